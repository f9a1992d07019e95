"""The processes of torchrun. With one process, `total(x)` is x and `mine(items)` is items.

--shard divides parameters, gradients and optimizer states over the processes, by torch's FSDP2. A forward or backward
gathers the blocks one by one; `gathered` gathers a net at once, for a rollout. Files hold what is whole.
"""

import importlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from data.files import InputError
from model import GPT, ScalarModel

RANK = int(os.environ.get("RANK", 0))  # of this process
WORLD = int(os.environ.get("WORLD_SIZE", 1))  # how many there are
FORWARDS = ("logprobs", "logprobs_and_entropy", "scores", "values")  # what is called on a sharded net


def join(device: torch.device) -> None:
    """Start the process group, under torchrun."""
    if WORLD > 1 and not torch.distributed.is_initialized():
        # The optimizer imports this module. If that happened later, its defaults would keep gloo's threads to the end.
        importlib.import_module("torch.distributed.nn.functional")
        backend = "nccl" if device.type == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, timeout=timedelta(hours=12))


def leave(code: int) -> None:
    """End the process group. With a fault the process ends at once: leaving would wait for the others, and they for it.

    It also ends at once after --shard: torch's caches keep gloo's threads, which could abort the interpreter's end.
    """
    if WORLD == 1:
        return
    if not code and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if code or "torch.distributed.fsdp" in sys.modules:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


# --- numbers of all processes -----------------------------------------------------------------------------------------


def total(x: Tensor) -> Tensor:
    """The sum of x over all processes."""
    if WORLD > 1:
        x = x.clone()
        torch.distributed.all_reduce(x)
    return x


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """The mean of x over the places where `mask` is true, in all processes together."""
    return total((x * mask).sum()) / total(mask.sum())


def gather(x: Tensor) -> Tensor:
    """x (B,) of every process, one after the other. Each process has the same B."""
    if WORLD == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(WORLD)]
    torch.distributed.all_gather(parts, x)
    return torch.cat(parts)


def gather_objects(x: Any) -> list:
    """x of every process, in order. For text and lists; tensors go through `gather`."""
    if WORLD == 1:
        return [x]
    found: list = [None] * WORLD
    torch.distributed.all_gather_object(found, x)
    return found


def agree(yes: bool) -> bool:
    """Whether any process says yes."""
    if WORLD == 1:
        return yes
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    return bool(total(torch.tensor(float(yes), device=device)))


def barrier() -> None:
    """Wait for all processes."""
    if WORLD > 1:
        torch.distributed.barrier()


def mine(items: list, evenly: bool = False) -> list:
    """This process's part of a batch: every WORLD-th item. Raises InputError if it must be even and cannot be."""
    if evenly and len(items) % WORLD:
        raise InputError(f"--shard: {len(items)} rows cannot be dealt to {WORLD} processes evenly; give more rows")
    return items[RANK::WORLD]


def pad_to_equal(items: list, spare: list) -> list:
    """`items`, the last of them (or of `spare`) repeated until each process has as many, as FSDP needs it."""
    most = max(gather_objects(len(items)))
    return items + (items or spare)[-1:] * (most - len(items))


def print0(text: str) -> None:
    """Print, in the first process alone."""
    if RANK == 0:
        print(text, flush=True)


def counted(parts: Sequence, what: str) -> Iterator:
    """The parts, one by one. Where they take more than five seconds, the first process says how far it is."""
    began = said = time.time()
    for i, part in enumerate(parts):
        now = time.time()
        if now - said > 5:
            said, left = now, timedelta(seconds=round((now - began) / i * (len(parts) - i)))
            print0(f"    {what}: {100 * i // len(parts)}%, {left} left")
        yield part


# --- nets and optimizers ----------------------------------------------------------------------------------------------


def broadcast(net: nn.Module) -> None:
    """Give every process the weights of the first."""
    if WORLD > 1 and not is_sharded(net):
        for x in net.state_dict().values():
            torch.distributed.broadcast(x, 0)


def sum_gradients(net: nn.Module) -> None:
    """Sum the gradients over all processes. A sum is right: every loss divides by the tokens of the whole batch."""
    if WORLD == 1:
        return
    if is_sharded(net):
        for p in net.parameters():
            p.grad *= WORLD  # FSDP has averaged them in the backward
        return
    for p in net.parameters():
        if p.grad is None:  # this process had no row of this batch
            p.grad = torch.zeros_like(p)
    for handle in [torch.distributed.all_reduce(p.grad, async_op=True) for p in net.parameters()]:
        handle.wait()


def check_shard(cfg: Any) -> None:
    """Raises InputError where --shard cannot do what is asked."""
    if not getattr(cfg, "shard", False):
        return
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 8):  # before, FSDP2 does not run on a CPU, as in tests
        raise InputError(f"--shard: needs torch 2.8 or newer, not {torch.__version__}; pip install -r requirements.txt")
    if WORLD == 1:
        raise InputError("--shard: divides a net over the processes of torchrun; start several, or leave it out")
    if cfg.compile:
        raise InputError("--shard: does not go with --compile; leave one of them out")
    if cfg.lora:
        raise InputError("--shard: does not go with --lora; leave one of them out")
    if cfg.batch_size % WORLD:  # all processes gather together, so each needs as many rows
        raise InputError(f"--shard: --batch_size must be a multiple of the {WORLD} processes")


def shard(net: GPT | ScalarModel) -> None:
    """Divide the net over the processes, in place. From then on only FORWARDS may be called on it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    broadcast(net)
    trunk = net.trunk if isinstance(net, ScalarModel) else net
    mesh = init_device_mesh(trunk.wte.weight.device.type, (WORLD,))
    for module in (*trunk.h, net):
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    for name in FORWARDS:
        if hasattr(net, name):
            register_fsdp_forward_method(net, name)


def is_sharded(net: nn.Module) -> bool:
    return any(map(is_divided, net.parameters()))


def is_divided(x: Any) -> bool:
    """Whether x is a DTensor, whose module takes a second to import."""
    return hasattr(x, "full_tensor")


def full(x: Any) -> Any:
    """x, gathered if it is divided. All processes must ask together."""
    return x.full_tensor() if is_divided(x) else x


def gathered(net: GPT | ScalarModel, autocast: torch.autocast | None = None) -> GPT | ScalarModel:
    """The net itself, or where it is divided, a whole copy in eval mode. All processes must ask together.

    A copy that is only run under `autocast` has its linear layers in autocast's dtype (see nets.freeze).
    """
    if not is_sharded(net):
        return net
    with torch.device("meta"):
        copy = GPT(net.config)
        copy = ScalarModel(copy) if isinstance(net, ScalarModel) else copy
    copy.load_state_dict({name: full(x) for name, x in net.state_dict().items()}, assign=True)
    if autocast is not None and autocast._enabled:
        for layer in getattr(copy, "trunk", copy).modules():
            if isinstance(layer, nn.Linear):
                layer.to(autocast.fast_dtype)
    return copy.eval()


def state(part: Any) -> dict:
    """`part.state_dict()` of a net or an optimizer. What was divided is whole, and in the first process alone."""

    def whole(x: Any) -> Any:
        if not is_divided(x):
            return x
        x = x.full_tensor()
        return x.cpu() if RANK == 0 else None

    return tree_map(whole, part.state_dict())


def load_state(part: Any, saved: dict) -> None:
    """`part.load_state_dict(saved)`. Each process keeps its part of what was divided."""
    if isinstance(part, torch.optim.Optimizer):
        parameters, states = [p for group in part.param_groups for p in group["params"]], {}
        for i, each in saved["state"].items():
            states[i] = {name: divided(x, parameters[i]) for name, x in each.items()}
        saved = saved | {"state": states}
    elif is_sharded(part):
        saved = {name: divided(saved[name], x) for name, x in part.state_dict().items()}
    part.load_state_dict(saved)


def divided(x: Tensor, like: Tensor) -> Tensor:
    """x, divided as `like` is if it has its shape."""
    if not is_divided(like) or x.shape != like.shape:
        return x
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x.to(like.device), like.device_mesh, like.placements)
