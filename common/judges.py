"""A user's function, which judges or rewards answers: rows, each with "prompt" and "response", become numbers.

    def judge(prompt, response): return 1.0                                one answer at a time
    def judge(prompts, responses): return [1.0 for _ in prompts]           lists: an API or a classifier is asked once

The names of the two parameters tell the two forms apart.
"""

import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType

from data.files import InputError
from data.rng import seed_of

Judge = Callable[[list[dict]], list[float]]
ROOT = Path(__file__).parent.parent


def is_function(name: str) -> bool:
    """Whether an option names a function, not a run folder."""
    return ".py:" in name


def load_function(name: str) -> Judge:
    """The function that is named "path/to/file.py:function", as a function rows → list of numbers.

    Raises InputError if there is none. The function that it returns raises InputError, after the user's own traceback,
    if the user's function fails or gives anything but a finite number for each row.
    """
    file, _, function = name.rpartition(":")
    path = next((path for path in (Path(file), ROOT / file) if path.is_file()), None)
    if path is None:
        raise InputError(f"{name}: no such file; a function is named path/to/file.py:function")
    called = getattr(import_file(path.resolve(), path.stat().st_mtime_ns), function, None)
    if not callable(called):
        raise InputError(f"{name}: {file} has no function {function}; a function is named path/to/file.py:function")
    try:
        takes_lists = list(inspect.signature(called).parameters)[:2] == ["prompts", "responses"]
    except (TypeError, ValueError):  # a function in C
        takes_lists = False

    def judge(rows: list[dict]) -> list[float]:
        prompts, responses = ([row[column] for row in rows] for column in ("prompt", "response"))
        try:
            given = list(called(prompts, responses) if takes_lists else map(called, prompts, responses))
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            raise InputError(f"{name}: failed ({type(error).__name__}: {error}); mend the function") from None
        if len(given) != len(rows):
            raise InputError(f"{name}: returned {len(given)} numbers for {len(rows)} answers; return as many")
        return [finite(name, x, row) for x, row in zip(given, rows)]

    return judge


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
