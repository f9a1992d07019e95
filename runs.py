"""Checkpoints and run folders: what a run writes, how it is read again, and how a stopped one goes on."""

import dataclasses
import hashlib
import importlib.util
import json
import math
import os
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import tiktoken
import torch
import torch.distributed as dist

import plots
from data.chance import seed_of
from data.files import InputError
from data.tokenizer import encoding_from_state, encoding_state
from model import GPT, GPTConfig, ScalarModel
from processes import RANK, WORLD, say

# --- checkpoints ------------------------------------------------------------------------------------------------------


def save_file(content: dict, path: Path) -> None:
    """torch.save under a temporary name, then rename: a kill leaves either the old file or the new one, whole."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


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
        raise InputError(
            f"{option} {folder}: no model.pt there; run the stage that writes it, or name another run folder"
        )
    try:
        saved = torch.load(path, map_location=device, weights_only=True)
        scalar = "head.weight" in saved["model"]
        config = GPTConfig(**saved["config"])
        encoding = encoding_from_state(saved["tokenizer"])
    except Exception as error:  # torch.load raises many kinds
        raise InputError(
            f"{path}: not a checkpoint of this project ({type(error).__name__}); name another run folder"
        ) from None
    if kind is GPT and scalar:
        raise InputError(f"{option} {folder}: holds a reward model; give a run folder of sft.py or ppo.py")
    if kind is ScalarModel and not scalar:
        raise InputError(f"{option} {folder}: holds a language model; give a run folder of reward.py")
    with torch.device("meta"):  # no memory yet: the saved tensors become the parameters
        model = GPT(config)
        model = ScalarModel(model) if scalar else model
    model.load_state_dict(saved["model"], assign=True)
    return model.eval(), encoding


def load_gpt(folder: str | Path, device: torch.device | str = "cpu", option: str = "") -> tuple[GPT, tiktoken.Encoding]:
    return load(folder, device, option, GPT)


def load_scalar(
    folder: str | Path, device: torch.device | str = "cpu", option: str = ""
) -> tuple[ScalarModel, tiktoken.Encoding]:
    return load(folder, device, option, ScalarModel)


def check_vocabulary(what: str, encoding: tiktoken.Encoding, wanted: tiktoken.Encoding, init: str) -> None:
    """Raises InputError if `what` has another vocabulary than the policy of --init."""
    if encoding_state(encoding) != encoding_state(wanted):
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


# --- run folders ------------------------------------------------------------------------------------------------------


def check_out(cfg: Any) -> None:
    """Raises InputError if --out cannot become a run folder: it is --init itself, or it holds other files."""
    out = Path(cfg.out)
    for name in ("init", "ref", "reward"):
        source = Path(getattr(cfg, name, ""))
        source = source.parent if source.suffix == ".pt" else source
        if getattr(cfg, name, "") and out.resolve() == source.resolve():
            raise InputError(f"--out {out}: is --{name} too; name another folder, so that it is not overwritten")
    is_run = (out / "metrics.jsonl").exists()
    is_empty = out.is_dir() and not any(out.iterdir())
    if out.exists() and not is_run and not is_empty:
        raise InputError(f"--out {out}: not empty and not a run folder; name another, so that nothing in it is lost")


INPUTS = ("data", "eval_data", "init", "ref", "reward")  # options that name what a run reads
MAY_DIFFER = ("resume", "device", "iterations", "best_of")  # options that a resumed run may change


def fingerprint(name: str) -> str:
    """The sha256 of a file, of a run folder's model.pt, or of the file of a function; "" where there is none."""
    path = Path(name.partition(".py:")[0] + ".py" if ".py:" in name else name)
    if ".py:" in name and not path.is_file():
        path = Path(__file__).parent / path  # a function of this project, while another folder is the current one
    if path.is_dir():
        path = path / "model.pt"
    if not name or not path.is_file():
        return ""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Run:
    """A run folder: model.pt, state.pt, metrics.jsonl, samples.txt, curves.png.

    Create it once all input has been checked. An earlier run there is resumed, or renamed FOLDER.1, FOLDER.2, ….
    """

    def __init__(self, cfg: Any):
        self.cfg, self.folder, self.step, self.steps = cfg, Path(cfg.out), 0, 0
        self.times: dict[str, float] = {}
        self.about: dict[str, Any] = {}  # what model.pt says besides
        self.inputs = {name: fingerprint(getattr(cfg, name, "")) for name in INPUTS}
        self.state = self._read_state() if cfg.resume and getattr(cfg, "iterations", 1) else None
        self.best = self.state.get("goodness", -math.inf) if self.state else -math.inf  # of all evaluations

    def _read_state(self) -> dict | None:
        """What --resume continues from, or None if there is nothing. Raises InputError if the options differ."""
        path = self.folder / "state.pt"
        if not path.exists():
            say(f"nothing to resume in {self.folder}, so this starts from the beginning")
            return None
        state = torch.load(path, map_location="cpu", weights_only=True)
        for name, value in dataclasses.asdict(self.cfg).items():
            if name not in MAY_DIFFER and (before := state["options"].get(name, value)) != value:
                raise InputError(f"--resume: {path} was made with --{name} {before}; give the same options")
        for name, before in state.get("inputs", {}).items():
            if self.inputs[name] != before:
                raise InputError(
                    f"--resume: --{name} {getattr(self.cfg, name)} has changed since {path} was made; "
                    "bring back what it was, or start anew without --resume"
                )
        if "inputs" not in state:
            say(f"{path} is from an earlier version, so nothing tells whether its inputs have changed since")
        if (before := state["options"].get("iterations", 0)) > getattr(self.cfg, "iterations", 0):
            raise InputError(f"--resume: {path} was made with --iterations {before}; give as many, or more")
        return state

    def start(self, steps: int, **parts: Any) -> None:
        """Open the folder for writing. On a resume, put the saved state into `parts` (nets, optimizers)."""
        if WORLD > 1:
            dist.barrier()  # once every process has read its input, the files in the folder may move
        self.steps = steps
        self.started = self.begun = time.time()
        if self.state:
            self.step = self.state["step"]
            for name, part in parts.items():
                part.load_state_dict(self.state.pop(name))  # so that no copy stays in memory
        if RANK > 0:
            return
        if self.state:
            kept = [line for line in read_metrics(self.folder) if line["step"] < self.step]
            if (samples := self.folder / "samples.txt").exists():
                lines = samples.read_text(encoding="utf-8").splitlines(keepends=True)
                samples.write_text("".join(s for s in lines if int(s.split()[1]) <= self.step), encoding="utf-8")
        else:
            if self.folder.exists() and any(self.folder.iterdir()):
                old = next(name for n in count(1) if not (name := Path(f"{self.folder}.{n}")).exists())
                self.folder.rename(old)
                say(f"the run that was in {self.folder} is kept in {old}")
            kept = []
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / "metrics.tmp"
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        temporary.replace(self.folder / "metrics.jsonl")

    def log(self, step: int, metrics: dict[str, float], show: Iterable[str] = ()) -> None:
        """Append the metrics of a step to metrics.jsonl. Print those that `show` names, and the time left."""
        self.check(step, metrics)
        if RANK > 0:
            return
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": step} | metrics) + "\n")
        if show:
            left = (time.time() - self.started) / (step + 1 - self.step) * (self.steps - step - 1)
            width = len(str(self.steps))
            names = {
                name: name if name.startswith("eval/") else name.split("/")[-1] for name in show if name in metrics
            }
            shown = "  ".join(f"{short} {number(metrics[name])}" for name, short in names.items())
            print(f"step {step + 1:>{width}}/{self.steps}  {shown}  {clock(left)} left", flush=True)

    def check(self, step: int, metrics: dict[str, float]) -> None:
        """Raises InputError if a metric is not finite, before a checkpoint can be written."""
        for name, x in metrics.items():
            if not math.isfinite(x):
                raise InputError(
                    f"step {step + 1}: {name} is {x}, so the run stops; what it last saved in {self.folder} is whole. "
                    "Lower --lr, or look at the data of this step"
                )

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Measure the seconds of the block; they stand in `times` as time/phase."""
        began = time.time()
        yield
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self.times[f"time/{phase}"] = time.time() - began

    def begin_step(self) -> None:
        self.begun = time.time()

    def speed(self, tokens: int) -> dict[str, float]:
        """Tokens a second since the step began, as a metric."""
        return {"tokens_per_s": tokens / (time.time() - self.begun)}

    def keep_best(self, goodness: float, model: GPT | ScalarModel, encoding: tiktoken.Encoding) -> None:
        """Write best.pt if no evaluation of this run was better."""
        if goodness > self.best and RANK == 0:
            self.best = goodness
            save_model(model, encoding, self.folder / "best.pt", **self.about)

    def save(
        self, step: int, model: GPT | ScalarModel, encoding: tiktoken.Encoding, values: dict, **parts: Any
    ) -> None:
        """Write model.pt, and state.pt with the model, `parts` (optimizers, nets) and plain `values`."""
        if RANK == 0:
            save_model(model, encoding, self.folder / "model.pt", **self.about)
            saved = {name: part.state_dict() for name, part in ({"model": model} | parts).items()}
            about = {"step": step, "options": dataclasses.asdict(self.cfg), "inputs": self.inputs}
            about["goodness"] = self.best
            about["tokenizer"] = encoding_state(encoding)
            save_file(about | values | saved, self.folder / "state.pt")

    def sample(self, step: int, text: str) -> None:
        """Append a sample to samples.txt and print it, with its line breaks shown as ⏎."""
        if RANK == 0:
            text = "⏎".join(text.splitlines())
            with open(self.folder / "samples.txt", "a", encoding="utf-8") as file:
                file.write(f"step {step}  {text}\n")
            print(f"    “{text}”", flush=True)

    def finish(self, device: torch.device, calibration: list[tuple] = ()) -> None:
        """Print the peak memory. Draw curves.png from metrics.jsonl if matplotlib is installed."""
        if RANK > 0:
            return
        say(f"peak memory: {peak_memory(device):.2f} GiB")
        if self.step >= self.steps:
            return  # nothing new to draw
        if importlib.util.find_spec("matplotlib") is None:
            return say(f"pip install matplotlib, and the next run draws {self.folder}/curves.png")
        title = f"{self.folder}, seed {self.cfg.seed}"
        if hasattr(self.cfg, "kl_coef"):
            title += f", β = {self.cfg.kl_coef:g}"
        plots.curves(read_metrics(self.folder), self.folder / "curves.png", title, calibration)


def read_metrics(folder: str | Path) -> list[dict]:
    """The lines of a run's metrics.jsonl, without a last line that a kill cut short."""
    lines = []
    for line in (Path(folder) / "metrics.jsonl").read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def peak_memory(device: torch.device) -> float:
    """Peak memory of this process so far, in GiB: allocated memory of the GPU with CUDA, else resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if (status := Path("/proc/self/status")).exists():  # Linux: ru_maxrss would count what started this process
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) / 2**20
    if importlib.util.find_spec("resource") is None:  # Windows
        return math.nan
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30  # bytes on macOS


def number(x: float) -> str:
    if abs(x) >= 1000:
        return f"{x:,.0f}"
    if abs(x) >= 100:
        return f"{x:.0f}"
    return f"{x:.2e}" if 0 < abs(x) < 0.001 else f"{x:.3f}"


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
