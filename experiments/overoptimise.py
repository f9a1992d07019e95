"""Over-optimisation (Gao, Schulman and Hilton 2022): score and judge against √KL, for four sizes of training set.

    OMP_NUM_THREADS=1 python -m experiments.overoptimise    seeds 1 to 3, from the first stage of `experiments.kl`

Reward models are trained on the comparisons of 20, 80, 320 and 1,000 prompts, eight answers each. For every one of
them, best of n takes n from 1 to 256 on 64 prompts, and PPO runs without the KL term. With d = √KL and R = how far
the judge has risen, the paper fits R = d (α − β d) for best of n and R = d (α − β log d) for PPO. Both are fitted by
least squares for every seed; ± is the standard deviation over the seeds. It draws experiments/overoptimise.svg.
"""

import argparse
import statistics
from pathlib import Path

import torch

from common.runs import read_metrics
from experiments.harness import (
    EVAL,
    JUDGE,
    KL,
    best_of_n,
    cell_after,
    closing_table,
    markdown,
    number,
    pyplot,
    save,
    stage,
    start,
)
from experiments.price import SIZES

PROMPTS = {20: 1, 80: 1, 320: 4, 1000: 4}  # and how many of them a step: few steps of many teach less (seed 4)
Curve = list[tuple[float, float, float]]  # (√KL, judge, score)


def run(n_prompts: int, seed: int) -> tuple[str, Curve, Curve, dict[str, tuple[str, str]]]:
    """Held-out accuracy, the curves of best of n and of PPO, and PPO's closing table."""
    folder, name = start(seed), f"reward-{n_prompts}"
    options = ["--seed", seed, "--n_prompts", n_prompts, "--batch_size", PROMPTS[n_prompts], "--out", f"out/{name}"]
    accuracy = cell_after(stage(folder, name, "reward.py", *options), "held-out accuracy")
    free = f"free-{n_prompts}"
    options = ["--seed", seed, "--reward", f"out/{name}", "--judge", JUDGE, "--kl_coef", 0, "--iterations", 160]
    table = closing_table(stage(folder, free, "ppo.py", *options, "--out", f"out/{free}"))
    lines = read_metrics(folder / "out" / free)
    options = [f"out/{free}", "--eval_prompts", 64, "--best_of", SIZES]
    best = best_of_n(stage(folder, f"best-of-n-{n_prompts}", EVAL, *options))
    before = 0.0, number(table[JUDGE][0]), number(table["score"][0])
    return accuracy, [(row.kl**0.5, row.judge, row.score) for row in best], [before, *smooth(lines)], table


def smooth(lines: list[dict]) -> Curve:
    """Means of ten iterations each."""
    points, width = [], 10
    for first in range(0, len(lines) - width + 1, width):
        some = lines[first : first + width]
        kl, judge, score = (
            sum(line[name] for line in some) / width for name in ("objective/kl", "objective/judge", "objective/scores")
        )
        points.append((max(kl, 0.0) ** 0.5, judge, score))
    return points


def fit(curve: Curve, logarithm: bool) -> tuple[float, float, float]:
    """α and β of R = d (α − β d), or of R = d (α − β log d), by least squares, and the fit's root mean square error.

    The curve's first point is the start.
    """
    before = curve[0][1]
    d = torch.tensor([point[0] for point in curve[1:]], dtype=torch.float64)
    risen = torch.tensor([point[1] - before for point in curve[1:]], dtype=torch.float64)
    columns = torch.stack([d, -torch.xlogy(d, d) if logarithm else -d * d], 1)
    solution = torch.linalg.lstsq(columns, risen[:, None]).solution[:, 0]
    left = (columns @ solution - risen).square().mean().sqrt()
    return *solution.tolist(), left.item()


def spread(numbers: list[float], digits: int = 3) -> str:
    error = f" ± {statistics.stdev(numbers):.{digits}f}" if len(numbers) > 1 else ""
    return f"{statistics.mean(numbers):.{digits}f}{error}"


def draw(found: dict[int, list[tuple]], target: Path) -> None:
    n = len(found)
    figure, axes = pyplot().subplots(2, n, figsize=(2.6 * n, 5), layout="constrained", sharey="row", squeeze=False)
    for column, (n_prompts, seeds) in enumerate(found.items()):
        for row, who in ((0, "best of n"), (1, "PPO, β = 0")):
            axis = axes[row][column]
            for i, each in enumerate(seeds):
                curve = each[1 + row]
                d = [point[0] for point in curve]
                axis.plot(d, [point[1] for point in curve], color="C0", label="" if i else "judge")
                axis.plot(d, [point[2] for point in curve], color="C3", linewidth=0.9, label="" if i else "score")
            axis.set(title=f"{who}, {n_prompts:,} prompts", xlabel="√KL")
            axis.grid(alpha=0.25)
    axes[0][0].legend(frameon=False)
    save(figure, target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", default="1,2,3", help="comma-separated")
    parser.add_argument("--figure", type=Path, default=Path(__file__).with_name("overoptimise.svg"))
    options = parser.parse_args()
    seeds = [int(seed) for seed in options.seeds.split(",")]
    found = {n_prompts: [run(n_prompts, seed) for seed in seeds] for n_prompts in PROMPTS}
    rows, ends = [], []
    for n_prompts, each in found.items():
        cells = []
        for which, logarithm in ((1, False), (2, True)):
            fits = [fit(one[which], logarithm) for one in each]
            cells += [spread(list(numbers)) for numbers in zip(*fits)]
        rows.append([f"{n_prompts:,} × 8", ", ".join(one[0] for one in each), *cells])
        peaks = [max(one[2], key=lambda point: point[1]) for one in each]
        highest = ", ".join(f"{judge:.3f} at {d**2:.1f}" for d, judge, _ in peaks)
        last = [", ".join(one[3][name][1].split()[0] for one in each) for name in (JUDGE, "score", KL)]
        ends.append([f"{n_prompts:,} × 8", highest, *last])
    header = ["prompts × answers", "held-out accuracy"]
    header += [f"{name}, {who}" for who in ("best of n", "PPO") for name in ("α", "β", "rms error")]
    print(markdown(header, rows), end="\n\n")
    header = [
        "prompts × answers",
        "highest judge of ten iterations",
        "judge at the end",
        "score at the end",
        "KL at the end",
    ]
    print(markdown(header, ends), end="\n\n")
    draw(found, options.figure)


if __name__ == "__main__":
    main()
