"""A sitting gives questions to annotators and saves their answers."""

import fcntl
import json
import os
import random
import statistics
import threading
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from data.files import InputError, is_verdict, read_jsonl, write_jsonl
from data.label.sampling import Answer, preference

AHEAD = 16  # questions that are prepared before an annotator needs them
ABANDONED = 300  # seconds until an open question goes to another person, if no new question remains


@dataclass(eq=False)
class Question:
    prompt: str
    answers: list[Answer]
    checkpoints: list[str]  # the checkpoint of each answer
    number: int = 0  # the index of its prompt

    def __post_init__(self) -> None:
        self.answers = [Answer(*answer) for answer in self.answers]


class Sitting:
    """Prepares questions in the background, gives them to annotators, and appends their answers to one file.

    `make` returns the question of a prompt, or None if the model does not give enough different answers. Any thread may
    call any method. At most `people` annotators have answered a question or have it open.
    """

    def __init__(self, prompts: list[str], make: Callable[[str], Question | None], out: Path, people: int, seed: int):
        self.out, self.people, self.seed = out, people, seed
        self.rows = read_answers(out, repair=True)
        self.answered_by: dict[str, set[str]] = {prompt: set() for prompt in prompts}  # prompt → who has answered it
        for row in self.rows:
            self.answered_by.setdefault(row["prompt"], set()).add(row["annotator"])
        self.prompts, self.alike = prompts, 0  # alike: the number of prompts without a question
        self.waiting: list[Question] = []  # questions that fewer than `people` have answered
        self.open: dict[str, tuple[Question, float]] = {}  # annotator → their open question, and its start time
        self.history: defaultdict[str, list[Question]] = defaultdict(list)  # annotator → what they answered here
        self.changed = threading.Condition()
        self.making, self.stopping, self.error = True, False, ""
        remaining = [(i, prompt) for i, prompt in enumerate(prompts) if len(self.answered_by[prompt]) < people]
        self.maker = threading.Thread(target=self._make_ahead, args=(remaining, make), daemon=True)
        self.maker.start()

    def _make_ahead(self, prompts: list[tuple[int, str]], make: Callable[[str], Question | None]) -> None:
        try:
            for number, prompt in prompts:
                question = make(prompt)
                with self.changed:
                    if question is None:
                        self.alike += 1
                    else:
                        question.number = number
                        self.waiting.append(question)
                    self.changed.notify_all()
                    self.changed.wait_for(self._wants_more)
                if self.stopping:
                    return
        except Exception as error:
            self.error = f"sampling failed: {error!r}"
        finally:
            with self.changed:
                self.making = False
                self.changed.notify_all()

    def _wants_more(self) -> bool:
        return self.stopping or sum(not self._takers(question) for question in self.waiting) < AHEAD

    def stop(self) -> None:
        """Stop sampling after the current prompt, because a process must not end during a forward pass."""
        with self.changed:
            self.stopping = True
            self.changed.notify_all()
        self.maker.join()

    def _takers(self, question: Question) -> set[str]:
        """Return the annotators who have answered a question or have it open."""
        return self.answered_by[question.prompt] | {who for who, (shown, _) in self.open.items() if shown is question}

    def next(self, annotator: str) -> Question | None:
        """Return the annotator's open question, else a new one, else None. Raises OSError if sampling failed."""

        def pick() -> Question | None:
            for question in self.waiting:
                takers = self._takers(question)
                if len(takers) < self.people and annotator not in takers:
                    return question
            return None

        with self.changed:
            self.changed.wait_for(lambda: annotator in self.open or pick() or not self.making)
            if annotator not in self.open:  # the annotator's other request may have opened one
                if (question := pick()) is None:
                    if self.error:
                        raise OSError(self.error)
                    limit = time.monotonic() - ABANDONED
                    old = [
                        who
                        for who, (q, since) in self.open.items()
                        if since < limit and annotator not in self.answered_by[q.prompt]
                    ]
                    if not old:
                        return None
                    question = self.open.pop(old[0])[0]
                self.open[annotator] = question, time.monotonic()
                self.changed.notify_all()
            return self.open[annotator][0]

    def order(self, question: Question, annotator: str) -> list[int]:
        """Return the random order of the answers on the page. A reload does not change it."""
        key = f"{self.seed} {annotator} {question.prompt}"
        return random.Random(zlib.crc32(key.encode("utf-8", "replace"))).sample(range(n := len(question.answers)), n)

    def answer(self, annotator: str, number: int, verdict: str | list[int]) -> None:
        """Append a verdict on the open question: "tie", "skip", or the positions on the page, best first.

        Raises ValueError if the verdict is none of these, or if question `number` is not the annotator's open question.
        Raises OSError if the write fails; the file then stays unchanged.
        """
        with self.changed:
            question, since = self.open.get(annotator, (None, 0.0))
            if question is None or question.number != number:
                raise ValueError("this question is no longer open; reload the page")
            order, prompt = self.order(question, annotator), question.prompt
            row: dict = {"prompt": prompt}
            if verdict in ("tie", "skip"):
                row |= {"verdict": verdict, "responses": [answer.text for answer in question.answers]}
                row["checkpoint"] = question.checkpoints
            elif isinstance(verdict, list) and {*map(type, verdict)} == {int} and sorted(verdict) == sorted(order):
                best_first = [order[place] for place in verdict]
                row |= preference([question.answers[i] for i in best_first])
                row |= {"checkpoint": [question.checkpoints[i] for i in best_first], "position": verdict[0]}
            else:
                raise ValueError("a verdict is tie, skip, or every place once, best first")
            row |= {"annotator": annotator, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
            row |= {"seconds": round(time.monotonic() - since, 2), "seed": self.seed}
            with open(self.out, "ab", buffering=0) as file:
                size = file.tell()
                try:
                    line = (json.dumps(row) + "\n").encode()
                    if file.write(line) < len(line):
                        raise OSError("the disk is full")
                    os.fsync(file.fileno())
                except OSError:
                    file.truncate(size)
                    raise
            self.rows.append(row)
            self.answered_by[prompt].add(annotator)
            self.history[annotator].append(question)
            del self.open[annotator]
            if len(self.answered_by[prompt]) >= self.people:
                self.waiting.remove(question)
            self.changed.notify_all()

    def undo(self, annotator: str) -> bool:
        """Remove the annotator's last answer of this sitting from the file, and open its question again."""
        with self.changed:
            if not self.history[annotator]:
                return False
            question = self.history[annotator].pop()
            index = max(
                i
                for i, row in enumerate(self.rows)
                if (row["annotator"], row["prompt"]) == (annotator, question.prompt)
            )
            write_jsonl(self.out, self.rows[:index] + self.rows[index + 1 :])
            del self.rows[index]
            self.answered_by[question.prompt].discard(annotator)
            if question not in self.waiting:
                self.waiting.insert(0, question)
            self.open[annotator] = question, time.monotonic()
            self.changed.notify_all()
            return True

    def progress(self, annotator: str) -> dict:
        """Return the number of answered and of remaining questions of this annotator, and the seconds remaining."""
        with self.changed:
            mine = [row for row in self.rows if row["annotator"] == annotator]
            full = sum(
                len(self.answered_by[p]) >= self.people or annotator in self.answered_by[p] for p in self.prompts
            )
            left = len(self.prompts) - self.alike - full
            pace = statistics.median(row["seconds"] for row in mine[-20:]) if mine else None
            return {"done": len(mine), "left": left, "seconds_left": pace and pace * left}


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
        if not (are_texts(texts) and are_texts(row.get("checkpoint")) and places):
            raise InputError(
                f"{path}: row {number}: not an answer of data.label (texts, checkpoint, position); remove the row"
            )
    return rows


def are_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def is_row(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Hold the lock of `path`. Raises InputError if another labelling process holds it, or nothing can be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not (path.is_file() and os.access(path, os.W_OK)):
            raise PermissionError(13, "not a file that can be written")
        lock = open(f"{path}.lock", "w")
    except OSError as error:
        raise InputError(f"--out {path}: cannot be written ({error.strerror}); name another file") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"--out {path}: another labelling session writes to it; stop that one first") from None
        yield
