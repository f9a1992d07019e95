"""Functions of the user: a judge or a reward, which gives a number to a prompt and a response.

    def judge(prompt, response): return 1.0                                one pair at a time
    def judge(prompts, responses): return [1.0 for _ in prompts]           lists: an API or a classifier is asked once

The names of the two parameters tell the two forms apart. `load_function` checks every number that comes back.
"""

import importlib.util
import inspect
import math
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data.files import InputError
from data.rng import seed_of

Judge = Callable[[str, str], float]  # (prompt, response) -> how good
AT_ONCE = 256  # pairs that a function of lists gets in one call
IMPORTED: dict[tuple, Any] = {}  # (path, time, size) → module
ROOT = Path(__file__).parent.parent
QUIET = 10  # seconds until a slow function shows its progress


def load_function(name: str) -> Judge:
    """The function that is named "path/to/file.py:function", as one of a pair; its `lists`, if it has one, takes lists.

    The file is a module: it may import its neighbours, but none that is called as a file of this project. Raises
    InputError, after the user's own traceback, if it fails.
    """
    file, _, function = name.rpartition(":")
    if not Path(file).is_file() and (ROOT / file).is_file():
        file = str(ROOT / file)  # a function of this project, while another folder is the current one
    if not Path(file).is_file():
        raise InputError(f"{name}: no such file; a function is named path/to/file.py:function")
    called = getattr(import_file(name, Path(file).resolve()), function, None)
    if not callable(called):
        raise InputError(f"{name}: {file} has no function {function}; a function is named path/to/file.py:function")

    def of_lists(prompts: list[str], responses: list[str]) -> list[float]:
        first = quoted(prompts[0], responses[0])
        what = f"failed for {len(prompts)} pairs from {first} on"
        numbers = users(name, what, lambda: list(called(prompts, responses)))
        if len(numbers) != len(prompts):
            raise InputError(
                f"{name}: returned {len(numbers)} numbers for {len(prompts)} pairs; return as many numbers"
            )
        return [finite(name, *each) for each in zip(numbers, prompts, responses)]

    def of_a_pair(prompt: str, response: str) -> float:
        if takes_lists:
            return of_lists([prompt], [response])[0]
        given = users(name, f"failed for {quoted(prompt, response)}", lambda: called(prompt, response))
        return finite(name, given, prompt, response)

    takes_lists = parameters(called)[:2] == ["prompts", "responses"]
    of_a_pair.__name__ = name
    if takes_lists:
        of_a_pair.lists = of_lists
    return of_a_pair


def load_functions(names: str) -> dict[str, Judge]:
    """The functions of a comma-separated list, by name."""
    return {name: load_function(name) for name in names.split(",") if name}


def ask(function: Judge, pairs: list[tuple[str, str]]) -> list[float]:
    """The numbers of a function for (prompt, response) pairs. A slow one shows its progress."""
    numbers: list[float] = []
    shown = time.time()
    lists = getattr(function, "lists", None)
    step = AT_ONCE if lists else 1
    for start in range(0, len(pairs), step):
        some = pairs[start : start + step]
        numbers += lists(*map(list, zip(*some))) if lists else [float(function(*some[0]))]
        if time.time() - shown > QUIET and len(numbers) < len(pairs):
            print(f"    {function.__name__}: {len(numbers):,} of {len(pairs):,} answers", file=sys.stderr, flush=True)
            shown = time.time()
    return numbers


def import_file(name: str, path: Path) -> Any:
    """The module of a file. Functions of one file share one module, and so what it has loaded."""
    state = path.stat()
    key = path, state.st_mtime_ns, state.st_size
    if key in IMPORTED:
        return IMPORTED[key]
    module_name = path.stem if path.stem not in sys.modules else f"{path.stem}_{seed_of(str(path)):x}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses and pickle look it up
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    users(name, f"{path} cannot be imported", lambda: spec.loader.exec_module(module))
    IMPORTED[key] = module
    return module


def parameters(function: Callable) -> list[str]:
    try:
        return list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # of a function in C
        return []


def quoted(prompt: str, response: str) -> str:
    return f"the prompt {prompt[-60:]!r} and the response {response[:60]!r}"


def finite(name: str, given: Any, prompt: str, response: str) -> float:
    """What a function gave as a float. Raises InputError if it is no finite number of float32."""
    try:
        number = math.nan if isinstance(given, (str, bytes)) else float(given)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not abs(number) < 3e38:
        raise InputError(f"{name}: returned {given!r:.60} for {quoted(prompt, response)}; return a finite number")
    return number


def users(name: str, what: str, call: Callable[[], Any]) -> Any:
    """The result of code of the user. If it raises, its traceback is printed, without our frames, and one sentence."""
    try:
        return call()
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        frames = error.__traceback__.tb_next.tb_next if error.__traceback__.tb_next else None
        if frames:
            traceback.print_exception(error.with_traceback(frames))
        raise InputError(f"{name}: {what} ({type(error).__name__}: {error}); mend the function") from None
