"""Stage 1: train a language model on the next token: plain text (pretraining) or prompt → completion (fine-tuning).

    python sft.py                                            both, one after the other, on the embedded tales
    python sft.py --data TEXT.jsonl --out out/base           pretrain from nothing, with a vocabulary of its own
    python sft.py --data PAIRS.jsonl --init out/base         fine-tune; the loss is on the completion and its EOS alone

What --data holds decides which it is: .txt or JSONL with "text", or JSONL with "prompt" and "completion".
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import tiktoken
import torch

import common
import data
import fast
from data import InputError, tales
from model import GPT, GPTConfig


@dataclass
class Config:
    # data
    data: str = ""  # .txt, JSONL "text", or JSONL "prompt" and "completion"; empty: both, on the tales
    init: str = ""  # run folder to start from; empty: random weights
    out: str = "out/sft"  # run folder to write
    block_size: int = 0  # longest row, in tokens; 0: the context of --init. Without --init the context; 0: 128
    # run
    seed: int = 0  # of weights, data order and samples
    device: str = "auto"  # auto, cpu, cuda or mps
    dtype: str = "auto"  # auto, float32 or bfloat16 (autocast)
    compile: bool = False  # torch.compile of the blocks, after a minute of compiling
    checkpoint_activations: bool = False  # in training keep less and compute more
    shard: bool = False  # divide the nets over the processes of torchrun, where one GPU cannot hold them
    evals: int = 5  # times that held-out loss and a sample are shown and the run is saved
    resume: bool = False  # continue the run in --out
    tensorboard: bool = False  # write the metrics for TensorBoard too, into --out
    # training
    epochs: float = 1.0  # passes over the data
    batch_size: int = 16  # rows a step, over all processes; a row of plain text is block_size tokens
    micro_batch_size: int = 0  # rows in one forward; 0: the whole batch
    lr: float = 2e-3  # peak of the learning rate
    warmup: int = 20  # steps of warm-up
    weight_decay: float = 0.1  # on matrices
    max_grad_norm: float = 1.0  # gradients are clipped to this; 0: not clipped
    # model, without --init
    vocab_size: int = 1024  # of the byte-level BPE learned from --data; 0: GPT-2's vocabulary
    arch: str = "gpt2"  # gpt2, or llama: rotary positions, RMSNorm, SwiGLU, no biases
    n_layer: int = 2  # blocks
    n_head: int = 4  # attention heads
    n_embd: int = 192  # channels
    dropout: float = 0.0  # in training


# --- 1 data and model -------------------------------------------------------------------------------------------------


def build(
    cfg: Config, run: common.Run, device: torch.device
) -> tuple[GPT, tiktoken.Encoding, list[data.Row], Callable[[int], list[data.Row]], float]:
    """The model, its tokenizer, held-out rows, a function step → rows of that batch, and the batches in one epoch."""
    if cfg.arch not in ("gpt2", "llama"):
        raise InputError(f"--arch {cfg.arch}: give gpt2 or llama")
    if cfg.n_embd % cfg.n_head:
        raise InputError(f"--n_embd {cfg.n_embd}: not a multiple of --n_head {cfg.n_head}; change one of the two")
    if cfg.init:
        model, encoding = common.load_gpt(cfg.init, device, "--init")
    else:
        if run.state:
            encoding = data.encoding_from_state(run.state["tokenizer"])
        elif cfg.vocab_size == 0:
            encoding = data.gpt2_encoding()
        else:
            encoding = data.learn_bpe(data.documents(cfg.data), cfg.vocab_size)
        shape = (cfg.block_size or 128, cfg.n_layer, cfg.n_head, cfg.n_embd, cfg.dropout)
        config = GPTConfig(encoding.n_vocab, *shape, encoding.eot_token)
        if cfg.arch == "llama":  # Touvron et al. 2023, section 2.2
            config = replace(config, rope_theta=10000.0, rms_norm=True, bias=False, qkv_bias=False, tied=False)
            config = replace(config, swiglu=True, n_inner=64 * max(1, round(cfg.n_embd * 8 / 3 / 64)))
        model = GPT(config).to(device)
    width = common.context(cfg, model)
    rows_of = text_rows if plain_text(cfg.data) else completion_rows
    return model, encoding, *rows_of(cfg, run, encoding, model.config.eos, width)


def plain_text(path: str) -> bool:
    return not data.has_rows(path) or "text" in data.first_row(path)


def completion_rows(
    cfg: Config, run: common.Run, encoding: tiktoken.Encoding, eos: int, width: int
) -> tuple[list[data.Row], Callable[[int], list[data.Row]], float]:
    """Prompt → completion: held-out rows, the batch of each step, batches in an epoch."""
    rows = data.completions(cfg.data, encoding, eos)
    rows = data.keep_short(rows, [len(row.tokens) for row in rows], width, f"rows of {cfg.data}", common.say)
    held_out, rows = data.hold_out(rows)
    lengths = [len(row.tokens) for row in rows]
    batch = partial(data.shuffled, rows, cfg.batch_size, cfg.seed, lengths)
    return held_out, batch, len(rows) / cfg.batch_size


def text_rows(
    cfg: Config, run: common.Run, encoding: tiktoken.Encoding, eos: int, width: int
) -> tuple[list[data.Row], Callable[[int], list[data.Row]], float]:
    """Plain text: the same three, from one stream of tokens, which is kept in the run folder. Its end is held out."""
    if width < 2:
        raise InputError("--block_size 1: a row of one token leaves nothing to predict; give at least 2")
    key = run.inputs["data"], run.inputs["init"], cfg.vocab_size
    tokens = run.made("tokens", key, partial(data.token_stream, cfg.data, encoding, eos))
    stream = data.token_stream(cfg.data, encoding, eos, tokens)
    tail = min(len(stream) // 20, 64 * width)
    if tail < width:
        raise InputError(
            f"{cfg.data}: {len(stream):,} tokens are too few for a context of {width}; give 20 times as many"
        )
    held_out = data.windows(stream[-tail:], width, range(0, tail - width + 1, width))
    stream = stream[:-tail]
    batch = partial(data.random_windows, stream, width, cfg.batch_size, cfg.seed)
    return held_out, batch, len(stream) / width / cfg.batch_size


# --- 2 loss -----------------------------------------------------------------------------------------------------------


def next_token_loss(model: GPT, rows: list[data.Row], device: torch.device) -> torch.Tensor:
    """−Σ log p(token | all before it) over the responses of `rows`, in nats. Plain text answers its first token."""
    return -model.summed_logprobs(*data.pad(rows, device))


def count_targets(rows: list[data.Row]) -> int:
    return sum(len(row.tokens) - row.prompt_len for row in rows)


# --- 3 evaluation -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(model: GPT, rows: list[data.Row], cfg: Config, device: torch.device, autocast: torch.autocast) -> float:
    """Mean loss a token (nats) on held-out rows."""
    model.eval()
    parts = list(data.micro_batches(rows, cfg.micro_batch_size or cfg.batch_size))
    numbers, losses = list(range(len(parts))), {}
    for i in common.together(common.share(numbers), numbers):
        with autocast:
            losses[i] = next_token_loss(model, parts[i], device).item()
    everybody = {i: loss for each in common.gather_objects(losses) for i, loss in each.items()}
    return sum(everybody.values()) / count_targets(rows)


def sample(model: GPT, encoding: tiktoken.Encoding, row: data.Row, cfg: Config, step: int) -> str:
    """The prompt of a held-out row, or the first tokens of plain text, and how the model goes on."""
    prompt = row.tokens[: row.prompt_len if row.prompt_len > 1 else 8]
    room = common.context(cfg, model) - len(prompt)
    chance = common.generator("sample", cfg.seed, step)
    tokens, _, _ = common.whole(model).generate([prompt], min(room, 96), generator=chance)
    return encoding.decode(tokens[0].tolist())


# --- the loop ---------------------------------------------------------------------------------------------------------


def train(cfg: Config) -> None:
    device, autocast = common.setup(cfg)
    run = common.Run(cfg)
    model, encoding, held_out, batch, batches = build(cfg, run, device)
    if cfg.compile:
        fast.compile_blocks(model)
    model.checkpoint_activations = cfg.checkpoint_activations
    model = common.shard(model, cfg)
    optimizer = common.adamw(model, cfg.lr, cfg.weight_decay)
    steps = max(1, round(cfg.epochs * batches))
    run.start(steps, model=model, optimizer=optimizer)
    size = sum(p.numel() for p in model.parameters())
    kind = "plain text" if plain_text(cfg.data) else "prompts and completions"
    common.say(
        f"{cfg.data} ({kind}) → {cfg.out}: {size:,} parameters, {encoding.n_vocab:,} tokens of vocabulary, on {device}"
    )

    for step in range(run.step, steps):
        run.begin_step()
        # 1 The rows of this step.
        rows = batch(step)
        n_targets = count_targets(rows)  # of the whole batch, so that no split of it changes the gradient
        # 2 Forward and backward, one micro-batch at a time.
        model.train()
        torch.manual_seed(common.seed_of("dropout", cfg.seed, step, common.RANK))
        loss = torch.zeros((), device=device)
        for part in data.micro_batches(common.share(rows, cfg.shard), cfg.micro_batch_size or len(rows)):
            with autocast:
                part_loss = next_token_loss(model, part, device) / n_targets
            part_loss.backward()
            loss += part_loss.detach()
        # 3 One step of the optimizer.
        lr = common.warmup_cosine(step, steps, cfg.lr, cfg.warmup)
        norm = common.step_optimizer(optimizer, model, lr, cfg.max_grad_norm)
        # 4 Metrics; now and then held-out loss, a sample and a checkpoint.
        metrics = {"loss/train": common.total(loss).item(), "grad_norm": norm.item(), "lr": lr}
        metrics |= run.speed(sum(len(row.tokens) for row in rows))
        due = (step + 1) * cfg.evals // steps > step * cfg.evals // steps
        if due:
            metrics["loss/held_out"] = evaluate(model, held_out, cfg, device, autocast)
        run.log(step, metrics, show=("loss/train", "loss/held_out", "tokens_per_s") if due or step % 20 == 0 else ())
        if due:
            run.sample(step + 1, sample(model, encoding, held_out[step % len(held_out)], cfg, step))
            run.keep_best(-metrics["loss/held_out"], model, encoding)
        if run.must_save(step, due):
            run.save(step + 1, model, encoding, {}, optimizer=optimizer)
    run.finish(device)


def main() -> None:
    cfg = common.parse(Config)
    if cfg.data:
        return train(cfg)
    if not cfg.init:
        cfg = replace(cfg, init="out/pretrain")
        train(replace(cfg, data=tales.path("pretrain"), init="", out=cfg.init))
    resume = cfg.resume and common.started_from(cfg.out, cfg.init)  # else --out holds another run, which is kept
    train(replace(cfg, data=tales.path("sft"), resume=resume))


if __name__ == "__main__":
    common.run_main(main)
