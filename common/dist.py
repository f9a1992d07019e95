"""The device, and the processes of torchrun. With one process, `total(x)` is x and `share(items)` is items."""

import importlib
import os
import shutil
import signal
import threading
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from data.files import InputError
from fast import keep_memory, settle_math

RANK = int(os.environ.get("RANK", 0))  # of this process
WORLD = int(os.environ.get("WORLD_SIZE", 1))  # how many there are


asked = 0  # the signal that has asked this process to stop; 0: none
_asked_at, _finishes = 0.0, False  # when it came; whether a loop runs that finishes its step first


class Stopped(KeyboardInterrupt):
    """A signal ended the run. The message is one sentence."""


def listen() -> None:
    """Let Ctrl-C and SIGTERM end a run in order: it finishes the step and saves. A second signal ends it at once."""

    def hear(number: int, frame: Any) -> None:
        global asked, _asked_at
        again, now = asked > 0, time.monotonic()
        if again and WORLD > 1 and now - _asked_at < 5:  # torchrun passes on the signal that the terminal sent us too
            return
        asked, _asked_at = number, now
        if again:
            os._exit(128 + number)
        if not _finishes:
            raise Stopped("stopped; what it had saved is whole")

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, hear)


def forget() -> None:
    """After a run: no signal has come, and the next one ends the process."""
    global asked, _finishes
    asked, _finishes = 0, False


def finish_the_step(yes: bool) -> None:
    """From now on a signal waits until `Run.save`, or, with False, ends the process where it is."""
    global _finishes
    _finishes = yes


def agree(yes: bool) -> bool:
    """Whether any process says yes."""
    if WORLD == 1:
        return yes
    device = f"cuda:{torch.cuda.current_device()}" if dist.get_backend() == "nccl" else "cpu"
    return bool(total(torch.tensor(float(yes), device=device)))


def check_torch(oldest: str = "2.6", what: str = "this project") -> None:
    """Raises InputError if this torch is older than the oldest that the tests of `what` have passed on."""
    version, wanted = (tuple(map(int, text.split(".")[:2])) for text in (torch.__version__, oldest))
    if version < wanted:
        raise InputError(f"torch {torch.__version__}: {what} needs {oldest} or newer; pip install -r requirements.txt")


def pick_device(name: str) -> torch.device:
    """`auto` takes CUDA, then MPS, then the CPU. Under torchrun every process gets the GPU of its local rank.

    Processes on a Mac take the CPU: gloo, which carries their numbers, does not reach MPS.
    """
    if WORLD > 1 and name == "mps":
        raise InputError("--device mps: several processes cannot share it; give cpu, or start one process")
    available = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available, "cpu": lambda: True}
    if name == "auto":
        name = next(k for k, is_available in available.items() if is_available() and not (k == "mps" and WORLD > 1))
    kind = name.partition(":")[0]
    if kind not in available:
        raise InputError(f"--device {name}: give auto, cpu, cuda or mps")
    if not available[kind]():
        raise InputError(f"--device {name}: there is none on this machine; --device auto takes what there is")
    if kind == "cuda" and WORLD > 1:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    if kind == "cuda" and ":" in name:
        torch.cuda.set_device(name)
    return torch.device(name)


def setup(cfg: Any) -> tuple[torch.device, torch.autocast]:
    """Device, autocast context and, under torchrun, the process group. Seeds torch for weight initialisation."""
    device = pick_device(cfg.device)
    if WORLD > 1 and not dist.is_initialized():
        # The optimizer imports this module. If that happened later, its defaults would keep gloo's threads to the end.
        importlib.import_module("torch.distributed.nn.functional")
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=12))
    if device.type == "cpu":
        keep_memory()
        settle_math()
    if getattr(cfg, "compile", False) and device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        raise InputError("--compile: on a CPU it needs a C++ compiler; install g++, or leave it out")
    if cfg.dtype not in ("auto", "float32", "bfloat16"):
        raise InputError(f"--dtype {cfg.dtype}: give auto, float32 or bfloat16")
    bf16 = cfg.dtype == "bfloat16"
    if cfg.dtype == "auto" and device.type == "cuda":
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    torch.manual_seed(cfg.seed)
    return device, torch.autocast(device.type, torch.bfloat16, enabled=bf16, cache_enabled=False)


def total(x: Tensor) -> Tensor:
    """The sum of x over all processes."""
    if WORLD > 1:
        x = x.clone()
        dist.all_reduce(x)
    return x


def synchronize() -> None:
    """Wait until the accelerator has done its work, so that a clock can be read."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    elif torch.backends.mps.is_available():
        torch.mps.synchronize()


def broadcast(module: nn.Module) -> None:
    """Give every process the weights of the first."""
    if WORLD > 1:
        for x in module.state_dict().values():
            dist.broadcast(x, 0)


def gather_objects(x: Any) -> list:
    """x of every process, in order. For text and lists; tensors go through `gather`."""
    if WORLD == 1:
        return [x]
    found: list = [None] * WORLD
    dist.all_gather_object(found, x)
    return found


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """The mean of x over the places where `mask` is true, in all processes together."""
    return total((x * mask).sum()) / total(mask.sum())


def gather(x: Tensor) -> Tensor:
    """x (B,) of every process, one after the other. Each process has the same B."""
    if WORLD == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(WORLD)]
    dist.all_gather(parts, x)
    return torch.cat(parts)


def sum_gradients(model: nn.Module) -> None:
    """Sum the gradients over all processes (see sharding.sum_gradients)."""
    if WORLD > 1:
        for p in model.parameters():
            if p.grad is None:  # this process had no row of this batch
                p.grad = torch.zeros_like(p)
        for handle in [dist.all_reduce(p.grad, async_op=True) for p in model.parameters()]:
            handle.wait()


def share(items: list, evenly: bool = False) -> list:
    """This process's part of a batch: every WORLD-th item. Raises InputError if it must be, and cannot be, even."""
    if evenly and len(items) % WORLD:
        raise InputError(f"--shard: {len(items)} rows cannot be dealt to {WORLD} processes evenly; give more rows")
    return items[RANK::WORLD]


def together(items: list, spare: list) -> list:
    """items, and the last of them (or of `spare`) again until each process has as many: nets that are divided over the
    processes are read together. So what is done for an item must be the same when it is done twice."""
    if WORLD == 1:
        return items
    most = max(gather_objects(len(items)))
    return items + (items or spare)[-1:] * (most - len(items))


def say(text: str, end: str = "\n") -> None:
    """Print, in the first process only."""
    if RANK == 0:
        print(text, end=end, flush=True)
