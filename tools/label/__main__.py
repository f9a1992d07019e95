from common import cli
from tools.label import Config, label

cli.run_main(lambda: label(cli.parse(Config)), "tools.label")
