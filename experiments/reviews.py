"""A real language model made better: SmolLM2-135M-Instruct learns to write positive film reviews, every seed.

    python -m tools.get.imdb && python -m experiments.sentiment && python -m experiments.reviewer   reviews and judges
    python -m tools.hf HuggingFaceTB/SmolLM2-135M-Instruct out/smollm2                        the public model
    OMP_NUM_THREADS=1 python -m experiments.reviews --model out/smollm2                   seeds 30 to 32, an hour each

The model is adapted to the reviews once, for all seeds. By seed: it answers prompts of 2 to 4 words, a linear
sentiment model in the role of a noisy person compares the answers, the reward model learns from these comparisons, and
PPO from the reward model. The judge is a model of another kind, fitted on other reviews: a small transformer. Beside it
stand a linear judge, the start's log-probability of a token, and how many word pairs are different ones. Best of n
chooses among the start's answers by the score of the reward model. The learning rates were chosen on seeds 0 and 10.

It prints the tables and the answers to the first three held-out prompts, writes experiments/results/reviews.json and
draws experiments/reviews.svg. What has run is kept in out/experiments/reviews; a stopped run goes on.
"""

import argparse
import json
from pathlib import Path

from common import nets
from common.measure import ENDED
from common.runs import read_metrics
from experiments import harness, texts
from experiments.harness import KL, pyplot, stage
from tools.get import imdb

HERE = harness.FOLDER / "reviews"
CRITIC, LINEAR = "experiments/reviewer.py:judge", "experiments/sentiment.py:judge"
SFT = "--epochs 0.025 --block_size 128 --batch_size 8 --lr 2e-5 --evals 2".split()
REWARD = "--judge experiments/sentiment.py:labeller --label_temperature 0.05 --n_prompts 300".split()
REWARD += "--response_len 24 --lr 3e-4".split()
TASK = "--response_len 24 --unended_cap inf".split() + ["--judge", f"{CRITIC},{LINEAR}"]
TASK += ["--data", imdb.FOLDER / "ppo.jsonl", "--eval_data", imdb.FOLDER / "eval.jsonl"]
PPO = "--iterations 60 --batch_size 32 --minibatch_size 16 --epochs 1 --lr 3e-5 --value_lr 1e-4".split()
PPO += "--value_warmup 4 --kl_coef 0.05 --eval_prompts 500 --save_every 10".split()
BEST_OF = (1, 2, 4, 8, 16, 32, 64)


def run(seed: int) -> dict:
    """What a seed has found: of the reward model, of PPO before and after, and of best of n beside PPO."""
    folder, start = HERE / f"seed-{seed}", ["--init", "../out/sft", "--seed", seed]
    reward = [*start, "--data", imdb.FOLDER / "compare.jsonl", *REWARD]
    printed = [
        stage(folder, "reward", "reward.py", *reward),
        stage(folder, "ppo", "ppo.py", *start, *TASK, *PPO),
    ]
    metrics, report = (json.loads((folder / f"out/{x}/report.json").read_text()) for x in ("reward", "ppo"))
    drawn = harness.start_answers(
        folder, ["reward"], 48, max(BEST_OF), seed, *TASK, "--init", HERE / "out/sft", "--judge", CRITIC
    )
    beside = harness.beside(drawn, read_metrics(folder / "out/ppo"), BEST_OF)
    about = {"KL": report["table"][KL]["after"][0], "minutes": sum(map(harness.seconds, printed)) / 60}
    for name, metric in (("reward accuracy", "eval/accuracy"), ("the noise allows", "eval/accuracy_ceiling")):
        about[name] = metrics["metrics"][metric]
    sides = {side: measures(report, side) for side in ("before", "after")}
    return about | {"sides": sides, "best of n": beside}


def measures(report: dict, side: str) -> dict[str, float]:
    """Means over the answers of PPO's report on one side, before or after."""
    start, encoding = nets.load_gpt(HERE / "out/sft")
    found = {name: report["table"][name][side][0] for name in (CRITIC, LINEAR, "score")}
    answers = [(each[side]["text"], each[side][ENDED] > 0) for each in report["answers"]]
    prompts = [each["prompt"] for each in report["answers"]]
    found["log π₀ per token (nats)"] = texts.fluency(start, encoding, prompts, answers)
    found["distinct pairs of words"] = texts.distinct_bigrams([text for text, _ in answers])
    return found


def draw(found: dict[int, dict], target: Path) -> None:
    figure, axes = pyplot().subplots(1, 3, figsize=(9, 2.9), layout="constrained")
    for i, (seed, end) in enumerate(found.items()):
        colour, lines = f"C{i}", read_metrics(HERE / f"seed-{seed}/out/ppo")
        steps = [line["step"] + 1 for line in lines]
        for axis, name in zip(axes, ("objective/judge", "objective/kl")):
            axis.plot(steps, [line[name] for line in lines], color=colour, label=f"seed {seed}")
        kls = [row["KL"] for row in end["best of n"]]
        best, after = [row["best of n"] for row in end["best of n"]], end["sides"]["after"][CRITIC]
        axes[2].plot(kls, best, "--", color=colour)
        axes[2].plot(kls, [row["PPO"] for row in end["best of n"]], color=colour, linewidth=0.6)
        axes[2].plot(end["KL"], after, "o", color=colour)
    harness.label_ends(axes[2], {"best of n": (kls[-1], best[-1], "0.3"), "PPO": (end["KL"], after, "0.3")})
    axes[0].set(xlabel="iteration", ylabel="judge (0 to 1)")
    axes[1].set(xlabel="iteration", ylabel="KL to the start (nats)")
    axes[2].set(xlabel="KL (nats; of best of n: at most)", ylabel="judge (0 to 1)")
    for axis in axes:
        axis.grid(alpha=0.25)
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, loc="outside upper center", ncols=5)
    harness.save(figure, target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="run folder of the converted model")
    parser.add_argument("--seeds", default="30,31,32", help="comma-separated")
    parser.add_argument("--figure", type=Path, default=Path(__file__).with_name("reviews.svg"))
    options = parser.parse_args()
    stage(HERE, "sft", "sft.py", "--data", imdb.FOLDER / "pretrain.jsonl", "--init", options.model.resolve(), *SFT)
    found = {seed: run(seed) for seed in map(int, options.seeds.split(","))}
    harness.write_results("reviews", found)
    runs = list(found.values())
    print("\n\n".join([*harness.before_and_after(runs), harness.beside_table(runs)]), end="\n\n")
    for seed in found:
        print(harness.first_answers(HERE / f"seed-{seed}/out/ppo", f"prompt (seed {seed})", n=3), end="\n\n")
    draw(found, options.figure)


if __name__ == "__main__":
    main()
