"""An atlas of mistakes: what each form of tests/test_mistakes.py looks like in a run of ppo.py, beside the right run.

    OMP_NUM_THREADS=1 python -m experiments.atlas --jobs 2      every form, two at a time: about 5 hours on two cores
    OMP_NUM_THREADS=1 python -m experiments.atlas --only 26a    one form: some 10 minutes
    python -m experiments.atlas --finished                      run nothing: keep what has run until now
    python -m experiments.atlas --page                          write atlas.md and its figures, from the results alone

Each form runs in a copy of the project, on the tales (starts of experiments.kl) and in the world of letters. What has
ended stands in experiments/results/atlas.json. A stopped run goes on.
"""

import argparse
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean

from common.runs import read_metrics
from data.rng import seed_of
from experiments import atlas_page, letters
from experiments.harness import DIVERGED, EVAL, FOLDER, closing_table, number, stage, start, write_results
from tests.test_mistakes import forms, plant

SEEDS, BETA, CHANCE = (30, 31), 0.6, "another seed"  # of the right run: what chance does
FILES = ("ppo.py", "model.py", "fast.py", "common/nets.py", "common/dist.py", "common/measure.py")  # that PPO runs
NEEDS = {  # mistakes that no such run can show
    2: "dropout", 21: "two processes", 22: "a resume", 23: "a new head", 33: "the closing table", 37: "two processes"
}  # fmt: skip
WHY = {  # a form changes no number here
    "6a": "On a CPU rows of at most 128 tokens take another path, with a mask of its own.",
    "7a": "All prompts of these worlds have one length.",
    "7b": "All prompts of these worlds have one length.",
    "19a": "Here every text gave back the tokens that had been sampled.",
    "35a": "The cap is −1 here. The mistake needs a cap of 0.",
    "38a": "PPO masks out no answer. The mistake needs a fork that does.",
}
STOPS = f"{DIVERGED}|RuntimeError|IndexError"  # with which a mistake may end a run
OPTIONS = {8: {"temperature": 0.7}, 13: {"kl_target": 2.0}, 15: {"micro_batch_size": 8}}  # with which they show


def shown_forms() -> dict[str, tuple[str, str, dict[str, str]]]:
    """The forms that can change a run of ppo.py, by name."""
    return {name: form for name, form in forms().items() if form[1] in FILES and int(name[:-1]) not in NEEDS}


def options_of(name: str) -> dict[str, object]:
    return OPTIONS.get(int(name[:-1]), {}) if name[0].isdigit() else {}


def label_of(name: str, options: dict[str, object]) -> str:
    """A name for the runs of a form; that of the right run holds its options."""
    if name[0].isdigit():
        return f"{name}-{seed_of(json.dumps(forms()[name][2])) % 16**6:06x}"
    return "-".join([name, *(f"{option}-{x}" for option, x in options.items())]).replace(" ", "-")


def script(name: str) -> Path:
    """The ppo.py of a copy of the project with the mistake in it; of the right run, the project's own."""
    if not name[0].isdigit():
        return Path("ppo.py")
    folder = (FOLDER / "atlas" / label_of(name, {})).resolve()
    if not folder.exists():
        half = folder.with_suffix(".tmp")
        shutil.rmtree(half, ignore_errors=True)
        plant(half, *forms()[name][1:])
        half.rename(folder)
    return folder / "ppo.py"


def place(name: str, options: dict[str, object], world: int | str) -> tuple[Path, str, Path]:
    """The folder in which a run is started, the name of its log, and its run folder in there."""
    folder = letters.place() if world == "letters" else FOLDER / "kl" / f"seed-{world}"
    label = f"atlas-{label_of(name, options)}"
    return folder, label, Path("out") / label / "ppo"


def run(name: str, options: dict[str, object], world: int | str) -> None:
    folder, log, out = place(name, options, world)
    seed = (0 if world == "letters" else world) + 100 * (name == CHANCE)
    given = {"seed": seed, "out": out, **options}
    words = [x for option, value in given.items() for x in (f"--{option}", value)]
    words = letters.options(folder, BETA, **given) if world == "letters" else words
    try:
        stage(folder, log, script(name), *words, may_fail=STOPS if name[0].isdigit() else None)
        if world != "letters" and (folder / out / "report.json").exists():
            stage(folder, f"{log}-end", EVAL, out)  # by the right code
    except SystemExit as error:  # the other runs go on
        print(f"{name}: {error}", flush=True)


def read(name: str, options: dict[str, object], world: int | str) -> dict:
    """What is kept of a run: {} if it has not ended, and "failed" if it diverged or stopped."""
    folder, log, out = place(name, options, world)
    if not (path := folder / f"{log}.log").exists():
        return {}
    end, said = folder / f"{log}-end.log", path.read_text().splitlines()
    alarms = [line for line in said if ": impossible: " in line]
    found: dict = {"alarm": alarms[0]} if alarms else {}
    if not (folder / out / "report.json").exists():
        found["failed"] = said[-2].removeprefix("failed: ")
    elif world == "letters":
        return found | {x: round(y, 4) for x, y in letters.ended(folder / out, BETA).items() if x in ("share", "TV")}
    elif end.exists():
        table = closing_table(end.read_text())
        found["end"] = {each: number(table[row][1]) for each, row in atlas_page.ENDS.items()}
    if not (lines := read_metrics(folder / out)):
        return found
    n = -(-len(lines) // 16)  # iterations to a point
    for each, metric in atlas_page.KEPT.items():
        column = [line[metric] for line in lines]
        numbers = {"first": column[0], "lowest": min(column), "highest": max(column), "last": mean(column[-4:])}
        found[each] = {moment: float(f"{x:.4g}") for moment, x in numbers.items()}
        if each in atlas_page.DRAWN:
            points = [mean(column[i : i + n]) for i in range(0, len(column), n)]
            found[each]["curve"] = [float(f"{x:.3g}") for x in points]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="forms such as 8b,26a, comma-separated, and their right runs")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--finished", action="store_true", help="run nothing: keep what has run")
    parser.add_argument("--page", action="store_true", help="run nothing, and read nothing but the results")
    given = parser.parse_args()
    if given.page:
        return atlas_page.write(shown_forms(), NEEDS, WHY)
    chosen = given.only.split(",") if given.only else [*shown_forms()]
    if unknown := set(chosen) - shown_forms().keys():
        parser.error(f"--only: {', '.join(sorted(unknown))}: no form here; there are {', '.join(shown_forms())}")
    if not given.finished:
        for world in (*SEEDS, "letters"):  # before two runs need them at once
            letters.place() if world == "letters" else start(world)
        with ThreadPoolExecutor(given.jobs) as pool:
            try:
                list(pool.map(lambda task: run(*task), tasks(chosen)))
            except KeyboardInterrupt:
                pool.shutdown(wait=False, cancel_futures=True)  # what runs has heard it as well, and saves
                raise
    found: dict[str, dict] = {}
    for name, options, world in tasks([*shown_forms()]):
        if ended := read(name, options, world):
            key = name if name[0].isdigit() else label_of(name, options)
            found.setdefault(key, {"options": options})[str(world)] = ended
    write_results("atlas", found)
    atlas_page.write(shown_forms(), NEEDS, WHY)


def tasks(chosen: list[str]) -> list[tuple[str, dict[str, object], int | str]]:
    """What to run: the right runs and the forms, each with its options, in every world where π* is as it was."""
    wanted = [("right", {}), (CHANCE, {}), *((who, options_of(name)) for name in chosen for who in ("right", name))]
    found = [(name, options, world) for name, options in wanted for world in (*SEEDS, "letters")]
    found = [task for task in found if task[2] != "letters" or not task[1].keys() & {"temperature", "kl_target"}]
    return [task for i, task in enumerate(found) if task not in found[:i]]


if __name__ == "__main__":
    main()
