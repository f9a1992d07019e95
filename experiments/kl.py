"""What the KL term does: score, judge and KL over a run of PPO, with it and without it, every seed.

    python -m experiments.kl                      seeds 0 to 5: the three stages, PPO with β = 0.05 and with β = 0
    python -m experiments.kl --seeds 6,7          other seeds

Without the KL term PPO runs for 160 iterations in place of 64, because it needs time to find what fools the reward
model. It prints the tables and draws experiments/kl.svg. What has run is kept in out/experiments/kl; a stopped run
goes on.
"""

import argparse
import re
from pathlib import Path

from common.runs import read_metrics
from experiments.harness import (
    GRAMMAR,
    JUDGE,
    KL,
    cell_after,
    closing_table,
    course,
    markdown,
    pyplot,
    save,
    seconds,
    stage,
    start,
)

RUNS = {"with the KL term": ("ppo", "C0"), "without it (β = 0)": ("hacked", "C3")}
PANELS = {
    "objective/scores": "score of the reward model\n(1 = one standard deviation)",
    "objective/judge": "judge\n(never trained on)",
    "objective/kl": "KL to the start\n(nats a response)",
}


def run(seed: int) -> tuple[Path, dict[str, str]]:
    """The folder of a seed's run folders, and what each stage printed."""
    folder = start(seed)
    printed = {script: stage(folder, script, f"{script}.py", "--seed", seed) for script in ("sft", "reward", "ppo")}
    options = ["--seed", seed, "--kl_coef", 0, "--iterations", 160, "--out", "out/hacked"]
    printed["hacked"] = stage(folder, "hacked", "ppo.py", *options)
    return folder / "out", printed


def draw(folders: list[Path], target: Path) -> None:
    plt = pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(9, 2.9), layout="constrained")
    for axis, (name, label) in zip(axes, PANELS.items()):
        for title, (run_folder, colour) in RUNS.items():
            for i, folder in enumerate(folders):
                lines = read_metrics(folder / run_folder)
                points = [(line["step"] + 1, line[name]) for line in lines]
                axis.plot(*zip(*points), color=colour, alpha=0.7, linewidth=1.2, label="" if i else title)
        axis.set(xlabel="iteration", title=label)
        axis.grid(alpha=0.25)
    axes[0].legend(frameon=False, loc="lower right")
    save(figure, target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", default="0,1,2,3,4,5", help="comma-separated")
    parser.add_argument("--figure", type=Path, default=Path(__file__).with_name("kl.svg"))
    options = parser.parse_args()
    folders, ends, roads, both, models = [], [], [], [], []
    for seed in map(int, options.seeds.split(",")):
        folder, printed = run(seed)
        folders.append(folder)
        rows, hacked = closing_table(printed["ppo"]), closing_table(printed["hacked"])
        wins = cell_after(printed["ppo"], "win rate against the reference")
        took = " + ".join(f"{seconds(printed[name]):.0f}" for name in ("sft", "reward", "ppo"))
        judge, grammar = rows[JUDGE], rows[GRAMMAR]
        change = f"{grammar[0]} → {grammar[1]}"
        ends.append([seed, judge[0], judge[1], rows[KL][1], rows["ended by EOS"][1], change, wins, took])
        roads.append([seed, *course(read_metrics(folder / "ppo"))])
        names = ("score", KL, JUDGE, GRAMMAR)
        both.append([seed, *(each[name][1] for name in names for each in (rows, hacked))])
        allowed = re.search(r"the noise in these labels allows (\S+)\)", printed["reward"])[1]
        models.append([seed, cell_after(printed["reward"], "held-out accuracy"), allowed])
    header = [
        "seed",
        "judge before",
        "judge after",
        "KL",
        "ended by EOS",
        "grammar",
        "wins against the start",
        "seconds",
    ]
    print(markdown(header, ends), end="\n\n")
    header = ["seed", "highest KL", "last KL", "lowest judge", "first judge", "ratio", "highest approxkl"]
    print(markdown(header, roads), end="\n\n")
    columns = [f"{name}, {kind}" for name in ("score", "KL", "judge", "grammar") for kind in ("with", "without")]
    print(markdown(["seed", *columns], both), end="\n\n")
    print(markdown(["seed", "held-out accuracy", "the noise allows"], models), end="\n\n")
    draw(folders, options.figure)


if __name__ == "__main__":
    main()
