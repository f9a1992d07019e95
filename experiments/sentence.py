"""A gain that any reader sees: SmolLM2-135M-Instruct learns to answer a question in one complete sentence.

    python -m tools.get.hh --messages --source helpful-*/test.jsonl.gz                         three sets' test files
    python -m tools.hf HuggingFaceTB/SmolLM2-135M-Instruct out/smollm2                        the public model
    OMP_NUM_THREADS=1 python -m experiments.sentence --model out/smollm2                  seeds 30 to 32, an hour each

The questions are the short ones with which the dialogues of HH begin. The system message asks for one short sentence,
before and after; the start seldom obeys. A noisy person (experiments/person.py) compares the start's answers by what a
reader sees, the reward model learns from these comparisons, and PPO from the reward model. Beside the person's own
score stand measures of another kind, which nothing was trained on: the start's log-probability of a token; how many
word pairs are different ones; and by how many nats an answer makes its question more likely to the start than the
answer to another question does. The rates are from short runs on seeds 10 and 11.

It prints the tables and the answers to the first three held-out questions, and writes
experiments/results/sentence.json. What has run is kept in out/experiments/sentence; a stopped run goes on.
"""

import argparse
import json
from pathlib import Path
from statistics import mean

import data
from common import nets
from common.measure import ENDED
from common.runs import read_metrics
from experiments import harness, texts
from experiments.harness import stage
from experiments.person import is_sentence, labeller, question
from tools.get import hh

HERE = harness.FOLDER / "sentence"
LABELLER = "experiments/person.py:labeller"
LONGEST, N_COMPARE = 34, 160  # tokens of a question in its template; questions for the comparisons
SAMPLING = "--response_len 32 --temperature 0.7".split()
REWARD = ["--judge", LABELLER, *SAMPLING, *"--samples 4 --label_temperature 0.1 --lr 3e-4".split()]
TASK = "--unended_cap inf --kl_coef 0.1 --batch_size 16 --minibatch_size 8".split() + ["--judge", LABELLER, *SAMPLING]
PPO = "--iterations 24 --lr 4e-5 --value_lr 1e-4 --value_warmup 2 --eval_prompts 64 --save_every 4".split()
BEST_OF = (1, 2, 4, 8, 16)
SYSTEM = {"role": "system", "content": "Answer in one short sentence."}


def write_files(model: Path) -> None:
    """Write the short opening questions: some for the comparisons, the others for PPO, and the held-out ones."""
    net, encoding = nets.load_gpt(model)
    files = {}
    for name in ("ppo", "eval"):
        rows = data.read_jsonl(hh.FOLDER / f"{name}.jsonl", {"prompt": list})
        asked = [[SYSTEM, *row["prompt"]] for row in rows if len(row["prompt"]) == 1]
        files[name] = [{"prompt": each} for each in asked if len(data.encode_prompt(encoding, each)) <= LONGEST]
    files["compare"], files["ppo"] = files["ppo"][:N_COMPARE], files["ppo"][N_COMPARE:]
    for name, rows in files.items():
        data.write_jsonl(HERE / f"{name}.jsonl", rows)


def run(model: Path, seed: int) -> dict:
    """What a seed has found: accuracy of the reward model, minutes, KL, means by side, best of n beside PPO."""
    folder, mine = HERE / f"seed-{seed}", ["--init", model, "--seed", seed]
    prompts = ["--data", (HERE / "ppo.jsonl").resolve(), "--eval_data", (HERE / "eval.jsonl").resolve()]
    printed = [
        stage(folder, "reward", "reward.py", "--data", (HERE / "compare.jsonl").resolve(), *mine, *REWARD),
        stage(folder, "ppo", "ppo.py", *mine, *prompts, *TASK, *PPO),
    ]
    metrics = json.loads((folder / "out/reward/report.json").read_text())["metrics"]
    report = json.loads((folder / "out/ppo/report.json").read_text())
    drawn = harness.start_answers(folder, ["reward"], 12, max(BEST_OF), seed, "--init", model, *prompts, *TASK)
    beside = harness.beside(drawn, read_metrics(folder / "out/ppo"), BEST_OF)
    kept = folder / "measures.json"
    if not kept.exists():
        kept.write_text(json.dumps({side: measures(model, report["answers"], side) for side in ("before", "after")}))
    about = {"KL": report["table"][harness.KL]["after"][0], "reward accuracy": metrics["eval/accuracy"]}
    about["minutes"] = sum(map(harness.seconds, printed)) / 60
    return about | {"sides": json.loads(kept.read_text()), "best of n": beside}


def measures(model: Path, answers: list[dict], side: str) -> dict[str, float]:
    """Means over the answers of PPO's report on one side, before or after."""
    start, encoding = nets.load_gpt(model)
    prompts, said = [each["prompt"] for each in answers], [each[side]["text"] for each in answers]
    asked, ended = [question(prompt).strip() for prompt in prompts], [each[side][ENDED] > 0 for each in answers]
    messages = [[SYSTEM, *texts.user(each)] for each in asked]
    return {
        "the person's score": mean(map(labeller, prompts, said)),
        "one sentence that ends": mean(map(is_sentence, said)),
        "ended by EOS": mean(ended),
        "log π₀ per token (nats)": texts.fluency(start, encoding, messages, list(zip(said, ended))),
        "distinct pairs of words": texts.distinct_bigrams(said),
        "nats about its question": texts.about_question(start, encoding, asked, said),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="run folder of the converted model")
    parser.add_argument("--seeds", default="30,31,32", help="comma-separated")
    options = parser.parse_args()
    write_files(options.model)
    found = {seed: run(options.model.resolve(), seed) for seed in map(int, options.seeds.split(","))}
    harness.write_results("sentence", found)
    runs = list(found.values())
    print("\n\n".join([*harness.before_and_after(runs), harness.beside_table(runs)]), end="\n\n")
    for seed in found:
        print(harness.first_answers(HERE / f"seed-{seed}/out/ppo", f"question (seed {seed})", question, 3), end="\n\n")


if __name__ == "__main__":
    main()
