"""The command line: options from a dataclass, one sentence for bad input, the device."""

import argparse
import dataclasses
import inspect
import json
import math
import os
import re
import shutil
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, get_args

import torch
from torch import nn

from common import dist
from data.files import InputError
from fast import compile_blocks, keep_memory, settle_math

# The type of an option gives its limits. A plain int has none; a plain float is between −1e9 and 1e9, or inf.
Count = Annotated[int, (1, 10**9)]
Whole = Annotated[int, (0, 2**63 - 1)]
Number = Annotated[float, (0.0, 1e9)]
Positive = Annotated[float, (0.01, 1e9)]
Share = Annotated[float, (0.0, 1.0)]


@dataclass
class Shared:
    # of every stage
    device: str = "auto"  # cpu, cuda or mps; auto: CUDA if there is one, else the CPU
    dtype: str = "auto"  # float32 or bfloat16 (autocast); auto: bfloat16 on a CUDA GPU that has it, else float32
    compile: bool = False  # torch.compile of the blocks, after a minute of compiling
    checkpoint_activations: bool = False  # less memory, slower: compute activations again in the backward
    lora: Whole = 0  # rank of adapters (LoRA, α = 32) to train beside frozen weights; raise --lr some 10 times; 0: off
    shard: bool = False  # divide the nets over the processes of torchrun (FSDP), where one GPU cannot hold them
    micro_batch_size: Whole = 0  # rows (stage 2: prompts) per forward: fewer save memory, and change no result; 0: all
    max_grad_norm: Number = 1.0  # each net's gradient is clipped to this norm; 0: not clipped
    save_every: Whole = 0  # steps between checkpoints, and one per minute; 0: ppo 20, reward 200, sft as --evals
    resume: bool = False  # continue the run in --out, with the same options


THEIRS = {  # our option → what other projects call it
    "data": "dataset dataset_name dataset_path train_file",
    "init": "model model_name model_name_or_path",
    "out": "output_dir",
    "reward": "reward_model reward_model_path",
    "lr": "learning_rate",
    "lora": "lora_r lora_rank use_peft",
    "kl_coef": "beta init_kl_coef kl_penalty",
    "iterations": "max_steps total_episodes",
    "epochs": "num_train_epochs num_ppo_epochs",
    "batch_size": "per_device_train_batch_size",
    "micro_batch_size": "gradient_accumulation_steps",
    "response_len": "max_new_tokens max_length response_length",
    "block_size": "max_length max_seq_length",
    "dtype bfloat16": "bf16",
}


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        given = set(re.findall(r"--(\w+)", message))
        ours = [f"--{name}" for name, theirs in THEIRS.items() if given & {*theirs.split()}]
        ours = ", ".join(name for name in ours if name.split()[0] in self._option_string_actions)
        raise InputError(f"{message}; {f'see {ours}; ' * bool(ours)}{self.prog} --help lists the options")


def parse(config: type, argv: list[str] | None = None, positional: str = "") -> Any:
    """A `config` dataclass from the command line. Each field is an option, and the comment behind it is its help.

    A comment on a line of its own is the heading of the options below it. The module's docstring down to its examples
    opens the help. With `positional`, returns (config, that argument); in brackets it may be left out, and is then
    None. Raises InputError for what does not parse, and for a number beyond the limits of its type.
    """
    doc = "\n\n".join((sys.modules[config.__module__].__doc__ or "").split("\n\n")[:2])
    raw = argparse.RawDescriptionHelpFormatter
    usage = f"%(prog)s {positional} [--option value …]".replace("  ", " ")
    parser = Parser(usage=usage, description=doc, allow_abbrev=False, formatter_class=raw)
    if positional:
        parser.add_argument(positional.strip("[]"), nargs="?" if "[" in positional else None, help="a run folder")
    if issubclass(config, Shared):
        parser.add_argument("--like", metavar="DIR", help="take this run's options, except --out; yours override them")
    fields = {field.name: field for field in dataclasses.fields(config)}
    line = re.compile(r"^    (?:# (.*)|(\w+): .*?(?:#\s*(.*))?)$", re.MULTILINE)
    for each in config.__mro__[:-1]:
        group: Any = parser
        for heading, name, comment in line.findall(inspect.getsource(each)):
            if heading:
                group = parser.add_argument_group(heading)
            elif name in fields:
                add_option(group, fields.pop(name), comment)
    words = sys.argv[1:] if argv is None else argv
    words = [re.sub(r"^--[\w-]+", lambda name: "--" + name[0][2:].replace("-", "_"), word) for word in words]
    options = vars(parser.parse_args(words))
    if options.get("like"):
        options = vars(parser.parse_args(options_of(options["like"], config) + words))
    _, folder = options.pop("like", None), options.pop(positional.strip("[]"), None)
    for field in dataclasses.fields(config):
        check_limits(field, options[field.name])
    return (config(**options), folder) if positional else config(**options)


def options_of(folder: str, config: type) -> list[str]:
    """The options of a run as words, but for --out and --resume. Raises InputError if it is no run of this stage."""
    try:
        options = json.loads((Path(folder) / "config.json").read_text())["options"] | {"out": "", "resume": ""}
    except (OSError, ValueError, LookupError, TypeError):
        raise InputError(f"--like {folder}: holds no config.json of a run; name a folder that does") from None
    if other := options.keys() - config.__dataclass_fields__.keys():
        raise InputError(f"--like {folder}: has --{min(other)}, which is no option here; name a run of this stage")
    return as_words(options)


def as_words(options: dict[str, Any]) -> list[str]:
    """Options as words of a command line, but for those that are off."""
    given = {name: x for name, x in options.items() if str(x) not in ("", "None", "False")}
    return [f"--{name}" + f"={x}" * (x is not True) for name, x in given.items()]


def add_option(group: Any, field: dataclasses.Field, comment: str) -> None:
    kind = get_args(field.type)[0] if isinstance(field.type, UnionType) else field.type  # without None
    kind = getattr(kind, "__origin__", kind)  # without limits
    read = os.path.expanduser if kind is str else kind  # a shell leaves --out=~/x as it is
    how = {"action": "store_true"} if kind is bool else {"type": read, "metavar": kind.__name__}
    if field.default not in ("", None) and field.default is not False:
        comment += f" (default: {field.default})"
    group.add_argument(f"--{field.name}", default=field.default, help=comment.replace("%", "%%") or " ", **how)


def check_limits(field: dataclasses.Field, value: Any) -> None:
    plain = isinstance(value, float) and value != math.inf
    for low, high in getattr(field.type, "__metadata__", [(-1e9, 1e9)] * plain):
        if not low <= value <= high:
            raise InputError(f"--{field.name} {value}: give a number from {low:g} to {high:g}")


def run_main(main: Callable[[], None], name: str = "") -> None:
    """Run a script's `main`. Bad input ends it with one sentence and exit code 2, a signal with its own code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # where the terminal cannot show a character
    sys.argv[0] = name or sys.argv[0]  # what usage and errors begin with
    code, said = 0, ""
    try:
        if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6):  # the oldest that the tests have passed on
            raise InputError(f"torch {torch.__version__}: needs 2.6 or newer; pip install -r requirements.txt")
        main()
    except InputError as error:
        code, said = 2, str(error)
    except KeyboardInterrupt as error:
        code, said = error.args or (130, "stopped; what it had saved is whole")
    except BrokenPipeError:  # what reads the output has gone, such as head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except Exception as error:
        code, said = 2, sentence(error)
        if not said:
            traceback.print_exc()
            code = 1
    if said:
        print(f"{Path(sys.argv[0]).name}: {said}", file=sys.stderr)
    dist.leave(code)
    if code:
        sys.exit(code)


def sentence(error: Exception) -> str:
    """What the user can do about a fault of the machine; "" for any other fault."""
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}; name a file or folder that can be used"
    too_large = "out of memory|can't allocate memory|size calculation overflowed"
    if isinstance(error, MemoryError) or re.search(too_large, str(error)):
        return "out of memory; give a smaller --micro_batch_size, --batch_size, --response_len or model"
    if dist.WORLD > 1 and re.search("onnection (reset|closed)|NCCL|ProcessGroup", str(error)):
        return "another process has ended; start all of them again with --resume"
    return ""


def pick_device(name: str) -> torch.device:
    """`auto` takes CUDA, else the CPU. Under torchrun every process gets the GPU of its local rank."""
    cuda = torch.cuda.is_available()
    if name == "auto":
        name = "cuda" if cuda else "cpu"
    if name.startswith("cuda") and dist.WORLD > 1:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        if cuda and name.startswith("cuda:"):
            torch.cuda.set_device(name)
        torch.zeros(1, device=name)  # a wrong number may pass until here
        return torch.device(name)
    except (AssertionError, RuntimeError) as error:  # the first is that of a torch without CUDA
        what = str(error).splitlines()[0].partition(". ")[0]
        raise InputError(f"--device {name}: {what}; give auto, cpu, or another") from None


def setup(cfg: Any) -> tuple[torch.device, torch.autocast]:
    """Device, autocast context and, under torchrun, the process group. Seeds torch for weight initialisation."""
    device = pick_device(cfg.device)
    dist.join(device)
    if device.type == "cpu":
        keep_memory()
        settle_math()
    if cfg.dtype not in ("auto", "float32", "bfloat16"):
        raise InputError(f"--dtype {cfg.dtype}: give auto, float32 or bfloat16")
    bf16 = cfg.dtype == "bfloat16"
    if cfg.dtype == "auto" and device.type == "cuda":
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    torch.manual_seed(cfg.seed)
    return device, torch.autocast(device.type, torch.bfloat16, enabled=bf16, cache_enabled=False)


def prepare(cfg: Shared, *models: nn.Module) -> None:
    """Apply --checkpoint_activations, --compile and --shard to the nets of a stage."""
    on_cpu = next(models[0].parameters()).device.type == "cpu"
    if cfg.compile and on_cpu and not shutil.which(os.environ.get("CXX", "g++")):
        raise InputError("--compile: on a CPU it needs a C++ compiler; install g++, or leave it out")
    for model in models:
        trunk = getattr(model, "trunk", model)
        trunk.checkpoint_activations = cfg.checkpoint_activations
        if cfg.compile:
            compile_blocks(trunk)
        if cfg.shard:
            dist.shard(model)
