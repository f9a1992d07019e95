"""The price of KL: PPO at five values of β, best of n, and the best policy that there is, every seed.

    OMP_NUM_THREADS=1 python -m experiments.price      seeds 30 to 33, after experiments.kl; 15 minutes per seed

PPO runs for 64 and for 160 iterations at each β, and is measured on 512 held-out prompts. The start gives 256 answers
to each of the first 64 of these prompts. From them come the best of n by the score, in the mean over all choices of n
among the 256, and the best policy π* ∝ π₀ exp(score / β): its answers are π₀'s, weighted. No policy has a higher score
at the same KL. It prints the tables, writes experiments/results/price.json and draws experiments/price.svg.
"""

import argparse
import math
from collections.abc import Iterable
from pathlib import Path

import numpy

from experiments import harness

BETAS = (0.01, 0.05, 0.15, 0.5)
LENGTHS = (64, 160)  # iterations
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
PROMPTS, ANSWERS = 64, 256
TILTS = (10, 3, 2, 1.5, 1, 0.8, 0.6, 0.5, 0.4, 0.35, 0.3, 0.25, 0.2, 0.15, 0.1)  # β of π*
NAMES = {(0.05, 64): "ppo", (0.05, 160): "good-0.05"}  # the default run, and one of experiments.kl
Point = tuple[float, float, float]  # KL, judge, score
LIMITS = ((0,), (0, 1), (), (1,))  # of these, and of the answers that count


def run(seed: int) -> dict[str, dict]:
    """For each method: what was asked for, β or n → where it ends."""
    folder, found = harness.start(seed), {}
    for iterations in LENGTHS:
        ends = {}
        for beta in BETAS:
            name = NAMES.get((beta, iterations), f"beta-{beta:g}-{iterations}")
            options = ["--reward", "out/reward", "--kl_coef", beta, "--iterations", iterations, "--out", f"out/{name}"]
            harness.stage(folder, name, "ppo.py", "--seed", seed, *(options if name != "ppo" else []))
            end = harness.ending(folder / "out" / name)
            ends[f"{beta:g}"] = end["kl"], end["after"], end["score"]
        found[f"PPO, {iterations} iterations"] = ends
    answers = harness.start_answers(folder, ["reward"], PROMPTS, ANSWERS, seed)
    score, judge = answers["reward"], answers["judge"]
    found["best of n"] = {str(n): harness.best_of(score, judge, n) for n in SIZES}
    found["π*"] = {str(beta): harness.tilted(score, judge, beta) for beta in TILTS}
    return found


def at_kl(kl: float, curve: list[Point], column: int) -> float:
    """The curve's judge (1) or score (2) at a KL, between the two points around it; nan outside the curve."""
    x, y = [each[0] for each in curve], [each[column] for each in curve]
    return float(numpy.interp(kl, x, y, left=math.nan, right=math.nan))


def intervals(points: Iterable[Point]) -> list[str]:
    """Of each column the mean over the seeds with its interval, cut at what can be."""
    return [harness.t_interval(list(column), 2, *limits) for column, limits in zip(zip(*points), LIMITS)]


def rows(found: dict[int, dict[str, dict]]) -> list[list[str]]:
    """For PPO at each β: means over the seeds with intervals, and how far it is from the others at the same KL."""
    table = []
    for iterations in LENGTHS:
        for beta in map("{:g}".format, BETAS):
            ends = {seed: each[f"PPO, {iterations} iterations"][beta] for seed, each in found.items()}
            cells = intervals(ends.values())
            for method, column in (("best of n", 1), ("π*", 1), ("best of n", 2), ("π*", 2)):
                curves = {seed: list(each[method].values()) for seed, each in found.items()}
                apart = [end[column] - at_kl(end[0], curves[seed], column) for seed, end in ends.items()]
                inside = [x for x in apart if not math.isnan(x)]
                cells.append(harness.t_interval(inside) if inside else "further than any")
            table.append([iterations, beta, *cells])
    return table


def tables(found: dict[int, dict[str, dict]]) -> list[str]:
    header = ["iterations", "β", "KL (nats)", "judge", "score", "judge less best of n's", "judge less π*'s"]
    shown = [harness.markdown([*header, "score less best of n's", "score less π*'s"], rows(found))]
    for method, asked in (("best of n", "n"), ("π*", "β")):
        lines = []
        for name in next(iter(found.values()))[method]:
            points = [each[method][name] for each in found.values()]
            lines.append([name, *intervals(points)])
        header = [f"{method}: {asked}", "KL (nats)", "judge", "score", "answers that count"]
        shown.append(harness.markdown(header[: len(lines[0])], lines))
    return shown


def draw(found: dict[int, dict[str, dict]], target: Path) -> None:
    figure, axes = harness.pyplot().subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    styles = {"π*": ("0.5", "-"), "best of n": ("C1", "x--")}
    styles |= {f"PPO, {iterations} iterations": (f"C{i * 2}", "o-") for i, iterations in enumerate(LENGTHS)}
    for axis, column, title in zip(axes, (2, 1), ("score of the reward model", "judge (never trained on)")):
        for method, (colour, style) in styles.items():
            for i, each in enumerate(found.values()):
                points = sorted((end[0], end[column]) for end in each[method].values())
                label = "" if i else method
                axis.plot(*zip(*points), style, color=colour, alpha=0.7, markersize=4, linewidth=1, label=label)
        axis.set(xlabel="KL to the start (nats; of best of n: at most)", ylabel=title.split(" (")[0], title=title)
        axis.grid(alpha=0.25)
    figure.legend(*axes[1].get_legend_handles_labels(), frameon=False, loc="outside upper center", ncols=4)
    harness.save(figure, target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", default="30,31,32,33", help="comma-separated")
    parser.add_argument("--figure", type=Path, default=Path(__file__).with_name("price.svg"))
    options = parser.parse_args()
    found = {seed: run(seed) for seed in map(int, options.seeds.split(","))}
    harness.write_results("price", found)
    print("\n\n".join(tables(found)))
    draw(found, options.figure)


if __name__ == "__main__":
    main()
