"""The project's speed, beside other libraries' on the same shapes and random weights: JSON lines, then a table.

    python -m tests.bench                                         training, generation, a PPO iteration, on 2 shapes
    python -m tests.bench --vs transformers,trl                   interleaved with what is installed of them
    python -m tests.bench --shapes gpt2 --what generate,ppo       GPT-2's 124M
    python -m tests.bench --what profile                          what training and PPO's update spend their time on
    python -m tests.bench --what growth --plot growth.svg         how time and memory grow with batch, length, …

Contenders take turns, in reverse order every other round, each in a process of its own, so that memory and its settings
are its own; figures are medians, ratios are of the same round. A busy neighbour makes a step several times slower: stop
other work first.
"""

import argparse
import gc
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch

import common
import data
import fast
import ppo
from model import GPT, GPTConfig, ScalarModel

SHAPES = {  # V, layers, heads, C
    "small": (1024, 4, 4, 128),
    "wide": (50257, 4, 4, 128),
    "gpt2": (50257, 12, 12, 768),
    "gpt2-medium": (50257, 24, 16, 1024),
}
PROMPT, NEW = 16, 48
PLAIN, COMPILED = "plainrlhf", "plainrlhf --compile"


def make_gpt(shape: tuple[int, int, int, int], block_size: int, device: torch.device) -> GPT:
    """Random weights, and no EOS that could end a response early."""
    torch.manual_seed(0)
    vocab_size, n_layer, n_head, n_embd = shape
    model = GPT(GPTConfig(vocab_size, block_size, n_layer, n_head, n_embd, eos=vocab_size - 1)).to(device)
    model.config.eos = -1
    return model


def make_theirs(shape: tuple[int, int, int, int], block_size: int, device: torch.device, **kind):
    import transformers

    vocab_size, n_layer, n_head, n_embd = shape
    config = transformers.GPT2Config(
        vocab_size=vocab_size, n_positions=block_size, n_embd=n_embd, n_layer=n_layer, n_head=n_head, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None, **kind,
    )  # fmt: skip
    name = "GPT2ForSequenceClassification" if "num_labels" in kind else "GPT2LMHeadModel"
    return getattr(transformers, name)(config).to(device)


def random_tokens(vocab_size: int, *size: int) -> torch.Tensor:
    return torch.randint(0, vocab_size - 1, size, generator=torch.Generator().manual_seed(1))


# --- what is timed: a function that does the work once, and what it counts ------------------------------------------


def train(shape: tuple, batch: int, device: torch.device, who: str) -> tuple[Callable[[], None], int]:
    """Forward, backward and AdamW on `batch` rows of 64 tokens, of which transformers has 63 to predict."""
    T, theirs = 64, who == "transformers"
    model = (make_theirs if theirs else make_gpt)(shape, T + 1, device).train()
    if who == COMPILED:
        fast.compile_blocks(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = random_tokens(shape[0], batch, T + 1).to(device)
    first = torch.ones(batch, dtype=torch.long)

    def step() -> None:
        if theirs:
            loss = model(input_ids=tokens[:, :-1], labels=tokens[:, :-1], use_cache=False).loss
        else:
            loss = -model.logprobs(tokens, first, first + T).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, batch * T


def generate(shape: tuple, batch: int, device: torch.device, who: str) -> tuple[Callable[[], None], int]:
    """NEW tokens to each of `batch` prompts of PROMPT, drawn at temperature 1 with a cache."""
    prompts = random_tokens(shape[0], batch, PROMPT).to(device)
    if who != "transformers":
        model = make_gpt(shape, PROMPT + NEW, device)
        if who == COMPILED:
            fast.compile_blocks(model)
        return lambda: model.generate(prompts.tolist(), NEW), batch * NEW
    model = make_theirs(shape, PROMPT + NEW, device).eval()
    how = dict(max_new_tokens=NEW, do_sample=True, top_k=0, pad_token_id=0, eos_token_id=None)
    return lambda: model.generate(prompts, attention_mask=torch.ones_like(prompts), **how), batch * NEW


def ppo_iterations(
    shape: tuple,
    batch: int,
    minibatches: int,
    device: torch.device,
    who: str,
    n: int = 4,
    response_len: int = 32,
    epochs: int = 4,
    watch: AbstractContextManager | None = None,
) -> list[dict]:
    """Seconds of each phase of `n` iterations, the first left out; the last update is made under `watch`."""
    cfg = ppo.Config(batch_size=batch, minibatch_size=batch // minibatches, response_len=response_len, lr=1e-5)
    cfg.epochs = epochs
    cfg.device = str(device)
    _, autocast = common.setup(cfg)
    policy, ref, value, reward = (make_gpt(shape, PROMPT + response_len, device) for _ in range(4))
    value, reward = ScalarModel(value).to(device), ScalarModel(reward).to(device)
    ref, reward = common.freeze(ref, autocast), common.freeze(reward, autocast)
    policy.eval(), value.eval()
    if who == COMPILED:
        fast.compile_blocks(policy, ref, value.trunk, reward.trunk)
    score = ppo.scorer(reward, None, -1)
    optimizers = [common.adamw(net, cfg.lr, 0.0, eps=1e-5) for net in (policy, value)]
    prompts = random_tokens(shape[0], 4 * batch, PROMPT).tolist()
    lines = []
    for step in range(n):
        clock = [time.perf_counter()]

        def tick(clock: list[float] = clock) -> None:
            if device.type == "cuda":
                torch.cuda.synchronize()
            clock.append(time.perf_counter())

        ids = data.shuffled(prompts, batch, 0, None, step)
        with autocast:
            answers = ppo.rollout(policy, ids, cfg, common.generator(0, 1, step))
            tick()
            answers |= ppo.read(answers, policy, ref, value, score, cfg)
            answers |= ppo.estimate(answers, cfg.kl_coef, -1.0, cfg)
        tick()
        with watch if watch and step == n - 1 else nullcontext():
            ppo.update(policy, value, *optimizers, answers, cfg.lr, cfg, autocast, step)
        ppo.rollout_metrics(answers, [], cfg.kl_coef)
        tick()
        seconds = dict(zip(("rollout", "score", "update"), np.diff(clock).tolist()))
        lines.append(seconds | {"seconds": clock[-1] - clock[0]})
    return lines[1:]


def trl_iterations(
    shape: tuple, batch: int, minibatches: int, device: torch.device, who: str, n: int = 4
) -> list[dict]:
    """The same work by TRL's PPOTrainer (in trl.experimental up to 1.12)."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    V, ends = shape[0], []
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(V)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    last = f"t{V - 1}"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token=last, pad_token=last, padding_side="left")

    class Clock(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            ends.append(time.perf_counter())

        on_step_end = on_train_begin

        def on_log(self, *args, **kwargs):
            pass

    def net(**kind):
        return make_theirs(shape, PROMPT + 32, device, **kind)

    scalar = {"num_labels": 1, "pad_token_id": V - 1}
    args = PPOConfig(
        output_dir=tempfile.mkdtemp(), report_to="none", disable_tqdm=True, save_strategy="no",
        use_cpu=device.type == "cpu", per_device_train_batch_size=batch, gradient_accumulation_steps=1,
        num_mini_batches=minibatches, num_ppo_epochs=4, total_episodes=batch * n, response_length=32, temperature=1.0,
        local_rollout_forward_batch_size=batch, num_sample_generations=0, learning_rate=1e-5,
        bf16=device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False),
        gradient_checkpointing=False,
    )  # fmt: skip
    rows = Dataset.from_dict({"input_ids": random_tokens(V, 4 * batch, PROMPT).tolist()})
    PPOTrainer(
        args=args, processing_class=tokenizer, model=net(), ref_model=net(), reward_model=net(**scalar),
        value_model=net(**scalar), train_dataset=rows, callbacks=[Clock()],
    ).train()  # fmt: skip
    return [{"seconds": seconds} for seconds in np.diff(ends).tolist()[1:]]


# --- measuring --------------------------------------------------------------------------------------------------------


def rate(work: Callable[[], None], count: int, device: torch.device, seconds: float = 3.0) -> float:
    """Units a second, over about `seconds`."""
    gc.collect()
    began, n = time.perf_counter(), 0
    while time.perf_counter() - began < seconds or n < 2:
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        n += 1
    return n * count / (time.perf_counter() - began)


def alone(who: str, what: str, shape: tuple, *sizes: int, device: torch.device) -> dict:
    """What `child` found in a process of its own."""
    command = [sys.executable, "-m", "tests.bench", "--child", json.dumps([who, what, shape, *sizes])]
    done = subprocess.run([*command, "--device", str(device)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{who}, {what}, {shape}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def child(who: str, what: str, shape: list[int], *sizes: int, device: torch.device) -> None:
    """Tokens a second, or medians of a PPO iteration's phases; and peak memory, whole and less what torch takes."""
    before = common.peak_memory(device)
    if who in (PLAIN, COMPILED) and device.type == "cpu":
        common.keep_memory()
    if what == "ppo":
        batch, minibatches, *more = sizes
        lines = (trl_iterations if who == "trl" else ppo_iterations)(
            tuple(shape), batch, minibatches, device, who, *more
        )
        found = {key: statistics.median(line[key] for line in lines) for key in lines[0]}
    else:
        work, count = {"train": train, "generate": generate}[what](tuple(shape), *sizes, device, who)
        work()
        found = {"tokens_per_s": rate(work, count, device)}
    peak = common.peak_memory(device)
    print("\n" + json.dumps(found | {"peak_GiB": peak, "own_GiB": peak - before}))


def compare(what: str, name: str, ours: str, rivals: list[str], rounds: int, device: torch.device) -> None:
    """A JSON line for each contender; "ratio" is ours to it, round by round."""
    small, large = {"train": [32], "generate": [64], "ppo": [64, 4]}, {"train": [8], "generate": [8], "ppo": [8, 2]}
    sizes = (large if "gpt2" in name else small)[what]
    contenders = [ours] + [rival for rival in rivals if rival == ("trl" if what == "ppo" else "transformers")]
    found: dict[str, list[dict]] = {who: [] for who in contenders}
    for r in range(rounds):
        for who in contenders[:: 1 if r % 2 == 0 else -1]:
            found[who].append(alone(who, what, SHAPES[name], *sizes, device=device))
    key = "seconds" if what == "ppo" else "tokens_per_s"
    for who, runs in found.items():
        ratios = [mine[key] / theirs[key] for mine, theirs in zip(found[ours], runs)]
        line = {"what": what, "shape": name, "who": who, "rounds": rounds}
        line |= {"ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios)}
        LINES.append(line | {each: statistics.median(run[each] for run in runs) for each in runs[0]})
        print(json.dumps(LINES[-1]), flush=True)


def profile(name: str, device: torch.device) -> None:
    """Shares of a training step and of an epoch of PPO's update, by kernel; and how near the products come to the peak.

    What the profiler itself allocates breaks up the memory that is kept; so there is plenty of it from the start, lest
    clearing new pages be counted as work.
    """
    shape, (batch, minibatches, rows) = SHAPES[name], (8, 2, 8) if "gpt2" in name else (64, 4, 32)
    if device.type == "cpu":
        common.keep_memory()
        torch.empty(2**31 if "gpt2" in name else 2**29).fill_(0)
    square = torch.randn(2048, 2048, device=device)
    peak = max(rate(lambda: square @ square, 2 * 2048**3, device, 1.0) for _ in range(3)) / 1e9
    families = {"attention": ("attention", "bmm", "softmax"), "products": ("mm", "mkldnn")}
    families |= {"activation": ("gelu", "GELU", "sigmoid", "pow", "addcmul")}
    families |= {"norms": ("layer_norm",), "optimizer": ("adam", "foreach"), "copies": ("copy_", "fill_", "::cat")}
    time_of = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    for what in ("train", "update"):
        found = torch.profiler.profile(record_shapes=True, with_flops=True)
        if what == "train":
            step, _ = train(shape, rows, device, PLAIN)
            step(), step()
            with found:
                step()
        else:
            ppo_iterations(shape, batch, minibatches, device, PLAIN, n=2, epochs=1, watch=found)
        spent: dict[str, float] = dict.fromkeys([*families, "other"], 0.0)
        flops = 0.0
        for event in found.key_averages(group_by_input_shape=True):
            if event.device_type != torch.autograd.DeviceType.CPU:
                continue  # a kernel, which its operator counts already
            family = next((f for f, parts in families.items() if any(part in event.key for part in parts)), "other")
            flops += event.flops * (family == "products")
            if "linear_pointwise" in event.key:  # which the profiler does not count: x (…, I), W (O, I)
                flops += 2 * event.count * math.prod(event.input_shapes[0]) * event.input_shapes[1][0]
            spent[family] += getattr(event, time_of) / 1e6  # seconds
        whole = sum(spent.values())
        line = {"what": "profile", "of": what, "shape": name, "seconds": round(whole, 3)}
        line |= {family: round(seconds / whole, 3) for family, seconds in spent.items()}
        print(
            json.dumps(line | {"products_GFLOPs": round(flops / spent["products"] / 1e9), "peak_GFLOPs": round(peak)})
        )


LINES: list[dict] = []
CURVES: list[dict] = []


def growth(device: torch.device, target: str) -> None:
    """Time and memory of a PPO iteration at four points of each axis; the exponent is the power law's from end to end.

    What does not vary stays at 32 prompts, 32 new tokens, a vocabulary of 1,024 and 128 channels. Memory is what the
    iteration adds to an interpreter with torch.
    """
    axes = {
        "batch": [16, 32, 64, 128],
        "response length": [32, 64, 128, 256],
        "vocabulary": [1024, 4096, 16384, 65536],
        "parameters": [128, 256, 384, 512],  # by width
    }
    for axis, points in axes.items():
        found: list[dict] = []
        for x in points:
            at = {"batch": 32, "response length": 32, "vocabulary": 1024, "parameters": 128} | {axis: x}
            shape = at["vocabulary"], 4, 4, at["parameters"]
            found.append(alone(PLAIN, "ppo", shape, at["batch"], 4, 4, at["response length"], device=device))
        if axis == "parameters":
            points = [
                sum(p.numel() for p in make_gpt((1024, 4, 4, x), 48, torch.device("cpu")).parameters()) for x in points
            ]
        line: dict = {"what": "growth", "with": axis, "at": points}
        for key in ("rollout", "score", "update", "own_GiB"):
            values = [each[key] for each in found]
            line[key] = [round(value, 4) for value in values]
            line[f"{key}_exponent"] = round(math.log(values[-1] / values[0]) / math.log(points[-1] / points[0]), 2)
        CURVES.append(line)
        print(json.dumps(line), flush=True)
    if target:
        draw(target)


def draw(target: str) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    names = {"rollout": "rollout (s)", "score": "score (s)", "update": "update (s)", "own_GiB": "memory (GiB)"}
    figure, axes = pyplot.subplots(1, len(CURVES), figsize=(13, 3.6), sharey=True)
    for axis, line in zip(axes, CURVES):
        for i, (key, name) in enumerate(names.items()):
            style = dict(color=f"C{i}", marker="o", linestyle="--" if key == "own_GiB" else "-")
            axis.loglog(line["at"], line[key], label=f"{name}: {line[f'{key}_exponent']:.2f}", **style)
        axis.set_xlabel(line["with"])
        axis.set_xticks(line["at"], [f"{x / 1e6:.1f}M" if x >= 1e5 else f"{x:,}" for x in line["at"]])
        axis.minorticks_off()
        axis.legend(frameon=False, fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylim(top=5 * axes[0].get_ylim()[1])  # room for the legends
    figure.tight_layout()
    figure.savefig(target, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--what", default="train,generate,ppo", help="of train, generate, ppo, growth, profile")
    parser.add_argument("--shapes", default="small,wide", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--vs", default="", help="of transformers, trl")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--plot", default="", help="an SVG to draw growth into")
    parser.add_argument("--compile", action="store_true", help="plainrlhf's stages with --compile")
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = common.pick_device(options.device)
    if options.child:
        who, what, shape, *sizes = json.loads(options.child)
        return child(who, what, shape, *sizes, device=device)
    whats = options.what.split(",")
    for name in options.shapes.split(","):
        for what in [what for what in ("train", "generate", "ppo") if what in whats]:
            rounds = max(1, options.rounds // 2) if what == "ppo" else options.rounds
            compare(what, name, COMPILED if options.compile else PLAIN, options.vs.split(","), rounds, device)
        if "profile" in whats:
            profile(name, device)
    if "growth" in whats:
        growth(device, options.plot)
    if LINES:
        print(f"\n{'':<20}{'':<21}{'':>12}   plainrlhf / it")
    for line in LINES:
        value = f"{line['seconds']:.2f} s" if "seconds" in line else f"{line['tokens_per_s']:,.0f} tok/s"
        spread = f"{line['ratio']:.2f}  ({line['ratio_min']:.2f}-{line['ratio_max']:.2f})"
        memory = f"   {line['peak_GiB']:.2f} GiB" if "peak_GiB" in line else ""
        print(f"{line['what'] + ', ' + line['shape']:<20}{line['who']:<21}{value:>14}   {spread}{memory}")


if __name__ == "__main__":
    main()
