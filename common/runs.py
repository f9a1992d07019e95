"""Run folders: what a run writes, that it alone writes there, and how a stopped one goes on."""

import dataclasses
import fcntl
import hashlib
import importlib.util
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

import tiktoken
import torch
import torch.distributed as dist

from common import dist as processes
from common import sharding
from common.dist import RANK, WORLD, say
from common.nets import read_checkpoint, save_file, save_model
from data.files import InputError, cannot_write, replacing
from data.rng import seed_of
from data.tokenizer import encoding_state
from model import GPT, ScalarModel

INPUTS = ("data", "eval_data", "init", "ref", "reward", "judge")  # options that name what a run reads
MAY_DIFFER = ("resume", "device", "iterations", "best_of", "out", "tensorboard", *INPUTS)  # in a resumed run
OURS = r"(metrics\.jsonl|(model|state|best)\.pt|samples\.txt|curves\.png|tokens|comparisons\.jsonl"
OURS += r"|(config|rollout|report)\.json|report\.txt|(run|compare)\.html)(\..*tmp)?|metrics\.tmp"
OURS += r"|events\.out\.tfevents\..*"
SAVE_SECONDS = 60  # a run saves this often at least, if that takes less than a twentieth of its time


def check_out(cfg: Any) -> None:
    """Raises InputError if --out cannot become a run folder: it is --init itself, or it holds other files."""
    out = Path(cfg.out)
    for name in ("init", "ref", "reward"):
        source = Path(getattr(cfg, name, ""))
        source = source.parent if source.suffix == ".pt" else source
        if getattr(cfg, name, "") and out.resolve() == source.resolve():
            raise InputError(f"--out {out}: is --{name} too; name another folder, so that it is not overwritten")
    try:
        foreign = out.exists() and [path.name for path in out.iterdir() if not re.fullmatch(OURS, path.name)]
        is_run = (out / "metrics.jsonl").exists()
    except OSError as error:
        raise InputError(f"--out {out}: cannot be a folder ({error.strerror}); name another") from None
    if foreign and not is_run or out.resolve() == Path.cwd():
        raise InputError(f"--out {out}: not empty and not a run folder; name another, so that nothing in it is lost")


def lock(out: Path) -> Any:
    """An open file whose lock says that a run writes to `out`. The system drops it when the process ends, however.

    Raises InputError if another process holds it, or if nothing can be written there.
    """
    path = out.with_name(f".{out.resolve().name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if out.exists() and not os.access(out, os.W_OK):
            raise PermissionError(13, "Permission denied")
        file = open(path, "a")
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written ({error.strerror}); name another folder") from None
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise InputError(f"--out {out}: another run writes to it; wait for its end, or name another folder") from None
    return file


def fingerprint(names: str) -> str:
    """The sha256 of a file, of a run folder's model.pt, or of the file of a function; "" where there is none."""
    digest, found = hashlib.sha256(), False
    for name in names.split(",") if ".py:" in names else [names]:
        path = Path(name.partition(".py:")[0] + ".py" if ".py:" in name else name)
        if ".py:" in name and not path.is_file():
            path = (
                Path(__file__).parent.parent / path
            )  # a function of this project, while another folder is the current one
        if path.is_dir():
            path = path / "model.pt"
        if name and path.is_file():
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
            found = True
    return digest.hexdigest() if found else ""


def started_from(out: str, init: str) -> bool:
    """Whether the run in `out` started from the model that is in `init` now."""
    path = Path(out) / "state.pt"
    if not path.exists():
        return True
    return read_checkpoint(path, "start anew without --resume").get("inputs", {}).get("init") == fingerprint(init)


class Run:
    """A run folder: model.pt, state.pt, metrics.jsonl, samples.txt, curves.png and, as JSON, config, rollout, report.

    It is locked from here on. `start` opens it, once all input has been checked: an earlier run there is resumed, or
    renamed FOLDER.1, FOLDER.2, ….
    """

    def __init__(self, cfg: Any):
        self.cfg, self.folder, self.step, self.steps = cfg, Path(cfg.out), 0, 0
        self.times: dict[str, float] = {}
        self.board: Any = None  # TensorBoard's writer, with --tensorboard
        self.about: dict[str, Any] = {}  # what model.pt says besides
        self.files: dict[str, Path] = {}  # what was made before the start: its name in the folder → where it is
        self.created = self.saved_at = time.time()
        self.save_took = 0.0
        sharding.check(cfg)
        trains = getattr(cfg, "iterations", 1) > 0
        if trains:
            check_out(cfg)
        self.wants_board = getattr(cfg, "tensorboard", False)
        if self.wants_board and importlib.util.find_spec("tensorboard") is None:
            raise InputError("--tensorboard: needs the package of that name; pip install tensorboard")
        self.lock = lock(self.folder) if trains and RANK == 0 else None
        self.inputs = {name: fingerprint(getattr(cfg, name, "")) for name in INPUTS}
        self.state = self._read_state() if cfg.resume and trains else None
        self.best = self.state.get("goodness", -math.inf) if self.state else -math.inf  # of all evaluations

    def _read_state(self) -> dict | None:
        """What --resume continues from, or None if there is nothing. Raises InputError if it is of another run."""
        path = self.folder / "state.pt"
        if not path.exists():
            say(f"nothing to resume in {self.folder}, so this starts from the beginning")
            return None
        state = read_checkpoint(path, "start anew without --resume")
        if not isinstance(state.get("options"), dict) or not isinstance(state.get("step"), int):
            raise InputError(f"--resume: {path} is damaged; start anew without --resume")
        options = state["options"]
        for name, value in dataclasses.asdict(self.cfg).items():
            if name not in MAY_DIFFER and (before := options.get(name, value)) != value:
                raise InputError(f"--resume: {path} was made with --{name} {before}; give the same options")
        if (before := state.get("processes", WORLD)) != WORLD:
            raise InputError(f"--resume: {path} was made by {before} processes; start as many")
        for name, before in state.get("inputs", {}).items():
            if self.inputs[name] != before:
                raise InputError(
                    f"--resume: --{name} {getattr(self.cfg, name)} has changed since {path} was made, by its contents; "
                    "bring back what it was, or start anew without --resume"
                )
        if "inputs" not in state:
            say(f"{path} is from an earlier version, so nothing tells whether its inputs have changed since")
        if (before := options.get("iterations", 0)) > getattr(self.cfg, "iterations", 0):
            raise InputError(f"--resume: {path} was made with --iterations {before}; give as many, or more")
        return state

    def made(self, name: str, key: tuple, make: Callable[[Path], None]) -> Path:
        """The file `name`, which this run makes before its first step, such as its tokens or sampled comparisons.

        It lies beside the folder until the start. Its name there is a hash of `key`, of all that decides its contents,
        so that a run which is killed and started again finds it.
        """
        if self.state and (self.folder / name).exists():
            return self.folder / name
        path = self.folder.with_name(f"{self.folder.name}.{seed_of(name, *key):016x}.{name}")
        if RANK == 0 and not path.exists():
            make(path)
        if WORLD > 1:
            dist.barrier()
        self.files[name] = path
        return path

    def start(self, steps: int, **parts: Any) -> None:
        """Open the folder for writing. On a resume, put the saved state into `parts` (nets, optimizers)."""
        if WORLD > 1:
            dist.barrier()  # once every process has read its input, the files in the folder may move
        self.steps = steps
        if self.state:
            self.step = self.state["step"]
            try:
                for name, part in parts.items():
                    sharding.load_state(part, self.state.pop(name))  # so that no copy stays in memory
            except Exception as error:  # torch raises many kinds
                why = f"{error}".partition("\n")[0]
                raise InputError(
                    f"--resume: {self.folder / 'state.pt'} is damaged ({why}); start anew without --resume"
                ) from None
        for part in parts.values():
            if isinstance(part, torch.nn.Module) and not sharding.is_sharded(part):
                processes.broadcast(part)
        if RANK == 0:
            try:
                self._open()
            except OSError as error:
                raise cannot_write(self.folder, error) from None
            device = next(parts["model"].parameters()).device
            self.origin = origin(self.cfg, device, self.folder if self.state else None)
            self._describe()
            if self.wants_board:
                from torch.utils.tensorboard import SummaryWriter

                self.board = SummaryWriter(self.folder, purge_step=self.step)
        self.started = self.begun = self.saved_at = time.time()
        processes.finish_the_step(self.step < steps)

    def _open(self) -> None:
        """Rename an earlier run, or, on a resume, cut what it wrote after its last checkpoint."""
        kept, samples = [], self.folder / "samples.txt"
        if self.state:
            kept = [line for line in read_metrics(self.folder) if line["step"] < self.step]
            if samples.exists():
                lines = samples.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
                with replacing(samples) as file:
                    file.writelines(line for line in lines if line.endswith("\n") and sampled_at(line) <= self.step)
            old = [self.folder / name for name in ("report.txt", "report.json") if self.step < self.steps]
            for left in [*self.folder.glob("*.tmp"), *old]:
                left.unlink(missing_ok=True)
            self._move_in()
        elif self.folder.exists() and any(self.folder.iterdir()):
            old = next(name for n in count(1) if not (name := Path(f"{self.folder}.{n}")).exists())
            self.folder.rename(old)
            say(f"the run that was in {self.folder} is kept in {old}")
        with replacing(self.folder / "metrics.jsonl") as file:
            file.writelines(json.dumps(line) + "\n" for line in kept)

    def _move_in(self) -> None:
        """Move in what was made before the start: after a save, so that a run which is killed before one finds it."""
        for name in list(self.files):
            self.files.pop(name).replace(self.folder / name)

    def log(self, step: int, metrics: dict[str, float], show: Iterable[str] = ()) -> None:
        """Append the metrics of a step to metrics.jsonl. Print those that `show` names, and the time left."""
        self.check(step, metrics)
        if RANK > 0:
            return
        self._append("metrics.jsonl", json.dumps({"step": step} | metrics))
        if self.board:
            for name, x in metrics.items():
                self.board.add_scalar(name, x, step)
            self.board.flush()
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
                raise self.diverged(step + 1, name, x)

    def diverged(self, step: int, what: str, value: object) -> InputError:
        saved = [name for name in ("model.pt", "best.pt") if (self.folder / name).exists()]
        kept = f"{self.folder} keeps the last good {' and '.join(saved)}" if saved else "nothing has been saved yet"
        return InputError(
            f"step {step}: {what} is {value}, so the run stops; {kept}. Lower --lr, or look at the data of this step"
        )

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Measure the seconds of the block; they stand in `times` as time/phase."""
        began = time.time()
        yield
        processes.synchronize()
        self.times[f"time/{phase}"] = time.time() - began

    def begin_step(self) -> None:
        self.begun = time.time()

    def speed(self, tokens: int) -> dict[str, float]:
        """Tokens a second since the step began, as a metric."""
        return {"tokens_per_s": tokens / (time.time() - self.begun)}

    def keep_best(self, goodness: float, model: GPT | ScalarModel, encoding: tiktoken.Encoding) -> None:
        """Write best.pt if no evaluation of this run was better."""
        if goodness > self.best:
            self.best = goodness
            model = sharding.whole(model)
            if RANK == 0:
                save_model(model, encoding, self.folder / "best.pt", **self.about)

    def must_save(self, step: int, due: bool) -> bool:
        """Whether to save after this step: if `due`, at the end, after a minute, or because a signal ends the run."""
        now = time.time()
        late = now - self.saved_at > max(SAVE_SECONDS, 20 * self.save_took) and RANK == 0
        return processes.agree(due or step + 1 == self.steps or late or processes.asked > 0)

    def save(
        self, step: int, model: GPT | ScalarModel, encoding: tiktoken.Encoding, values: dict, **parts: Any
    ) -> None:
        """Write model.pt, and state.pt with the model, `parts` (optimizers, nets) and plain `values`.

        Raises Stopped if a signal has asked the run to end.
        """
        began = time.time()
        saved = {name: sharding.state(part) for name, part in ({"model": model} | parts).items()}
        model = sharding.whole(model)
        if RANK == 0:
            for name, x in saved["model"].items():
                if not x.isfinite().all():
                    raise self.diverged(step, f"weight {name}", "not finite")
            save_model(model, encoding, self.folder / "model.pt", **self.about)
            about = {"step": step, "options": dataclasses.asdict(self.cfg), "inputs": self.inputs, "processes": WORLD}
            about["goodness"] = self.best
            about["tokenizer"] = encoding_state(encoding)
            save_file(about | values | saved, self.folder / "state.pt")
            self._move_in()
            self._describe()
        self.saved_at = time.time()
        self.save_took = self.saved_at - began
        if step == self.steps:
            processes.finish_the_step(False)
        if processes.agree(processes.asked > 0):
            raise processes.Stopped(f"stopped after step {step} of {self.steps}; the same command and --resume go on")

    def _append(self, name: str, line: str) -> None:
        try:
            with open(self.folder / name, "a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise cannot_write(self.folder / name, error) from None

    def _describe(self) -> None:
        """Write config.json: what this run is, and the seconds that it has taken."""
        seconds = self.origin["seconds"] + time.time() - self.created
        self.write("config.json", self.origin | {"seconds": round(seconds, 1)})

    def write(self, name: str, content: Any) -> None:
        """Write a JSON file into the folder."""
        if RANK == 0:
            with replacing(self.folder / name) as file:
                json.dump(content, file)

    def report(self, text: str, content: dict) -> None:
        """Print a report and, if this run trains, keep it as report.txt and, with all its numbers, report.json."""
        say(text)
        if self.lock:
            self.write("report.json", content)
            with replacing(self.folder / "report.txt") as file:
                file.write(text.strip("\n") + "\n")

    def sample(self, step: int, text: str) -> None:
        """Append a sample to samples.txt and print it, with its line breaks shown as ⏎."""
        if RANK == 0:
            text = "⏎".join(text.splitlines())
            self._append("samples.txt", f"step {step}  {text}")
            print(f"    “{text}”", flush=True)

    def finish(self, device: torch.device, calibration: list[tuple] = ()) -> None:
        """Print the peak memory."""
        if RANK > 0:
            return
        self._describe()
        say(f"peak memory: {peak_memory(device):.2f} GiB")


def origin(cfg: Any, device: torch.device, resumed: Path | None) -> dict:
    """What made a run, for config.json. The seconds are those that a resumed run had taken before."""
    about = {"stage": type(cfg).__module__, "options": dataclasses.asdict(cfg), "command": shlex.join(sys.argv)}
    if about["stage"] == "__main__":
        about["stage"] = Path(sys.argv[0]).stem
    about |= {"commit": git("rev-parse", "HEAD"), "clean": None}
    if about["commit"]:
        about["clean"] = git("status", "--porcelain", "--untracked-files=no") == ""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    about |= {"python": platform.python_version(), "torch": torch.__version__, "device": f"{device.type} ({name})"}
    about |= {"processes": WORLD, "threads": torch.get_num_threads(), "seconds": 0.0}
    if resumed:
        with suppress(OSError, ValueError, TypeError, KeyError):
            about["seconds"] += json.loads((resumed / "config.json").read_text(encoding="utf-8"))["seconds"]
    return about


def git(*words: str) -> str | None:
    """What git says of the folder of this file; None if it is no checkout."""
    try:
        command = ["git", "--no-optional-locks", "-C", str(Path(__file__).parent), *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def read_metrics(folder: str | Path) -> list[dict]:
    """The lines of a run's metrics.jsonl, up to the first that is damaged; a kill may cut the last one short."""
    path, lines = Path(folder) / "metrics.jsonl", []
    if not path.exists():
        return []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            break
        lines.append(row)
    return lines


def sampled_at(line: str) -> int:
    """The step of a line of samples.txt; 0 for a line that a person wrote."""
    found = re.match(r"step (\d+)  ", line)
    return int(found[1]) if found else 0


def peak_memory(device: torch.device) -> float:
    """Peak memory of this process so far, in GiB: allocated memory of the GPU with CUDA, else resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if (status := Path("/proc/self/status")).exists():  # Linux: ru_maxrss would count what started this process
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) / 2**20
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
