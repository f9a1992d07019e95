"""β that adapts to a KL of 6 nats (Ziegler et al. 2019, section 2.2), from two starts, every seed.

    OMP_NUM_THREADS=1 python -m experiments.adaptive    seeds 1 to 3, from the first two stages of `experiments.kl`

β starts at 0.01, which lets the policy go further than 6 nats, and at 0.3, which holds it back. The learning rates fall
to 0, as in every run, so late in a run β moves more than the policy. It prints a table and draws
experiments/adaptive.svg.
"""

import argparse
from pathlib import Path

from common.runs import read_metrics
from experiments.harness import JUDGE, KL, closing_table, markdown, pyplot, save, stage, start

STARTS, TARGET = (0.01, 0.3), 6.0
OPTIONS = ["--kl_target", TARGET, "--iterations", 160]
PANELS = {"objective/kl": "KL to the start (nats a response)", "kl_coef": "β", "objective/judge": "judge"}


def run(kl_coef: float, seed: int) -> tuple[list[dict], dict[str, tuple[str, str]]]:
    """The metrics of a run and its closing table."""
    folder, name = start(seed), f"adaptive-{kl_coef:g}"
    options = ["--seed", seed, "--kl_coef", kl_coef, *OPTIONS, "--out", f"out/{name}"]
    text = stage(folder, name, "ppo.py", *options)
    return read_metrics(folder / "out" / name), closing_table(text)


def settled(lines: list[dict]) -> int | None:
    """The iteration from which the mean KL of ten iterations stays within a fifth of the target."""
    kl = [line["objective/kl"] for line in lines]
    means = [sum(kl[i - 10 : i]) / 10 for i in range(10, len(kl) + 1)]
    outside = [i for i, mean in enumerate(means) if abs(mean / TARGET - 1) > 0.2]
    last = outside[-1] + 1 if outside else 0
    return last + 10 if last < len(means) else None


def draw(runs: dict[tuple[float, int], list[dict]], target: Path) -> None:
    figure, axes = pyplot().subplots(1, 3, figsize=(9, 2.9), layout="constrained")
    for axis, (name, title) in zip(axes, PANELS.items()):
        for (kl_coef, seed), lines in runs.items():
            colour = f"C{STARTS.index(kl_coef)}"
            label = f"from β = {kl_coef:g}" if seed == min(s for _, s in runs) else ""
            points = [(line["step"] + 1, line[name]) for line in lines]
            axis.plot(*zip(*points), color=colour, alpha=0.7, linewidth=1, label=label)
        axis.set(xlabel="iteration", title=title)
        axis.grid(alpha=0.25)
    axes[0].axhline(TARGET, color="black", linewidth=0.8, linestyle=":")
    axes[1].set_yscale("log")
    axes[2].legend(frameon=False, loc="lower right")
    save(figure, target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", default="1,2,3", help="comma-separated")
    parser.add_argument("--figure", type=Path, default=Path(__file__).with_name("adaptive.svg"))
    options = parser.parse_args()
    rows, runs = [], {}
    for kl_coef in STARTS:
        for seed in map(int, options.seeds.split(",")):
            runs[kl_coef, seed], table = run(kl_coef, seed)
            lines = runs[kl_coef, seed]
            kl, when = [line["objective/kl"] for line in lines], settled(lines)
            last = f"{sum(kl[-20:]) / 20:.2f}"
            coefficients = f"{lines[-1]['kl_coef']:.3f}"
            rows.append(
                [kl_coef, seed, f"{max(kl):.1f}", when or "never", last, coefficients, table[KL][1], table[JUDGE][1]]
            )
    header = ["first β", "seed", "highest KL", "settled at", "KL of the last 20", "last β", "KL at the end", "judge"]
    print(markdown(header, rows), end="\n\n")
    draw(runs, options.figure)


if __name__ == "__main__":
    main()
