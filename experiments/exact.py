"""A laboratory for variants of PPO: how far each lands from the policy that is known to be the best.

    OMP_NUM_THREADS=1 python -m experiments.exact               the table: PPO and its forks, three β, three seeds
    python -m experiments.exact --diff mine.diff                a row beside it, of a patch (or several) against ppo.py
    python -m experiments.exact --script my_ppo.py --seeds 0    a row of a whole script that takes ppo.py's options

The world of letters (letters.py) has 781 responses, so π* is listed, and so is where a run ends. What is missing to J*
is β KL(π ‖ π*): "share" is the part of the way from J(π₀) to J* that was gone. Beside the forks stand DPO and TRL's PPO
(exact_trl.py). It prints a table, writes experiments/results/exact.json, and draws experiments/exact.svg. What has run
is kept in out/experiments/exact.
"""

import argparse
import json
import math
import statistics
import sys
from functools import partial
from pathlib import Path

import numpy as np

from data.files import InputError
from experiments import exact_trl, letters
from experiments.forks import FORKS, HERE, patched
from experiments.harness import ROOT, markdown, pyplot, save, seconds, stage, t_interval, write_results

VARIANTS = ("PPO", "RLOO", "GRPO with the KL in the reward", "GRPO", "KL in the loss as k3", "DAPO clip-higher")
RESULTS = Path(__file__).with_name("results") / "exact.json"
SHOWN = {  # what a table has of each end: its head, digits, and the bounds of what is measured
    "share": ("share of the way to J\\*", 3, -math.inf, 1), "J": ("J", 2), "TV": ("TV to π\\*", 2, 0, 1),
    "KL": ("KL to π₀", 2, 0), "KL to π*": ("KL to π\\*", 3, 0),
}  # fmt: skip


def dpo(beta: float, seed: int, n: int = 100_000) -> dict[str, float]:
    """Where DPO lands after 400 steps on all of `n` comparisons of the start's answers."""
    folder, name = letters.place(), f"dpo-{beta:g}-{seed}"
    pairs = folder / "pairs.jsonl"
    if not pairs.exists():
        letters.compared(letters.log_probabilities(folder / "start"), n, pairs)
    words = ["--data", pairs, "--init", folder / "start", "--out", folder / name, "--kl_coef", beta, "--seed", seed]
    text = stage(folder, name, HERE / "dpo.py", *words, "--epochs", 400, "--lr", 3e-3, "--device", "cpu")
    return letters.ended(folder / name, beta) | {"seconds": seconds(text)}


def tables(found: dict[str, dict[str, list[dict]]]) -> list[str]:
    """One table, a line for each variant and β; means over the seeds with their interval of 95%."""
    rows = []
    for who, beta, ends in ((who, *each) for who, by_beta in found.items() for each in by_beta.items()):
        cells = [t_interval([end[name] for end in ends], *shown[1:]) for name, shown in SHOWN.items()]
        rows.append([who, beta, *cells, f"{statistics.mean(end['seconds'] for end in ends):.0f}"])
    return [markdown(["variant", "β", *(head for head, *_ in SHOWN.values()), "seconds"], rows)]


def draw(found: dict[str, dict[str, list[dict]]], target: Path) -> None:
    """The exact frontier and where each variant ends beside it; and how far that is from π*. A point is a run."""
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(9, 4.2), layout="constrained")
    start = letters.log_probabilities(letters.place() / "start")
    best = [letters.optimum(start, beta)[0] for beta in np.geomspace(0.1, 20, 200)]
    left.plot([letters.kl(p, start) for p in best], [np.exp(p) @ letters.PAID for p in best], color="0.6", label="π*")
    betas = list(next(iter(found.values())))
    for y, by_beta in enumerate(found.values()):
        for beta, ends in by_beta.items():
            i = betas.index(beta)
            kls, scores = [end["KL"] for end in ends], [end["J"] + float(beta) * end["KL"] for end in ends]
            height = [y + 0.2 * (i - (len(betas) - 1) / 2)] * len(ends)
            style = {"color": f"C{y}", "marker": "osd"[i % 3], "markersize": 4, "linestyle": "none"}
            left.plot(kls, scores, **style, label=f"β = {beta}" if y == 0 else "")
            right.plot([end["KL to π*"] for end in ends], height, **style)
    left.set(xlabel="KL to the start (nats)", ylabel="expected score")
    left.legend(frameon=False, loc="lower right")
    right.set(xscale="log", xlabel="KL(π ‖ π*) at the end (nats)", yticks=range(len(found)))
    for y, label in enumerate(right.set_yticklabels(list(found))):
        label.set_color(f"C{y}")
    right.invert_yaxis()
    for axis in (left, right):
        axis.grid(alpha=0.25)
    save(figure, target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--diff", type=Path, nargs="+", help="patches in turn; an option of yours has its default")
    parser.add_argument("--script", type=Path, help="a script that takes ppo.py's options")
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated")
    parser.add_argument("--betas", default=",".join(map(str, letters.BETAS)), help="comma-separated")
    options = parser.parse_args()
    source, mine = (ROOT / "ppo.py").read_text(), (options.diff or [options.script])[-1]
    try:
        variants = {who: patched(source, *FORKS[who][0]) for who in VARIANTS}
        if options.diff:
            variants = {mine.name: patched(source, *options.diff)}
        elif options.script:
            variants = {mine.name: mine.read_text()}
    except OSError as error:
        sys.exit(f"{mine}: {error.strerror}; name a file that can be read")
    except InputError as error:
        sys.exit(f"{error}")
    known = json.loads(RESULTS.read_text())["found"] if mine and RESULTS.exists() else {}
    betas, seeds = options.betas.split(","), [int(seed) for seed in options.seeds.split(",")]
    plans = {who: (partial(letters.settle, text), betas, seeds) for who, text in variants.items()}
    if not mine:
        plans["DPO"] = dpo, betas, seeds[:1]  # each step takes all comparisons, so that a seed changes nothing
        plans["TRL's PPO"] = exact_trl.land, ["0.6"], seeds  # ten minutes per run
    found: dict[str, dict[str, list[dict]]] = {}
    for who, (land, betas, seeds) in plans.items():
        found[who] = {beta: [land(float(beta), seed) for seed in seeds] for beta in betas}
        if not mine:
            write_results("exact", found)  # after each, since a run takes minutes
    if not mine:
        draw(found, RESULTS.parent.with_name("exact.svg"))
    print(*tables(known | found))


if __name__ == "__main__":
    main()
