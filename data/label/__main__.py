"""`python -m data.label`: see __init__.py for the commands, command.py for the options."""

import sys

import common
from data.label.command import Config, label

if __name__ == "__main__":
    sys.argv[0] = "data.label"
    common.run_main(lambda: label(common.parse(Config)))
