"""What every stage needs and no reader needs first: command line, device, processes, checkpoints, run folders."""

import argparse
import ctypes
import dataclasses
import importlib.util
import inspect
import json
import math
import os
import re
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import count
from pathlib import Path
from types import UnionType
from typing import Any

import numpy as np
import tiktoken
import torch
import torch.distributed as dist
from torch import Tensor, nn

from data import InputError, encoding_from_state, encoding_state
from model import GPT, GPTConfig, Linear, ScalarModel

# --- command line ---------------------------------------------------------------------------------------------------

ABOVE_ZERO = "samples batch_size minibatch_size epochs response_len n_layer n_head n_embd label_temperature".split()
ABOVE_ZERO += ["eval_prompts", "save_every", "evals", "horizon", "people"]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise InputError(f"{message}; {self.prog} --help lists the options")


def parse(config: type, argv: list[str] | None = None, positional: str = "") -> Any:
    """A `config` dataclass from the command line: a field is an option, its trailing comment the help.

    With `positional`, the pair (config, that argument). Raises InputError for what does not parse.
    """
    comments = dict(re.findall(r"^\s+(\w+): .*#\s*(.*)$", inspect.getsource(config), re.MULTILINE))
    doc = (sys.modules[config.__module__].__doc__ or "").split("\n")[0]
    parser = _Parser(description=doc, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    if positional:
        parser.add_argument(positional, help="a run folder")
    for field in dataclasses.fields(config):
        kind = field.type.__args__[0] if isinstance(field.type, UnionType) else field.type
        how = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind, "metavar": kind.__name__}
        parser.add_argument(
            f"--{field.name}", default=field.default, help=comments.get(field.name, " ").replace("%", "%%"), **how
        )
    options = vars(parser.parse_args(argv))
    folder = options.pop(positional, None)
    for name, value in options.items():
        if isinstance(value, (int, float)) and (
            value < 0 and name != "unended_cap" or name in ABOVE_ZERO and value == 0
        ):
            raise InputError(f"--{name} {value}: give a number {'above' if name in ABOVE_ZERO else 'of at least'} 0")
    return (config(**options), folder) if positional else config(**options)


def run_main(main: Callable[[], None]) -> None:
    """Run a script's `main`; bad input ends it with one sentence and exit code 2, without a traceback."""
    code = 0
    try:
        main()
    except InputError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        code = 2
    except Exception:
        if WORLD == 1:
            raise
        traceback.print_exc()
        code = 1
    if code and WORLD > 1:  # at once: to take leave of the group, which waits for this process, would take for ever
        sys.stderr.flush()
        os._exit(code)
    if dist.is_initialized():
        dist.destroy_process_group()
    if code:
        sys.exit(code)


def load_function(name: str) -> Callable[[str, str], float]:
    """The judge named "path/to/file.py:function": a function (prompt, response) -> float."""
    file, _, function = name.rpartition(":")
    if not Path(file).is_file() and (Path(__file__).parent / file).is_file():
        file = str(Path(__file__).parent / file)  # a function of this project's own, named from elsewhere
    if not Path(file).is_file():
        raise InputError(f"{name}: no such file; a function is named path/to/file.py:function")
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, function, None)):
        raise InputError(f"{name}: {file} has no function {function}; a function is named path/to/file.py:function")
    return getattr(module, function)


# --- device and processes -------------------------------------------------------------------------------------------

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def pick_device(name: str) -> torch.device:
    """auto takes CUDA, then MPS, then the CPU. Under torchrun every process gets the GPU of its local rank."""
    available = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available, "cpu": lambda: True}
    if name == "auto":
        name = next(kind for kind, there in available.items() if there())
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
        # the optimiser imports this; once the group is made, its default arguments would keep gloo's threads to the end
        importlib.import_module("torch.distributed.nn.functional")
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=12))
    if device.type == "cpu":
        keep_memory()
    if cfg.dtype not in ("auto", "float32", "bfloat16"):
        raise InputError(f"--dtype {cfg.dtype}: give auto, float32 or bfloat16")
    bf16 = cfg.dtype == "bfloat16"
    if cfg.dtype == "auto" and device.type == "cuda":
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    torch.manual_seed(cfg.seed)
    return device, torch.autocast(device.type, torch.bfloat16, enabled=bf16, cache_enabled=False)


def keep_memory() -> None:
    """Have glibc keep what is freed: by itself it returns large tensors, and fresh pages cost more than arithmetic."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        for option, setting in ((-4, 0), (-1, -1)):  # M_MMAP_MAX: no mapping of its own; M_TRIM_THRESHOLD: never
            mallopt(option, setting)


def generator(*key: int) -> torch.Generator:
    """A CPU generator that depends on the key (seed, purpose, step, …) alone, so that a resume needs no state of it."""
    return torch.Generator().manual_seed(seed_of(*key))


def seed_of(*key: int) -> int:
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)


def total(x: Tensor) -> Tensor:
    """The sum over all processes of a tensor that each of them has."""
    if WORLD > 1:
        x = x.clone()
        dist.all_reduce(x)
    return x


def sum_gradients(model: nn.Module) -> None:
    """Add up the gradients of all processes. Every loss divides by the tokens of the whole batch, so a sum is right."""
    if WORLD > 1:
        for p in model.parameters():
            if p.grad is None:  # no row of this batch fell to this process
                p.grad = torch.zeros_like(p)
        for sum_of_one in [dist.all_reduce(p.grad, async_op=True) for p in model.parameters()]:
            sum_of_one.wait()


def first_alone(work: Callable[[], Any]) -> Any:
    """What `work` returns, done by process 0 before the others do it (they find its files)."""
    if RANK > 0:
        dist.barrier()
    result = work()
    if RANK == 0 and WORLD > 1:
        dist.barrier()
    return result


def share(items: list) -> list:
    """This process's part of a batch: every WORLD-th item."""
    return items[RANK::WORLD]


def freeze(model: nn.Module, autocast: torch.autocast) -> nn.Module:
    """In eval mode, without gradients; under autocast the linear layers are kept in its dtype.

    Autocast rounds just those weights before each product, so the frozen copy computes what the live model does. A
    scalar head and embeddings, which are also read as they are, stay as they are.
    """
    model.eval().requires_grad_(False)
    if autocast._enabled:
        for module in model.modules():
            if isinstance(module, Linear):
                module.to(autocast.fast_dtype)
    return model


def compile_blocks(*models: GPT | ScalarModel) -> None:
    """Have torch.compile fuse the blocks of each net. It leaves decoding alone, which on CUDA becomes a graph."""
    if next(models[0].parameters()).device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        raise InputError("--compile: on a CPU it needs a C++ compiler; install g++, or leave it out")
    for model in models:
        trunk = model.trunk if isinstance(model, ScalarModel) else model
        trunk.static_decode = trunk.wte.weight.is_cuda
        for block in trunk.h:
            block.compile(dynamic=True, recompile_limit=64)  # all blocks of all nets share one code


def adamw(model: nn.Module, lr: float, weight_decay: float, eps: float = 1e-8) -> torch.optim.AdamW:
    """AdamW that decays matrices alone, not biases and layer norms."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=eps, fused=True)


def step_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, lr: float, max_norm: float) -> Tensor:
    """Gradients of all processes → clip → step → zero. Returns the norm before clipping."""
    sum_gradients(model)
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm or float("inf"))
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    return norm


def warmup_cosine(step: int, steps: int, peak: float, warmup: int) -> float:
    """Learning rate: a linear warm-up to `peak`, then half a cosine down to a tenth of it."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.55 + 0.45 * float(np.cos(np.pi * (step - warmup) / max(1, steps - warmup))))


# --- checkpoints ----------------------------------------------------------------------------------------------------


def save_file(content: dict, path: Path) -> None:
    """torch.save under a temporary name, renamed into place: a kill leaves the old file or the new one, whole."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def save_model(model: GPT | ScalarModel, encoding: tiktoken.Encoding, path: Path) -> None:
    """A model.pt: {"model": weights, "config": GPTConfig's fields, "tokenizer": the encoding}, all plain."""
    content = {
        "model": model.state_dict(),
        "config": dataclasses.asdict(model.config),
        "tokenizer": encoding_state(encoding),
    }
    save_file(content, path)


def load(
    folder: str | Path, device: torch.device | str = "cpu", option: str = "", kind: type | None = None
) -> tuple[GPT | ScalarModel, tiktoken.Encoding]:
    """The model of a run folder (or of a .pt file) in eval mode, and its tokenizer.

    Raises InputError where there is none, or where it is not of the `kind` that `option` wants.
    """
    path = Path(folder) / "model.pt" if Path(folder).suffix != ".pt" else Path(folder)
    if not path.exists():
        raise InputError(
            f"{option} {folder}: no model.pt there; run the stage that writes it, or name another run folder"
        )
    try:
        saved = torch.load(path, map_location=device, weights_only=True)
        scalar, config, encoding = (
            "head.weight" in saved["model"], GPTConfig(**saved["config"]), encoding_from_state(saved["tokenizer"])
        )  # fmt: skip
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


def context(cfg: Any, model: GPT) -> int:
    """The longest sequence in tokens: --block_size, or the model's whole context where that is 0."""
    if cfg.block_size > model.config.block_size:
        raise InputError(
            f"--block_size {cfg.block_size}: {cfg.init} has a context of {model.config.block_size}; give less"
        )
    return cfg.block_size or model.config.block_size


class Run:
    """A run folder: model.pt, state.pt, metrics.jsonl, samples.txt, curves.png.

    Made once all input has been checked. An earlier run there is renamed FOLDER.1, FOLDER.2, …, unless it is resumed.
    """

    def __init__(self, cfg: Any):
        self.cfg, self.folder, self.step = cfg, Path(cfg.out), 0
        self.times: dict[str, float] = {}
        self.state = self._read_state() if cfg.resume else None

    def _read_state(self) -> dict | None:
        """What --resume continues from, or None where there is nothing. Raises InputError where the options differ."""
        path = self.folder / "state.pt"
        if not path.exists():
            say(f"nothing to resume in {self.folder}, so this starts from the beginning")
            return None
        state = torch.load(path, map_location="cpu", weights_only=True)
        for name, value in dataclasses.asdict(self.cfg).items():
            if name not in ("resume", "device") and state["options"].get(name) != value:
                raise InputError(
                    f"--resume: {path} was made with --{name} {state['options'].get(name)}; give the same options"
                )
        return state

    def start(self, steps: int, **parts: Any) -> None:
        """Open the folder for writing. On a resume, put the saved state into `parts` (nets, optimizers)."""
        if WORLD > 1:
            dist.barrier()  # every process has read its input: what was in the folder may move
        self.steps = steps
        self.started = self.logged = time.time()
        if self.state:
            self.step = self.state["step"]
            for name, part in parts.items():
                part.load_state_dict(self.state[name])
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
        """Append a step's metrics to metrics.jsonl; with `show`, print those of them and the time left."""
        if RANK > 0:
            return
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": step} | metrics) + "\n")
        if show:
            left = (time.time() - self.started) / (step + 1 - self.step) * (self.steps - step - 1)
            width = len(str(self.steps))
            shown = "  ".join(f"{name.split('/')[-1]} {number(metrics[name])}" for name in show if name in metrics)
            print(f"step {step + 1:>{width}}/{self.steps}  {shown}  {clock(left)} left", flush=True)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Put the seconds that the block takes into `times` as time/phase."""
        began = time.time()
        yield
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self.times[f"time/{phase}"] = time.time() - began

    def speed(self, tokens: int) -> dict[str, float]:
        """tokens_per_s since the last call."""
        before, self.logged = self.logged, time.time()
        return {"tokens_per_s": tokens / (self.logged - before)}

    def save_best(self, model: GPT | ScalarModel, encoding: tiktoken.Encoding) -> None:
        if RANK == 0:
            save_model(model, encoding, self.folder / "best.pt")

    def save(
        self, step: int, model: GPT | ScalarModel, encoding: tiktoken.Encoding, values: dict, **parts: Any
    ) -> None:
        """Write model.pt, and state.pt with the model, `parts` (optimizers, nets) and plain `values`."""
        if RANK == 0:
            save_model(model, encoding, self.folder / "model.pt")
            saved = {name: part.state_dict() for name, part in ({"model": model} | parts).items()}
            about = {"step": step, "options": dataclasses.asdict(self.cfg), "tokenizer": encoding_state(encoding)}
            save_file(about | values | saved, self.folder / "state.pt")

    def sample(self, step: int, text: str) -> None:
        """Append a sample to samples.txt and print it, its line breaks made visible."""
        if RANK == 0:
            text = "⏎".join(text.splitlines())
            with open(self.folder / "samples.txt", "a", encoding="utf-8") as file:
                file.write(f"step {step}  {text}\n")
            print(f"    “{text}”", flush=True)

    def finish(self, device: torch.device) -> None:
        """Say the most memory that was taken; draw curves.png from metrics.jsonl, where matplotlib is installed."""
        if RANK > 0:
            return
        say(f"peak memory: {peak_memory(device):.2f} GiB")
        if importlib.util.find_spec("matplotlib") is None:
            return say(f"pip install matplotlib, and the next run draws {self.folder}/curves.png")
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        lines = read_metrics(self.folder)
        skipped = ("step", "episode", "lr")
        names = sorted({k for line in lines for k in line if k not in skipped and not k.startswith("time/")})
        columns = min(4, len(names)) or 1
        rows = -(-len(names) // columns) or 1
        figure, axes = pyplot.subplots(
            rows, columns, figsize=(3.6 * columns, 2.4 * rows), squeeze=False, layout="constrained"
        )
        for axis, name in zip(axes.flat, names):
            points = [(line["step"] + 1, line[name]) for line in lines if name in line]
            axis.plot(*zip(*points), linewidth=1.2)
            axis.set_title(name, fontsize=9)
            axis.tick_params(labelsize=7)
            axis.grid(alpha=0.3)
        for axis in axes.flat[len(names) :]:
            axis.axis("off")
        figure.savefig(self.folder / "curves.png", dpi=110)
        pyplot.close(figure)


def peak_memory(device: torch.device) -> float:
    """The most memory that this process has taken so far, in GiB: allocated on the GPU with CUDA, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if (status := Path("/proc/self/status")).exists():  # Linux: ru_maxrss would count what started this process
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) / 2**20
    if importlib.util.find_spec("resource") is None:  # Windows
        return math.nan
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30  # bytes on macOS


def read_metrics(folder: str | Path) -> list[dict]:
    """The lines of a run's metrics.jsonl; one that a kill cut short is left out."""
    lines = []
    for line in (Path(folder) / "metrics.jsonl").read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def check_out(cfg: Any) -> None:
    """Raises InputError where --out cannot become a run folder: it is --init itself, or not a folder of ours."""
    out = Path(cfg.out)
    for name in ("init", "reward"):
        if getattr(cfg, name, "") and out.resolve() == Path(getattr(cfg, name)).resolve():
            raise InputError(f"--out {out}: is --{name} too; name another folder, so that it is not overwritten")
    if out.exists() and not (out.is_dir() and ((out / "metrics.jsonl").exists() or not any(out.iterdir()))):
        raise InputError(f"--out {out}: not empty and not a run folder; name another, so that nothing in it is lost")


def say(text: str, end: str = "\n") -> None:
    """Print, from the first process alone."""
    if RANK == 0:
        print(text, end=end, flush=True)


def number(x: float) -> str:
    return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.2e}" if 0 < abs(x) < 0.001 else f"{x:.3f}"


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
