"""The format of comparisons: the columns of a preference, and the file that people's answers are appended to."""

import json
import os
from pathlib import Path
from typing import NamedTuple

from data.files import InputError, is_verdict, read_jsonl


class Answer(NamedTuple):
    """A response to compare. The ids, without EOS, are those that the model sampled."""

    text: str
    ended: bool  # with EOS, before the length limit
    ids: list[int] | None = None


def preference(ordered: list[Answer]) -> dict:
    """Return the columns of a row for two or more responses, which a person ordered from best to worst.

    The ids are kept, because encoding a sampled text again can give other ids than those that were sampled.
    """
    if len(ordered) > 2:
        return columns("ranked", ordered)
    pair = columns("", ordered).items()
    return {f"chosen{name}": column[0] for name, column in pair} | {
        f"rejected{name}": column[1] for name, column in pair
    }


def columns(name: str, answers: list[Answer]) -> dict[str, list]:
    """Return the columns NAME, NAME_ended and NAME_ids, each with an entry for each answer; no ids if one has none."""
    texts, ended, ids = (list(column) for column in zip(*(Answer(*answer) for answer in answers)))
    found = {name: texts, f"{name}_ended": ended, f"{name}_ids": ids}
    if None in ids:
        del found[f"{name}_ids"]
    return found


def read_answers(path: Path, repair: bool = False) -> list[dict]:
    """Return the rows of a label file. `repair` mends the last line that a kill has left without its line break.

    It gets its line break if it is a whole row, and is removed if it is not.
    """
    if not path.exists() or path.stat().st_size == 0:
        return []
    if repair:
        whole, _, rest = path.read_bytes().rpartition(b"\n")
        if rest:
            with open(path, "r+b") as file:
                if is_row(rest):
                    file.seek(0, os.SEEK_END)
                    file.write(b"\n")
                else:
                    file.truncate(len(whole) + bool(whole))
    if not path.stat().st_size:
        return []
    rows = read_jsonl(path, {"prompt": str, "annotator": str, "seconds": float})
    for number, row in enumerate(rows, 1):
        texts = row.get("responses") if is_verdict(row) else row.get("ranked", [row.get("chosen"), row.get("rejected")])
        places = isinstance(row.get("position"), int) or is_verdict(row)
        checkpoints = row.get("checkpoint")
        if not (are_texts(texts) and are_texts(checkpoints) and len(texts) == len(checkpoints) > 1 and places):
            raise InputError(
                f"{path}: row {number}: not an answer of tools.label (texts, checkpoint, position); remove the row"
            )
    return rows


def are_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def is_row(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False
