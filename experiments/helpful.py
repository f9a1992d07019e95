"""A chat model and human comparisons: PPO on Anthropic's HH, measured by a reward model that it never meets.

    python -m tools.get.hh --messages --source helpful-*/test.jsonl.gz                         three sets' test files
    python -m tools.hf HuggingFaceTB/SmolLM2-135M-Instruct out/smollm2                        the public model
    OMP_NUM_THREADS=1 python -m experiments.helpful --model out/smollm2                   seed 1, two hours

Comparisons of at most 160 tokens and questions of at most 64 are used. The comparisons are cut in two halves by the
opening question. PPO follows a reward model that is trained on one half. A second model, which measures, is trained on
the other half. It has another seed, and starts from a model that was fine-tuned on its half's chosen answers; but both
come from the same language model, so they may err alike. Each is evaluated on the other half: this accuracy says what
its number is worth.

It prints a table and the answers to the first eight held-out prompts. What has run is kept in out/experiments/helpful;
a stopped run goes on.
"""

import argparse
import functools
import json
import zlib
from pathlib import Path

import torch

import data
from common import nets
from experiments.harness import EVAL, FOLDER, KL, cell_after, first_answers, interval, markdown, seconds, stage
from tools.get import hh

HERE = FOLDER / "helpful"
JUDGE = "experiments/helpful.py:judge"
LONGEST, LONGEST_PROMPT = 160, 64  # tokens
SFT = "--block_size 160 --batch_size 8 --lr 2e-5 --weight_decay 0 --evals 1 --epochs 0.5".split()
REWARD = "--block_size 160 --batch_size 8 --lr 1e-4 --response_len 32".split()
PPO = "--block_size 96 --response_len 32 --unended_cap inf --kl_coef 0.05 --eval_prompts 200".split()
PPO += "--iterations 60 --batch_size 24 --minibatch_size 12 --epochs 1 --lr 3e-5 --value_lr 1e-4".split()
PPO += "--value_warmup 4 --save_every 10".split()


@functools.cache
def measure() -> tuple:
    """The second reward model, out/measure of the current folder, and its tokenizer."""
    net, encoding = nets.load_scalar("out/measure")
    return nets.freeze(net, torch.autocast("cpu", enabled=False)), encoding


@torch.no_grad()
def judge(prompts: list[str], responses: list[str]) -> list[float]:
    """The score that the second reward model gives each answer; EOS stands at its end, as in the comparisons."""
    net, encoding = measure()
    rows = [data.encode_row(encoding, net.config.eos, *pair) for pair in zip(prompts, responses)]
    found: list[float] = []
    for start in range(0, len(rows), 32):
        tokens, _, length = data.pad(rows[start : start + 32])
        found += net.scores(tokens, length).tolist()
    return found


def write_files(model: Path) -> None:
    """Write what is short enough: the halves of the comparisons, the chosen answers of the second, and the prompts."""
    net, encoding = nets.load_gpt(model)
    files: dict[str, list[dict]] = {"compare-0": [], "compare-1": [], "chosen-1": []}
    for row in data.read_jsonl(hh.FOLDER / "compare.jsonl", {"prompt": list, "chosen": list, "rejected": list}):
        half = zlib.crc32(row["prompt"][0]["content"].encode()) % 2
        texts = [row[name][0]["content"] for name in ("chosen", "rejected")]
        lengths = [len(data.encode_row(encoding, net.config.eos, row["prompt"], text).tokens) for text in texts]
        if max(lengths) <= LONGEST:
            files[f"compare-{half}"].append(row)
        if half == 1 and lengths[0] <= LONGEST:
            files["chosen-1"].append({"prompt": row["prompt"], "completion": row["chosen"]})
    for name in ("ppo", "eval"):
        rows = data.read_jsonl(hh.FOLDER / f"{name}.jsonl", {"prompt": list})
        files[name] = [row for row in rows if len(data.encode_prompt(encoding, row["prompt"])) <= LONGEST_PROMPT]
    for name, rows in files.items():
        data.write_jsonl(HERE / f"{name}.jsonl", rows)


def run(model: Path, seed: int) -> tuple[Path, dict[str, str]]:
    """The run folder of PPO, and what each stage printed."""
    folder, mine, others = HERE / f"seed-{seed}", ["--seed", seed], ["--seed", seed + 100]
    chosen = ["--data", "../chosen-1.jsonl", "--init", model, "--out", "out/fine-tuned"]
    data_1 = ["--data", "../compare-1.jsonl", "--init", "out/fine-tuned", "--out", "out/measure"]
    data_0 = ["--data", "../compare-0.jsonl", "--init", model]
    prompts = ["--data", "../ppo.jsonl", "--eval_data", "../eval.jsonl", "--judge", JUDGE]
    printed = {
        "fine-tuned": stage(folder, "fine-tuned", "sft.py", *chosen, *others, *SFT),
        "measure": stage(folder, "measure", "reward.py", *data_1, *others, *REWARD),
        "reward": stage(folder, "reward", "reward.py", *data_0, *mine, *REWARD),
        "ppo": stage(folder, "ppo", "ppo.py", "--init", model, *mine, *prompts, *PPO),
    }
    for name, half in (("measure", 0), ("reward", 1)):
        unseen = [f"out/{name}", "--data", f"../compare-{half}.jsonl"]
        printed[f"{name} on unseen"] = stage(folder, f"{name}-unseen", EVAL, *unseen)
    return folder / "out" / "ppo", printed


def last_question(prompt: str) -> str:
    """What the user said last, in the ChatML of SmolLM2."""
    return prompt.rpartition("<|im_start|>user")[2].partition("<|im_end|>")[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="run folder of the converted model")
    parser.add_argument("--seeds", default="1", help="comma-separated")
    options = parser.parse_args()
    write_files(options.model)
    rows, folders = [], {}
    for seed in map(int, options.seeds.split(",")):
        folders[seed], printed = run(options.model.resolve(), seed)
        table = json.loads((folders[seed] / "report.json").read_text())["table"]
        names = ("reward on unseen", "measure on unseen")
        accuracy = [cell_after(printed[name], "held-out accuracy") for name in names]
        cells = [interval(*table[name][side]) for name in (JUDGE, "score") for side in ("before", "after")]
        took = f"{sum(map(seconds, printed.values())):.0f}"
        rows.append([seed, *accuracy, *cells, interval(*table[KL]["after"]), took])
    header = ["seed", "accuracy of the reward model", "of the measure", "measure before", "measure after"]
    print(markdown([*header, "score before", "score after", "KL", "seconds"], rows), end="\n\n")
    for seed, folder in folders.items():
        print(first_answers(folder, f"question (seed {seed})", last_question), end="\n\n")


if __name__ == "__main__":
    main()
