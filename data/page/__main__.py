"""`python -m data.page`: see __init__.py."""

import sys

import common
from data.page import main

if __name__ == "__main__":
    sys.argv[0] = "data.page"
    common.run_main(main)
