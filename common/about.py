"""What a run says about itself: its origin, what cannot be in its metrics, its memory, numbers and times as text."""

import dataclasses
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from common.dist import WORLD
from common.judges import ROOT
from data import tales


def origin(cfg: Any, device: torch.device, resumed: Path | None) -> dict:
    """What made a run, for config.json. The seconds are those that a resumed run had taken before."""
    stage, commit = type(cfg).__module__, git("rev-parse", "HEAD")
    clean = git("status", "--porcelain", "--untracked-files=no") == "" if commit else None
    found = {"stage": Path(sys.argv[0]).stem if stage == "__main__" else stage, "options": dataclasses.asdict(cfg)}
    command = shlex.join(["python", os.path.relpath(sys.argv[0] or "."), *sys.argv[1:]])
    found |= {"command": command, "commit": commit, "clean": clean, "seconds": 0.0}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    found |= {"python": platform.python_version(), "torch": torch.__version__, "device": f"{device.type} ({name})"}
    found |= {"processes": WORLD, "threads": torch.get_num_threads()}
    if resumed:
        with suppress(OSError, ValueError, TypeError, KeyError):
            found["seconds"] += json.loads((resumed / "config.json").read_text(encoding="utf-8"))["seconds"]
    return found


def next_command(stage: str, cfg: Any) -> str:
    """What to type after a run, without folders that are defaults; "" where sft.py goes on by itself."""
    folders = {"--init": cfg.out} if stage == "sft" else {"--init": cfg.init, "--reward": cfg.out}
    defaults = ("out/sft", "out/reward")
    named = [word for name, folder in folders.items() if folder not in defaults for word in (name, folder)]
    if stage == "sft" and not cfg.init and Path(cfg.data).parent == tales.FOLDER:
        return ""
    if stage == "sft" and not cfg.init:
        return shlex.join(["python", "sft.py", "--init", cfg.out, "--data", "PAIRS.jsonl"])
    following = {"sft": ["reward.py"], "reward": ["ppo.py"]}.get(stage)
    return shlex.join(
        ["python", *following, *named] if following else ["python", "-m", "tools.sample", cfg.out, "--chat"]
    )


def impossible(metrics: dict[str, float], cfg: Any, first: bool) -> str:
    """One sentence on what the metrics of PPO cannot be while sampling, scoring and frozen copy are right, or "".

    Rounding is that of bfloat16 or TF32 on a GPU. At samples of π the sum of log π / π₀ over all answers is below −20
    in e^−20 of all cases at most: the mean of π₀ / π is ≤ 1 (Markov).
    """
    coarse = cfg.dtype == "bfloat16" or torch.cuda.is_available() or torch.backends.mps.is_available()
    rounding, still, length = 0.02 if coarse else 1e-4, metrics.get("lr") == 0, metrics.get("response_len", 0)
    kl, moved = metrics.get("objective/kl", 0.0), metrics.get("policy/approxkl", 0.0)
    if still and max(moved, abs(metrics.get("policy/ratio", 1.0) - 1)) > rounding:
        return "the ratio is not 1 though the policy stands still: compare how old and new log-probabilities are made"
    if (still or first) and length and cfg.ref in ("", cfg.init) and abs(kl) > rounding * length:
        return "the KL is not 0 though the policy is still the reference: compare how logp and ref_logp are made"
    if length and kl < -20 / cfg.batch_size - rounding * length:
        return "the KL is below 0 by more than chance: what is sampled has other probabilities than what is scored"
    return ""


def git(*words: str) -> str | None:
    """What git says of this project's folder; None if it is no checkout."""
    command = ["git", "--no-optional-locks", "-C", str(ROOT), *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def synchronize() -> None:
    """Wait until the accelerator has done its work, so that a clock can be read."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    elif torch.backends.mps.is_available():
        torch.mps.synchronize()


def peak_memory(device: torch.device) -> float:
    """Peak memory of this process so far, in GiB: allocated memory of the GPU with CUDA, else resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status")  # of Linux: ru_maxrss would count what started this process
    if status.exists() and (found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return int(found[1]) / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30  # bytes on macOS


def number(x: float) -> str:
    if abs(x) >= 100:
        return f"{x:,.0f}"
    return f"{x:.2e}" if 0 < abs(x) < 0.001 else f"{x:.3f}"


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
