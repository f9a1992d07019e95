"""The ceiling on win rate: the highest that any policy can have at its KL, and every run that has been measured.

    python -m experiments.ceiling       seconds; reads what `experiments.kl`, `price`, `forks` and `exact` have left

A win rate against the start, at a given KL, cannot be above `common.measure.win_rate_ceiling`, whoever judges. Best of
n wins n / (n + 1) by the score that it chooses by, at log n − (n − 1) / n nats. Each run is shown by the judge and by
the score that it was trained on: what lies between the two is the reward model's error, and ties of the judge. In the
world of letters every win rate and KL is exact, of each variant of PPO, DPO and TRL's PPO. It prints a table, writes
experiments/results/ceiling.json and draws experiments/ceiling.svg.
"""

import json
import math
import re
from pathlib import Path

import numpy as np

from common.measure import KL, share, win_rate_ceiling
from experiments.harness import FOLDER, JUDGE, markdown, pyplot, read_results, save, write_results

MEASURES = {JUDGE: "by the judge (never trained on)", "final score": "by the score (trained on)"}
KINDS = {  # run folder → what it is
    r"ppo|beta-[\d.]+-\d+|good-[\d.]+": "PPO, each β",
    r"poor-[\d.]+": "PPO, reward model of 20 prompts",
    r"(rloo|grpo|kl-in-the-loss|grpo-kl-in-the-loss|clip-higher|rule|dpo)-[\d.]+": "forks",
}


def kind(name: str) -> str | None:
    return next((what for pattern, what in KINDS.items() if re.fullmatch(pattern, name)), None)


def wins(report: dict, by: str) -> tuple[float, float, float]:
    """The win rate against the start by a measure, ties half, and the ends of its interval of 95%."""
    pairs = [(answer["before"][by], answer["after"][by]) for answer in report["answers"]]
    return share(sum((b > a) + 0.5 * (b == a) for a, b in pairs) / len(pairs), len(pairs))


def measured(folder: Path) -> dict[str, dict]:
    """Every run below `folder` that has a report: its kind, KL, ceiling there, and win rates."""
    found = {}
    for path in sorted(folder.glob("seed-*/out/*/report.json")):
        what, report = kind(path.parent.name), json.loads(path.read_text())
        if what and all(measure in report["table"] for measure in MEASURES):
            kl = report["table"][KL]["after"][0]
            each = {"kind": what, "KL": kl, "ceiling": win_rate_ceiling(kl)}
            found[f"{path.parts[-4]} {path.parent.name}"] = each | {by: wins(report, by) for by in MEASURES}
    return found


def draw(found: dict[str, dict], exact: dict[str, dict], target: Path) -> None:
    """Two panels of runs on the tales, `found`; and one of all ends in the world of letters, as exact.py found them."""
    figure, axes = pyplot().subplots(1, 3, figsize=(11, 3.8), layout="constrained", sharey=True)
    x = np.geomspace(0.02, 200, 200)
    n = [2**i for i in range(1, 11)]
    for axis in axes:
        axis.plot(x, [win_rate_ceiling(kl) for kl in x], color="k", label="the ceiling")
        axis.set(xscale="log", xlabel="KL to the start (nats)")
        axis.grid(alpha=0.25)
    for axis, (by, title) in zip(axes, MEASURES.items()):
        if by == "final score":
            kl = [math.log(size) - (size - 1) / size for size in n]
            axis.plot(kl, [size / (size + 1) for size in n], "x", color="0.5", label="best of n = 2, 4, 8 … 1024")
        for i, what in enumerate(KINDS.values()):
            runs = [each for each in found.values() if each["kind"] == what]
            if not runs:
                continue
            y = np.array([each[by] for each in runs])  # (n, 3)
            ends = np.array([y[:, 0] - y[:, 1], y[:, 2] - y[:, 0]])
            axis.errorbar([e["KL"] for e in runs], y[:, 0], ends, fmt="o", ms=4, lw=1, color=f"C{i}", label=what)
        axis.set_title(title)
    ends = [end for by_beta in exact.values() for at_beta in by_beta.values() for end in at_beta]
    axes[2].plot([e["KL"] for e in ends], [e["win rate"] for e in ends], "d", color="C4", markersize=4)
    axes[2].set_title("by the score, in the world of letters")
    axes[0].set_ylabel("win rate against the start\n(ties half, interval of 95%)")
    figure.legend(*axes[1].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=5)
    save(figure, target)


def main() -> None:
    found = measured(FOLDER / "kl")
    write_results("ceiling", found)
    cell = "{:.2f} [{:.2f}, {:.2f}]".format
    rows = [
        [who, f"{e['KL']:.2f}", f"{e['ceiling']:.2f}", *(cell(*e[by]) for by in MEASURES)] for who, e in found.items()
    ]
    print(markdown(["run", "KL (nats)", "ceiling", *MEASURES.values()], rows))
    above = [who for who, each in found.items() if max(each[by][1] for by in MEASURES) > each["ceiling"]]
    print(f"\nabove the ceiling by more than its error: {', '.join(above) or 'none'} of {len(found)} runs")
    exact = read_results("exact")
    draw(found, exact, Path(__file__).with_suffix(".svg"))


if __name__ == "__main__":
    main()
