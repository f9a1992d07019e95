"""A sitting gives questions to annotators and saves their answers."""

import fcntl
import json
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from data.files import VERDICTS, InputError, cannot_write, is_verdict, write_jsonl
from data.label import Answer, columns, preference, read_answers
from data.rng import seed_of

AHEAD = 16  # questions that are prepared before an annotator needs them
ABANDONED = 300  # seconds until an open question goes to another person, if no new question remains
LONGEST_COMMENT = 2000  # characters


@dataclass(eq=False)
class Question:
    prompt: str
    answers: list[Answer]
    checkpoints: list[str]  # the checkpoint of each answer

    def __post_init__(self) -> None:
        self.answers = [Answer(*answer) for answer in self.answers]
        texts = sorted(answer.text for answer in self.answers)
        self.number = seed_of(self.prompt, *texts) % 2**53  # the same after a restart; JavaScript is exact to 2**53


class Sitting:
    """Prepares questions in the background, gives them to annotators, and appends their answers to one file.

    `make` returns the question of a prompt, or None if the model does not give enough different answers. Any thread may
    call any method. At most `people` annotators have answered a question or have it open.
    """

    def __init__(self, prompts: list[str], make: Callable[[str], Question | None], out: Path, people: int, seed: int):
        self.prompts, self.out, self.people, self.seed = prompts, out, people, seed
        self.rows = read_answers(out, repair=True)
        self.answered_by: dict[str, set[str]] = {prompt: set() for prompt in prompts}  # prompt → who has answered it
        for row in self.rows:
            self.answered_by.setdefault(row["prompt"], set()).add(row["annotator"])
        self.alike = 0  # prompts without a question, because the model's answers are the same
        self.waiting: list[Question] = []  # questions that fewer than `people` have answered
        self.open: dict[str, tuple[Question, float]] = {}  # annotator → their open question, and its start time
        self.changed = threading.Condition()
        self.making, self.error, self.began = True, "", time.monotonic()
        unanswered = [prompt for prompt in prompts if len(self.answered_by[prompt]) < people]
        self.maker = threading.Thread(target=self._make_ahead, args=(unanswered, make), daemon=True)
        self.maker.start()

    def _make_ahead(self, prompts: list[str], make: Callable[[str], Question | None]) -> None:
        try:
            for prompt in prompts:
                question = make(prompt)
                with self.changed:
                    self.alike += question is None
                    self.waiting += [question] if question else []
                    self.changed.notify_all()
                    self.changed.wait_for(
                        lambda: not self.making or [*map(self._takers, self.waiting)].count(set()) < AHEAD
                    )
                if not self.making:
                    return
        except Exception as error:
            self.error = f"sampling failed: {error!r}"
        finally:
            with self.changed:
                self.making = False
                self.changed.notify_all()

    def stop(self) -> None:
        """Stop sampling after the current prompt, because a process must not end during a forward pass."""
        with self.changed:
            self.making = False
            self.changed.notify_all()
        self.maker.join()

    def _takers(self, question: Question) -> set[str]:
        """Return the annotators who have answered a question or have it open."""
        return self.answered_by[question.prompt] | {who for who, (shown, _) in self.open.items() if shown is question}

    def _available(self, annotator: str) -> list[Question]:
        """Return the questions that the annotator may be given."""
        takers = [(question, self._takers(question)) for question in self.waiting]
        return [question for question, who in takers if len(who) < self.people and annotator not in who]

    def _take_over(self, annotator: str) -> list[Question]:
        """Close a question that another annotator left open long ago, and return it."""
        for who, (question, since) in self.open.items():
            if since < time.monotonic() - ABANDONED and annotator not in self.answered_by[question.prompt]:
                return [self.open.pop(who)[0]]
        return []

    def next(self, annotator: str) -> Question | None:
        """Return the annotator's open question, else a new one, else None. Raises OSError if sampling failed."""
        with self.changed:
            self.changed.wait_for(lambda: annotator in self.open or self._available(annotator) or not self.making)
            if annotator in self.open:
                return self.open[annotator][0]
            found = self._available(annotator) or self._take_over(annotator)
            if not found and self.error:
                raise OSError(self.error)
            if found:
                self.open[annotator] = found[0], time.monotonic()
                self.changed.notify_all()
            return found[0] if found else None

    def order(self, question: Question, annotator: str) -> list[int]:
        """Return the random order of the answers on the page. It depends on their texts, so it is always the same."""
        keys = [seed_of("place", self.seed, annotator, question.prompt, answer.text) for answer in question.answers]
        return sorted(range(len(keys)), key=keys.__getitem__)

    def progress(self, annotator: str) -> dict:
        """Return the number of answered and of remaining questions of this annotator, and the seconds remaining."""
        with self.changed:
            mine = self.earlier(annotator)
            answered = [self.answered_by[prompt] for prompt in self.prompts]
            left = sum(len(people) < self.people and annotator not in people for people in answered) - self.alike
            pace = statistics.median(row["seconds"] for row in mine[-20:]) if mine else None
            return {"done": len(mine), "left": left, "seconds_left": pace and pace * left}

    def answer(self, annotator: str, number: int, verdict: str | list[int], comment: str = "", sure: int = 0) -> None:
        """Append a verdict on the open question: "tie", "bad", "skip", or the positions on the page, best first.

        `sure` is from 1 to 3, or 0 if unsaid. Raises ValueError if an argument is wrong or question `number` is not
        open to the annotator, and OSError if the write fails; the file then stays unchanged.
        """
        with self.changed:
            question, since = self.open.get(annotator, (None, self.began))
            if question is None:  # the server has started again since the page got the question
                question = next((each for each in self._available(annotator) if each.number == number), None)
            if question is None or question.number != number:
                raise ValueError("this question is no longer open; your earlier answers show what is saved")
            row = self._row(question, annotator, verdict, comment, sure)
            row |= {"time": now(), "seconds": round(time.monotonic() - since, 2), "seed": self.seed}
            with open(self.out, "ab", buffering=0) as file:
                size, line = file.tell(), (json.dumps(row) + "\n").encode()
                try:
                    if file.write(line) < len(line):
                        raise OSError("the disk is full")
                    os.fsync(file.fileno())
                except OSError:
                    file.truncate(size)
                    raise
            self.rows.append(row)
            self.answered_by[question.prompt].add(annotator)
            self.open.pop(annotator, None)
            if len(self.answered_by[question.prompt]) >= self.people:
                self.waiting.remove(question)
            self.changed.notify_all()

    def _row(self, question: Question, annotator: str, verdict: object, comment: object, sure: object) -> dict:
        order = self.order(question, annotator)
        row: dict = {"prompt": question.prompt}
        if verdict in VERDICTS:
            row |= {"verdict": verdict, "checkpoint": question.checkpoints} | columns("responses", question.answers)
        elif isinstance(verdict, list) and {*map(type, verdict)} == {int} and sorted(verdict) == sorted(order):
            best_first = [order[place] for place in verdict]
            row |= preference([question.answers[i] for i in best_first])
            row |= {"checkpoint": [question.checkpoints[i] for i in best_first], "position": verdict[0]}
        else:
            raise ValueError("a verdict is tie, bad, skip, or every place once, best first")
        if not isinstance(comment, str) or len(comment) > LONGEST_COMMENT or repr(sure) not in ("0", "1", "2", "3"):
            raise ValueError(f"a comment has at most {LONGEST_COMMENT:,} characters; how sure one is goes from 1 to 3")
        f"{annotator}{comment}".encode()  # raises ValueError for half a character, which no reader of the file takes
        about = {"comment": comment, "sure": sure, "annotator": annotator}
        return row | {name: value for name, value in about.items() if value}

    def earlier(self, annotator: str) -> list[dict]:
        """Return the annotator's rows of the file, the oldest first."""
        with self.changed:
            return [row for row in self.rows if row["annotator"] == annotator]

    def earlier_row(self, annotator: str, index: int) -> dict:
        """Return row `index` of those that `earlier` gives. Raises ValueError if there is none."""
        rows = self.earlier(annotator)
        if type(index) is not int or not 0 <= index < len(rows):
            raise ValueError("there is no such earlier answer")
        return rows[index]

    def revise(self, annotator: str, index: int, verdict: str | list[int], comment: str = "", sure: int = 0) -> None:
        """Replace the annotator's row `index` of those that `earlier` gives. Arguments and errors as in `answer`."""
        with self.changed:
            old = self.earlier_row(annotator, index)
            new = self._row(question_of(old), annotator, verdict, comment, sure)
            new |= {name: old[name] for name in ("time", "seconds", "seed") if name in old} | {"revised": now()}
            rows = [new if row is old else row for row in self.rows]
            write_jsonl(self.out, rows)
            self.rows = rows

    def said(self, row: dict) -> str | list[int]:
        """Return the verdict of a row as `answer` takes it."""
        if is_verdict(row):
            return row["verdict"]
        order = self.order(question_of(row), row["annotator"])  # the answers of a preference stand best first
        return [order.index(i) for i in range(len(order))]


def question_of(row: dict) -> Question:
    """Return the question that a row answers."""
    if "chosen" in row:
        names = ("chosen", "rejected")
        answers = [(row[name], row.get(f"{name}_ended", True), row.get(f"{name}_ids")) for name in names]
    else:
        name, n = "responses" if is_verdict(row) else "ranked", len(row["checkpoint"])
        answers = [*zip(row[name], row.get(f"{name}_ended", [True] * n), row.get(f"{name}_ids", [None] * n))]
    return Question(row["prompt"], answers, row["checkpoint"])


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Hold the lock of `path`. Raises InputError if another process holds it, or if the file cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = open(f"{path}.lock", "w")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"--out {path}: another labelling session writes to it; stop that one first") from None
    except OSError as error:
        raise cannot_write(path, error) from None
    with lock:
        yield
