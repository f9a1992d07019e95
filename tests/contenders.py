"""The work that is timed, and those who do it: this project, plain PyTorch, transformers, TRL and nanoGPT.

A contender is named `project` or `project:variant`. Variants of this project are `plainrlhf:compile`,
`plainrlhf:checkpoint_activations`, `plainrlhf:plain` (model.py's plain lines, without fast.py) and, with one plain line
alone, `plainrlhf:plain-attend` and so on. Of others `:kept` is one whose freed memory stays with the process, as ours.
All have random weights of the same shapes, and on a GPU the same autocast.
"""

import functools
import importlib.util
import os
import sys
import tempfile
import time
import types
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import data
import fast
import model
import ppo
from common import about, agreement, cli, measure, nets
from data.rng import generator
from model import GPT, ScalarModel
from reward import pairwise_loss
from tests.shapes import config_of

OURS = "plainrlhf"
PLAIN = ("Linear", "attend", "pack", "linear_float32", "token_logprobs", "draw", "decoding")
RIVALS = {"train": ["transformers", "nanogpt"], "generate": ["floor", "transformers", "nanogpt"], "ppo": ["trl"]}


# --- nets -------------------------------------------------------------------------------------------------------------


@functools.cache
def plain_model() -> types.ModuleType:
    """model.py without the line that imports fast.py."""
    text = Path(model.__file__).read_text()
    line = next(line for line in text.splitlines() if line.startswith("from fast import"))
    module = sys.modules["plain_model"] = types.ModuleType("plain_model")  # dataclasses look it up
    exec(compile(text.replace(line, ""), "plain_model.py", "exec"), module.__dict__)
    return module


def use_plain_lines(names: tuple[str, ...]) -> None:
    """From now on model.py computes by these plain lines of its own, not by fast.py's functions."""
    for name in names:
        setattr(model, name, getattr(plain_model(), name))
    if "decoding" in names:
        GPT.generate = model.decoding(GPT.generate.__wrapped__)


def make_gpt(name: str, block_size: int, device: torch.device, variant: str = "") -> GPT:
    """Random weights, and no EOS that could end a response early."""
    kind, _, part = variant.partition("-")
    if kind == "plain":
        use_plain_lines((part,) if part else PLAIN)
    torch.manual_seed(0)
    with device:
        net = GPT(config_of(name, block_size))
    net.config.eos = -1
    net.checkpoint_activations = variant == "checkpoint_activations"
    if variant == "compile":
        fast.compile_blocks(net)
    return net


def make_theirs(name: str, block_size: int, device: torch.device, **kind):
    """The same shape in transformers, as a language model or, with `num_labels`, under a scalar head."""
    import transformers

    config = config_of(name, block_size)
    shape = dict(vocab_size=config.vocab_size, bos_token_id=None, eos_token_id=None, **kind)
    if config.swiglu:
        shape |= dict(
            hidden_size=config.n_embd, intermediate_size=config.n_inner, num_hidden_layers=config.n_layer,
            num_attention_heads=config.n_head, num_key_value_heads=config.n_kv_head,
            max_position_embeddings=block_size, tie_word_embeddings=config.tied,
        )  # fmt: skip
        family, theirs = "Llama", transformers.LlamaConfig(**shape)
    else:
        shape |= dict(n_embd=config.n_embd, n_layer=config.n_layer, n_head=config.n_head, n_positions=block_size)
        family, theirs = "GPT2", transformers.GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **shape)
    if "num_labels" in kind:
        task = "ForSequenceClassification"
    else:
        task = "LMHeadModel" if family == "GPT2" else "ForCausalLM"
    with device:
        return getattr(transformers, family + task)(theirs)


def make_nanogpt(name: str, block_size: int, device: torch.device):
    """nanoGPT's model.py, from the folder that NANOGPT_DIR names."""
    if "NANOGPT_DIR" not in os.environ:
        sys.exit("nanogpt: set NANOGPT_DIR to a folder with nanoGPT's model.py")
    spec = importlib.util.spec_from_file_location("nanogpt", Path(os.environ["NANOGPT_DIR"], "model.py"))
    nanogpt = sys.modules["nanogpt"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(nanogpt)
    config = config_of(name)
    shape = (block_size, config.vocab_size, config.n_layer, config.n_head, config.n_embd)
    return nanogpt.GPT(nanogpt.GPTConfig(*shape, dropout=0.0, bias=True)).to(device)


def takes_part(who: str, name: str) -> bool:
    """Whether a contender has this shape: nanoGPT and the plain loop are of GPT-2's kind."""
    return who.partition(":")[0] not in ("nanogpt", "floor") or not config_of(name).swiglu


def autocast_of(device: torch.device) -> torch.autocast:
    """What `cli.setup` gives the stages on this device."""
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16, cache_enabled=False)


def dtype_of(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if autocast_of(device)._enabled else torch.float32


def random_tokens(name: str, *size: int) -> Tensor:
    return torch.randint(0, config_of(name).vocab_size - 1, size, generator=torch.Generator().manual_seed(1))


# --- the work: a function that does it once, and the tokens that it counts --------------------------------------------


def train(who: str, name: str, batch: int, length: int, device: torch.device) -> tuple[Callable[[], None], int]:
    """Forward, backward and AdamW on `batch` rows of `length` tokens, of which transformers predicts all but one."""
    project, _, variant = who.partition(":")
    tokens = random_tokens(name, batch, length + 1).to(device)
    first = torch.ones(batch, dtype=torch.long)
    if project == "transformers":
        model = make_theirs(name, length + 1, device)
        loss_of = lambda: model(input_ids=tokens[:, :-1], labels=tokens[:, :-1], use_cache=False).loss  # noqa: E731
    elif project == "nanogpt":
        model = make_nanogpt(name, length + 1, device)
        inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        loss_of = lambda: model(inputs, targets)[1]  # noqa: E731
    else:
        model = make_gpt(name, length + 1, device, variant)
        loss_of = lambda: -model.logprobs(tokens, first, first + length).sum() / tokens[:, 1:].numel()  # noqa: E731
    model.train()
    autocast = autocast_of(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        with autocast:
            loss = loss_of()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, batch * length


def reward_step(who: str, name: str, batch: int, length: int, device: torch.device) -> tuple[Callable[[], None], int]:
    """A step of stage 2: forward, backward and AdamW on `batch` pairs of rows of `length` tokens."""
    model = ScalarModel(make_gpt(name, length, device)).to(device)
    rows = [data.Row(row, 1) for row in random_tokens(name, 2 * batch, length).tolist()]
    groups = [data.Group(rows[i : i + 2], [(0, 1)], [1.0]) for i in range(0, 2 * batch, 2)]
    autocast = autocast_of(device)
    optimizer = nets.adamw(model, 1e-4, 0.0)

    def step() -> None:
        with autocast:
            margin = agreement.margins(groups, agreement.score_groups(model, groups, device))
        (pairwise_loss(margin, groups) / batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, 2 * batch * length


def generate(
    who: str, name: str, batch: int, prompt: int, new: int, device: torch.device
) -> tuple[Callable[[], None], int]:
    """`new` tokens to each of `batch` prompts of `prompt`, drawn at temperature 1; all but nanoGPT have a cache."""
    project, _, variant = who.partition(":")
    prompts = random_tokens(name, batch, prompt).to(device)
    autocast = autocast_of(device)
    if project == "transformers":
        model = make_theirs(name, prompt + new, device).eval().to(dtype_of(device))
        how = dict(max_new_tokens=new, do_sample=True, top_k=0, pad_token_id=0, eos_token_id=None)
        return lambda: model.generate(prompts, attention_mask=torch.ones_like(prompts), **how), batch * new
    if project == "nanogpt":
        model = make_nanogpt(name, prompt + new, device).eval().to(dtype_of(device))
        return lambda: model.generate(prompts, new), batch * new
    model = make_gpt(name, prompt + new, device, variant)
    if project == "floor":
        decode = plain_decoder(model.to(dtype_of(device)))
        return lambda: decode(prompts, torch.rand(new, batch, dtype=torch.float64).to(device)), batch * new
    rows = prompts.tolist()

    def work() -> None:
        with autocast:
            model.generate(rows, new)

    return work, batch * new


def plain_decoder(model: GPT) -> Callable[[Tensor, Tensor], Tensor]:
    """The floor: a decode loop in plain PyTorch for GPT-2's kind, prompts of one length, no EOS, one temperature.

    prompts (B, P), uniform (N, B) in float64 → new tokens (B, N), drawn by an inverse CDF in float64. Matrices are laid
    out once, outside the time that is measured, for products that read them straight.
    """
    C, H = model.config.n_embd, model.config.n_head
    D = C // H
    layers = []
    for block in model.h:
        linears = (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj)
        matrices = [(linear.bias.detach().clone(), linear.weight.detach().T.contiguous()) for linear in linears]
        for x in matrices[0]:
            x[..., :C] *= D**-0.5  # the scale of attention
        layers.append((block.ln_1, block.ln_2, *matrices))
    head = model.wte.weight.detach().T.contiguous()  # (C, V)

    @torch.inference_mode()
    def decode(prompts: Tensor, uniform: Tensor) -> Tensor:
        (B, P), N = prompts.shape, len(uniform)
        caches = head.new_zeros(len(layers), 2, B, H, P + N, D)
        causal = torch.full((P, P), -torch.inf, dtype=head.dtype, device=head.device).triu(1)

        def logits(tokens: Tensor, start: int) -> Tensor:
            """tokens (B, T) at places start … start + T − 1 → logits (B, V) after the last."""
            T = tokens.shape[1]
            end = start + T
            x = (model.wte(tokens) + model.wpe.weight[start:end]).view(B * T, C)
            for (ln_1, ln_2, c_attn, attn_proj, c_fc, mlp_proj), (keys, values) in zip(layers, caches):
                qkv = torch.addmm(c_attn[0], ln_1(x), c_attn[1]).view(B, T, 3, H, D)
                q, keys[:, :, start:end], values[:, :, start:end] = qkv.permute(2, 0, 3, 1, 4)
                past_keys, past_values = (past.view(B * H, P + N, D)[:, :end] for past in (keys, values))
                scores = q.reshape(B * H, T, D).bmm(past_keys.transpose(1, 2))  # (B H, T, end)
                if T > 1:
                    scores += causal
                found = scores.softmax(-1).bmm(past_values).view(B, H, T, D).transpose(1, 2).reshape(B * T, C)
                x = x + torch.addmm(attn_proj[0], found, attn_proj[1])
                inner = F.gelu(torch.addmm(c_fc[0], ln_2(x), c_fc[1]), approximate="tanh")
                x = x + torch.addmm(mlp_proj[0], inner, mlp_proj[1])
            return model.ln_f(x.view(B, T, C)[:, -1]) @ head

        new = prompts.new_empty(B, N)
        for t in range(N):
            z = logits(prompts, 0) if t == 0 else logits(new[:, t - 1 : t], P + t - 1)
            cdf = z.float().softmax(-1).cumsum(-1, dtype=torch.float64)
            token = torch.searchsorted(cdf, uniform[t][:, None] * cdf[:, -1:], right=True)
            new[:, t] = token[:, 0].clamp(max=head.shape[1] - 1)
        return new

    return decode


# --- iterations of PPO ------------------------------------------------------------------------------------------------


def ppo_iterations(
    who: str,
    name: str,
    batch: int,
    minibatches: int,
    prompt: int,
    response: int,
    *,
    device: torch.device,
    n: int = 4,
    epochs: int = 4,
    watch: AbstractContextManager | None = None,
) -> list[dict]:
    """Seconds of each phase of `n` iterations, the first left out; the last update is made under `watch`."""
    variant = who.partition(":")[2]
    cfg = ppo.Config(batch_size=batch, minibatch_size=batch // minibatches, response_len=response, lr=1e-5)
    cfg.epochs, cfg.device = epochs, str(device)
    _, autocast = cli.setup(cfg)
    policy, ref, value, reward = (make_gpt(name, prompt + response, device, variant) for _ in range(4))
    value, reward = ScalarModel(value).to(device), ScalarModel(reward).to(device)
    ref, reward = nets.freeze(ref, autocast), nets.freeze(reward, autocast)
    policy.eval(), value.eval()
    score = ppo.scorer(reward, None, -1, cfg)
    optimizers = [nets.adamw(net, cfg.lr, 0.0, eps=1e-5) for net in (policy, value)]
    prompts = random_tokens(name, 4 * batch, prompt).tolist()
    lines = []
    for step in range(n):
        clock = [time.perf_counter()]

        def tick(clock: list[float] = clock) -> None:
            about.synchronize()
            clock.append(time.perf_counter())

        ids = data.shuffled(prompts, batch, 0, None, step)
        with autocast:
            answers = ppo.rollout(policy, ids, cfg, generator(0, 1, step))
            tick()
            answers |= ppo.read(answers, policy, ref, value, score, cfg)
            answers |= ppo.estimate(answers, cfg.kl_coef, cfg)
        tick()
        with watch if watch and step == n - 1 else nullcontext():
            ppo.update(policy, value, *optimizers, answers, cfg.lr, cfg.lr, cfg, autocast, step)
        measure.rollout_metrics(answers, [], cfg.kl_coef)
        tick()
        seconds = dict(zip(("rollout", "score", "update"), np.diff(clock).tolist()))
        lines.append(seconds | {"seconds": clock[-1] - clock[0]})
    return lines[1:]


def trl_iterations(
    who: str,
    name: str,
    batch: int,
    minibatches: int,
    prompt: int,
    response: int,
    *,
    device: torch.device,
    n: int = 4,
) -> list[dict]:
    """The same work by TRL's PPOTrainer (in trl.experimental up to 1.12)."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    V, ends = config_of(name).vocab_size, []
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(V)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    last = f"t{V - 1}"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token=last, pad_token=last, padding_side="left")

    class Clock(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            about.synchronize()
            ends.append(time.perf_counter())

        on_step_end = on_train_begin

        def on_log(self, *args, **kwargs):
            pass

    def net(**kind):
        return make_theirs(name, prompt + response, device, **kind)

    scalar = {"num_labels": 1, "pad_token_id": V - 1}
    args = PPOConfig(
        output_dir=tempfile.mkdtemp(), report_to="none", disable_tqdm=True, save_strategy="no",
        use_cpu=device.type == "cpu", per_device_train_batch_size=batch, gradient_accumulation_steps=1,
        num_mini_batches=minibatches, num_ppo_epochs=4,
        total_episodes=batch * n, response_length=response, temperature=1.0, num_sample_generations=0,
        local_rollout_forward_batch_size=batch, learning_rate=1e-5, bf16=autocast_of(device)._enabled,
        gradient_checkpointing=False,
    )  # fmt: skip
    rows = Dataset.from_dict({"input_ids": random_tokens(name, 4 * batch, prompt).tolist()})
    PPOTrainer(
        args=args, processing_class=tokenizer, model=net(), ref_model=net(), reward_model=net(**scalar),
        value_model=net(**scalar), train_dataset=rows, callbacks=[Clock()],
    ).train()  # fmt: skip
    return [{"seconds": seconds} for seconds in np.diff(ends).tolist()[1:]]


# --- how much work it is ----------------------------------------------------------------------------------------------


def matrices(name: str) -> tuple[int, int]:
    """How many weights a token is multiplied by: in the blocks, and in the output layer."""
    with torch.device("meta"):
        blocks = GPT(config_of(name)).h
    config = config_of(name)
    inside = sum(layer.weight.numel() for layer in blocks.modules() if isinstance(layer, torch.nn.Linear))
    return inside, config.vocab_size * config.n_embd


def flops(what: str, name: str, *sizes: int) -> float:
    """Operations that the work needs: 2 a weight and token forward, twice that backward, and attention over all keys.

    For `train` and `generate` a token, for `ppo` an iteration of 4 epochs. What is computed again does not count.
    """
    (inside, head), config = matrices(name), config_of(name)
    attention = 4 * config.n_layer * config.n_head * config.head_dim  # a key
    if what == "train":
        _, length = sizes
        return 3 * (2 * (inside + head) + attention * length)
    if what == "generate":
        _, prompt, new = sizes
        return 2 * (inside + head) + attention * (prompt + new / 2)
    batch, _, prompt, response, *_ = sizes
    tokens = prompt + response
    trunk = tokens * (2 * inside + attention * tokens)
    # one rollout; four nets read, two of them with the output layer; two nets learn, one of them with it
    return batch * (trunk * (1 + 4 + 2 * 3 * 4) + 2 * head * response * (1 + 2 + 3 * 4))


def bytes_read(name: str, batch: int, prompt: int, new: int, device: torch.device) -> float:
    """Bytes that one step of decoding must read: each weight, and the cache at its mean length."""
    config, size = config_of(name), dtype_of(device).itemsize
    cache = 2 * config.n_layer * config.n_kv_head * config.head_dim
    return size * (sum(matrices(name)) + batch * cache * (prompt + new / 2))
