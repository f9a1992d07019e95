"""Over-optimisation (Gao, Schulman and Hilton 2022): best of up to 1,024 answers, by seven reward models.

    OMP_NUM_THREADS=1 python -m experiments.overoptimise --predict    seeds 30 to 34, after kl; some 10 minutes each
    OMP_NUM_THREADS=1 python -m experiments.overoptimise              after it; some 20 minutes each

Four reward models take 226 steps, on 20 to 1,000 prompts; four take 14 to 904 steps, on 1,000 prompts. All choose among
the same answers to 32 held-out prompts. With d = √KL and R = the rise of the judge, the paper fits R = d (α − β d).
The first command draws 64 answers to each prompt, fits n ≤ 64 and writes what follows for n = 256 and 1,024 to
experiments/results/overoptimise-prediction.json: commit it. The second one draws 1,024 other answers, says which
predictions hold, writes results/overoptimise.json and draws experiments/overoptimise.svg. Intervals are of 95%.
"""

import argparse
import json
from pathlib import Path

import numpy
from torch import Tensor

from experiments import harness
from experiments.harness import FOLDER, agreement, best_of_kl, bootstrap, cell, t_interval
from experiments.recipe import write_changed
from tools.evaluate import expected_at_best

SETS = {  # what is equal → its reward models: run folder → prompts, steps; "reward" is the default run, of one epoch
    "226 steps": {f"reward-{n}x226": (n, 226) for n in (20, 80, 320)} | {"reward": (1000, 226)},
    "1,000 prompts": {f"reward-1000x{n}": (1000, n) for n in (14, 56, 904)} | {"reward": (1000, 226)},
}
MODELS = dict(sorted((each for models in SETS.values() for each in models.items()), key=lambda each: each[1]))
SIZES = [2**i for i in range(11)]
ONE_EPOCH = "max(1, len(groups) // cfg.batch_size)"  # what reward.py says of its steps
FITTED, PREDICTED, PROMPTS = 64, (256, 1024), 32
PREDICTION = Path(__file__).parent / "results" / "overoptimise-prediction.json"


def answers(seed: int, n: int) -> dict[str, Tensor]:
    """What the judge and each reward model say of n answers to each prompt: (PROMPTS, n) each."""
    folder = harness.start(seed)
    for name, (prompts, steps) in MODELS.items():
        if name != "reward":
            script = write_changed("reward.py", {ONE_EPOCH: str(steps)}, FOLDER / "overoptimise" / f"{steps}-steps")
            options = ["--data", "out/reward/comparisons.jsonl", "--n_prompts", prompts, "--out", f"out/{name}"]
            harness.stage(folder, name, script, "--seed", seed, *options)
    return harness.start_answers(folder, list(MODELS), PROMPTS, n, seed + n)  # another n has other answers


def curves(drawn: list[dict[str, Tensor]], name: str, column: str, sizes: list[int]) -> numpy.ndarray:
    """Means of a column over the best of n answers by a reward model: (seeds, prompts, sizes)."""
    return numpy.array([[expected_at_best(x[name], x[column], n).numpy() for n in sizes] for x in drawn]).swapaxes(1, 2)


def fit(judge: numpy.ndarray) -> numpy.ndarray:
    """For curves (…, sizes): α and β by least squares on n ≤ FITTED, and the judge at each n of PREDICTED: (…, 4)."""
    known = SIZES[1 : 1 + SIZES.index(FITTED)]
    of_fit, of_guess = ([[best_of_kl(n) ** 0.5, -best_of_kl(n)] for n in each] for each in (known, PREDICTED))
    found = (judge[..., 1 : 1 + len(known)] - judge[..., :1]) @ numpy.linalg.pinv(of_fit).T
    return numpy.concatenate([found, judge[..., :1] + found @ numpy.transpose(of_guess)], -1)


def describe(drawn: list[dict[str, Tensor]], sizes: list[int]) -> dict[str, dict]:
    """Of each reward model: judge and score at each n, the n of the judge's peak, the change from there, and `fit`."""
    found = {}
    for name in MODELS:
        judge, score = (curves(drawn, name, column, sizes) for column in ("judge", name))
        peak = judge.mean((0, 1)).argmax()
        found[name] = {
            "agreement": [agreement(each[name][:, :FITTED], each["judge"][:, :FITTED]) for each in drawn],
            "judge": bootstrap(judge, lambda curve: curve),
            "score": bootstrap(score, lambda curve: curve),
            "peak": bootstrap(judge, lambda curve: numpy.array(sizes)[curve.argmax(-1)[..., None]]),
            "change": bootstrap(judge, lambda curve, peak=peak: curve[..., -1:] - curve[..., [peak]]),
            "fit": bootstrap(judge, fit),
        }
    return found


def draw(found: dict[str, dict], predictions: dict[str, dict], target: Path) -> None:
    figure, axes = harness.pyplot().subplots(2, 2, figsize=(9, 7), layout="constrained", sharex=True, sharey="row")
    kl, names = [best_of_kl(n) for n in SIZES], {"judge": "judge (0 to 1)", "score": "score (standard deviations)"}
    for column, (equal, models) in enumerate(SETS.items()):
        for axis, (what, ylabel) in zip(axes[:, column], names.items()):
            labels = {}
            for i, name in [each for each in enumerate(MODELS) if each[1] in models]:
                middle, low, high = zip(*found[name][what])
                axis.plot(kl, middle, color=f"C{i}")
                axis.fill_between(kl, low, high, color=f"C{i}", alpha=0.15, linewidth=0)
                labels[f"{MODELS[name][column]:,} {('prompts', 'steps')[column]}"] = kl[-1] + 0.4, middle[-1], f"C{i}"
                for n, (at, low, high) in zip(PREDICTED, predictions[name]["fit"][2:] if what == "judge" else []):
                    axis.errorbar(best_of_kl(n) + i / 20, at, [[at - low], [high - at]], fmt="x", color=f"C{i}")
            harness.label_ends(axis, labels)
            axis.set(ylabel=f"{ylabel} of the best of n", xlabel="KL to the start (nats, at most)")
            axis.grid(alpha=0.25)
        axes[0, column].set_title(f"{equal} each; ×: predicted from n ≤ {FITTED}")
    harness.save(figure, target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", default="30,31,32,33,34", help="comma-separated")
    parser.add_argument("--predict", action="store_true", help=f"write the prediction, from {FITTED} answers a prompt")
    options = parser.parse_args()
    seeds = list(map(int, options.seeds.split(",")))
    written = json.loads(PREDICTION.read_text())["found"] if PREDICTION.exists() else {}
    if not options.predict and written.get("seeds") != seeds:
        parser.error(f"{PREDICTION}: has no prediction for these seeds; write it first, with --predict")
    sizes = [n for n in SIZES if n <= FITTED or not options.predict]
    found = describe([answers(seed, sizes[-1]) for seed in seeds], sizes)
    result = {"seeds": seeds, "n": sizes, "models": found}
    harness.write_results(PREDICTION.stem if options.predict else "overoptimise", result)
    if options.predict:
        return
    rows, checks = [], []
    for name, each in found.items():
        judge, (n, low, high), what = each["judge"], each["peak"][0], [f"{x:,}" for x in MODELS[name]]
        guesses = written["models"][name]["fit"]
        cells = [*guesses[:2], judge[0], judge[SIZES.index(n)], judge[-1], *each["change"]]
        peak = f"{n:,.0f} [{low:,.0f}, {high:,.0f}] at {best_of_kl(n):.1f}"
        rows.append([*what, t_interval(each["agreement"]), *map(cell, cells), peak])
        for n, guess in zip(PREDICTED, guesses[2:]):
            before, after = judge[SIZES.index(FITTED)], judge[SIZES.index(n)]
            hit = "hit" if guess[1] <= after[0] <= guess[2] else "miss"
            checks.append([*what, f"{n:,}", *map(cell, (before, guess, after)), hit])
    header = ["prompts", "steps", "agrees with the judge", "α", "β", "judge at n = 1", "at its peak", "at n = 1,024"]
    print(harness.markdown([*header, "change from the peak", "n of the peak, at KL (nats)"], rows), end="\n\n")
    print(harness.markdown(["prompts", "steps", "n", f"judge at n = {FITTED}", "predicted", "measured", ""], checks))
    draw(found, written["models"], Path(__file__).with_suffix(".svg"))


if __name__ == "__main__":
    main()
