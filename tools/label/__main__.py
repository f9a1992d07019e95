import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # for `python tools/label` as well as `python -m tools.label`

from common import cli  # noqa: E402
from tools.label import Config, label  # noqa: E402

cli.run_main(lambda: label(cli.parse(Config)), "tools.label")
