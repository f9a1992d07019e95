"""One measurement in a process of its own: a contender's speed and memory, or the limits of the machine."""

import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch

import fast
from common import about
from tests import contenders
from tests.contenders import OURS, dtype_of

OUT_OF_MEMORY = "out of memory"


def each(work: Callable[[], object], seconds: float) -> tuple[float, float]:
    """Seconds of one `work`, and of processor time, over about `seconds`, after once to warm up."""
    work()
    gc.collect()
    about.synchronize()
    began, busy, n = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - began < seconds or n < 2:
        work()
        about.synchronize()
        n += 1
    return (time.perf_counter() - began) / n, (time.process_time() - busy) / n


def fastest(work: Callable[[], object], seconds: float) -> float:
    """The least seconds that `work` takes, tried for about `seconds`."""
    found, began = [], time.perf_counter()
    while time.perf_counter() - began < seconds or len(found) < 3:
        about.synchronize()
        start = time.perf_counter()
        work()
        about.synchronize()
        found.append(time.perf_counter() - start)
    return min(found)


def limits(device: torch.device, seconds: float = 3.0) -> dict[str, float]:
    """What the machine can do: operations a second in a product, bytes a second read and written by a copy."""
    n, size = (8192, 2**30) if device.type == "cuda" else (2048, 2**28)
    square = torch.randn(n, n, device=device, dtype=dtype_of(device))
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    products = (lambda: square @ square, lambda: fast.linear(square, square))  # by MKL and by oneDNN
    with torch.no_grad():
        product = min(fastest(product, seconds) for product in products)
        copy = fastest(lambda: target.copy_(source), seconds)
    return {"products": 2 * n**3 / product, "copy": 2 * size / copy}


def one(who: str, what: str, name: str, *sizes: int, device: torch.device, seconds: float) -> dict:
    """Tokens a second, or medians of a PPO iteration's phases; and peak memory, whole and less what torch takes."""
    before = about.peak_memory(device)
    project, _, variant = who.partition(":")
    if device.type == "cpu" and (project == OURS or variant == "kept"):
        fast.keep_memory()
    if what == "ppo":
        iterations = contenders.trl_iterations if project == "trl" else contenders.ppo_iterations
        lines = iterations(who, name, *sizes, device=device)
        found = {key: statistics.median(line[key] for line in lines) for key in lines[0]}
    else:
        works = {"train": contenders.train, "reward": contenders.reward_step, "generate": contenders.generate}
        prepare = works["train" if what == "checkpoint" else what]
        work, count = prepare(who, name, *sizes, device)
        wall, busy = each(work, seconds)
        found = {"tokens_per_s": count / wall, "step_s": wall, "step_cpu_s": busy}
    peak = about.peak_memory(device)
    return found | {"peak_GiB": peak, "own_GiB": peak - before}


def print_one(words: list[str], device: torch.device, seconds: float) -> None:
    """What `one` or `limits` finds, as the last line. A lack of memory is a finding."""
    who, *rest = words
    try:
        if who == "limits":
            found = limits(device, seconds)
        else:
            found = one(who, *rest[:2], *map(int, rest[2:]), device=device, seconds=seconds)
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if not isinstance(error, MemoryError) and not any(x in str(error) for x in (OUT_OF_MEMORY, "allocate memory")):
            raise
        found = {"error": OUT_OF_MEMORY}
    print("\n" + json.dumps(found))


def command(*words: object, device: torch.device) -> str:
    """The command of one measurement."""
    return f"python -m tests.bench --one {','.join(map(str, words))} --device {device}"


def python(*argv: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *argv], capture_output=True, text=True)


def alone(*words: object, device: torch.device, seconds: float = 3.0) -> dict:
    """What `print_one` found in a process of its own, or the error that ended it."""
    done = python(*command(*words, device=device).split()[1:], "--seconds", str(seconds))
    if done.returncode == -9:
        return {"error": OUT_OF_MEMORY}  # Linux ends a process for it
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["it ended without a word"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])
