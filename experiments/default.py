"""What the three commands of README end with, every seed.

    OMP_NUM_THREADS=1 python -m experiments.default                  seeds 30 to 39, some 5 minutes each
    OMP_NUM_THREADS=1 python -m experiments.default --seeds 30,31    some of them

It prints the table, writes experiments/results/default.json, and draws what a healthy run looks like,
experiments/healthy.svg. What has run is kept in out/experiments/kl; a stopped run goes on.
"""

import argparse
from pathlib import Path

from common.measure import KL
from common.runs import read_metrics
from experiments.harness import FOLDER, JUDGE, markdown, pyplot, report, save, stage, start, t_interval, write_results

COLUMNS = {  # name → digits
    "held-out loss of stage 1 (nats per token)": 2,
    "held-out accuracy of the reward model": 2,
    "accuracy that the noise allows": 2,
    "judge before": 2,
    "judge after": 2,
    "win rate against the start": 2,
    "KL (nats)": 1,
    "highest KL of an iteration": 1,
}
NOTES = {  # metric → its axis, and what to know of it
    "objective/scores": ("score", "1 The score rises and levels off"),
    "objective/judge": ("judge", "2 So does the judge"),
    "objective/kl": ("KL (nats)", "3 KL is 0 while only the value\nnet learns, then rises evenly"),
    "objective/kl_max": ("KL (nats)", "4 The farthest answer leaps;\nthe mean should not"),
    "loss/policy_avg": ("loss", "5 The policy loss hovers\naround 0 and says nothing"),
    "loss/value_avg": ("loss", "6 The value loss falls"),
    "value/explained_variance": ("share", "7 Explained variance climbs;\nit is noisy, and may dip below 0"),
    "policy/ratio": ("mean ratio", "8 The mean ratio stays near 1;\n0.95 or 1.05 would be far"),
    "token_entropy": ("nats per token", "9 Entropy falls, not to 0"),
    "response_len": ("tokens", "10 Length hardly changes,\nif good answers are as long"),
}


def run(seed: int) -> dict[str, float]:
    """What a seed ends with, by column."""
    folder = start(seed)
    stage(folder, "ppo", "ppo.py", "--seed", seed)
    metrics, ended = report(folder / "out" / "reward")["metrics"], report(folder / "out" / "ppo")
    table = ended["table"]
    ends = [
        read_metrics(folder / "out" / "sft")[-1]["loss/held_out"],
        metrics["eval/accuracy"],
        metrics["eval/accuracy_ceiling"],
        table[JUDGE]["before"][0],
        table[JUDGE]["after"][0],
        ended["win_rate"][0],
        table[KL]["after"][0],
        max(line["objective/kl"] for line in read_metrics(folder / "out" / "ppo")),
    ]
    return dict(zip(COLUMNS, ends))


def tables(found: dict[int, dict[str, float]]) -> list[str]:
    rows = []
    for name, digits in COLUMNS.items():
        column = [each[name] for each in found.values()]
        shown = [f"{x:.{digits}f}" for x in column]
        rows.append([name, t_interval(column, digits), f"{min(shown, key=float)}–{max(shown, key=float)}", *shown])
    return [markdown(["", "mean [95%]", "range", *(f"seed {seed}" for seed in found)], rows)]


def draw(seeds: list[int], target: Path) -> None:
    """Ten metrics of healthy runs, with a note each; a line a seed."""
    figure, axes = pyplot().subplots(2, 5, figsize=(14, 5), layout="constrained", sharex=True)
    runs = [read_metrics(FOLDER / "kl" / f"seed-{seed}" / "out" / "ppo") for seed in seeds]
    for axis, (metric, (unit, note)) in zip(axes.flat, NOTES.items()):
        for lines in runs:
            points = [(line["step"] + 1, line[metric]) for line in lines]
            axis.plot(*zip(*points), color="C0", alpha=0.5, linewidth=1)
        if metric == "policy/ratio":
            axis.set_ylim(0.95, 1.05)
        axis.set_title(note, loc="left")
        axis.set_ylabel(unit)
        axis.grid(alpha=0.25)
    figure.supxlabel("iteration")
    save(figure, target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", default=",".join(map(str, range(30, 40))), help="comma-separated")
    options = parser.parse_args()
    found = {seed: run(seed) for seed in map(int, options.seeds.split(","))}
    write_results("default", found)
    draw([*found], Path(__file__).with_name("healthy.svg"))
    print(*tables(found))


if __name__ == "__main__":
    main()
