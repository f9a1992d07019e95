"""Is `tools.stress` right about how far a reward model can be trusted? Its turning point against the judge's.

    OMP_NUM_THREADS=1 python -m experiments.trust      seeds 30 to 39, after kl; some 15 minutes each

For reward models of 20, 80, 320 and 1,000 prompts `tools.stress` trains a second one on half of them, draws 256 answers
to each of 64 held-out prompts, and says from which KL on the best of n gets no better by the second. The judge reads
the same answers, chosen alike: where does its curve turn? A prediction is right within one doubling of n; too late, if
it trusts the model further than that; too early, if less far. It prints the tables, writes
experiments/results/trust.json and draws experiments/trust.svg.
"""

import argparse
import re
from pathlib import Path

from common.measure import share
from experiments.harness import JUDGE, best_of_kl, markdown, pyplot, save, stage, start, write_results

PROMPTS = (20, 80, 320, 1000)
SIZES = [2**i for i in range(9)]  # the last is that of "no turn"
VERDICTS = ("right", "too late", "too early")


def run(prompts: int, seed: int) -> dict[str, int]:
    """The n at which the second reward model and the judge turn."""
    folder, name = start(seed), "reward"
    if prompts < 1000:
        name, few = f"reward-{prompts}", ["--batch_size", 1] if prompts < 320 else []  # else it takes too few steps
        options = ["--n_prompts", prompts, *few, "--out", f"out/{name}"]
        stage(folder, name, "reward.py", "--seed", seed, *options)
    return turns(stage(folder, f"stress-{prompts}", "tools/stress.py", f"out/{name}", "--judge", JUDGE, "--seed", seed))


def turns(text: str) -> dict[str, int]:
    """The sizes n at which the two turn, from what `tools.stress` printed; its KLs have one digit."""
    predicted, true = text.splitlines()[-2], re.search(r"^the judge .*", text, re.MULTILINE)[0]  # "took … s" is last
    kl = {f"{best_of_kl(n):.1f}": n for n in SIZES}
    said = {"predicted": predicted, "true": true}
    return {who: kl[found[0]] if (found := re.findall(r"(\d\.\d) nats", line)) else 1 for who, line in said.items()}


def verdict(found: dict[str, int]) -> str:
    predicted, true = (SIZES.index(found[who]) for who in ("predicted", "true"))
    return VERDICTS[0] if abs(predicted - true) < 2 else VERDICTS[1 + (predicted < true)]


def shown(n: int) -> str:
    return f"> {best_of_kl(n):.1f}" if n == SIZES[-1] else f"{best_of_kl(n):.1f}"


def tables(found: dict[int, dict[int, dict[str, int]]]) -> list[str]:
    """Every run with its miss in bold, predicted / true in nats; and how many are right, with Wilson's intervals."""
    each, counts = [], []
    for prompts, runs in found.items():
        cells = [f"{shown(run['predicted'])} / {shown(run['true'])}" for run in runs.values()]
        said = [verdict(run) for run in runs.values()]
        each.append([prompts, *(x if what == VERDICTS[0] else f"**{x}**" for x, what in zip(cells, said))])
        right, low, high = share(said.count(VERDICTS[0]) / len(said), len(said))
        counts.append([prompts, f"{right:.2f} [{low:.2f}, {high:.2f}]", *map(said.count, VERDICTS[1:])])
    seeds = next(iter(found.values()))
    first = markdown(["prompts", *(f"seed {seed}" for seed in seeds)], each)
    return [first, markdown(["prompts", "right within a doubling of n", *VERDICTS[1:]], counts)]


def draw(found: dict[int, dict[int, dict[str, int]]], target: Path) -> None:
    figure, axis = pyplot().subplots(figsize=(5, 4.4), layout="constrained")
    kl = [best_of_kl(n) for n in SIZES]
    axis.plot(kl, kl, color="0.6", linewidth=0.8)
    axis.fill_between(
        kl, [kl[0], *kl[:-1]], [*kl[1:], kl[-1]], color="0.9", linewidth=0, label="within a doubling of n"
    )
    for i, (prompts, runs) in enumerate(found.items()):
        points = [[best_of_kl(run[who]) + (i - 1.5) / 25 for run in runs.values()] for who in ("true", "predicted")]
        axis.plot(*points, "o", color=f"C{i}", alpha=0.6, label=f"{prompts:,} prompts")
    axis.set(xlabel="the judge turns at (nats, at most)", ylabel="the second reward model turns at (nats)")
    axis.legend(frameon=False)
    save(figure, target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", default=",".join(map(str, range(30, 40))), help="comma-separated")
    seeds = list(map(int, parser.parse_args().seeds.split(",")))
    found = {prompts: {seed: run(prompts, seed) for seed in seeds} for prompts in PROMPTS}
    write_results("trust", found)
    print(*tables(found), sep="\n\n")
    draw(found, Path(__file__).with_suffix(".svg"))


if __name__ == "__main__":
    main()
