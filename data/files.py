"""Files: read text, JSONL and parquet and check each row; write files whole or not at all."""

import glob
import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from shlex import quote
from typing import IO

TEXT = (str, list)  # a text, or a conversation: a list of messages
VERDICTS = ("tie", "bad", "skip")  # of a person, in place of a preference
Kind = type | tuple[type, ...]  # of a JSON value
READ = (".txt", ".jsonl", ".json", ".parquet")  # suffixes of what is read
CSV = {".csv": "csv.DictReader({})", ".tsv": "csv.DictReader({}, delimiter='\\t')"}  # of what is not
KINDS = {str: "text", TEXT: "text", list: "list", dict: "JSON object", int: "whole number", float: "number"}


class InputError(Exception):
    """Bad input. The message is one sentence. It names the file, line or option and says what to do."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.splitlines()))  # what it quotes may have line breaks


@contextmanager
def at(where: str) -> Iterator[None]:
    """Name the row in an InputError that does not."""
    try:
        yield
    except InputError as error:
        raise error if str(error).startswith(where) else InputError(f"{where}: {error}") from None


def sources(path: str | Path) -> list[Path]:
    """Return the files that `path` names, by name: one, all of a folder, or those of a pattern (data/*.parquet).

    Raises InputError if a folder or pattern has none that can be read, or files of different kinds.
    """
    pattern = f"{glob.escape(str(path))}/*" if Path(path).is_dir() else str(path)
    if Path(path).is_file() or set("*?[").isdisjoint(pattern):
        return [Path(path)]
    found = sorted(each for each in map(Path, glob.glob(pattern, recursive=True)) if suffix(each) in READ)
    kinds = sorted({suffix(each) for each in found})
    if len(kinds) != 1:
        what = " and ".join(kinds) or f"no {', '.join(READ)}"
        raise InputError(f"{path}: holds {what}; name files of one kind, such as FOLDER/*.parquet")
    return found


def _lines(path: str | Path) -> Iterator[tuple[int, str]]:
    try:
        with gzip.open(path) if Path(path).suffix == ".gz" else open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot be read ({reason}); give a readable file, or fetch it again") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}:{number}: not UTF-8; save the file as UTF-8, or unpack it") from None


def numbered(path: str | Path, columns: dict[str, Kind]) -> Iterator[tuple[str, dict]]:
    """Yield ("FILE: row N", row) for each row of JSONL or parquet files. N counts the lines or rows of that file.

    Raises InputError if a row lacks a column or has a wrong type.
    """
    for file in sources(path):
        kind, row = suffix(file), None
        if kind in CSV:
            raise InputError(f"{file}: {kind} is not read; make it JSONL: {_as_jsonl(file, CSV[kind])}")
        for number, row in _parquet_rows(file) if kind == ".parquet" else _json_rows(file):
            row = {column: value for column, value in row.items() if value is not None}  # tables write null for absent
            for column, wanted in columns.items():
                if column not in row:
                    known = ", ".join(row)
                    raise InputError(
                        f'{file}:{number}: no column "{column}" among {known}; a row needs {", ".join(columns)}'
                    )
                if not _has_kind(row[column], wanted):
                    raise InputError(f'{file}:{number}: "{column}" is not a {KINDS[wanted]}; fix the line')
            yield f"{file}: row {number}", row
        if row is None:
            raise InputError(f"{file}: no rows; give a file with at least one")


def _as_jsonl(file: Path, rows: str) -> str:
    """Return the command that writes a file as JSONL; `rows` is Python, with {} for the open file."""
    opened = f"{'gzip.' * (file.suffix == '.gz')}open('{file}', 'rt', newline='', encoding='utf-8-sig')"
    made = quote(str(file).removesuffix(".gz").removesuffix(suffix(file)) + "-rows.jsonl")
    return f'python -c "import csv, gzip, json; [print(json.dumps(row)) for row in {rows.format(opened)}]" > {made}'


def _json_rows(path: Path) -> Iterator[tuple[int, dict]]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        if number == 1 and line.lstrip().startswith("["):
            raise InputError(f"{path}: one JSON list; write a row a line: {_as_jsonl(path, 'json.load({})')}")
        try:
            row = json.loads(line)
            if "\\u" in line:
                json.dumps(row, ensure_ascii=False).encode("utf-8")  # refuses half of a surrogate pair
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}:{number}: not JSON ({error}); fix or remove the line") from None
        if not isinstance(row, dict):
            raise InputError(f"{path}:{number}: not a JSON object; each line must be {{…}}")
        yield number, row


def _parquet_rows(path: str | Path) -> Iterator[tuple[int, dict]]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise InputError(f"{path}: parquet files need pyarrow: pip install pyarrow") from None
    try:
        batches = parquet.ParquetFile(path).iter_batches(1024)
        yield from enumerate((_without_null(row) for batch in batches for row in batch.to_pylist()), 1)
    except (OSError, ValueError) as error:  # pyarrow's own errors are kinds of ValueError
        raise InputError(f"{path}: not a parquet file that can be read ({error}); fetch it again") from None


def _without_null(x: object) -> object:
    """Return a value of a table without keys that are null. All structs of a column have the keys of each of them."""
    if isinstance(x, dict):
        return {key: _without_null(value) for key, value in x.items() if value is not None}
    return [_without_null(each) for each in x] if isinstance(x, list) else x


def _has_kind(value: object, kind: Kind) -> bool:
    """Return True if a JSON value is of `kind`. A whole number is a float too; true and false are no numbers."""
    if kind is float:
        return type(value) in (int, float) and abs(value) < 1e300  # and neither nan nor infinite
    return isinstance(value, kind) and not isinstance(value, bool)


def is_verdict(row: dict) -> bool:
    """Return True if a row of a label file holds a tie, "all are bad" or a skip in place of a preference."""
    return row.get("verdict") in VERDICTS


def read_jsonl(path: str | Path, columns: dict[str, type]) -> list[dict]:
    return [row for _, row in numbered(path, columns)]


@contextmanager
def replacing(path: str | Path, mode: str = "w") -> Iterator[IO]:
    """Open a file that takes the place of `path` at the end. A kill or an error leaves the old one as it was."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise cannot_write(path, error) from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def cannot_write(path: str | Path, error: OSError) -> InputError:
    return InputError(f"{path}: cannot be written ({error.strerror or error}); make room, or name another place")


def write_jsonl(path: str | Path, rows: Iterable[dict]) -> None:
    """Write JSONL, whole or not at all."""
    with replacing(path) as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def read_object(path: Path) -> dict:
    """Return a JSON object. NaN and Infinity become None, as JSON has neither."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda name: None)
        if not isinstance(found, dict):
            raise ValueError(f"a {type(found).__name__}")
        return found
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as a JSON object ({error}); mend it, or fetch it again") from None


def first_row(path: str | Path) -> dict:
    """Return the first row that is no verdict, if there is one. Its columns show which kind of data the file holds."""
    for _, row in numbered(path, {}):
        if not is_verdict(row):
            break
    return row


def suffix(path: str | Path) -> str:
    """Return the suffix of the path without .gz, one of READ or another."""
    return Path(str(path).removesuffix(".gz")).suffix


def has_rows(path: str | Path) -> bool:
    """Return True for tables, JSONL or parquet, and False for .txt. Raises InputError for another suffix."""
    kind = suffix(sources(path)[0])
    if kind not in READ and kind not in CSV:
        raise InputError(f"{path}: neither {' nor '.join(READ)}; give it the right suffix")
    return kind != ".txt"


def documents(path: str | Path) -> Iterator[str]:
    """Yield the texts of files. A .txt file is one document, which is yielded in pieces of whole lines."""
    if has_rows(path):
        first = first_row(path)
        columns = {"messages": TEXT} if "messages" in first else {"prompt": TEXT, "completion": TEXT}
        if "text" in first:
            columns = {"text": str}
        for _, row in numbered(path, columns):
            yield "".join(_contents(row[column]) for column in columns)
        return
    for file in sources(path):
        piece = ""
        for _, line in _lines(file):
            piece += line
            if len(piece) > 2**20:
                yield piece
                piece = ""
        if piece:
            yield piece


def _contents(text: str | list) -> str:
    """Return a text, or what the messages of a conversation say."""
    if isinstance(text, str):
        return text
    return "\n\n".join(str(message.get("content") or "") for message in text if isinstance(message, dict))
