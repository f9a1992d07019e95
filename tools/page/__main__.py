import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # for `python tools/page` as well as `python -m tools.page`

from common import cli  # noqa: E402
from tools.page import main  # noqa: E402

cli.run_main(main, "tools.page")
