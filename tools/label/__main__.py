"""`python -m tools.label`: see __init__.py."""

import sys

from common import cli
from tools.label import Config, label

sys.argv[0] = "tools.label"
cli.run_main(lambda: label(cli.parse(Config)))
