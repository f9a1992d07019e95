"""What every stage needs and no reader needs first: command line, functions of the user, optimizer steps.

Its rooms are processes.py (device, torchrun, signals), sharding.py, checkpoints.py, runs.py (run folders) and
functions.py (judges and rewards of the user); every name is reached by `common`.
"""

import argparse
import dataclasses
import difflib
import inspect
import math
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from types import UnionType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from common import dist as processes
from common import sharding
from common.dist import WORLD
from common.sharding import sum_gradients
from data.files import InputError
from fast import Linear
from model import GPT

# --- command line -----------------------------------------------------------------------------------------------------

ABOVE_ZERO = "samples batch_size minibatch_size epochs response_len n_layer n_head n_embd label_temperature".split()
ABOVE_ZERO += ["eval_prompts", "save_every", "evals", "horizon", "people"]
AT_MOST = {"dropout": 0.99, "port": 65535, "gamma": 1, "lam": 1, "top_p": 1, "seed": 2**63 - 1}
AT_MOST |= {"unended_cap": math.inf}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise InputError(f"{message}; {self.prog} --help lists the options")


def parse(config: type, argv: list[str] | None = None, positional: str = "") -> Any:
    """A `config` dataclass from the command line. Each field is an option; the comment behind it is its help.

    A comment on a line of its own is the heading of the options below it. The module's docstring down to its examples
    opens the help. With `positional`, returns (config, that argument); in brackets it may be left out, and is then
    None. Raises InputError for what does not parse.
    """
    module = sys.modules[config.__module__]
    doc = "\n\n".join((module.__doc__ or "").split("\n\n")[:2])
    parser = _Parser(
        usage=f"%(prog)s {positional} [--option value …]".replace("  ", " "),
        description=doc,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if positional:
        parser.add_argument(positional.strip("[]"), nargs="?" if "[" in positional else None, help="a run folder")
    heading, described, groups = "", {}, {"": parser}  # by name: heading and comment; by heading: the group
    line = re.compile(r"^    (?:# (.*)|(\w+): .*?(?:#\s*(.*))?)$", re.MULTILINE)
    for title, name, comment in line.findall(inspect.getsource(config)):
        heading = title or heading
        described[name] = heading, comment
    for field in dataclasses.fields(config):
        heading, comment = described.get(field.name, ("", ""))
        if heading not in groups:
            groups[heading] = parser.add_argument_group(heading)
        kind = field.type.__args__[0] if isinstance(field.type, UnionType) else field.type
        how = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind, "metavar": kind.__name__}
        if field.default not in ("", None) and kind is not bool:
            comment += f" (default: {field.default})"
        groups[heading].add_argument(
            f"--{field.name}", default=field.default, help=comment.replace("%", "%%") or " ", **how
        )
    options = vars(parser.parse_args(spelled(sys.argv[1:] if argv is None else argv, parser)))
    folder = options.pop(positional.strip("[]"), None)
    for name, value in options.items():
        if not isinstance(value, (int, float)):
            continue
        if math.isnan(value) or math.isinf(value) and name != "unended_cap":
            raise InputError(f"--{name} {value}: give a finite number")
        if name in ABOVE_ZERO and value <= 0:
            raise InputError(f"--{name} {value}: give a number above 0")
        if value < 0 and name != "unended_cap":
            raise InputError(f"--{name} {value}: give a number of at least 0")
        if value > AT_MOST.get(name, 1e9):
            raise InputError(f"--{name} {value}: give a number of at most {AT_MOST.get(name, 1e9):g}")
        if name == "temperature" and 0 < value < 0.01:
            raise InputError(f"--temperature {value}: give 0, or at least 0.01")
    return (config(**options), folder) if positional else config(**options)


def spelled(argv: list[str], parser: argparse.ArgumentParser) -> list[str]:
    """The words of a command line, with `-` inside the name of an option as `_`.

    Raises InputError for an option that there is not, and names the nearest one.
    """
    known, words = list(parser._option_string_actions), []
    for i, word in enumerate(argv):
        if word == "--":
            return words + argv[i:]
        name, equals, value = word.partition("=")
        if name.startswith("--") and " " not in name and name not in known:
            name = f"--{name[2:].replace('-', '_')}"
            name = f"--no-{name[5:]}" if name.startswith("--no_") else name
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                advice = f"did you mean {near[0]}?" if near else f"{parser.prog} --help lists the options"
                raise InputError(f"{word.partition('=')[0]}: no such option; {advice}")
        words.append(name + equals + value)
    return words


def context(cfg: Any, model: GPT) -> int:
    """The longest sequence in tokens: --block_size, or the model's whole context if that is 0."""
    if cfg.block_size > model.config.block_size:
        raise InputError(
            f"--block_size {cfg.block_size}: {cfg.init} has a context of {model.config.block_size}; give less"
        )
    return cfg.block_size or model.config.block_size


def run_main(main: Callable[[], None]) -> None:
    """Run a script's `main`. Bad input ends it with one sentence and exit code 2, a signal with its own code."""
    name, code, said = Path(sys.argv[0]).name, 0, ""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # where the terminal cannot show a character
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    processes.listen()
    try:
        processes.check_torch()
        main()
    except InputError as error:
        code, said = 2, str(error)
    except KeyboardInterrupt as error:
        code, said = 128 + (processes.asked or signal.SIGINT), str(error) or "stopped"
    except BrokenPipeError:  # what reads the output has gone, such as head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except OSError as error:
        if not error.filename:
            raise
        code, said = 2, f"{error.filename}: {error.strerror}; name a file or folder that can be used"
    except MemoryError:
        code, said = 2, OUT_OF_MEMORY
    except RuntimeError as error:
        if "out of memory" in str(error) or "can't allocate memory" in str(error):
            code, said = 2, OUT_OF_MEMORY
        elif WORLD > 1 and re.search("onnection (reset|closed)|NCCL|ProcessGroup", str(error)):
            code, said = 1, "another process has ended; start all of them again with --resume"
        elif WORLD == 1:
            raise
        else:
            traceback.print_exc()
            code = 1
    except Exception:
        if WORLD == 1:
            raise
        traceback.print_exc()
        code = 1
    finally:
        processes.forget()
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                signal.signal(number, handler)
    if said:
        print(f"{name}: {said}", file=sys.stderr)
    if code and WORLD > 1:  # end at once: leaving the group would wait for the other processes, and they for this one
        sys.stderr.flush()
        os._exit(code)
    if dist.is_initialized():
        dist.destroy_process_group()
    if sharding.used:  # torch's caches keep gloo's threads, which could abort the process while the interpreter ends
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    if code:
        sys.exit(code)


OUT_OF_MEMORY = "out of memory; give a smaller --micro_batch_size, --batch_size, --response_len or model"


# --- training --------------------------------------------------------------------------------------------------------


def freeze(model: nn.Module, autocast: torch.autocast) -> nn.Module:
    """The model in eval mode, without gradients. Under autocast its linear layers are stored in autocast's dtype.

    Autocast rounds the same weights before each product, so the frozen copy computes what the live model computes. The
    scalar head and the embeddings stay in float32.
    """
    model.eval().requires_grad_(False)
    if autocast._enabled:
        for module in model.modules():
            if isinstance(module, Linear):
                module.to(autocast.fast_dtype)
    return model


def adamw(model: nn.Module, lr: float, weight_decay: float, eps: float = 1e-8) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only, not on biases and norms."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=eps, fused=True)


def step_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, lr: float, max_norm: float) -> Tensor:
    """Gradients of all processes → clip → step → zero. Returns the norm before clipping."""
    sum_gradients(model)
    norm = sharding.full(nn.utils.clip_grad_norm_(model.parameters(), max_norm or float("inf")))
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
