"""Do several reward models hold longer than one (Coste et al. 2023, 2310.02743; Eisenstein et al. 2023, 2312.09244)?

    OMP_NUM_THREADS=1 python -m experiments.ensembles      policy seeds 30 to 32, after kl; some two hours each

Five reward models of the policy's own pretraining, with seeds of their own, against five whose trunks come from five
pretrainings. All learn from the same comparisons of 80 prompts: as they are, and with a quarter turned round. One, the
mean of five or their min chooses the best of n answers, and trains PPO at β = 0.01. Coste et al. find that mean and min
of seeds hold where one is fooled, most of all at 25% noise; Eisenstein et al. that pretrainings hold better than seeds,
and none for good. It writes experiments/results/ensembles.json and draws experiments/ensembles.svg.
"""

import argparse
from pathlib import Path

import torch

import data
from common.runs import read_metrics
from data.rng import shuffler
from experiments import harness
from experiments.harness import FOLDER, best_of, markdown, stage, t_interval

MEMBERS, PROMPTS, ANSWERS, QUESTIONS = 5, 80, 256, 32
SIZES = [2**i for i in range(9)]
FLIPPED = {"labels as they are": 0.0, "25% turned round": 0.25}
KINDS = {"seeds": "h", "pretrainings": "p"}  # what the members differ in → the first letter of their names
COMBINED = {"mean": lambda x: x.mean(0), "min": lambda x: x.amin(0)}
ARMS = ["one", *(f"{how} of {kind}" for kind in KINDS for how in COMBINED)]


def comparisons(folder: Path, share: float) -> str:
    """The comparisons of the first PROMPTS prompts, with a share of them turned round; the path from `folder`."""
    rows = data.read_jsonl(folder / "out" / "reward" / "comparisons.jsonl", {})
    prompts = set(list(dict.fromkeys(row["prompt"] for row in rows))[:PROMPTS])
    rows = [row for row in rows if row["prompt"] in prompts]
    turned = shuffler("flip").permutation(len(rows))[: round(share * len(rows))].tolist()
    for row in (rows[i] for i in turned):
        for a, b in [(name, name.replace("chosen", "rejected")) for name in row if name.startswith("chosen")]:
            row[a], row[b] = row[b], row[a]
        row["p_chosen"] = round(1 - row["p_chosen"], 4)
    path = folder / "out" / f"labels-{share:g}.jsonl"
    data.write_jsonl(path, rows)
    return f"out/{path.name}"


def members(folder: Path, seed: int, share: float) -> dict[str, list[str]]:
    """Train the reward models; their run folders' names, by kind."""
    labels, found = comparisons(folder, share), {kind: [] for kind in KINDS}
    for kind, letter in KINDS.items():
        for i in range(MEMBERS):
            name, init = f"{letter}{i}-{share:g}", "out/sft"
            if kind == "pretrainings":
                other = FOLDER / "ensembles" / f"sft-{i}"
                stage(other, "sft", "sft.py", "--seed", 40 + i)
                init = (other / "out" / "sft").resolve()
            options = ["--data", labels, "--init", init, "--batch_size", 1, "--out", f"out/{name}"]
            stage(folder, name, "reward.py", "--seed", 100 * seed + i, *options)
            found[kind].append(name)
    return found


def run(seed: int, share: float) -> dict[str, dict]:
    """For each arm: (KL at most, judge, score) of the best of n, for each of SIZES; and PPO's end and its way there."""
    folder, found = harness.start(seed), {}
    names = members(folder, seed, share)
    drawn = harness.start_answers(folder, [*names["seeds"], *names["pretrainings"]], QUESTIONS, ANSWERS, seed)
    for arm in ARMS:
        how, _, kind = arm.partition(" of ")
        chosen = names[kind] if kind else names["seeds"][:1]
        score = COMBINED[how if kind else "mean"](torch.stack([drawn[name] for name in chosen]))
        name = f"{arm.replace(' ', '-')}-{share:g}"
        options = ["--reward", ",".join(f"out/{each}" for each in chosen), "--combine", how if kind else "mean"]
        options += ["--kl_coef", 0.01, "--iterations", 160, "--out", f"out/{name}"]
        stage(folder, name, "ppo.py", "--seed", seed, *options)
        end = harness.ending(folder / "out" / name)
        lines = read_metrics(folder / "out" / name)[::4]
        way = [(round(line["objective/kl"], 2), round(line["objective/judge"], 3)) for line in lines]
        found[arm] = {"best of n": [best_of(score, drawn["judge"], n) for n in SIZES], "PPO": end, "way": way}
    return found


def rows(found: dict[int, dict[str, dict]]) -> list[list]:
    """A row for each arm: the judge's peak and end over the best of n, and at PPO's end; less that of one model."""
    table = []
    for arm in ARMS:
        columns = []
        for each in found.values():
            judged, one = ([judge for _, judge, _ in each[name]["best of n"]] for name in (arm, "one"))
            end, less = each[arm]["PPO"], each["one"]["PPO"]
            of_ppo = end["kl"], end["after"], end["after"] - less["after"]
            columns.append((max(judged), judged[-1], judged[-1] - one[-1], *of_ppo))
        table.append([arm, *map(t_interval, zip(*columns))])
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", default="30,31,32", help="of the policy, comma-separated")
    seeds = list(map(int, parser.parse_args().seeds.split(",")))
    found = {label: {seed: run(seed, share) for seed in seeds} for label, share in FLIPPED.items()}
    harness.write_results("ensembles", found)
    figure, axes = harness.pyplot().subplots(2, 2, figsize=(9, 7), layout="constrained", sharey=True)
    header = ["judge, best of n: peak", f"n = {ANSWERS}", "less one", "PPO: KL", "judge", "less one"]
    for column, (label, runs) in enumerate(found.items()):
        print(markdown([label, *header], rows(runs)), end="\n\n")
        for i, arm in enumerate(ARMS):
            curves = torch.tensor([each[arm]["best of n"] for each in runs.values()]).mean(0)
            axes[0, column].plot(curves[:, 0], curves[:, 1], color=f"C{i}", label=arm)
            for each in runs.values():
                axes[1, column].plot(*zip(*each[arm]["way"]), ".", markersize=2, color=f"C{i}", alpha=0.5)
        axes[0, column].set(title=label, xlabel="best of n: KL to the start (nats, at most)", ylabel="judge (0 to 1)")
        axes[1, column].set(xlabel="PPO, β = 0.01: KL to the start (nats)", ylabel="judge (0 to 1)", xscale="symlog")
    axes[0, 0].legend(frameon=False)
    harness.save(figure, Path(__file__).with_suffix(".svg"))


if __name__ == "__main__":
    main()
