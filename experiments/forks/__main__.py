"""The forks of ppo.py and DPO beside PPO, every seed; or a diff of your own beside the default run.

    OMP_NUM_THREADS=1 python -m experiments.forks --choose        rate and β of each fork, on seeds 10 and 11; 8 hours
    OMP_NUM_THREADS=1 python -m experiments.forks                 the table, on seeds 30 to 34; 5 hours
    python -m experiments.forks --diff mine.diff --seeds 30,31    your diff; other options go to its ppo.py alone

A diff applies to ppo.py as it is here: `git diff ppo.py > mine.diff && git checkout ppo.py`.

Each fork is tried at half, once and twice its rate, with β set so that its KL is PPO's: the KL falls about as 1 / √β
(experiments.price), so a first run says which β is next. The rate with the highest judge is taken. Where a rule, the
exact judge or a teacher is the reward, β stays. What has run is kept in out/experiments/kl.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from statistics import mean

import ppo
from common import cli
from data.files import InputError
from data.rng import seed_of
from experiments import harness
from experiments.forks import FORKS, HERE, JUDGE, dpo, patched
from experiments.harness import DIVERGED, KL, ROOT, markdown, number, seconds, stage, t_interval

CHOICE = HERE.parent / "results" / "forks-choice.json"
ROWS = {"judge": JUDGE, "KL": KL, "score": "score"}  # of the closing table


def run(seed: int, name: str, diffs: list, options: list, rate: float = 1, beta: float | None = None) -> dict:
    """Judge, KL and score on the held-out prompts, and seconds; empty if the run diverged."""
    default = (dpo if name == "DPO" else ppo).Config()
    options = options + (["--lr", f"{rate * default.lr:g}"] if rate != 1 else [])
    options += ["--kl_coef", beta] if beta not in (None, default.kl_coef) else []
    forked, script, label = patched((ROOT / "ppo.py").read_text(), *diffs), "ppo.py", "ppo"
    if name != "PPO" or options:  # else it is the default run, which other experiments share
        label = f"{name.replace(' ', '-')}-{seed_of(forked, *map(str, options)) % 16**6:06x}"
        options += ["--out", f"out/{label}"]
    if diffs:
        script = (harness.FOLDER / "forks" / label / "ppo.py").resolve()
        script.parent.mkdir(parents=True, exist_ok=True)
        script.write_text(forked)
    folder, took = harness.start(seed), 0
    if name == "on-policy distillation":
        stage(folder / "teacher", "sft", "sft.py", "--seed", seed, "--n_layer", 4, "--n_embd", 256)
    if name == "DPO":
        took = seconds(stage(folder, f"{label}-training", HERE / "dpo.py", "--seed", seed, *options))
        script, options = harness.EVAL, [f"out/{label}"]
    text = stage(folder, label, script, "--seed", seed, *options, may_fail=DIVERGED)
    cells = harness.closing_table(text)
    return cells and {key: number(cells[row][1]) for key, row in ROWS.items()} | {"seconds": took + seconds(text)}


def choose(name: str) -> list[dict]:
    """What each rate gives on seeds 10 and 11 at a matched β: means, none if a run diverged. Highest judge first."""

    def means(name: str, *rate_and_beta: float | None) -> dict:
        runs = [run(seed, name, *FORKS[name][::2], *rate_and_beta) for seed in (10, 11)]
        return {key: mean(each[key] for each in runs) for key in ROWS} if all(runs) else {}

    goal, tried = means("PPO")["KL"], []
    for rate in (0.5, 1, 2):
        beta = FORKS[name][1]
        found = means(name, rate, beta)
        if beta and (beta := matched(beta, found.get("KL", 2 * goal), goal)):
            found = means(name, rate, beta)
        tried.append({"rate": rate, "beta": beta} | found)
    return sorted(tried, key=lambda each: -each.get("judge", -1))


def matched(beta: float, kl: float, goal: float) -> float:
    """The β at which the KL should be `goal`, if it is `kl` at `beta`. Within 10% of the goal β stays."""
    factor = min(max((kl / goal) ** 2, 1 / 4), 4)
    return beta if 0.81 < factor < 1.21 else float(f"{beta * factor:.2g}")


def chosen() -> Iterator[tuple]:
    """Of each fork: its name in the table, and how it runs."""
    if not CHOICE.exists():
        raise InputError(f"{CHOICE}: is not there; run `python -m experiments.forks --choose` first")
    for name, (best, *_) in harness.read_results(CHOICE.stem).items():
        rate, beta = best["rate"], best["beta"]
        yield f"{name}, rate × {rate}" + (f", β {beta}" if beta else ""), name, *FORKS[name][::2], rate, beta


def table(found: dict[str, dict[int, dict]]) -> str:
    """For each name: changes from the default run, paired by seed, and means over the seeds, with their intervals."""
    lines, default = [], found["default"]
    for name, runs in found.items():
        pairs = [(runs[seed], default[seed]) for seed in runs if runs[seed] and default[seed] and name != "default"]
        columns = [[mine[key] - its[key] for mine, its in pairs] for key in ROWS]
        columns += [[end[key] for end in runs.values() if end] for key in (*ROWS, "seconds")]
        cells = [t_interval(x, digits) if x else "" for x, digits in zip(columns, (3, 2, 2, 3, 2, 2, 0))]
        lines.append([name, f"{sum(map(bool, runs.values()))} of {len(runs)}", *cells])
    return markdown(["", "ended", *(f"change in {key}" for key in ROWS), *ROWS, "seconds"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", default="30,31,32,33,34", help="comma-separated")
    parser.add_argument("--choose", action="store_true", help="choose the rate and β of each fork")
    parser.add_argument("--diff", type=Path, nargs="+", help="diffs of ppo.py, in turn; further options go to it")
    given, more = parser.parse_known_args()
    if more and not given.diff:
        raise InputError(f"{more[0]}: there is no such option; only with --diff do options go to ppo.py")
    if given.choose:
        found = {name: choose(name) for name in FORKS}
        harness.write_results("forks-choice", found)
        lines = [[name, *map(each.get, ("rate", "beta", *ROWS))] for name in found for each in found[name]]
        return print(markdown(["fork", "rate ×", "β", *ROWS], lines))
    runs = [(given.diff[-1].name, given.diff[-1].name, given.diff, more)] if given.diff else chosen()
    seeds = [int(seed) for seed in given.seeds.split(",")]
    found = {label: {seed: run(seed, *how) for seed in seeds} for label, *how in runs}
    found = {"default": {seed: run(seed, "PPO", [], []) for seed in seeds}} | found
    if not given.diff:
        harness.write_results("forks", found)
    print(table(found))


if __name__ == "__main__":
    cli.run_main(main, "experiments.forks")
