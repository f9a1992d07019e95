"""The format of comparisons: the columns of a preference, and the file of people's answers."""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from data.chat import check
from data.files import TEXT, InputError, at, is_verdict, read_jsonl


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


def given_answers(row: dict) -> list[Answer]:
    """Return the two or more answers of a row: "chosen" and "rejected", a list "ranked", or a list "responses".

    Raises InputError if they are not texts.
    """
    if "chosen" in row:
        pair = ("chosen", "rejected")
        texts, ids = ([row.get(f"{name}{end}") for name in pair] for end in ("", "_ids"))
        ended = [row.get(f"{name}_ended", True) for name in pair]
    else:
        name = "ranked" if "ranked" in row else "responses"
        texts, ended, ids = (row.get(f"{name}{end}") for end in ("", "_ended", "_ids"))
    if not are_texts(texts) or len(texts) < 2:
        raise InputError('"responses", or "chosen" and "rejected", are not two or more texts; fix the row')
    ended = [True] * len(texts) if ended is None else ended
    if not isinstance(ended, list) or [type(each) for each in ended] != [bool] * len(texts):
        raise InputError('a column "…_ended" must be true or false for each text; fix the row')
    ids = ids if isinstance(ids, list) and len(ids) == len(texts) else [None] * len(texts)
    return [*map(Answer, texts, ended, ids)]


def read_answers(path: Path, repair: bool = False) -> list[dict]:
    """Return the rows of a label file. `repair` removes a last line that a kill has cut."""
    if repair and path.exists():
        mend_last_line(path)
    if not path.exists() or not path.stat().st_size:
        return []
    rows = read_jsonl(path, {"prompt": TEXT, "annotator": str, "seconds": float})
    for number, row in enumerate(rows, 1):
        with at(f"{path}: row {number}"):
            if isinstance(row["prompt"], list):
                check(row["prompt"])
            n, names = len(given_answers(row)), row.get("checkpoint")
            placed = is_verdict(row) or isinstance(row.get("position"), int)
            if not (are_texts(names) and len(names) == n and placed):
                raise InputError("not an answer of a person to tools.label; remove the row")
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
