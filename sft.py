"""Stage 1: train a language model on the next token: plain text (pretraining) or prompt → completion (fine-tuning).

    python sft.py                                            both, one after the other, on the embedded tales
    python sft.py --data TEXT.jsonl --out out/base           pretrain from nothing, with a vocabulary of its own
    python sft.py --data PAIRS.jsonl --init out/base         fine-tune; the loss is on the completion and its EOS alone

What --data holds decides which it is: .txt or JSONL with "text", or JSONL with "prompt" and "completion".
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated

import tiktoken
import torch

import data
from common import cli, dist, folders, lora, nets, runs
from common.cli import Count, Number, Whole
from data import InputError, tales
from data.rng import generator, seed_of
from model import GPT, GPTConfig

WARMUP = 20  # steps in which the rate rises


@dataclass
class Config(cli.Shared):
    # data
    data: str = ""  # .txt, JSONL "text", or JSONL "prompt" and "completion"; empty: both, on the tales
    init: str = ""  # run folder to start from; empty: random weights
    out: str = "out/sft"  # run folder to write
    block_size: Whole = 0  # longest row, in tokens; 0: the context of --init, or 128 without --init
    seed: Whole = 0  # random seed of weights, data order and samples
    # training
    epochs: Number = 1.0  # passes over the data
    batch_size: Count = 16  # rows per step, over all processes; a row of plain text is block_size tokens
    lr: Number = 2e-3  # peak of the learning rate
    weight_decay: Number = 0.1  # strength of AdamW's weight decay, on matrices alone
    evals: Count = 5  # how often held-out loss and a sample are shown, and the run is saved
    # model, without --init
    vocab_size: Whole = 1024  # size of the byte-level BPE that is learned from --data; 0: GPT-2's vocabulary
    arch: str = "gpt2"  # gpt2, or llama: rotary positions, RMSNorm, SwiGLU, no biases
    n_layer: Count = 2  # blocks
    n_head: Count = 4  # attention heads
    n_embd: Count = 192  # channels
    dropout: Annotated[float, (0.0, 0.99)] = 0.0  # share of activations that training sets to 0


# --- the loop ---------------------------------------------------------------------------------------------------------


def train(cfg: Config) -> None:
    device, autocast = cli.setup(cfg)
    run = runs.Run(cfg)
    model, encoding = build(cfg, run, autocast, device)
    plain = not data.has_rows(cfg.data) or "text" in data.first_row(cfg.data)
    held_out, batch, batches = load_rows(cfg, run, encoding, model.config.eos, nets.context(cfg, model), plain)
    cli.prepare(cfg, model)
    optimizer = nets.adamw(model, cfg.lr, cfg.weight_decay)
    steps = max(1, round(cfg.epochs * batches))
    every = math.ceil(steps / cfg.evals)
    run.start(steps, model=model, optimizer=optimizer)
    size = f"{sum(p.numel() for p in model.parameters()):,} parameters, {encoding.n_vocab:,} tokens of vocabulary"
    kind = "plain text" if plain else "prompts and completions"
    dist.print0(f"{cfg.data} ({kind}) → {cfg.out}: {size}, on {device}")

    for step in range(run.step, steps):
        # 1 The rows of this step.
        rows = batch(step)
        n_targets = count_targets(rows)  # of the whole batch, so that no split of it changes the gradient
        # 2 Forward and backward, one micro-batch at a time.
        model.train()
        torch.manual_seed(seed_of("dropout", cfg.seed, step, dist.RANK))
        loss = torch.zeros((), device=device)
        for part in data.micro_batches(dist.mine(rows, cfg.shard), cfg.micro_batch_size or len(rows)):
            with autocast:
                part_loss = next_token_loss(model, part, device) / n_targets
            part_loss.backward()
            loss += part_loss.detach()
        # 3 One step of the optimizer.
        lr = nets.warmup_cosine(step, steps, cfg.lr, WARMUP)
        norm = nets.step_optimizer(optimizer, model, lr, cfg.max_grad_norm)
        # 4 Metrics; now and then held-out loss, a sample and a checkpoint.
        metrics = {"loss/train": dist.total(loss).item(), "grad_norm": norm.item(), "lr": lr}
        due = (step + 1) % every == 0 or step + 1 == steps
        if due:
            with run.timed("evaluate"):
                metrics["loss/held_out"] = held_out_loss(model, held_out, cfg.batch_size, device, autocast)
        shown = ("loss/train", "loss/held_out", "tokens_per_s")
        run.log(step, metrics, shown, tokens=sum(len(row.tokens) for row in rows))
        if due:
            row = held_out[step % len(held_out)]
            with autocast:
                text = sample(model, encoding, row.tokens[: 8 if plain else row.prompt_len], cfg, step)
            run.sample(step + 1, text)
            run.keep_best(-metrics["loss/held_out"], model, encoding)
        if run.due(step, cfg.save_every or every):
            run.save(step + 1, model, encoding, {}, optimizer=optimizer)
    run.finish(device)


# --- 1 model and data -------------------------------------------------------------------------------------------------


def build(cfg: Config, run: runs.Run, autocast: torch.autocast, device: torch.device) -> tuple[GPT, tiktoken.Encoding]:
    """The model and its tokenizer: those of --init, or new ones."""
    if cfg.arch not in ("gpt2", "llama"):
        raise InputError(f"--arch {cfg.arch}: give gpt2 or llama")
    divisor = cfg.n_head * (2 if cfg.arch == "llama" else 1)  # rotary positions turn channels in pairs
    if cfg.n_embd % divisor:
        raise InputError(f"--n_embd {cfg.n_embd}: for --n_head {cfg.n_head} give a multiple of {divisor}")
    if cfg.init:
        model, encoding = nets.load_gpt(cfg.init, device, "--init", lora.Trunks(cfg.lora, autocast))
        for name in ("n_layer", "n_head", "n_embd", "dropout"):
            asked, its = getattr(cfg, name), getattr(model.config, name)
            if asked not in (its, getattr(Config, name)):
                raise InputError(f"--{name}: the model of --init {cfg.init} has {its} and keeps it; leave it out")
        return model, encoding
    if cfg.lora:
        raise InputError("--lora: adapts a model that is trained already; name its run folder with --init")
    if run.state:
        encoding = run.state["encoding"]
    elif cfg.vocab_size == 0:
        encoding = data.gpt2_encoding()
    else:
        encoding = data.learn_bpe(data.documents(cfg.data), cfg.vocab_size)
    shape = (cfg.block_size or 128, cfg.n_layer, cfg.n_head, cfg.n_embd, cfg.dropout)
    config = GPTConfig(encoding.n_vocab, *shape, encoding.eot_token)
    if cfg.arch == "llama":  # Touvron et al. 2023, section 2.2
        config = replace(config, rope_theta=10000.0, rms_norm=True, bias=False, qkv_bias=False, tied=False)
        config = replace(config, swiglu=True, n_inner=64 * max(1, round(cfg.n_embd * 8 / 3 / 64)))
    return GPT(config).to(device), encoding


def load_rows(
    cfg: Config, run: runs.Run, encoding: tiktoken.Encoding, eos: int, width: int, plain: bool
) -> tuple[list[data.Row], Callable[[int], list[data.Row]], float]:
    """Held-out rows, a function step → rows of that batch, and the batches in one epoch.

    Plain text becomes one stream of tokens, which is kept in the run folder; its end is held out.
    """
    if not plain:
        rows = data.completions(cfg.data, encoding, eos)
        rows = data.keep_short(rows, [len(row.tokens) for row in rows], width, f"rows of {cfg.data}", dist.print0)
        held_out, rows = data.hold_out(rows, encoding, say=dist.print0)
        lengths = [len(row.tokens) for row in rows]
        batch = partial(data.shuffled, rows, cfg.batch_size, cfg.seed, lengths)
        return held_out, batch, len(rows) // min(cfg.batch_size, len(rows))
    tokens = run.made("tokens", partial(data.token_stream, cfg.data, encoding, eos))
    stream = data.token_stream(cfg.data, encoding, eos, tokens)
    tail = min(len(stream) // 20, 64 * width)
    if tail < width or width < 2:
        what = f"{len(stream):,} tokens are too few for a context of {width}"
        raise InputError(f"{cfg.data}: {what}; give 20 times as many as --block_size, which is at least 2")
    held_out = data.windows(stream[-tail:], width, range(0, tail - width + 1, width))
    batch = partial(data.random_windows, stream[:-tail], width, cfg.batch_size, cfg.seed)
    return held_out, batch, (len(stream) - tail) / width / cfg.batch_size


# --- 2 loss -----------------------------------------------------------------------------------------------------------


def next_token_loss(model: GPT, rows: list[data.Row], device: torch.device) -> torch.Tensor:
    """−Σ log p(token | all before it) over the responses of `rows`, in nats. The first token of plain text is given."""
    return -model.logprobs(*data.pad(rows, device)).sum()


def count_targets(rows: list[data.Row]) -> int:
    return sum(len(row.tokens) - row.prompt_len for row in rows)


# --- 3 evaluation -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def held_out_loss(model: GPT, rows: list[data.Row], size: int, device: torch.device, autocast: torch.autocast) -> float:
    """Mean loss per token (nats) on held-out rows, `size` rows at a time. The processes share the work."""
    model.eval()
    parts = list(data.micro_batches(rows, size))
    numbers, losses = list(range(len(parts))), {}
    mine = dist.mine(numbers)
    mine = dist.pad_to_equal(mine, numbers) if dist.is_sharded(model) else mine
    for i in dist.counted(mine, "held-out rows"):
        with autocast:
            losses[i] = next_token_loss(model, parts[i], device).item()
    everybody = {i: loss for each in dist.gather_objects(losses) for i, loss in each.items()}
    return sum(everybody.values()) / count_targets(rows)


def sample(model: GPT, encoding: tiktoken.Encoding, prompt: list[int], cfg: Config, step: int) -> str:
    """The prompt, and how the model goes on. A prompt that fills the context is cut."""
    longest = nets.context(cfg, model)
    prompt = prompt[: longest - 1]
    rng = generator("sample", cfg.seed, step)
    tokens, _, _ = dist.gathered(model).generate([prompt], min(longest - len(prompt), 96), generator=rng)
    return encoding.decode(tokens[0].tolist())


def main() -> None:
    cfg = cli.parse(Config)
    if cfg.data:
        return train(cfg)
    if not cfg.init:
        cfg = replace(cfg, init="out/pretrain")
        train(replace(cfg, data=tales.path("pretrain"), init="", out=cfg.init))
    resume = cfg.resume and folders.started_from(cfg.out, cfg.init)  # if not, --out holds another run: it is renamed
    train(replace(cfg, data=tales.path("sft"), resume=resume))


if __name__ == "__main__":
    cli.run_main(main)
