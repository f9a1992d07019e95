"""`python -m tools.label`: see __init__.py for the commands, command.py for the options."""

import sys

import common
from tools.label.command import Config, label

if __name__ == "__main__":
    sys.argv[0] = "tools.label"
    common.run_main(lambda: label(common.parse(Config)))
