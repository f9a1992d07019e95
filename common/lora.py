"""LoRA (Hu et al. 2021, arXiv 2106.09685): nets share one frozen trunk, and each trains small adapters of its own.

With --lora RANK every linear layer of the blocks computes W x + b + α/r · B A x, those of the MLP too (Schulman et al.
2025, "LoRA Without Regret"). The adapters A (r, in) and B (out, r) train, and the head of a reward model or value net.
All else is frozen: W, b, embeddings, norms, the output layer. B starts at zero: a net starts as its base, bit for bit.

What is frozen is no parameter but a buffer that no state_dict holds. So gradients, optimizers and checkpoints have what
trains alone. A model.pt names the file of its base too, by its path from the run folder and its sha256. Under autocast
the frozen linear layers are stored in its dtype, which changes no number (see nets.freeze).
"""

import functools
import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.files import InputError
from model import GPT, Linear, ScalarModel

ALPHA = 32.0  # α
LAYERS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")  # of a block, that get adapters


class Base(NamedTuple):
    path: Path  # of the model.pt that a net started from
    sha256: str


class Adapted(Linear):
    """A frozen linear layer of a base, and its adapters."""

    def __init__(self, layer: nn.Linear, rank: int, base: Base):
        nn.Module.__init__(self)  # that of nn.Linear would make new weights
        self.out_features, self.in_features = layer.weight.shape
        self.base = base
        self.register_buffer("weight", layer.weight, persistent=False)
        self.register_buffer("bias", layer.bias, persistent=False)
        self.A = nn.Parameter(torch.empty(rank, self.in_features).uniform_(-1, 1) / self.in_features**0.5)
        self.B = nn.Parameter(torch.zeros(self.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        low = F.linear(x, self.A) * (ALPHA / len(self.A))  # (…, r)
        return super().forward(x) + F.linear(low, self.B)


@dataclass
class Trunks:
    """What the nets of a stage share: the frozen tensors of each base, by sha256 and name."""

    rank: int  # of adapters; 0: nets share nothing, and are loaded whole
    autocast: torch.autocast
    tensors: dict[tuple[str, str], Tensor] = field(default_factory=dict)

    def adapt(self, net: GPT | ScalarModel, path: Path, adapters: dict[str, Tensor], device: torch.device) -> None:
        """Freeze the trunk of a net made of the file `path`, and put adapters on it, in place. If {}, they are new."""
        base, trunk = Base(path.resolve(), fingerprint(path)), getattr(net, "trunk", net)
        names = [name.removeprefix("trunk.")[:-2] for name in adapters if name.endswith(".A")]
        for place, module in [*trunk.named_modules()]:
            low = self.autocast._enabled and isinstance(module, nn.Linear)
            for name, x in [*module.named_parameters(recurse=False)]:
                delattr(module, name)
                key = base.sha256, f"{place}.{name}"
                if key not in self.tensors:
                    self.tensors[key] = x.detach().to(device, self.autocast.fast_dtype if low else x.dtype)
                module.register_buffer(name, self.tensors[key], persistent=False)
            if place in names or not names and place.startswith("h.") and place.endswith(LAYERS):
                trunk.set_submodule(place, Adapted(module, self.rank, base))
        if adapters:
            net.load_state_dict(adapters)


def find_base(saved: dict, path: Path, rank: int) -> Path:
    """The file that has the frozen weights of a model.pt: its base, or the file itself if it is whole.

    Raises InputError if the base is missing or is not what it was, or if the adapters are not of `rank` (0: of any).
    """
    if "base" not in saved:
        return path
    for found in {len(x) for name, x in saved["model"].items() if rank and name.endswith(".A")} - {rank}:
        what = f"{path}: has adapters of rank {found}, not of --lora {rank}"
        raise InputError(f"{what}; give --lora {found}, or 0 to merge them and train all weights")
    base = (path.parent.resolve() / saved["base"]["path"]).resolve()
    if not base.is_file():
        raise InputError(f"{path}: its base, {base}, is missing; bring it back, or train the adapters anew")
    if fingerprint(base) != saved["base"]["sha256"]:
        raise InputError(f"{path}: its base, {base}, has changed; bring back what it was, or train the adapters anew")
    return base


def completed(base: dict[str, Tensor], adapters: dict[str, Tensor], merge: bool) -> dict[str, Tensor]:
    """The weights of a whole net: those of its base, its own head, and if asked W + α/r · B A for W."""
    if not all(x.isfinite().all() for x in adapters.values()):
        raise ValueError("adapters are not all finite")
    prefix = "trunk." if "head.weight" in adapters else ""
    heads = ("head.weight", "head.bias", "gain", "bias", "lm_head.weight" if prefix else "")
    weights = {prefix + name.removeprefix("trunk."): x for name, x in base.items() if name not in heads}
    weights |= {name: x for name, x in adapters.items() if not name.endswith((".A", ".B"))}
    for name, A in adapters.items() if merge else ():
        if name.endswith(".A"):
            layer = name.removesuffix("A")
            weights[f"{layer}weight"] = weights[f"{layer}weight"] + ALPHA / len(A) * adapters[f"{layer}B"] @ A
    return weights


def reference(net: nn.Module, path: Path) -> dict:
    """What the file `path` of an adapted net says of the base; {} for a whole net."""
    base = next((layer.base for layer in net.modules() if isinstance(layer, Adapted)), None)
    if base is None:
        return {}
    if base.path.parent == path.parent.resolve():
        raise InputError(f"--out {path.parent}: held the base of this run; bring it back, and name another folder")
    return {"base": {"path": os.path.relpath(base.path, path.parent.resolve()), "sha256": base.sha256}}


def fingerprint(path: Path) -> str:
    return sha256(path.resolve(), path.stat().st_mtime_ns)


@functools.cache
def sha256(path: Path, time: int) -> str:
    """The sha256 of a file as it was at `time`: a file that has not changed is read once."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
