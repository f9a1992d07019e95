"""Two hundred comparisons: a choice between two answers to each of 200 prompts, and PPO on what was learned of them.

    OMP_NUM_THREADS=1 python -m experiments.fewer    seeds 30 to 34, after default; 2 minutes each

Beside it stands the default run, whose reward model learns from some 25,000 comparisons of 1,000 prompts. The choices
are simulated. Intervals are Student's t over the seeds, of 95%. It prints a table and writes
experiments/results/fewer.json.
"""

import argparse

from common.measure import share
from experiments.harness import cell, ending, markdown, report, stage, start, t_interval, write_results

REWARD = ["--n_prompts", 200, "--samples", 2]
COLUMNS = ("accuracy", "noise allows", "before", "after", "kl", "score")


def run(seed: int) -> dict[str, dict]:
    """How PPO ends on the reward model of two hundred comparisons, and on the default one."""
    folder, found = start(seed), {}
    stage(folder, "reward-fewer", "reward.py", "--seed", seed, *REWARD, "--out", "out/reward-fewer")
    stage(folder, "fewer", "ppo.py", "--seed", seed, "--reward", "out/reward-fewer", "--out", "out/fewer")
    stage(folder, "ppo", "ppo.py", "--seed", seed)
    for name, reward in (("fewer", "reward-fewer"), ("ppo", "reward")):
        learned = report(folder / "out" / reward)["metrics"]
        found[name] = ending(folder / "out" / name)
        found[name] |= {"accuracy": learned["eval/accuracy"], "noise allows": learned["eval/accuracy_ceiling"]}
        found[name]["held out"] = learned["eval/prompts"]
    return found


def rows(found: dict[int, dict[str, dict]]) -> list[list]:
    """A row for each seed, the means over them, those of the default run, and the differences, paired by seed."""
    few, default = ([each[name] for each in found.values()] for name in ("fewer", "ppo"))
    table = [[f"200, seed {seed}", *(f"{x[column]:.2f}" for column in COLUMNS)] for seed, x in zip(found, few)]
    for what, ends in (("200", few), ("25,000", default)):
        table.append([what, *(t_interval([end[column] for end in ends]) for column in COLUMNS)])
    apart = {column: t_interval([a[column] - b[column] for a, b in zip(few, default)]) for column in ("after", "kl")}
    return [*table, ["200 less 25,000", *(apart.get(column, "") for column in COLUMNS)]]  # what else is of two measures


def tables(found: dict[str, dict]) -> list[str]:
    """The table, and the accuracy over the held-out pairs of all seeds, with Wilson's interval."""
    header = ["comparisons", "held-out accuracy", "noise allows", "judge before", "judge after", "KL (nats)", "score"]
    each = [(seed["fewer"]["held out"], seed["fewer"]["accuracy"]) for seed in found.values()]
    n = sum(pairs for pairs, _ in each)
    accuracy = cell(share(sum(pairs * right for pairs, right in each) / n, n))
    return [markdown(header, rows(found)), f"Over the {n} held-out pairs of all seeds the accuracy is {accuracy}."]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", default="30,31,32,33,34", help="comma-separated")
    found = {seed: run(seed) for seed in map(int, parser.parse_args().seeds.split(","))}
    write_results("fewer", found)
    print("\n\n".join(tables(found)))


if __name__ == "__main__":
    main()
