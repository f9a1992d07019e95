"""Checkpoints: a model.pt with weights, shape and tokenizer, written whole or not at all, checked when it is read."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import tiktoken
import torch
from torch import Tensor

from data.files import InputError, replacing
from data.rng import seed_of
from data.tokenizer import encoding_from_state, encoding_state
from model import GPT, GPTConfig, ScalarModel


def save_file(content: dict, path: Path) -> None:
    """torch.save under a temporary name, then rename. If the disk is full: InputError, and `path` is as it was."""
    with replacing(path, "wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # torch's writer hides the OSError
            raise OSError(f"{error}".partition("\n")[0]) from None


def save_model(model: GPT | ScalarModel, encoding: tiktoken.Encoding, path: Path, **more: Any) -> None:
    """A model.pt: {"model": weights, "config": GPTConfig's fields, "tokenizer": the encoding} | more, all plain."""
    content = {
        "model": model.state_dict(),
        "config": dataclasses.asdict(model.config),
        "tokenizer": encoding_state(encoding),
    }
    save_file(content | more, path)


def load(
    folder: str | Path, device: torch.device | str = "cpu", option: str = "", kind: type | None = None
) -> tuple[GPT | ScalarModel, tiktoken.Encoding]:
    """The model of a run folder (or of a .pt file) in eval mode, and its tokenizer.

    Raises InputError if there is none, or if it is not of the `kind` that `option` wants.
    """
    path = Path(folder) / "model.pt" if Path(folder).suffix != ".pt" else Path(folder)
    if not path.exists():
        what = f"{option} {folder}".strip()
        if str(folder).endswith(".py"):
            raise InputError(f"{what}: a function is named {folder}:function")
        raise InputError(f"{what}: no model.pt there; run the stage that writes it, or name another run folder")
    saved = read_checkpoint(path)
    if not {"config", "tokenizer"} <= saved.keys():
        raise InputError(f"{path}: not a checkpoint of this project (no config or tokenizer); name another run folder")
    try:
        scalar = "head.weight" in saved["model"]
        config = GPTConfig(**saved["config"])
        encoding = encoding_from_state(saved["tokenizer"])
        model = empty_model(config, saved["model"], scalar)
        if encoding.n_vocab > config.vocab_size or config.eos not in encoding._special_tokens.values():
            raise ValueError("tokenizer and model do not fit each other")
    except Exception as error:  # whatever the damage is
        raise InputError(f"{path}: damaged ({error}); name another run folder, or train it again") from None
    if kind is GPT and scalar:
        raise InputError(f"{option} {folder}: holds a reward model; give a run folder of sft.py or ppo.py")
    if kind is ScalarModel and not scalar:
        raise InputError(f"{option} {folder}: holds a language model; give a run folder of reward.py")
    model.load_state_dict(saved["model"], assign=True)
    return model.to(device).eval(), encoding


def read_checkpoint(path: Path, advice: str = "name another run folder") -> dict:
    """What torch.load makes of a model.pt or state.pt, on the CPU. Raises InputError if it is none."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds
        raise InputError(f"{path}: not a checkpoint of this project ({type(error).__name__}); {advice}") from None
    if not isinstance(saved, dict) or not isinstance(saved.get("model"), dict):
        raise InputError(f"{path}: not a checkpoint of this project (no weights); {advice}")
    return saved


def empty_model(config: GPTConfig, weights: dict[str, Tensor], scalar: bool) -> GPT | ScalarModel:
    """A model without memory, whose parameters the weights are to become.

    Raises ValueError if they are not those of a model of this shape, or are not all finite.
    """
    layers = {name.split(".")[-4] for name in weights if ".c_attn.weight" in name}
    for field in dataclasses.fields(GPTConfig):
        value = getattr(config, field.name)
        if type(value) is not type(field.default) and not (type(field.default) is float and type(value) is int):
            raise ValueError(f"{field.name} is {value!r}")
        numbers = value if isinstance(value, tuple) else (value,)
        if not all(0 <= number < (1 if field.name == "dropout" else math.inf) for number in numbers):
            raise ValueError(f"{field.name} is {value}")
    if config.n_layer != len(layers):  # before a model of a million layers is built
        raise ValueError(f"n_layer is {config.n_layer}, but there are weights of {len(layers)} layers")
    with torch.device("meta"):
        model = GPT(config)
        model = ScalarModel(model) if scalar else model
    wanted = model.state_dict()
    kinds = {x.dtype for x in weights.values()}
    if len(kinds) > 1 or not all(kind.is_floating_point for kind in kinds):
        raise ValueError("weights are not all of one floating-point type")
    for name in sorted(wanted.keys() | weights.keys()):
        if name not in weights:
            raise ValueError(f"weight {name} is missing")
        if name not in wanted:
            raise ValueError(f"weight {name} belongs to no model of this shape")
        if weights[name].shape != wanted[name].shape:
            raise ValueError(f"weight {name} has shape {tuple(weights[name].shape)}")
        if not weights[name].isfinite().all():
            raise ValueError(f"weight {name} is not finite")
    return model


def load_gpt(folder: str | Path, device: torch.device | str = "cpu", option: str = "") -> tuple[GPT, tiktoken.Encoding]:
    return load(folder, device, option, GPT)


def load_scalar(
    folder: str | Path, device: torch.device | str = "cpu", option: str = ""
) -> tuple[ScalarModel, tiktoken.Encoding]:
    return load(folder, device, option, ScalarModel)


def check_vocabulary(what: str, encoding: tiktoken.Encoding, wanted: tiktoken.Encoding, init: str) -> None:
    """Raises InputError if `what` has another vocabulary than the policy of --init."""
    ours, theirs = ({k: v for k, v in encoding_state(each).items() if k != "chat"} for each in (encoding, wanted))
    if ours != theirs:
        raise InputError(f"{what}: was trained with another vocabulary than {init}; train it from that policy")


def prompt_key(ids: list[int]) -> int:
    return seed_of("prompt", *ids)


def known_prompts(reward: str, prompts: list[list[int]]) -> str:
    """How many of the prompts have trained the reward model, for a log line; "" if none, or if it does not say."""
    if ".py:" in reward:
        return ""
    path = Path(reward) / "model.pt" if Path(reward).suffix != ".pt" else Path(reward)
    trained = torch.load(path, map_location="cpu", weights_only=True, mmap=True).get("prompts", torch.tensor([]))
    known = set(trained.tolist())
    n = sum(prompt_key(prompt) in known for prompt in prompts)
    return f" ({n:,} of them trained the reward model)" if n else ""
