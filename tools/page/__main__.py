"""`python -m tools.page`: see __init__.py."""

import sys

from common import cli
from tools.page import main

sys.argv[0] = "tools.page"
cli.run_main(main)
