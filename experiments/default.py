"""What the three commands of README end with, every seed.

    OMP_NUM_THREADS=1 python -m experiments.default                  seeds 30 to 39, some 10 minutes each
    OMP_NUM_THREADS=1 python -m experiments.default --seeds 30,31    some of them

It prints the table and writes experiments/results/default.json. What has run is kept in out/experiments/kl; a stopped
run goes on.
"""

import argparse
import json

from common.measure import KL
from common.runs import read_metrics
from experiments.harness import JUDGE, markdown, stage, start, t_interval, write_results

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


def run(seed: int) -> dict[str, float]:
    """What a seed ends with, by column."""
    folder = start(seed)
    stage(folder, "ppo", "ppo.py", "--seed", seed)
    read = lambda name: json.loads((folder / "out" / name / "report.json").read_text())  # noqa: E731
    metrics, report = read("reward")["metrics"], read("ppo")
    table = report["table"]
    ends = [
        read_metrics(folder / "out" / "sft")[-1]["loss/held_out"],
        metrics["eval/accuracy"],
        metrics["eval/accuracy_ceiling"],
        table[JUDGE]["before"][0],
        table[JUDGE]["after"][0],
        report["win_rate"][0],
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", default=",".join(map(str, range(30, 40))), help="comma-separated")
    options = parser.parse_args()
    found = {seed: run(seed) for seed in map(int, options.seeds.split(","))}
    write_results("default", found)
    print(*tables(found))


if __name__ == "__main__":
    main()
