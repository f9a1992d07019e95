"""Rounds: the policy answers, a person compares, a reward model learns, PPO follows it; and again, in four ways.

    OMP_NUM_THREADS=1 python -m experiments.rounds --rounds 4    seeds 30 to 32; each 17 times PPO's 64 iterations

WAYS lists them; each differs from the one above it in one thing. Equal in every way and round: 200 new labels, the
prompts that are asked, 64 iterations of PPO, all other options. A label is a choice of the simulated person between two
answers to a prompt of its own. Each reward model begins with the start and sees a label once; the start's answers have
scores of mean 0, variance 1. The reference is always the start. The first round is one run for all ways. "One long run"
has all labels of "the start answers", and as many iterations as a policy that goes on has had in all.

It prints the tables, writes experiments/results/rounds.json and draws experiments/rounds.svg. A stopped run goes on.
"""

import argparse
from pathlib import Path

import numpy

from data import read_jsonl, tales, write_jsonl
from experiments.harness import FOLDER, JUDGE, ending, markdown, pyplot, save, stage, t_interval, write_results

START, LONG = "out/sft", "one long run"
PROMPTS, LABELS, ITERATIONS = 250, 200, 64  # of a round; prompts to spare, as two equal answers are no label
WAYS = {  # name → the policy that answers, the policy that PPO begins with, the rounds whose labels count
    "the start answers": ("start", "start", "all"),
    "the policy answers": ("last", "start", "all"),
    "from the last policy": ("last", "last", "all"),
    "last labels alone": ("last", "last", "last"),
}
PAIRS = [*zip([*WAYS][1:], WAYS), ("from the last policy", LONG)]  # whose last judges are compared
COLUMNS = {"after": "judge", "score": "score by the round's reward model", "kl": "KL to the start (nats)"}


def labels(folder: Path, name: str, policy: str, number: int, seed: int) -> list[dict]:
    """LABELS choices between two answers of a policy to a prompt of round `number`."""
    prompts, out = f"rounds-prompts-{number}.jsonl", f"out/{name}-asked"
    write_jsonl(folder / prompts, tales.rows()["compare"][(number - 1) * PROMPTS : number * PROMPTS])
    options = ["--data", prompts, "--judge", JUDGE, "--samples", 2, "--init", policy, "--seed", seed]
    stage(folder, f"{name}-asked", "reward.py", *options, "--out", out)  # only its comparisons are used
    found = read_jsonl(folder / out / "comparisons.jsonl", {})[:LABELS]
    if len(found) < LABELS:
        raise SystemExit(f"{folder / out}: {len(found)} labels, not {LABELS}: too many prompts got two equal answers")
    return found


def learn(folder: Path, name: str, chosen: list[dict], begin: str, seed: int, iterations: int) -> dict:
    """How PPO ended, from `begin`, on a reward model of the `chosen` labels."""
    write_jsonl(folder / f"{name}.jsonl", chosen)
    mine, model = ["--seed", seed], f"out/{name}-reward"
    stage(folder, f"{name}-reward", "reward.py", "--data", f"{name}.jsonl", *mine, "--out", model)
    options = ["--init", begin, "--ref", START, "--reward", model, "--iterations", iterations, *mine]
    stage(folder, name, "ppo.py", *options, "--out", f"out/{name}")
    return ending(folder / "out" / name)


def run(seed: int, rounds: int) -> dict[str, list[dict]]:
    """How each round of each way ended, and the long run."""
    folder, found = FOLDER / "kl" / f"seed-{seed}", {}
    stage(folder, "sft", "sft.py", "--seed", seed)
    for way, (answering, begin, counted) in WAYS.items():
        policies, made, found[way] = {"start": START, "last": START}, [], []
        for number in range(1, rounds + 1):
            name = f"rounds-{way.replace(' ', '-')}-{number}" if number > 1 else "rounds-1"
            made.append(labels(folder, name, policies[answering], number, seed))
            chosen = sum(made, []) if counted == "all" else made[-1]
            found[way].append(learn(folder, name, chosen, policies[begin], seed, ITERATIONS))
            policies["last"] = f"out/{name}"
        if way == "the start answers":
            found[LONG] = [learn(folder, f"rounds-long-{rounds}", chosen, START, seed, rounds * ITERATIONS)]
    return found


def curves(runs: list[dict], way: str, column: str) -> numpy.ndarray:
    """A column of `harness.ending`, (seeds, rounds)."""
    return numpy.array([[end[column] for end in run[way]] for run in runs])


def tables(runs: list[dict]) -> list[str]:
    """By way: judge by round, score and KL at the end. And differences of the judge at the end, paired by seed."""
    rows, rounds = [], len(runs[0]["the start answers"])
    for way in runs[0]:
        judge, score, kl = (curves(runs, way, column) for column in COLUMNS)
        cells = [t_interval(seeds.tolist()) for seeds in (*judge.T, score[:, -1], kl[:, -1])]
        rows.append([way, *[""] * (rounds - judge.shape[1]), *cells])
    before = t_interval(curves(runs, way, "before")[:, 0].tolist())
    header = [f"judge at the start: {before}", *(f"after round {i + 1}" for i in range(rounds)), "score", "KL (nats)"]
    last = {way: curves(runs, way, "after")[:, -1] for way in runs[0]}
    apart = [[way, other, t_interval((last[way] - last[other]).tolist())] for way, other in PAIRS]
    return [
        markdown(header, rows),
        markdown(["judge at the end of", "less that of", "difference [95%]"], apart),
    ]


def draw(runs: list[dict], target: Path) -> None:
    figure, axes = pyplot().subplots(1, 3, figsize=(10, 3.4), layout="constrained")
    for axis, (column, title) in zip(axes, COLUMNS.items()):
        for i, way in enumerate(runs[0]):
            seeds = curves(runs, way, column)
            x = len(runs[0]["the start answers"]) - numpy.arange(seeds.shape[1])[::-1] + 0.05 * i  # beside each other
            axis.plot(x, seeds.mean(0), "-" if way in WAYS else "_", color=f"C{i}", label=way)
            axis.plot(x, seeds.T, ".", color=f"C{i}")
        axis.set(title=title, xlabel="round")
        axis.grid(alpha=0.25)
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=5)
    save(figure, target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", default="30,31,32", help="comma-separated")
    parser.add_argument("--rounds", type=int, default=4, choices=(2, 3, 4))
    options = parser.parse_args()
    found = {seed: run(seed, options.rounds) for seed in map(int, options.seeds.split(","))}
    write_results("rounds", found)
    print("\n\n".join(tables([*found.values()])))
    draw([*found.values()], Path(__file__).with_suffix(".svg"))


if __name__ == "__main__":
    main()
