"""A laboratory for variants of PPO: how far each lands from the policy that is known to be the best.

    OMP_NUM_THREADS=1 python -m experiments.exact               the table: PPO and its forks, three β, three seeds
    python -m experiments.exact --diff mine.diff                a row beside it, of a patch against ppo.py
    python -m experiments.exact --script my_ppo.py --seeds 0    a row of a whole script that takes ppo.py's options

The world of letters (letters.py) has 781 responses, so π* is listed, and so is where a run ends. What is missing to J*
is β KL(π ‖ π*): "share" is the part of the way from J(π₀) to J* that was gone. It prints a table, writes
experiments/results/exact.json and draws experiments/exact.svg. What has run is kept in out/experiments/exact.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path

from experiments import letters
from experiments.forks import HERE, patched
from experiments.harness import FOLDER, ROOT, markdown, pyplot, save, seconds, stage, t_interval, write_results

FORKS = {  # name → its diffs
    "PPO": [],
    "RLOO": ["rloo"],
    "GRPO": ["grpo"],
    "GRPO, k3 in the loss": ["grpo", "kl_in_loss"],
    "k3 in the loss": ["kl_in_loss"],
    "clip-higher": ["clip_higher"],
}
RESULTS = Path(__file__).with_name("results") / "exact.json"
SHOWN = {"J": "J", "share": "share of the way", "TV": "TV to π*", "KL": "KL to π₀", "KL to π*": "KL to π*"}


def place() -> Path:
    """The folder of the runs; the starting policy stands in it."""
    folder = (FOLDER / "exact").resolve()
    return folder if (folder / "start" / "model.pt").exists() else letters.world(folder).parent


def settle(source: str, beta: float, seed: int, **changes: object) -> dict[str, float]:
    """Where a variant of ppo.py, given as its text, lands; and its seconds. A text and its options run once."""
    folder = place()
    key = source + repr(sorted(changes.items()))
    name = f"{hashlib.sha256(key.encode()).hexdigest()[:10]}-{beta:g}-{seed}"
    script = folder / "scripts" / f"{name}.py"
    script.parent.mkdir(exist_ok=True)
    script.write_text(source)
    text = stage(folder, name, script, *letters.options(folder, beta, seed, out=folder / name, **changes))
    return ended(folder / name, beta) | {"seconds": seconds(text)}


def ended(run: Path, beta: float) -> dict[str, float]:
    return letters.landing(letters.log_probabilities(run), letters.log_probabilities(place() / "start"), beta)


def dpo(beta: float, seed: int, n: int = 20_000) -> dict[str, float]:
    """Where DPO lands on `n` comparisons of the start's answers: as many answers as some forty iterations of PPO."""
    folder, name = place(), f"dpo-{beta:g}-{seed}"
    pairs = folder / "pairs.jsonl"
    if not pairs.exists():
        letters.compared(letters.log_probabilities(folder / "start"), n, pairs)
    words = ["--data", pairs, "--init", folder / "start", "--out", folder / name, "--kl_coef", beta, "--seed", seed]
    text = stage(folder, name, HERE / "dpo.py", *words, "--epochs", 200, "--lr", 3e-3, "--device", "cpu")
    return ended(folder / name, beta) | {"seconds": seconds(text)}


def rows(found: dict[str, dict[str, list[dict]]]) -> list[list]:
    """A line for each variant and β; means over the seeds with their interval of 95%."""
    lines = []
    for who, by_beta in found.items():
        for beta, ends in by_beta.items():
            cells = [t_interval([end[name] for end in ends], 3 if name == "share" else 2) for name in SHOWN]
            lines.append([who, beta, *cells, f"{sum(end['seconds'] for end in ends) / len(ends):.0f}"])
    return lines


def draw(found: dict[str, dict[str, list[dict]]], target: Path) -> None:
    """How far each variant ends from π*, a point a seed."""
    figure, axis = pyplot().subplots(figsize=(7, 0.4 * len(found) + 1.2), layout="constrained")
    for y, by_beta in enumerate(found.values()):
        for i, (beta, ends) in enumerate(by_beta.items()):
            height = [y + 0.2 * (i - 1)] * len(ends)
            axis.plot([e["KL to π*"] for e in ends], height, "o", color=f"C{i}", label="" if y else f"β = {beta}")
    axis.set(xscale="log", xlabel="KL(π ‖ π*) where the run ends (nats; log scale)", yticks=range(len(found)))
    axis.set_yticklabels(list(found))
    axis.invert_yaxis()
    axis.grid(alpha=0.25)
    figure.legend(frameon=False, loc="outside upper center", ncols=3)
    save(figure, target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--diff", type=Path, help="a patch against ppo.py")
    parser.add_argument("--script", type=Path, help="a script that takes ppo.py's options")
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated")
    parser.add_argument("--betas", default=",".join(map(str, letters.BETAS)), help="comma-separated")
    options = parser.parse_args()
    seeds, betas = [int(seed) for seed in options.seeds.split(",")], [float(beta) for beta in options.betas.split(",")]
    source, known = (ROOT / "ppo.py").read_text(), {}
    mine = options.diff or options.script
    try:
        forks = {who: patched(source, *names) for who, names in FORKS.items()}
        if options.script:
            source = options.script.read_text()
        if options.diff:
            source = patched(source, str(options.diff.resolve().with_suffix("")))
    except (OSError, ValueError) as error:
        sys.exit(f"{mine or 'experiments/forks'}: {error}")
    if mine:
        forks = {mine.name: source}
        known = json.loads(RESULTS.read_text())["found"] if RESULTS.exists() else {}
    found = {who: {str(b): [settle(text, b, seed) for seed in seeds] for b in betas} for who, text in forks.items()}
    if not mine:
        found |= {"DPO": {str(beta): [dpo(beta, seed) for seed in seeds] for beta in betas}}
        write_results("exact", found)
        draw(found, RESULTS.parent.with_name("exact.svg"))
    print(markdown(["variant", "β", *SHOWN.values(), "seconds"], rows(known | found)))


if __name__ == "__main__":
    main()
