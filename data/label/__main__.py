"""`python -m data.label`; its pages of help stand in data/label/__init__.py and command.py."""

import sys

import common
from data.label.command import Config, label

if __name__ == "__main__":
    sys.argv[0] = "data.label"
    common.run_main(lambda: label(common.parse(Config)))
