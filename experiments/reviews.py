"""A real language model made better: SmolLM2-135M-Instruct learns to write positive film reviews, every seed.

    python -m tools.get.imdb && python -m experiments.sentiment                           the reviews, and their judges
    hf download HuggingFaceTB/SmolLM2-135M-Instruct --local-dir out/smollm2-hf            the public model
    python -m tools.hf out/smollm2-hf out/smollm2
    OMP_NUM_THREADS=1 python -m experiments.reviews --model out/smollm2                   seeds 1 and 2, an hour each

The model is adapted to the reviews once, for all seeds. By seed: it answers prompts of 2 to 4 words, a linear
sentiment model in the role of a noisy person compares the answers, the reward model learns from these comparisons, and
PPO from the reward model. Another sentiment model, fitted on other reviews, is the judge. Best of n chooses among the
start's answers by the score of the reward model. The learning rates were chosen on seeds 0 and 10.

It prints the tables and the answers to the first eight held-out prompts, and draws experiments/reviews.svg. Intervals
are of 95%, over prompts, for one run each. What has run is kept in out/experiments/reviews; a stopped run goes on.
"""

import argparse
import json
import re
from pathlib import Path

from common.runs import read_metrics
from experiments.harness import (
    EVAL,
    FOLDER,
    KL,
    best_of_n,
    first_answers,
    interval,
    markdown,
    pyplot,
    save,
    stage,
)
from tools.get import imdb

HERE = FOLDER / "reviews"
JUDGE = "experiments/sentiment.py:judge"
SFT = "--epochs 0.025 --block_size 128 --batch_size 8 --lr 2e-5 --evals 2".split()
REWARD = "--judge experiments/sentiment.py:labeller --label_temperature 0.05 --n_prompts 300".split()
REWARD += "--response_len 24 --lr 3e-4".split()
TASK = "--response_len 24 --unended_cap inf".split() + ["--judge", JUDGE]
TASK += ["--data", imdb.FOLDER / "ppo.jsonl", "--eval_data", imdb.FOLDER / "eval.jsonl"]
PPO = "--iterations 60 --batch_size 32 --minibatch_size 16 --epochs 1 --lr 3e-5 --value_lr 1e-4".split()
PPO += "--value_warmup 4 --kl_coef 0.05 --eval_prompts 500 --save_every 10".split()
BEST_OF = "--eval_prompts 48 --best_of 1,2,4,8,16,32,64".split()  # the first 48 of the 500


def run(seed: int) -> tuple[Path, dict[str, str]]:
    """The run folder of PPO, and what each stage printed."""
    folder, start = HERE / f"seed-{seed}", ["--init", "../out/sft", "--seed", seed]
    reward = [*start, "--data", imdb.FOLDER / "compare.jsonl", *REWARD]
    printed = {"reward": stage(folder, "reward", "reward.py", *reward)}
    printed["ppo"] = stage(folder, "ppo", "ppo.py", *start, *TASK, *PPO)
    return folder / "out" / "ppo", printed


def run_best_of_n(seed: int) -> str:
    """What best of n printed, with the start and the reward model of a seed's PPO."""
    return stage(HERE / f"seed-{seed}", "best-of-n", EVAL, "out/ppo", *BEST_OF)


def path(lines: list[dict]) -> list[tuple[float, float]]:
    """KL and judge of PPO on its way: means of five iterations, 160 answers."""
    columns = [[line[name] for line in lines] for name in ("objective/kl", "objective/judge")]
    return [tuple(sum(column[i : i + 5]) / 5 for column in columns) for i in range(len(lines) - 4)]


def draw(runs: dict[int, tuple[Path, dict[str, str]]], target: Path) -> None:
    figure, axes = pyplot().subplots(1, 3, figsize=(9, 2.9), layout="constrained")
    for i, (seed, (folder, printed)) in enumerate(runs.items()):
        colour, lines = f"C{i}", read_metrics(folder)
        steps = [line["step"] + 1 for line in lines]
        for axis, name in zip(axes, ("objective/judge", "objective/kl")):
            axis.plot(steps, [line[name] for line in lines], color=colour, label=f"seed {seed}")
        table = json.loads((folder / "report.json").read_text())["table"]
        (judge, error), (kl, kl_error) = (table[name]["after"] for name in (JUDGE, KL))
        label = f"PPO, seed {seed}"
        axes[2].errorbar(kl, judge, 1.96 * error, 1.96 * kl_error, color=colour, marker="o", label=label)
        axes[2].plot(*zip(*path(lines)), color=colour, linewidth=0.6)
        best = best_of_n(printed["best of n"])
        points = [row.kl for row in best], [row.judge for row in best], [1.96 * row.judge_error for row in best]
        axes[2].errorbar(*points, color=colour, linestyle="--", label=f"best of n, seed {seed}")
    axes[0].set(xlabel="iteration", title="judge of an iteration's answers")
    axes[1].set(xlabel="iteration", title="KL to the start (nats a response)")
    axes[2].set(xlabel="KL to the start (nats; of best of n: at most)", title="judge against KL, held-out prompts")
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
    print(f"held-out loss of the reviews: {losses[0]} half-way, {losses[-1]} at the end\n")
    runs = {int(seed): run(int(seed)) for seed in options.seeds.split(",")}
    for seed, (_, printed) in runs.items():
        printed["best of n"] = run_best_of_n(seed)
    ends, others = [], []
    for seed, (folder, printed) in runs.items():
        table = json.loads((folder / "report.json").read_text())["table"]
        accuracy = re.search(
            r"held-out accuracy (\S+ ± \S+) \(the noise in these labels allows (\S+)\)", printed["reward"]
        )
        cells = [interval(*table[name][side]) for name in (JUDGE, "score") for side in ("before", "after")]
        took = f"{json.loads((folder / 'config.json').read_text())['seconds'] / 60:.0f}"
        ends.append([seed, *accuracy.groups(), *cells, interval(*table[KL]["after"]), took])
        for row in best_of_n(printed["best of n"]):
            _, judge = min(path(read_metrics(folder)), key=lambda point: abs(point[0] - row.kl))
            cells = [interval(row.judge, row.judge_error), interval(row.score, row.score_error), f"{judge:.3f}"]
            others.append([seed, row.n, f"{row.kl:.2f}", *cells])
    header = ["seed", "reward accuracy", "the noise allows", "judge before", "judge after"]
    print(markdown([*header, "score before", "score after", "KL", "minutes of PPO"], ends), end="\n\n")
    print(markdown(["seed", "best of n", "KL at most", "judge", "score", "PPO's judge there"], others), end="\n\n")
    for seed, (folder, _) in runs.items():
        print(first_answers(folder, f"prompt (seed {seed})"), end="\n\n")
    draw(runs, options.figure)


if __name__ == "__main__":
    main()
