from common import cli
from tools.page import main

cli.run_main(main, "tools.page")
