"""A laboratory for variants of PPO: how far each lands from the policy that is known to be the best.

    OMP_NUM_THREADS=1 python -m experiments.exact               the table: PPO and its forks, three β, three seeds
    python -m experiments.exact --diff mine.diff                a row beside it, of a patch against ppo.py
    python -m experiments.exact --script my_ppo.py --seeds 0    a row of a whole script that takes ppo.py's options

The world of letters (letters.py) has 781 responses, so π* is listed, and so is where a run ends. What is missing to J*
is β KL(π ‖ π*): "share" is the part of the way from J(π₀) to J* that was gone. It prints a table, writes
experiments/results/exact.json and draws experiments/exact.svg. What has run is kept in out/experiments/exact.
"""

import argparse
import json
import statistics
import sys
from functools import partial
from pathlib import Path

from data.files import InputError
from experiments import letters
from experiments.forks import FORKS, HERE, patched
from experiments.harness import ROOT, markdown, pyplot, save, seconds, stage, t_interval, write_results

VARIANTS = ("PPO", "RLOO", "GRPO with the KL in the reward", "GRPO", "KL in the loss as k3", "DAPO clip-higher")
RESULTS = Path(__file__).with_name("results") / "exact.json"
SHOWN = {"J": "J", "share": "share of the way", "TV": "TV to π*", "KL": "KL to π₀", "KL to π*": "KL to π*"}


def dpo(beta: float, seed: int, n: int = 100_000) -> dict[str, float]:
    """Where DPO lands after 400 steps on all of `n` comparisons of the start's answers."""
    folder, name = letters.place(), f"dpo-{beta:g}-{seed}"
    pairs = folder / "pairs.jsonl"
    if not pairs.exists():
        letters.compared(letters.log_probabilities(folder / "start"), n, pairs)
    words = ["--data", pairs, "--init", folder / "start", "--out", folder / name, "--kl_coef", beta, "--seed", seed]
    text = stage(folder, name, HERE / "dpo.py", *words, "--epochs", 400, "--lr", 3e-3, "--device", "cpu")
    return letters.ended(folder / name, beta) | {"seconds": seconds(text)}


def rows(found: dict[str, dict[str, list[dict]]]) -> list[list]:
    """A line for each variant and β; means over the seeds with their interval of 95%."""
    lines = []
    for who, beta, ends in ((who, *each) for who, by_beta in found.items() for each in by_beta.items()):
        cells = [t_interval([end[name] for end in ends], 3 if name == "share" else 2) for name in SHOWN]
        lines.append([who, beta, *cells, f"{statistics.mean(end['seconds'] for end in ends):.0f}"])
    return lines


def draw(found: dict[str, dict[str, list[dict]]], target: Path) -> None:
    """How far each variant ends from π*, a point a seed."""
    figure, axis = pyplot().subplots(figsize=(7, 0.4 * len(found) + 1.2), layout="constrained")
    for y, by_beta in enumerate(found.values()):
        for i, (beta, ends) in enumerate(by_beta.items()):
            height = [y + 0.2 * (i - (len(by_beta) - 1) / 2)] * len(ends)
            axis.plot([e["KL to π*"] for e in ends], height, "o", color=f"C{i}", label="" if y else f"β = {beta}")
    axis.set(xscale="log", xlabel="KL(π ‖ π*) where the run ends (nats)", yticks=range(len(found)))
    axis.set_yticklabels(list(found))
    axis.invert_yaxis()
    axis.grid(alpha=0.25)
    figure.legend(frameon=False, loc="outside upper center", ncols=3)
    save(figure, target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--diff", type=Path, help="a patch against ppo.py; an option of yours has its default")
    parser.add_argument("--script", type=Path, help="a script that takes ppo.py's options")
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated")
    parser.add_argument("--betas", default="1.0,0.6,0.3", help="comma-separated")
    options = parser.parse_args()
    source, mine, known = (ROOT / "ppo.py").read_text(), options.diff or options.script, {}
    try:
        variants = {who: patched(source, *FORKS[who][0]) for who in VARIANTS}
        if options.diff:
            variants = {mine.name: patched(source, mine)}
        elif options.script:
            variants = {mine.name: mine.read_text()}
    except OSError as error:
        sys.exit(f"{mine}: {error.strerror}; name a file that can be read")
    except InputError as error:
        sys.exit(f"{error}")
    if mine and RESULTS.exists():
        known = json.loads(RESULTS.read_text())["found"]
    runs = {who: partial(letters.settle, text) for who, text in variants.items()} | ({} if mine else {"DPO": dpo})
    seeds = [int(seed) for seed in options.seeds.split(",")]
    found: dict[str, dict[str, list[dict]]] = {}
    for who, land in runs.items():
        found[who] = {beta: [land(float(beta), seed) for seed in seeds] for beta in options.betas.split(",")}
        if not mine:
            write_results("exact", found)  # after each, since a run takes minutes
    if not mine:
        draw(found, RESULTS.parent.with_name("exact.svg"))
    print(markdown(["variant", "β", *SHOWN.values(), "seconds"], rows(known | found)))


if __name__ == "__main__":
    main()
