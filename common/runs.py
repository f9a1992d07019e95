"""Run folders: the files that a run writes, and how it stops."""

import dataclasses
import json
import math
import os
import re
import signal
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

from common import about, dist, folders, nets
from common.dist import RANK, WORLD
from common.judges import ROOT
from data.files import InputError, cannot_write, replacing
from data.tokenizer import encoding_state
from model import GPT, ScalarModel

SAVE_SECONDS = 60  # a run saves this often at least, if that takes less than a twentieth of its time


class Run:
    """A run folder: model.pt, state.pt, metrics.jsonl, samples.txt, run.html and, as JSON, config, rollout, report.

    It is locked from here on. `start` opens it, once all input has been checked: an earlier run there is resumed, or
    renamed FOLDER.1, FOLDER.2, …. In the loop come `log` and, where `due` says so, `save`; at the end `finish`.
    """

    def __init__(self, cfg: Any):
        self.cfg, self.folder, self.step, self.steps = cfg, Path(cfg.out), 0, 0
        self.times: dict[str, float] = {}
        self.files: dict[str, Path] = {}  # what was made before the start: its name in the folder → where it is
        self.created = self.saved_at = self.logged_at = time.time()
        self.shown_at = 0.0  # when a step was last printed
        self.save_took = 0.0
        self.signal, self.handlers = 0, {}  # the signal that has asked the run to stop; what else would hear it
        dist.check_shard(cfg)
        folders.check_out(cfg)
        self.lock = folders.lock(self.folder) if RANK == 0 else None
        self.inputs = {name: folders.fingerprint(getattr(cfg, name, "")) for name in folders.INPUTS}
        self.state = folders.read_state(cfg, self.inputs) if cfg.resume else None
        self.best = self.state["goodness"] if self.state else -math.inf  # of all evaluations

    def made(self, name: str, make: Callable[[Path], None]) -> Path:
        """The file `name`, which this run makes from its inputs, such as its tokens. It moves in at the start."""
        if self.state and (self.folder / name).exists():
            return self.folder / name
        self.files[name] = path = self.folder.with_name(f"{self.folder.name}.{name}")
        if RANK == 0:
            path.unlink(missing_ok=True)
            make(path)
        dist.barrier()
        return path

    def start(self, steps: int, **parts: Any) -> None:
        """Open the folder for writing. On a resume, put the saved state into `parts` (nets, optimizers)."""
        dist.barrier()  # once every process has read its input, the files in the folder may move
        self.steps = steps
        if self.state:
            self.step = self.state["step"]
            for name, part in parts.items():
                dist.load_state(part, self.state.pop(name))  # so that no copy stays in memory
        for part in parts.values():
            if isinstance(part, torch.nn.Module):
                dist.broadcast(part)
        if RANK == 0:
            try:
                self.open()
            except OSError as error:
                raise cannot_write(self.folder, error) from None
            device = next(parts["model"].parameters()).device
            self.origin = about.origin(self.cfg, device, self.folder if self.state else None)
            self.origin |= {"steps": steps, "first_step": self.step, "started": time.time(), "inputs": self.inputs}
            self.describe()
        self.started = self.saved_at = self.logged_at = time.time()
        if self.step < steps:
            self.hear()

    def open(self) -> None:
        """Rename an earlier run, or, on a resume, cut what it wrote after its last checkpoint."""
        kept, samples = [], self.folder / "samples.txt"
        if self.state:
            kept = [line for line in read_metrics(self.folder) if line["step"] < self.step]
            if samples.exists():
                lines = samples.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
                with replacing(samples) as file:
                    file.writelines(line for line in lines if line.endswith("\n") and sampled_at(line) <= self.step)
            old = ["report.json", "run.html"] if self.step < self.steps else []
            for left in [*self.folder.glob("*.tmp"), *(self.folder / name for name in old)]:
                left.unlink(missing_ok=True)
        elif self.folder.exists() and any(self.folder.iterdir()):
            old = next(name for n in count(1) if not (name := Path(f"{self.folder}.{n}")).exists())
            self.folder.rename(old)
            print(f"the run that was in {self.folder} is kept in {old}", flush=True)
        with replacing(self.folder / "metrics.jsonl") as file:
            file.writelines(json.dumps(line) + "\n" for line in kept)
        for name, path in self.files.items():
            path.replace(self.folder / name)

    def hear(self) -> None:
        """From now on Ctrl-C and SIGTERM let the step end and the run save. A second one ends the process at once."""

        def note(number: int, frame: Any) -> None:
            self.signal = number
            if WORLD == 1:  # torchrun passes on the signal that the terminal sent us too
                signal.signal(number, signal.SIG_DFL)

        with suppress(ValueError):  # outside the main thread
            self.handlers = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}

    def log(self, step: int, metrics: dict[str, float], show: Iterable[str] = (), tokens: int = 0) -> None:
        """Append the metrics of a step to metrics.jsonl, with its speed. Now and then print those that `show` names.

        It prints the first and the last step, those with an evaluation, and others two seconds after the line before.
        Raises InputError if a metric is not finite, before a checkpoint can be written.
        """
        for name, x in metrics.items():
            if not math.isfinite(x):
                raise self.diverged(step + 1, name, x)
        now = time.time()
        seconds = now - self.logged_at - self.times.get("time/evaluate", 0.0)
        metrics |= self.times | {"tokens_per_s": tokens / seconds}
        self.times, self.logged_at = {}, now
        if RANK > 0:
            return
        self.append("metrics.jsonl", json.dumps({"step": step} | metrics))
        if said := about.impossible(metrics, self.cfg, first=step == 0):
            print(f"step {step + 1}: impossible: {said}", flush=True)
        always = step in (self.step, self.steps - 1) or "time/evaluate" in metrics
        if show and (always or now - self.shown_at >= 2):
            self.shown_at = now
            left = (now - self.started) / (step + 1 - self.step) * (self.steps - step - 1)
            names = {name: name if "eval/" in name else name.split("/")[-1] for name in show if name in metrics}
            shown = "  ".join(f"{short} {about.number(metrics[name])}" for name, short in names.items())
            width = len(str(self.steps))
            print(f"step {step + 1:>{width}}/{self.steps}  {shown}  {about.clock(left)} left", flush=True)

    def diverged(self, step: int, what: str, value: object) -> InputError:
        saved = [name for name in ("model.pt", "best.pt") if (self.folder / name).exists()]
        kept = f"{self.folder} keeps the last good {' and '.join(saved)}" if saved else "nothing has been saved yet"
        return InputError(
            f"step {step}: {what} is {value}, so the run stops; {kept}. Lower --lr, or look at the data of this step"
        )

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Measure the seconds of the block; `log` writes them as time/phase."""
        began = time.time()
        yield
        about.synchronize()
        self.times[f"time/{phase}"] = time.time() - began

    def keep_best(self, goodness: float, model: GPT | ScalarModel, encoding: tiktoken.Encoding) -> None:
        """Write best.pt if no evaluation of this run was better."""
        if goodness > self.best:
            self.best = goodness
            model = dist.gathered(model)
            if RANK == 0:
                nets.save_model(model, encoding, self.folder / "best.pt")

    def due(self, step: int, every: int) -> bool:
        """Whether to save after this step: each `every` steps, at the end, once a minute, or because a signal came."""
        late = time.time() - self.saved_at > max(SAVE_SECONDS, 20 * self.save_took) and RANK == 0
        return dist.agree((step + 1) % every == 0 or step + 1 == self.steps or late or self.signal > 0)

    def save(
        self, step: int, model: GPT | ScalarModel, encoding: tiktoken.Encoding, values: dict, **parts: Any
    ) -> None:
        """Write model.pt, and state.pt with the model, `parts` (optimizers, nets) and plain `values`.

        Raises KeyboardInterrupt (exit code, sentence) if a signal has asked the run to end.
        """
        began = time.time()
        saved = {name: dist.state(part) for name, part in ({"model": model} | parts).items()}
        model = dist.gathered(model)
        if RANK == 0:
            for name, x in saved["model"].items():
                if not x.isfinite().all():
                    raise self.diverged(step, f"weight {name}", "not finite")
            nets.save_model(model, encoding, self.folder / "model.pt")
            saved |= {"version": folders.VERSION, "step": step, "processes": WORLD, "goodness": self.best}
            saved |= {"options": dataclasses.asdict(self.cfg), "inputs": self.inputs}
            saved |= {"tokenizer": encoding_state(encoding)}
            nets.save_file(saved | values, self.folder / "state.pt")
            self.describe()
        self.saved_at = time.time()
        self.save_took = self.saved_at - began
        self.logged_at += self.save_took  # so that it does not count as the next step's time
        stopped = next((n for n in dist.gather_objects(self.signal) if n), 0)
        if step == self.steps or stopped:
            for number, handler in self.handlers.items():
                signal.signal(number, handler)
        if stopped:
            what = f"stopped after step {step} of {self.steps}; the same command and --resume go on"
            raise KeyboardInterrupt(128 + stopped, what)

    def append(self, name: str, line: str) -> None:
        try:
            with open(self.folder / name, "a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise cannot_write(self.folder / name, error) from None

    def describe(self) -> None:
        """Write config.json: what this run is, and the seconds that it has taken."""
        seconds = self.origin["seconds"] + time.time() - self.created
        self.write("config.json", self.origin | {"seconds": round(seconds, 1)})

    def write(self, name: str, content: Any) -> None:
        """Write a JSON file into the folder."""
        if RANK == 0:
            with replacing(self.folder / name) as file:
                json.dump(content, file)

    def report(self, text: str, content: dict) -> None:
        """Print a report, and keep all its numbers as report.json."""
        dist.print0(text)
        self.write("report.json", content)

    def sample(self, step: int, text: str) -> None:
        """Append a sample to samples.txt and print it, with its line breaks shown as ⏎."""
        if RANK == 0:
            text = "⏎".join(text.splitlines())
            self.append("samples.txt", f"step {step}  {text}")
            print(f"    “{text}”", flush=True)

    def finish(self, device: torch.device) -> None:
        """Print the peak memory, write the run's page, and say what is next."""
        if RANK == 0:
            self.describe()
            print(f"peak memory: {about.peak_memory(device):.2f} GiB", flush=True)
            write_page(self.folder)
            if (path := self.folder / "report.json").exists():
                print(f"{path}: the report, with all its numbers")
            if command := about.next_command(self.origin["stage"], self.cfg):
                print(f"next: {command}", flush=True)


def write_page(folder: Path) -> None:
    """Let `python -m tools.page FOLDER` write run.html, and print where it lies."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tools.page", str(folder)]
    subprocess.run(command, env=environment, check=False)


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
        if not all(isinstance(x, float) or isinstance(x, int) and abs(x) < 2**63 for x in row.values()):
            break
        lines.append(row)
    return lines


def sampled_at(line: str) -> int:
    """The step of a line of samples.txt; 0 for a line that a person wrote."""
    found = re.match(r"step (\d{1,18})  ", line)
    return int(found[1]) if found else 0
