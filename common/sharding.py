"""--shard: parameters, gradients and optimizer states divided over the processes of torchrun, by torch's FSDP2.

Each block, and the rest of a net as one more group, keeps one part of every parameter in each process. A forward or
backward gathers the blocks one by one. `whole` gathers a net once, for a rollout or a file. Without --shard every
function here gives back what it got, so files do not tell how a run was divided.
"""

from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from common import dist as processes
from data.files import InputError
from fast import Linear
from model import GPT, ScalarModel

used = False  # whether a net has been divided
FORWARDS = (
    "logprobs",
    "summed_logprobs",
    "logprobs_and_entropy",
    "scores",
    "values",
)  # what may be called on a sharded net


def check(cfg: Any) -> None:
    """Raises InputError where --shard cannot do what is asked."""
    if not getattr(cfg, "shard", False):
        return
    processes.check_torch("2.8", "--shard")  # before, FSDP2 does not run on a CPU, where it is tested
    if processes.WORLD == 1:
        raise InputError("--shard: divides a net over the processes of torchrun; start several, or leave it out")
    if cfg.compile:
        raise InputError("--shard: does not go with --compile; leave one of them out")
    if cfg.batch_size % processes.WORLD:  # all processes gather together, so each needs as many rows
        raise InputError(f"--shard: --batch_size must be a multiple of the {processes.WORLD} processes")


def shard(net: GPT | ScalarModel, cfg: Any) -> GPT | ScalarModel:
    """The net, with --shard divided over the processes, in place. From then on only FORWARDS may be called on it."""
    global used
    if not cfg.shard:
        return net
    used = True
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    processes.broadcast(net)
    trunk = net.trunk if isinstance(net, ScalarModel) else net
    mesh = init_device_mesh(trunk.wte.weight.device.type, (processes.WORLD,))
    for module in (*trunk.h, net):
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    net.call = lambda work: work()
    register_fsdp_forward_method(net, "call")
    for name in FORWARDS:
        if hasattr(net, name):
            setattr(net, name, gathering(net, getattr(net, name)))
    return net


def gathering(net: nn.Module, method: Any) -> Any:
    """`method`, inside a forward of FSDP. It gets no tensor from there, or FSDP would move lengths to the GPU."""

    @wraps(method)
    def gathered(*args, **options):
        return net.call(partial(method, *args, **options))

    return gathered


def is_sharded(net: nn.Module) -> bool:
    return any(map(is_divided, net.parameters()))


def is_divided(x: Any) -> bool:
    """Whether x is a DTensor, whose module takes a second to import."""
    return hasattr(x, "full_tensor")


def sum_gradients(net: nn.Module) -> None:
    """Sum the gradients over all processes. A sum is right: every loss divides by the tokens of the whole batch."""
    if not is_sharded(net):
        return processes.sum_gradients(net)
    for p in net.parameters():
        p.grad *= processes.WORLD  # FSDP has averaged them in the backward


def full(x: Any) -> Any:
    """x, gathered if it is divided. All processes must ask together."""
    return x.full_tensor() if is_divided(x) else x


def whole(net: GPT | ScalarModel, autocast: torch.autocast | None = None) -> GPT | ScalarModel:
    """The net itself, or where it is divided, a whole copy in eval mode. All processes must ask together.

    A copy that is only run under `autocast` has its linear layers in autocast's dtype (see common.freeze).
    """
    if not is_sharded(net):
        return net
    with torch.device("meta"):
        copy = GPT(net.config)
        copy = ScalarModel(copy) if isinstance(net, ScalarModel) else copy
    rounded = set()
    if autocast is not None and autocast._enabled:
        layers = [name for name, module in copy.named_modules() if isinstance(module, Linear)]
        rounded = {f"{name}.{kind}" for name in layers for kind in ("weight", "bias")}
    weights = {}
    for name, x in net.state_dict().items():
        weights[name] = full(x).to(autocast.fast_dtype) if name in rounded else full(x)
    copy.load_state_dict(weights, assign=True)
    return copy.eval()


def state(part: Any) -> dict:
    """`part.state_dict()` of a net or an optimizer. What was divided is whole, and in the first process alone."""

    def gathered(x: Any) -> Any:
        if not is_divided(x):
            return x
        x = x.full_tensor()
        return x.cpu() if processes.RANK == 0 else None

    return tree_map(gathered, part.state_dict())


def load_state(part: Any, saved: dict) -> None:
    """`part.load_state_dict(saved)`. Each process keeps its part of what was divided."""
    if isinstance(part, torch.optim.Optimizer):
        parameters = [p for group in part.param_groups for p in group["params"]]
        states = {
            i: {name: divided(x, parameters[i]) for name, x in each.items()} for i, each in saved["state"].items()
        }
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
