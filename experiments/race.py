"""PPO here and PPO in TRL 1.12, from the same start and with the same reward model, every seed.

    OMP_NUM_THREADS=1 python -m experiments.race          seeds 1 to 3, after `python -m experiments.kl`
    OMP_NUM_THREADS=1 python -m experiments.race --seeds 10 --rates 1e-4,3e-4,6e-4       how the rate was chosen

Both take 64 iterations of 64 answers with the settings of ppo.py (race_trl.py says where TRL differs), one after the
other. Both policies answer the 512 held-out prompts at the end, and are measured alike. Seconds are those of the
iterations: without loading, and without ppo.py's checkpoints, for TRL writes none. "To 0.95": until the mean judge of
five iterations is 0.95 or more.

It prints a table and draws experiments/race.svg.
"""

import argparse
from pathlib import Path

from common.runs import read_metrics
from experiments.harness import EVAL, JUDGE, KL, closing_table, markdown, pyplot, save, stage, start
from tools import hf

RATE = 6e-4  # of TRL: the best of 1e-4, 3e-4 and 6e-4 on seed 10
GOAL = 0.95


def ours(seed: int) -> tuple[dict, list[dict]]:
    """The closing table of a run of ppo.py, and its metrics with the seconds since it began."""
    folder = start(seed)
    table = closing_table(stage(folder, "race", "ppo.py", "--seed", seed, "--out", "out/race"))
    lines, seconds = read_metrics(folder / "out" / "race"), 0.0
    for line in lines:
        seconds += line["response_len"] * 64 / line["tokens_per_s"]
        line["seconds"] = seconds
    return table, lines


def theirs(seed: int, rate: float) -> tuple[dict, list[dict]]:
    """The same of a run of TRL's PPO."""
    folder, name = start(seed), f"trl-{rate:g}"
    for net in ("sft", "reward"):
        if not (folder / f"{net}-hf").exists():
            hf.convert(str(folder / "out" / net), folder / f"{net}-hf")
    nets = ["--sft", "sft-hf", "--reward", "reward-hf"]
    stage(folder, name, "experiments/race_trl.py", *nets, "--seed", seed, "--lr", rate, "--out", f"{name}-hf")
    if not (folder / "out" / name).exists():
        hf.convert(str(folder / f"{name}-hf"), folder / "out" / name)
    text = stage(folder, f"{name}-end", EVAL, f"out/{name}", "--seed", seed)
    return closing_table(text), read_metrics(folder / f"{name}-hf")


def to_goal(lines: list[dict]) -> float | None:
    """Seconds until the mean judge of five iterations is GOAL."""
    for i in range(5, len(lines) + 1):
        if sum(line["objective/judge"] for line in lines[i - 5 : i]) / 5 >= GOAL:
            return lines[i - 1]["seconds"]
    return None


def draw(runs: dict[str, list[list[dict]]], target: Path) -> None:
    figure, axes = pyplot().subplots(1, 3, figsize=(9, 2.9), layout="constrained")
    panels = [("step", "objective/judge", "judge"), ("seconds", "objective/judge", "judge")]
    panels += [("step", "objective/kl", "KL to the start (nats a response)")]
    for axis, (x, y, title) in zip(axes, panels):
        for i, (who, seeds) in enumerate(runs.items()):
            for j, lines in enumerate(seeds):
                points = [(line[x] + (x == "step"), line[y]) for line in lines]
                axis.plot(*zip(*points), color=f"C{i}", alpha=0.7, linewidth=1.2, label="" if j else who)
        axis.set(xlabel="iteration" if x == "step" else x, title=title)
        axis.grid(alpha=0.25)
    axes[0].legend(frameon=False, loc="lower right")
    save(figure, target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", default="1,2,3", help="comma-separated")
    parser.add_argument("--rates", default=str(RATE), help="of TRL, comma-separated")
    parser.add_argument("--figure", type=Path, default=Path(__file__).with_name("race.svg"))
    options = parser.parse_args()
    seeds, rates = options.seeds.split(","), [float(rate) for rate in options.rates.split(",")]
    rows, runs = [], {}
    for seed in map(int, seeds):
        found = {"ppo.py": ours(seed)} | {f"TRL, rate {rate:g}": theirs(seed, rate) for rate in rates}
        limit = found["ppo.py"][1][-1]["seconds"]
        for who, (table, lines) in found.items():
            runs.setdefault(who, []).append(lines)
            judges = [line["objective/judge"] for line in lines if line["seconds"] <= limit][-5:]
            when = to_goal(lines)
            cells = [table[JUDGE][1], table[KL][1], f"{max(line['objective/kl'] for line in lines):.1f}"]
            cells += [f"{sum(judges) / len(judges):.3f}", f"{lines[-1]['seconds']:.0f}"]
            rows.append([seed, who, *cells, f"{when:.0f}" if when else "never"])
    header = ["seed", "who", "judge", "KL", "highest KL", "judge when ppo.py ends", "seconds", f"seconds to {GOAL}"]
    print(markdown(header, rows), end="\n\n")
    draw(runs, options.figure)


if __name__ == "__main__":
    main()
