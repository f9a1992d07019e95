"""PPO here and PPO in TRL 1.12, from the same start and with the same reward model, every seed.

    OMP_NUM_THREADS=1 python -m experiments.race          seeds 30 to 34, after experiments.kl, with nothing beside it
    python -m experiments.race --seeds 10,11,12 --rates 1e-4,2e-4,4e-4,8e-4,1.6e-3    how TRL's was chosen

Both take 64 iterations of 64 answers with the settings of ppo.py (race_trl.py says what stays TRL's own), one after the
other. Both policies answer the 512 held-out prompts at the end, and are measured alike. Seconds are those of the
iterations: without loading, and without ppo.py's checkpoints, for TRL writes none. A run is at the goal when the mean
judge of five iterations is 0.95 or more.

It prints the tables, writes experiments/results/race.json and draws experiments/race.svg.
"""

import argparse
from pathlib import Path

from common.runs import read_metrics
from experiments import harness
from experiments.harness import EVAL, JUDGE, KL
from tools import hf

RATE = 8e-4  # of TRL
GOAL = 0.95


def ours(seed: int) -> tuple[dict, list[dict], float]:
    """The closing table of a run of ppo.py, its metrics with the seconds since it began, and the command's seconds."""
    folder = harness.start(seed)
    text = harness.stage(folder, "race", "ppo.py", "--seed", seed, "--out", "out/race")
    lines, passed = read_metrics(folder / "out" / "race"), 0.0
    for line in lines:
        passed += line["time/rollout"] + line["time/score"] + line["time/update"]
        line["seconds"] = passed
    return harness.closing_table(text), lines, harness.seconds(text)


def theirs(seed: int, rate: float) -> tuple[dict, list[dict], float]:
    """The same of a run of TRL's PPO."""
    folder, name = harness.start(seed), f"trl-{rate:g}"
    for net in ("sft", "reward"):
        if not (folder / f"{net}-hf").exists():
            hf.convert(str(folder / "out" / net), folder / f"{net}-hf")
    nets = ["--sft", "sft-hf", "--reward", "reward-hf"]
    printed = harness.stage(
        folder, name, "experiments/race_trl.py", *nets, "--seed", seed, "--lr", rate, "--out", f"{name}-hf"
    )
    if not (folder / "out" / name).exists():
        hf.convert(str(folder / f"{name}-hf"), folder / "out" / name)
    text = harness.stage(folder, f"{name}-end", EVAL, f"out/{name}", "--seed", seed)
    return harness.closing_table(text), read_metrics(folder / f"{name}-hf"), harness.seconds(printed)


def to_goal(lines: list[dict]) -> int | None:
    """The number of iterations until the mean judge of five of them is GOAL."""
    for i in range(5, len(lines) + 1):
        if sum(line["objective/judge"] for line in lines[i - 5 : i]) / 5 >= GOAL:
            return i
    return None


def summary(table: dict, lines: list[dict], whole: float) -> dict[str, float | None]:
    """What is shown of a run."""
    goal = to_goal(lines)
    return {
        "judge": harness.number(table[JUDGE][1]),
        "KL (nats)": harness.number(table[KL][1]),
        "highest KL of an iteration": max(line["objective/kl"] for line in lines),
        "seconds per iteration": lines[-1]["seconds"] / len(lines),
        "iterations to 0.95": goal,
        "seconds to 0.95": lines[goal - 1]["seconds"] if goal else None,
        "seconds of the command": whole,
    }


def draw(runs: dict[str, list[list[dict]]], target: Path) -> None:
    figure, axes = harness.pyplot().subplots(1, 3, figsize=(9, 2.9), layout="constrained")
    panels = [("step", "objective/judge", "judge (0 to 1)"), ("seconds", "objective/judge", "judge (0 to 1)")]
    panels += [("step", "objective/kl", "KL to the start (nats)")]
    for axis, (x, y, ylabel) in zip(axes, panels):
        for i, (who, seeds) in enumerate(runs.items()):
            for j, lines in enumerate(seeds):
                points = [(line[x] + (x == "step"), line[y]) for line in lines]
                axis.plot(*zip(*points), color=f"C{i}", alpha=0.7, linewidth=1.2, label="" if j else who)
        axis.set(xlabel="iteration" if x == "step" else x, ylabel=ylabel)
        axis.grid(alpha=0.25)
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, loc="outside upper center", ncols=4)
    harness.save(figure, target)


def table(found: dict[str, dict[int, dict]]) -> str:
    rows, digits = [], {"judge": 3, "KL (nats)": 1, "highest KL of an iteration": 1, "seconds per iteration": 2}
    for who, seeds in found.items():
        columns = {name: [run[name] for run in seeds.values()] for name in next(iter(seeds.values()))}
        reached = {name: [x for x in column if x is not None] for name, column in columns.items()}
        cells = [harness.t_interval(x, digits.get(name, 0)) if x else "never" for name, x in reached.items()]
        rows.append([who, *cells, f"{len(reached['seconds to 0.95'])} of {len(seeds)}"])
    return harness.markdown(["who", *columns, "reached it"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", default="30,31,32,33,34", help="comma-separated")
    parser.add_argument("--rates", default=str(RATE), help="of TRL, comma-separated")
    parser.add_argument("--figure", type=Path, default=Path(__file__).with_name("race.svg"))
    options = parser.parse_args()
    runs, found = {}, {}
    for seed in map(int, options.seeds.split(",")):
        each = {"ppo.py": ours(seed)}
        each |= {f"TRL, rate {float(rate):g}": theirs(seed, float(rate)) for rate in options.rates.split(",")}
        for who, run in each.items():
            runs.setdefault(who, []).append(run[1])
            found.setdefault(who, {})[seed] = summary(*run)
    harness.write_results(f"race{'' if options.rates == str(RATE) else '-rates'}", found)
    print(table(found), end="\n\n")
    draw(runs, options.figure)


if __name__ == "__main__":
    main()
