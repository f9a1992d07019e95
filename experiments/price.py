"""The price of KL: PPO with five values of β, and the best of n answers of the start, every seed.

    OMP_NUM_THREADS=1 python -m experiments.price       seeds 1 to 3, from the first two stages of `experiments.kl`

PPO runs with β = 0.01, 0.03, 0.1, 0.3 and 1, and is measured on 512 held-out prompts. Best of n takes the answer with
the highest final score among n, to the first 128 of these prompts; n goes from 1 to 256, and its numbers are means
over all choices of n among 256 answers. Its KL is at most log n − (n − 1) / n, which is what is shown. It prints two
tables and draws experiments/price.svg.
"""

import argparse
from pathlib import Path

from experiments.harness import EVAL, JUDGE, KL, best_of_n, closing_table, markdown, number, pyplot, save, stage, start

COEFFICIENTS = (0.01, 0.03, 0.1, 0.3, 1.0)
SIZES = "1,2,4,8,16,32,64,128,256"
Point = tuple[float, float, float]  # KL, judge, score


def run(seed: int) -> tuple[list[dict[str, str]], str]:
    """The last column of each β's closing table, and what best of n printed."""
    folder, ends = start(seed), []
    for kl_coef in COEFFICIENTS:
        options = ["--seed", seed, "--kl_coef", kl_coef, "--out", f"out/beta-{kl_coef:g}"]
        table = closing_table(stage(folder, f"beta-{kl_coef:g}", "ppo.py", *options))
        ends.append({name: after for name, (_, after) in table.items()})
    options = [f"out/beta-{COEFFICIENTS[0]:g}", "--judge", JUDGE, "--eval_prompts", 128, "--best_of", SIZES]
    return ends, stage(folder, "best-of-n", EVAL, *options)


def draw(ppo: dict[int, list[Point]], best: dict[int, list[Point]], target: Path) -> None:
    figure, axes = pyplot().subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    for axis, which, title in zip(axes, (1, 2), ("judge (never trained on)", "score of the reward model")):
        for i, seed in enumerate(ppo):
            for who, points, line in (("PPO", ppo[seed], "o-"), ("best of n", best[seed], "x--")):
                x, y = [point[0] for point in points], [point[which] for point in points]
                axis.plot(x, y, line, color=f"C{i}", markersize=4, linewidth=1, label=f"{who}, seed {seed}")
        axis.set(xlabel="KL to the start (nats; of best of n: at most)", title=title)
        axis.grid(alpha=0.25)
    axes[0].legend(frameon=False, fontsize=7)
    save(figure, target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", default="1,2,3", help="comma-separated")
    parser.add_argument("--figure", type=Path, default=Path(__file__).with_name("price.svg"))
    options = parser.parse_args()
    seeds = [int(seed) for seed in options.seeds.split(",")]
    found = {seed: run(seed) for seed in seeds}
    rows = []
    for i, kl_coef in enumerate(COEFFICIENTS):
        each = [found[seed][0][i] for seed in seeds]
        rows.append([kl_coef, *(", ".join(end[name] for end in each) for name in (KL, JUDGE, "score"))])
    print(markdown(["β", "KL", "judge", "score"], rows), end="\n\n")
    tables = {seed: best_of_n(found[seed][1]) for seed in seeds}
    rows = []
    for each in zip(*tables.values()):
        judges = ", ".join(f"{row.judge:.3f} ± {row.judge_error:.3f}" for row in each)
        scores = ", ".join(f"{row.score:.3f} ± {row.score_error:.3f}" for row in each)
        rows.append([each[0].n, f"{each[0].kl:.2f}", judges, scores])
    print(markdown(["n", "KL at most", "judge", "score"], rows), end="\n\n")
    ppo = {
        seed: [tuple(number(end[name]) for name in (KL, JUDGE, "score")) for end in found[seed][0]] for seed in seeds
    }
    draw(
        ppo, {seed: [(row.kl, row.judge, row.score) for row in table] for seed, table in tables.items()}, options.figure
    )


if __name__ == "__main__":
    main()
