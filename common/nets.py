"""Nets: a model.pt with weights, shape and tokenizer, checked when read; answers; frozen copies; optimizer steps."""

import dataclasses
import math
import zipfile
from pathlib import Path
from typing import Any

import tiktoken
import torch
from torch import Tensor, nn

from common import dist, lora
from data.files import InputError, replacing
from data.tokenizer import encoding_from_state, encoding_state
from model import GPT, GPTConfig, ScalarModel

# --- files ------------------------------------------------------------------------------------------------------------


def save_file(content: dict, path: Path) -> None:
    """torch.save under a temporary name, then rename. If the disk is full: InputError, and `path` is as it was."""
    with replacing(path, "wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # torch's writer hides the OSError
            raise OSError(f"{error}".partition("\n")[0]) from None


def save_model(model: GPT | ScalarModel, encoding: tiktoken.Encoding, path: Path) -> None:
    """A model.pt: {"model": weights, "config": GPTConfig's fields, "tokenizer": the encoding}, all plain.

    Of an adapted net the weights are what trains, and "base" names the file of the others (see lora.py).
    """
    config, tokenizer = dataclasses.asdict(model.config), encoding_state(encoding)
    content = {"model": model.state_dict(), "config": config, "tokenizer": tokenizer}
    save_file(content | lora.reference(model, path), path)


def read_checkpoint(path: Path, advice: str = "name another run folder") -> dict:
    """What torch.load makes of a model.pt or state.pt, on the CPU. Raises InputError if it is none."""
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()  # the first part with a wrong checksum: torch.load looks at none
        if damaged:
            raise ValueError(damaged)
        saved = torch.load(path, map_location="cpu", weights_only=True)
        saved["model"].items()
    except Exception as error:  # torch.load raises many kinds
        raise InputError(f"{path}: not a checkpoint of this project ({type(error).__name__}); {advice}") from None
    return saved


def load(
    folder: str | Path,
    device: torch.device | str = "cpu",
    option: str = "",
    kind: type | None = None,
    trunks: lora.Trunks | None = None,
) -> tuple[GPT | ScalarModel, tiktoken.Encoding]:
    """The model of a run folder (or of a .pt file) in eval mode, and its tokenizer.

    With `trunks` of a rank above 0 it is adapted, and shares what is frozen. Else it is whole, with adapters merged.
    Raises InputError if there is none, or if it is not of the `kind` that `option` wants.
    """
    path = Path(folder) if Path(folder).suffix == ".pt" else Path(folder) / "model.pt"
    if (Path(folder) / "adapter_config.json").exists():
        merge = "merge it into its model first (peft's merge_and_unload), and bring that in with tools.hf"
        raise InputError(f"{option} {folder}: an adapter of another project; {merge}".strip())
    if not path.exists():
        advice = "bring it in with tools.hf, or name a run folder, or a function as path/to/file.py:function"
        raise InputError(f"{option} {folder}: no model.pt there; run the stage that writes it, {advice}".strip())
    saved, rank, adapters = read_checkpoint(path), trunks.rank if trunks else 0, {}
    try:
        base = lora.find_base(saved, path, rank)
        if base != path:
            adapters = saved["model"]
            saved["model"] = lora.completed(read_checkpoint(base)["model"], adapters, merge=not rank)
        model, encoding = build(saved)
        if rank:
            trunks.adapt(model, base, adapters, device)
    except InputError:
        raise
    except Exception as error:  # whatever the damage is
        what = " ".join(f"{error}".split())[:200]
        raise InputError(f"{path}: damaged ({what}); name another run folder, or train it again") from None
    if kind is not None and not isinstance(model, kind):
        holds, give = ("reward", "sft.py or ppo.py") if kind is GPT else ("language", "reward.py")
        raise InputError(f"{option} {folder}: holds a {holds} model; give a run folder of {give}")
    return model.to(device).eval(), encoding


def build(saved: dict) -> tuple[GPT | ScalarModel, tiktoken.Encoding]:
    """The model and the tokenizer of what `save_model` wrote. Raises many kinds of errors if it is of another form."""
    weights, config, encoding = saved["model"], GPTConfig(**saved["config"]), encoding_from_state(saved["tokenizer"])
    if encoding.n_vocab > config.vocab_size or config.eos not in encoding._special_tokens.values():
        raise ValueError("tokenizer and model do not fit each other")
    with torch.device("meta"):
        model = GPT(config)
        model = ScalarModel(model) if "head.weight" in weights else model
    model.load_state_dict(weights, assign=True)
    if len({x.dtype for x in weights.values()}) > 1 or not all(x.isfinite().all() for x in weights.values()):
        raise ValueError("weights are not all finite, or not all of one type")
    return model, encoding


def load_gpt(
    folder: str | Path, device: torch.device | str = "cpu", option: str = "", trunks: lora.Trunks | None = None
) -> tuple[GPT, tiktoken.Encoding]:
    return load(folder, device, option, GPT, trunks)


def load_scalar(
    folder: str | Path, device: torch.device | str = "cpu", option: str = "", trunks: lora.Trunks | None = None
) -> tuple[ScalarModel, tiktoken.Encoding]:
    return load(folder, device, option, ScalarModel, trunks)


def load_reward(
    device: torch.device, encoding: tiktoken.Encoding, init: str, trunks: lora.Trunks | None, folder: str
) -> ScalarModel:
    """The reward model of a folder of --reward. Raises InputError if it does not fit the policy of --init."""
    model, its_encoding = load_scalar(folder, device, "--reward", trunks)
    check_vocabulary(f"--reward {folder}", its_encoding, encoding, init)
    return model


def check_vocabulary(what: str, encoding: tiktoken.Encoding, wanted: tiktoken.Encoding, init: str) -> None:
    """Raises InputError if an id is another token in `what` than in the policy of --init.

    A reward model may have further ids, such as a pad's: no policy writes them. The name of an unused row is free.
    """
    ours, theirs = (
        {i: token for token, i in (e._mergeable_ranks | e._special_tokens).items()} for e in (encoding, wanted)
    )
    for i in theirs if what.startswith("--reward") else theirs | ours:
        pair = (ours.get(i), theirs.get(i))
        unused = f"<|unused_{i}|>" in pair and all(isinstance(token, str) for token in pair)
        if pair[0] != pair[1] and not unused:
            raise InputError(f"{what}: was trained with another vocabulary than {init}; train it from that policy")


def context(cfg: Any, model: GPT | ScalarModel) -> int:
    """The longest sequence in tokens: --block_size, or if that is 0 the model's whole context, less its suffix."""
    longest = model.config.block_size - len(model.config.suffix)
    if cfg.block_size > longest:
        whose = f"--init {cfg.init}" if isinstance(model, GPT) else "the reward model"
        raise InputError(f"--block_size {cfg.block_size}: {whose} has a context of {longest} tokens; give less")
    return cfg.block_size or longest


def generate(
    model: GPT, prompts: list[list[int]], new_tokens: int, temperature: float, rng: torch.Generator, size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`model.generate` of `size` prompts at a time (0: all at once): tokens (B, T), prompt_len (B,), length (B,).

    It bounds the memory and changes no answer, since a row has its own random numbers.
    """
    starts = range(0, len(prompts), size or len(prompts))
    how = {"temperature": temperature, "generator": rng}
    parts = [model.generate(prompts[i : i + starts.step], new_tokens, **how) for i in dist.counted(starts, "sampling")]
    tokens, prompt_len, length = zip(*parts)
    rows = [row for part in tokens for row in part]
    tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=model.config.eos)
    return tokens, torch.cat(prompt_len), torch.cat(length)


# --- training ---------------------------------------------------------------------------------------------------------


def freeze(model: GPT | ScalarModel, autocast: torch.autocast) -> GPT | ScalarModel:
    """The model in eval mode, without gradients. Under autocast its trunk's linear layers are stored in that dtype.

    Autocast rounds the same weights before each product, so the frozen copy computes what the live model computes. The
    scalar head and the embeddings stay in float32.
    """
    model.eval().requires_grad_(False)
    if autocast._enabled:
        for module in getattr(model, "trunk", model).modules():
            if isinstance(module, nn.Linear):
                module.to(autocast.fast_dtype)
    return model


def adamw(model: nn.Module, lr: float, weight_decay: float, eps: float = 1e-8) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only, not on biases and norms."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=eps, fused=True)


def step_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, lr: float, max_norm: float) -> Tensor:
    """Gradients of all processes → clip → step → zero. Returns the norm before clipping."""
    dist.sum_gradients(model)
    norm = dist.full(nn.utils.clip_grad_norm_(model.parameters(), max_norm or float("inf")))
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    return norm


def warmup_cosine(step: int, steps: int, peak: float, warmup: int) -> float:
    """Learning rate: a linear warm-up to `peak`, then half a cosine down to a tenth of it."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
