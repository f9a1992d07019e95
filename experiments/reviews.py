"""A real language model made better: SmolLM2-135M-Instruct learns to write film reviews that end well, every seed.

    python -m data.imdb                                                                   the reviews (84 MB)
    hf download HuggingFaceTB/SmolLM2-135M-Instruct --local-dir out/smollm2-hf            the public model
    python -m data.weights out/smollm2-hf out/smollm2
    OMP_NUM_THREADS=1 python -m experiments.reviews --model out/smollm2                   seeds 1 and 2, an hour each

The model is adapted to the reviews once, for all seeds. By seed: it answers prompts of 2 to 4 words, a linear
sentiment model in the role of a noisy person compares the answers, the reward model learns from these comparisons, and
PPO from the reward model. Another sentiment model, fitted on other reviews, is the judge. The best of n of the start's
answers stands beside PPO. The learning rates were chosen on seeds 0 and 10.

It prints the tables and eight pairs that nobody picked, and draws experiments/reviews.svg. What has run is kept in
out/experiments/reviews; a stopped run goes on.
"""

import argparse
import json
import re
from pathlib import Path

import common
from data import imdb
from experiments.harness import FOLDER, markdown, pyplot, save, seconds, stage

HERE = FOLDER / "reviews"
JUDGE, KL = "data/imdb.py:judge", "KL to the start (nats)"
SFT = "--epochs 0.025 --block_size 128 --batch_size 8 --lr 2e-5 --warmup 10 --evals 2".split()
REWARD = "--judge data/imdb.py:labeller --label_temperature 0.05 --n_prompts 300 --response_len 24 --lr 3e-4".split()
TASK = "--response_len 24 --unended_cap inf".split() + ["--judge", JUDGE]
TASK += ["--data", imdb.FOLDER / "ppo.jsonl", "--eval_data", imdb.FOLDER / "eval.jsonl"]
PPO = "--iterations 60 --batch_size 32 --minibatch_size 16 --epochs 1 --lr 3e-5 --value_lr 1e-4".split()
PPO += "--value_warmup 4 --lr_warmup 8 --kl_coef 0.05 --eval_prompts 500 --save_every 10".split()
BEST_OF = "--iterations 0 --eval_prompts 48 --best_of 1,2,4,8,16,32,64".split()  # the first 48 of the 500


def run(seed: int) -> tuple[Path, dict[str, str]]:
    """The run folder of PPO, and what each stage printed."""
    folder, start = HERE / f"seed-{seed}", ["--init", "../out/sft", "--seed", seed]
    reward = [*start, "--data", imdb.FOLDER / "compare.jsonl", *REWARD]
    printed = {"reward": stage(folder, "reward", "reward.py", *reward)}
    printed["ppo"] = stage(folder, "ppo", "ppo.py", *start, *TASK, *PPO)
    return folder / "out" / "ppo", printed


def choose(seed: int) -> str:
    """What best of n printed, with the reward model of a seed."""
    start = ["--init", "../out/sft", "--seed", seed]
    return stage(HERE / f"seed-{seed}", "best-of-n", "ppo.py", *start, *TASK, *BEST_OF)


def interval(mean: float, error: float) -> str:
    """A mean with its 95% interval."""
    return f"{mean:.3f} [{mean - 1.96 * error:.3f}, {mean + 1.96 * error:.3f}]"


def best_of_n(text: str) -> list[tuple[float, ...]]:
    """Of the table best of n: (n, KL, judge, its standard error, score, its standard error)."""
    row = r"^(\d+)\s+(\d+\.\d+)" + 2 * r"\s+(-?\d+\.\d+) ± (\d+\.\d+)" + "$"
    return [tuple(map(float, found)) for found in re.findall(row, text, re.MULTILINE)]


def pairs(folder: Path, seed: int) -> str:
    """The first eight answers to held-out prompts, before and after, as a table."""
    answers = json.loads((folder / "report.json").read_text())["answers"][:8]
    texts = [(answer["prompt"], answer["before"]["text"], answer["after"]["text"]) for answer in answers]
    rows = [[" ".join(text.split()).replace("|", "\\|") for text in each] for each in texts]
    return markdown([f"prompt (seed {seed})", "before", "after"], rows)


def draw(runs: dict[int, tuple[Path, dict[str, str]]], target: Path) -> None:
    figure, axes = pyplot().subplots(1, 3, figsize=(9, 2.9), layout="constrained")
    for i, (seed, (folder, printed)) in enumerate(runs.items()):
        colour, lines = f"C{i}", common.read_metrics(folder)
        steps = [line["step"] + 1 for line in lines]
        for axis, name in zip(axes, ("objective/judge", "objective/kl")):
            axis.plot(steps, [line[name] for line in lines], color=colour, label=f"seed {seed}")
        table = json.loads((folder / "report.json").read_text())["table"]
        (judge, error), (kl, kl_error) = (table[name]["after"] for name in (JUDGE, KL))
        label = f"PPO, seed {seed}"
        axes[2].errorbar(kl, judge, 1.96 * error, 1.96 * kl_error, color=colour, marker="o", label=label)
        _, kls, judges, errors, *_ = zip(*best_of_n(printed["best of n"]))
        label = f"best of n, seed {seed}"
        axes[2].errorbar(kls, judges, [1.96 * x for x in errors], color=colour, linestyle="--", label=label)
    axes[0].set(xlabel="iteration", title="judge of an iteration's answers")
    axes[1].set(xlabel="iteration", title="KL to the start (nats a response)")
    axes[2].set(xlabel="KL to the start (nats)", title="judge against KL, held-out prompts")
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.legend(frameon=False, loc="lower right", fontsize=7)
    save(figure, target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="run folder of the converted model")
    parser.add_argument("--seeds", default="1,2", help="comma-separated")
    parser.add_argument("--figure", type=Path, default=Path(__file__).with_name("reviews.svg"))
    options = parser.parse_args()
    text = stage(
        HERE, "sft", "sft.py", "--data", imdb.FOLDER / "pretrain.jsonl", "--init", options.model.resolve(), *SFT
    )
    losses = re.findall(r"held_out (\S+)", text)
    print(f"held-out loss of the reviews: {losses[0]} half-way, {losses[-1]} at the end; {seconds(text):.0f} s\n")
    runs = {int(seed): run(int(seed)) for seed in options.seeds.split(",")}
    for seed, (_, printed) in runs.items():
        printed["best of n"] = choose(seed)
    ends, others = [], []
    for seed, (folder, printed) in runs.items():
        table = json.loads((folder / "report.json").read_text())["table"]
        accuracy = re.search(
            r"held-out accuracy (\S+ ± \S+) \(the noise in these labels allows (\S+)\)", printed["reward"]
        )
        cells = [interval(*table[name][side]) for name in (JUDGE, "score") for side in ("before", "after")]
        took = " + ".join(f"{seconds(printed[name]):.0f}" for name in ("reward", "ppo", "best of n"))
        ends.append([seed, *accuracy.groups(), *cells, interval(*table[KL]["after"]), took])
        for n, kl, judge, error, score, score_error in best_of_n(printed["best of n"]):
            others.append([seed, f"{n:.0f}", kl, interval(judge, error), interval(score, score_error)])
    header = ["seed", "reward accuracy", "the noise allows", "judge before", "judge after"]
    print(markdown([*header, "score before", "score after", "KL", "seconds"], ends), end="\n\n")
    print(markdown(["seed", "best of n", "KL at most", "judge", "score"], others), end="\n\n")
    for seed, (folder, _) in runs.items():
        print(pairs(folder, seed), end="\n\n")
    draw(runs, options.figure)


if __name__ == "__main__":
    main()
