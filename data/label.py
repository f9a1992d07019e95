"""The format of comparisons: the columns of a preference, and the file that people's answers are appended to."""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from data.files import InputError, is_verdict, read_jsonl


class Answer(NamedTuple):
    """A response to compare. The ids are those that the model sampled, with the end token: encoding can give others."""

    text: str
    ended: bool  # with EOS, before the length limit
    ids: list[int] | None = None


def preference(ordered: list[Answer]) -> dict:
    """Return the columns of a row for two or more responses, which a person ordered from best to worst."""
    if len(ordered) > 2:
        return columns("ranked", ordered)
    chosen, rejected = columns("chosen", ordered), columns("rejected", ordered)
    return {name: texts[0] for name, texts in chosen.items()} | {name: texts[1] for name, texts in rejected.items()}


def columns(name: str, answers: list[Answer]) -> dict[str, list]:
    """Return the columns NAME, NAME_ended and NAME_ids, each with an entry for each answer; no ids if one has none."""
    texts, ended, ids = map(list, zip(*(Answer(*answer) for answer in answers)))
    found = {name: texts, f"{name}_ended": ended}
    return found if None in ids else found | {f"{name}_ids": ids}


def read_answers(path: Path, repair: bool = False) -> list[dict]:
    """Return the rows of a label file. `repair` removes a last line that a kill has cut."""
    if repair and path.exists():
        mend_last_line(path)
    if not path.exists() or not path.stat().st_size:
        return []
    rows = read_jsonl(path, {"prompt": str, "annotator": str, "seconds": float})
    for number, row in enumerate(rows, 1):
        texts = row.get("responses") if is_verdict(row) else row.get("ranked", [row.get("chosen"), row.get("rejected")])
        checkpoints = row.get("checkpoint")
        placed = is_verdict(row) or isinstance(row.get("position"), int)
        if not (are_texts(texts) and are_texts(checkpoints) and len(texts) == len(checkpoints) > 1 and placed):
            raise InputError(f"{path}: row {number}: not an answer of a person to tools.label; remove the row")
    return rows


def mend_last_line(path: Path) -> None:
    """Remove a last line that is not a whole row."""
    whole, line_break, rest = path.read_bytes().rpartition(b"\n")
    with suppress(ValueError, RecursionError):
        if isinstance(json.loads(rest), dict):
            return
    os.truncate(path, len(whole + line_break))


def are_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)
