"""A user's function, which judges or rewards answers: rows, each with "prompt" and "response", become numbers.

    def judge(prompt, response): return 1.0                                one answer at a time
    def judge(prompts, responses): return [1.0 for _ in prompts]           lists: an API or a classifier is asked once
    def judge(prompt, response, answer): return float(response == answer)  with a column of the prompt's row

A first parameter `prompts` asks for lists. Each parameter behind the first two is a column, a list of it for lists.
"""

import importlib.util
import inspect
import itertools
import math
import sys
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

from common import dist
from data.files import InputError
from data.rng import seed_of

Judge = Callable[[list[dict]], list[float]]
RESPONSE = ("response", "responses", "completion", "completions", "solution_str")  # names of no prompt
ROOT = Path(__file__).parent.parent


def is_function(name: str) -> bool:
    """Whether an option names a function, not a run folder."""
    return ".py:" in name


def load_function(name: str) -> Judge:
    """The function that is named "path/to/file.py:function", as a function rows → list of numbers.

    Raises InputError if there is none. The function that it returns raises InputError, after the user's own traceback,
    if the user's function fails or gives anything but a finite number for each row.
    """
    called = find(name)
    first, more, takes_any = parameters(called)
    if {*first[:1]} & {*RESPONSE} or first[1:] in (["prompt"], ["prompts"]):
        raise InputError(f"{name}: its first parameters are {', '.join(first)}; write it with (prompt, response, …)")
    own = {"prompt", "response", *first}

    def judge(rows: list[dict]) -> list[float]:
        check(name, first, more, rows)
        columns = [{c: x for c, x in row.items() if c in more or takes_any and c not in own} for row in rows]
        prompts, responses = ([row[column] for row in rows] for column in ("prompt", "response"))
        try:
            if first[:1] == ["prompts"]:
                names = dict.fromkeys(itertools.chain(*columns))
                lists = {column: [each.get(column) for each in columns] for column in names}
                given = list(called(prompts, responses, **lists))
            else:
                asked = dist.counted([*zip(prompts, responses, columns)], "judging")
                given = [called(*texts, **each) for *texts, each in asked]
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            raise InputError(f"{name}: failed ({type(error).__name__}: {error}); mend the function") from None
        if len(given) != len(rows):
            raise InputError(f"{name}: returned {len(given)} numbers for {len(rows)} answers; return as many")
        return [finite(name, x, row) for x, row in zip(given, rows)]

    return judge


def find(name: str) -> Callable:
    """The user's function itself. Raises InputError if there is none."""
    file, _, function = name.rpartition(":")
    path = next((path for path in (Path(file), ROOT / file) if path.is_file() and path.suffix == ".py"), None)
    if path is None:
        raise InputError(f"{name}: no such Python file; a function is named path/to/file.py:function")
    called = getattr(import_file(path.resolve(), path.stat().st_mtime_ns), function, None)
    if not callable(called):
        raise InputError(f"{name}: {file} has no function {function}; a function is named path/to/file.py:function")
    return called


def parameters(called: Callable) -> tuple[list[str], dict[str, bool], bool]:
    """The first two parameters; those behind them, with whether they must be given; and whether it takes **columns."""
    try:
        found = list(inspect.signature(called).parameters.values())
    except (TypeError, ValueError):  # a function in C
        found = []
    by_name = [each for each in found[2:] if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)]
    kinds = {each.kind.name for each in found}
    takes_any = "VAR_KEYWORD" in kinds and "VAR_POSITIONAL" not in kinds  # with *args it is a decorator's
    return [each.name for each in found[:2]], {each.name: each.default is each.empty for each in by_name}, takes_any


def check(name: str, first: list[str], more: dict[str, bool], rows: list[dict]) -> None:
    """Raises InputError if a row lacks a column that a function must get, or has one named as prompt or response."""
    for row in rows:
        if taken := {*first} & row.keys() - {"prompt", "response"}:
            what = f'its parameter "{min(taken)}" is the prompt or the response, and a column is called so too'
            raise InputError(f"{name}: {what}; rename one of them")
        for column, needed in more.items():
            if needed and column not in row:
                known = ", ".join(each for each in row if each != "response")
                what = f'its parameter "{column}" is no column of a row, which has {known}'
                raise InputError(f"{name}: {what}; rename one of them, or give the parameter a default")


def check_columns(names: str, rows: list[dict]) -> None:
    """Raises InputError if a row lacks a column that a function of a comma-separated list must get."""
    for name in filter(is_function, names.split(",")):
        check(name, *parameters(find(name))[:2], rows)


def load_functions(names: str) -> dict[str, Judge]:
    """The functions of a comma-separated list, by name."""
    return {name: load_function(name) for name in names.split(",") if name}


@cache
def import_file(path: Path, changed_at: int) -> ModuleType:
    """The module of a file. It may import its neighbours, but none that is called as a file of this project."""
    module_name = path.stem if path.stem not in sys.modules else f"{path.stem}_{seed_of(str(path)):x}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses and pickle look it up
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    try:
        with torch.enable_grad():  # it may turn gradients off for itself
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        raise InputError(f"{path}: cannot be imported ({type(error).__name__}: {error}); mend it") from None
    return module


def finite(name: str, given: object, row: dict) -> float:
    """What a function gave, as a float. Raises InputError if it is no finite number of float32."""
    try:
        number = math.nan if isinstance(given, (str, bytes)) else float(given)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not abs(number) < 3e38:
        answer = f"the prompt {row['prompt'][-60:]!r} and the response {row['response'][:60]!r}"
        raise InputError(f"{name}: returned {given!r:.60} for {answer}; return a finite number")
    return number
