"""What the KL term is for: PPO with it and without it, on a poor and on a good reward model, ten seeds.

    OMP_NUM_THREADS=1 python -m experiments.kl                  seeds 30 to 39, some 20 minutes each
    OMP_NUM_THREADS=1 python -m experiments.kl --seeds 30,31    some of them
    python -m experiments.kl --finished                         the tables of what has run until now

The good reward model is trained on the comparisons of all 1,000 prompts, the poor one on those of 20. Every run of PPO
has 160 iterations and the same schedule. A run "fell" if its judge ends below where it began, by the paired interval of
95% over the held-out prompts. It prints the tables, writes experiments/results/kl.json and draws experiments/kl.svg.
What has run is kept in out/experiments/kl; a stopped run goes on.
"""

import argparse
from pathlib import Path

from common.measure import share
from common.runs import read_metrics
from experiments import harness
from experiments.harness import DIVERGED, FOLDER

BOUNDS = {"before": (0, 1), "after": (0, 1), "kl": (0,), "score": ()}  # of the columns of `summary`
ARMS = {  # run folder → reward model, β
    "poor-0.05": ("reward-20", 0.05),
    "poor-0.15": ("reward-20", 0.15),
    "poor-0": ("reward-20", 0),
    "good-0.05": ("reward", 0.05),
    "good-0": ("reward", 0),
}
NAMES = {"reward-20": "20 prompts", "reward": "1,000 prompts"}
WITH_AND_WITHOUT = {0.05: "with it (β = 0.05)", 0: "without the KL term"}  # what is drawn
PANELS = {"objective/scores": "score", "objective/judge": "judge", "objective/kl": "KL to the start (nats)"}


def run(seed: int) -> None:
    folder = harness.start(seed)
    poor = ["--n_prompts", 20, "--batch_size", 1, "--out", "out/reward-20"]
    harness.stage(folder, "reward-20", "reward.py", "--seed", seed, *poor)
    for name, (reward, kl_coef) in ARMS.items():
        options = ["--seed", seed, "--reward", f"out/{reward}", "--kl_coef", kl_coef, "--iterations", 160]
        harness.stage(folder, name, "ppo.py", *options, "--out", f"out/{name}", may_fail=DIVERGED)


def read(seed: int) -> dict[str, dict]:
    """What each arm of a seed that has run ended with, by run folder."""
    folder, found = FOLDER / "kl" / f"seed-{seed}", {}
    for name in ARMS:
        if (folder / f"{name}.log").exists():
            found[name] = harness.ending(folder / "out" / name) or {"fell": True}
    return found


def summary(found: dict[int, dict[str, dict]]) -> list[list]:
    """A row for each arm: how many fell, and means over the seeds with their intervals."""
    rows = []
    for name, (reward, kl_coef) in ARMS.items():
        ends = [each[name] for each in found.values() if name in each]
        if not ends:
            continue
        fell, n = sum(end["fell"] for end in ends), len(ends)
        _, low, high = share(fell / n, n)
        measured = [end for end in ends if "after" in end]
        columns = [[end[column] for end in measured] for column in BOUNDS]
        cells = [harness.t_interval(column, 2, *limits) for column, limits in zip(columns, BOUNDS.values())]
        rows.append([NAMES[reward], kl_coef, f"{fell} of {n} [{low:.2f}, {high:.2f}]", *cells])
    return rows


def differences(found: dict[int, dict[str, dict]]) -> list[list]:
    """For each reward model: judge with the KL term less judge without it, paired over the seeds."""
    rows = []
    for with_term, without in (("poor-0.05", "poor-0"), ("poor-0.15", "poor-0"), ("good-0.05", "good-0")):
        pairs = [(each.get(with_term, {}), each.get(without, {})) for each in found.values()]
        apart = [a["after"] - b["after"] for a, b in pairs if "after" in a and "after" in b]
        reward, kl_coef = ARMS[with_term]
        if apart:
            rows.append([NAMES[reward], f"β = {kl_coef} less β = 0", len(apart), harness.t_interval(apart, 2, -1, 1)])
    return rows


def tables(found: dict[int, dict[str, dict]]) -> list[str]:
    header = ["reward model of", "β", "fell", "judge before", "judge after", "KL (nats)", "score"]
    rows = []
    for seed, ends in found.items():
        cells = ["" if name not in ends else shown(ends[name]) for name in ARMS]
        before = next(end["before"] for end in ends.values() if "before" in end)
        rows.append([seed, f"{before:.2f}", *cells])
    arms = [f"{NAMES[reward]}, β = {beta}" for reward, beta in ARMS.values()]
    return [
        harness.markdown(header, summary(found)),
        harness.markdown(["reward model of", "judge", "seeds", "difference [95%]"], differences(found)),
        harness.markdown(["seed", "start", *arms], rows),
    ]


def shown(end: dict) -> str:
    return f"{end['after']:.2f} at {end['kl']:.1f}" if "after" in end else "diverged"


def draw(found: dict[int, dict[str, dict]], target: Path) -> None:
    figure, axes = harness.pyplot().subplots(2, 3, figsize=(9, 5.4), layout="constrained", sharex=True)
    for row, reward in zip(axes, NAMES):
        for axis, (metric, title) in zip(row, PANELS.items()):
            for name, (of, beta) in ARMS.items():
                seeds = [seed for seed, ends in found.items() if name in ends]
                if of != reward or beta not in WITH_AND_WITHOUT:
                    continue
                for i, seed in enumerate(seeds):
                    lines = read_metrics(FOLDER / "kl" / f"seed-{seed}" / "out" / name)
                    points = [(line["step"] + 1, line[metric]) for line in lines]
                    label = "" if i else WITH_AND_WITHOUT[beta]
                    colour = "C0" if beta else "C3"
                    axis.plot(*zip(*points), color=colour, alpha=0.6, linewidth=1, label=label, zorder=2 + bool(beta))
            axis.set(title=f"{title}\nreward model of {NAMES[reward]}", xlabel="iteration")
            axis.grid(alpha=0.25)
            if metric == "objective/kl":
                axis.set_yscale("symlog", linthresh=1)
                axis.yaxis.set_major_locator(harness.pyplot().FixedLocator([0, 1, 3, 10, 30, 100, 300]))
                axis.yaxis.set_major_formatter("{x:g}")
    figure.legend(*axes[0][0].get_legend_handles_labels(), frameon=False, loc="outside upper center", ncols=2)
    harness.save(figure, target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", default=",".join(map(str, range(30, 40))), help="comma-separated")
    parser.add_argument("--finished", action="store_true", help="run nothing: show what has run")
    parser.add_argument("--figure", type=Path, default=Path(__file__).with_name("kl.svg"))
    options = parser.parse_args()
    seeds = [int(seed) for seed in options.seeds.split(",")]
    for seed in [] if options.finished else seeds:
        run(seed)
    found = {seed: ends for seed in seeds if (ends := read(seed))}
    harness.write_results("kl", found)
    print("\n\n".join(tables(found)))
    draw(found, options.figure)


if __name__ == "__main__":
    main()
