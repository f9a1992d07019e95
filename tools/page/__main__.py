"""`python -m tools.page`: see __init__.py."""

import sys

import common
from tools.page import main

if __name__ == "__main__":
    sys.argv[0] = "tools.page"
    common.run_main(main)
