"""β that adapts to a KL of 6 nats (Ziegler et al. 2019, section 2.2), from two starts, every seed.

    OMP_NUM_THREADS=1 python -m experiments.adaptive    seeds 30 to 32, after kl; 7 minutes each

β starts at 0.01, which lets the policy go further than 6 nats, and at 0.3, which holds it back. It moves by at most 5%
an iteration. The learning rates fall to 0, as in every run, so late in a run β moves more than the policy. Intervals
are Student's t over the seeds, of 95%. It prints the tables, writes experiments/results/adaptive.json and draws
experiments/adaptive.svg.
"""

import argparse
from pathlib import Path

from common.runs import read_metrics
from experiments.harness import ending, label_ends, markdown, pyplot, save, stage, start, t_interval, write_results

STARTS, TARGET = (0.01, 0.3), 6.0
OPTIONS = ["--kl_target", TARGET, "--iterations", 160]
PANELS = {"objective/kl": "KL to the start (nats per answer)", "kl_coef": "β", "objective/judge": "judge (0 to 1)"}
COLUMNS = {  # name → digits, and the bounds of its interval
    "highest kl": (1, 0),
    "late kl": (2, 0),
    "late β": (3, 0),
    "kl": (2, 0),
    "after": (2, 0, 1),
}


def run(kl_coef: float, seed: int) -> tuple[dict, list[dict]]:
    """How a run went, and its metrics."""
    folder, name = start(seed), f"adaptive-{kl_coef:g}"
    stage(folder, name, "ppo.py", "--seed", seed, "--kl_coef", kl_coef, *OPTIONS, "--out", f"out/{name}")
    lines = read_metrics(folder / "out" / name)
    kl = [line["objective/kl"] for line in lines]
    found = ending(folder / "out" / name)
    found |= {"late kl": sum(kl[-20:]) / 20, "late β": lines[-1]["kl_coef"]}
    return found | {"settled": settled(lines)}, lines


def settled(lines: list[dict]) -> int | None:
    """The iteration from which the mean KL of ten iterations stays within a fifth of the target."""
    kl = [line["objective/kl"] for line in lines]
    means = [sum(kl[i - 10 : i]) / 10 for i in range(10, len(kl) + 1)]
    outside = [i for i, mean in enumerate(means) if abs(mean / TARGET - 1) > 0.2]
    last = outside[-1] + 1 if outside else 0
    return last + 10 if last < len(means) else None


def rows(found: dict[float, dict[int, dict]]) -> list[list]:
    """A row for each run, and for each start the means over the seeds."""
    table = []
    for kl_coef, runs in found.items():
        for seed, each in runs.items():
            cells = [f"{each[column]:.{digits}f}" for column, (digits, *_) in COLUMNS.items()]
            table.append([kl_coef, seed, each["settled"] or "never", *cells])
        count = f"{sum(each['settled'] is not None for each in runs.values())} of {len(runs)}"
        means = [t_interval([each[column] for each in runs.values()], *how) for column, how in COLUMNS.items()]
        table.append([kl_coef, "all", count, *means])
    return table


def tables(found: dict[float, dict[int, dict]]) -> list[str]:
    header = ["first β", "seed", "settled at", "highest KL", "KL of the last 20", "last β", "KL at the end", "judge"]
    return [markdown(header, rows(found))]


def draw(metrics: dict[float, list[list[dict]]], target: Path) -> None:
    figure, axes = pyplot().subplots(1, 3, figsize=(9, 3.2), layout="constrained")
    axes[0].axhline(TARGET, color="black", linewidth=0.8, linestyle=":")
    axes[0].annotate("target", (0, TARGET), xytext=(0, 3), textcoords="offset points")
    axes[1].set(yscale="log")
    axes[1].set_yticks([0.01, 0.03, 0.1, 0.3], ["0.01", "0.03", "0.1", "0.3"])
    for axis, (name, ylabel) in zip(axes, PANELS.items()):
        labels = {}
        for i, (kl_coef, runs) in enumerate(metrics.items()):
            for lines in runs:
                points = [(line["step"] + 1, line[name]) for line in lines]
                axis.plot(*zip(*points), color=f"C{i}", alpha=0.7, linewidth=1)
                labels[f"from β = {kl_coef:g}"] = *points[-1], f"C{i}"
        axis.set(xlabel="iteration", ylabel=ylabel)
        axis.grid(alpha=0.25)
        if name == "kl_coef":
            label_ends(axis, labels)
    save(figure, target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", default="30,31,32", help="comma-separated")
    parser.add_argument("--figure", type=Path, default=Path(__file__).with_name("adaptive.svg"))
    options = parser.parse_args()
    seeds = list(map(int, options.seeds.split(",")))
    ran = {kl_coef: {seed: run(kl_coef, seed) for seed in seeds} for kl_coef in STARTS}
    found = {kl_coef: {seed: each for seed, (each, _) in runs.items()} for kl_coef, runs in ran.items()}
    write_results("adaptive", found)
    print(*tables(found), end="\n\n")
    draw({kl_coef: [lines for _, lines in runs.values()] for kl_coef, runs in ran.items()}, options.figure)


if __name__ == "__main__":
    main()
