"""A copy of the project with one mistake in it, which is not named. Find it.

    python -m tests.puzzle 17             makes out/puzzle-17, and says what to run there
    python -m tests.puzzle 17 --hint      the file and the function
    python -m tests.puzzle 17 --reveal    the lines, right and wrong, and the fact that they break

The mistakes are those of experiments.atlas, in a shuffled order. The copy has no tests, since they would tell.
"""

import argparse
import random
import re
import shutil
from pathlib import Path

from experiments.atlas import options_of, shown_forms
from experiments.atlas_page import lines_of
from tests.conftest import ROOT
from tests.test_mistakes import plant


def form_of(number: int) -> str:
    """The name of a form."""
    names = [*shown_forms()]
    random.Random(0).shuffle(names)
    return names[number % len(names)]


def hint(name: str) -> str:
    """The file of a form, and the function in which its line stands."""
    _, file, changes = shown_forms()[name]
    before = (ROOT / file).read_text().split(next(iter(changes)))[0]
    *_, function = re.findall(r"^ *def (\w+)", before, re.MULTILINE)
    return f"{file}, in or just below `{function}`"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("number", type=int, help="of the puzzle, any whole number")
    parser.add_argument("--hint", action="store_true")
    parser.add_argument("--reveal", action="store_true")
    given = parser.parse_args()
    name = form_of(given.number)
    if given.hint or given.reveal:
        return print(lines_of(name, shown_forms()[name]) if given.reveal else hint(name))
    target = Path("out") / f"puzzle-{given.number}"
    if not target.exists():
        plant(target, *shown_forms()[name][1:])
        shutil.rmtree(target / "tests")
    options = "".join(f" --{option} {x}" for option, x in options_of(name).items())
    command = f"python {target}/ppo.py --out out/puzzled-{given.number}{options}"
    print(f"{target} has one mistake. Run it in this folder, behind stages 1 and 2:\n\n    {command}\n")
    print(f"It shows in the log, beside that of `python ppo.py{options}`, or it costs what no log shows.")


if __name__ == "__main__":
    main()
