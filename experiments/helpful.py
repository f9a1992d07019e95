"""A chat model and human comparisons: PPO on Anthropic's HH, measured by a reward model that it never meets.

    python -m data.hh --messages                                                          the dialogues
    hf download HuggingFaceTB/SmolLM2-135M-Instruct --local-dir out/smollm2-hf            the public model
    python -m data.weights out/smollm2-hf out/smollm2
    OMP_NUM_THREADS=1 python -m experiments.helpful --model out/smollm2                   seed 1, two hours

The comparisons are cut in two halves by the opening question. On one half a reward model is trained, which PPO
follows. On the other half a second model measures: it has another seed, and starts from a model that was fine-tuned on
that half's chosen answers. No judge stands above it, so its own held-out accuracy says what its number is worth.

It prints the tables and eight pairs that nobody picked. What has run is kept in out/experiments/helpful; a stopped
run goes on.
"""

import argparse
import functools
import json
import re
import zlib
from pathlib import Path

import torch

import common
import data
from data import hh
from experiments.harness import FOLDER, markdown, seconds, stage
from experiments.reviews import interval, pairs

HERE = FOLDER / "helpful"
JUDGE, KL = "experiments/helpful.py:judge", "KL to the start (nats)"
SHORT = "--block_size 160 --drop_long".split()
SFT = [*SHORT, *"--batch_size 8 --lr 2e-5 --warmup 10 --weight_decay 0 --evals 1 --epochs 0.5".split()]
REWARD = [*SHORT, *"--n_prompts 800 --batch_size 8 --lr 1e-4 --response_len 32".split()]
PPO = "--block_size 96 --drop_long --response_len 32 --unended_cap inf --kl_coef 0.05 --eval_prompts 200".split()
PPO += "--iterations 60 --batch_size 24 --minibatch_size 12 --epochs 1 --lr 3e-5 --value_lr 1e-4".split()
PPO += "--value_warmup 4 --lr_warmup 8 --save_every 10".split()


@functools.cache
def measure() -> tuple:
    """The second reward model, out/measure of the current folder, and its tokenizer."""
    net, encoding = common.load_scalar("out/measure")
    return common.freeze(net, torch.autocast("cpu", enabled=False)), encoding


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


def halves() -> None:
    """Write the halves of the comparisons, and the chosen answers of the second."""
    files = [HERE / f"compare-{i}.jsonl" for i in range(2)] + [HERE / "chosen-1.jsonl"]
    if all(file.exists() for file in files):
        return
    HERE.mkdir(parents=True, exist_ok=True)
    rows: list[list[dict]] = [[], [], []]
    for row in data.read_jsonl(hh.FOLDER / "compare.jsonl", {"prompt": list, "chosen": list, "rejected": list}):
        half = zlib.crc32(row["prompt"][0]["content"].encode()) % 2
        rows[half].append(row)
        if half == 1:
            rows[2].append({"prompt": row["prompt"], "completion": row["chosen"]})
    for file, some in zip(files, rows):
        data.write_jsonl(file, some)


def run(model: Path, seed: int) -> tuple[Path, dict[str, str]]:
    """The run folder of PPO, and what each stage printed."""
    folder, start = HERE / f"seed-{seed}", ["--init", model, "--seed", seed]
    other = ["--seed", seed + 100, "--out", "out/other"]
    printed = {"other": stage(folder, "other", "sft.py", "--data", "../chosen-1.jsonl", "--init", model, *other, *SFT)}
    other = ["--init", "out/other", "--seed", seed + 100, "--out", "out/measure"]
    printed["measure"] = stage(folder, "measure", "reward.py", "--data", "../compare-1.jsonl", *other, *REWARD)
    printed["reward"] = stage(folder, "reward", "reward.py", "--data", "../compare-0.jsonl", *start, *REWARD)
    prompts = ["--data", hh.FOLDER / "ppo.jsonl", "--eval_data", hh.FOLDER / "eval.jsonl", "--judge", JUDGE]
    printed["ppo"] = stage(folder, "ppo", "ppo.py", *start, *prompts, *PPO)
    return folder / "out" / "ppo", printed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="run folder of the converted model")
    parser.add_argument("--seeds", default="1", help="comma-separated")
    options = parser.parse_args()
    halves()
    rows, folders = [], {}
    for seed in map(int, options.seeds.split(",")):
        folders[seed], printed = run(options.model.resolve(), seed)
        table = json.loads((folders[seed] / "report.json").read_text())["table"]
        accuracy = [re.search(r"held-out accuracy (\S+ ± \S+)", printed[name])[1] for name in ("reward", "measure")]
        cells = [interval(*table[name][side]) for name in (JUDGE, "score") for side in ("before", "after")]
        took = " + ".join(f"{seconds(text):.0f}" for text in printed.values())
        rows.append([seed, *accuracy, *cells, interval(*table[KL]["after"]), took])
    header = ["seed", "reward accuracy", "measure's accuracy", "measure before", "measure after"]
    print(markdown([*header, "score before", "score after", "KL", "seconds"], rows), end="\n\n")
    for seed, folder in folders.items():
        print(pairs(folder, seed), end="\n\n")


if __name__ == "__main__":
    main()
