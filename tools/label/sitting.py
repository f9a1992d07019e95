"""A sitting gives questions to annotators and saves their answers."""

import json
import math
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from data.chat import Messages, turns
from data.files import VERDICTS, is_verdict, write_jsonl
from data.label import Answer, columns, given_answers, preference, read_answers
from data.rng import seed_of

AHEAD = 16  # questions that are prepared before an annotator needs them
ABANDONED = 300  # seconds until an open question goes to another person too, if no new question remains
LONGEST_COMMENT = 2000  # characters
ABOUT = ("tools", "chat_template_kwargs")  # columns that a chat template reads beside the messages
STAMP = "%Y-%m-%dT%H:%M:%SZ"


@dataclass(eq=False)
class Question:
    prompt: str | Messages
    answers: list[Answer]
    checkpoints: list[str]  # the checkpoint of each answer
    about: dict = field(default_factory=dict)  # its row, of which the columns ABOUT are kept
    key: Hashable = None  # of `Sitting.prompts`, which has made it

    def __post_init__(self) -> None:
        self.answers = [Answer(*answer) for answer in self.answers]
        self.about = {name: self.about[name] for name in ABOUT if name in self.about}
        texts = sorted(answer.text for answer in self.answers)
        self.number = seed_of(self.prompt, *texts) % 2**53  # the same after a restart; JavaScript is exact to 2**53


class Sitting:
    """Prepares questions in the background, gives them to annotators, and keeps their answers in one file.

    `make` returns the question of a prompt's `key_of`, or of a number; None if the model's answers are too alike. At
    most `people` annotators answer a question. Any thread may call any method.
    """

    def __init__(self, prompts: list, make: Callable[[Hashable], Question | None], out: Path, people: int, seed: int):
        self.prompts, self.make, self.out, self.people, self.seed = prompts, make, out, people, seed
        self.rows = read_answers(out, repair=True)
        self.answered_by: defaultdict[Hashable, set[str]] = defaultdict(set)  # key or number → who has answered it
        for row in self.rows:
            for key in (key_of(row), question_of(row).number):
                self.answered_by[key].add(row["annotator"])
        self.open: dict[str, tuple[Question, float]] = {}  # annotator → their open question, and its start time
        self.lock, self.began = threading.RLock(), time.monotonic()
        self.alike = 0  # prompts without a question, because the model's answers are the same
        self.unasked = iter([prompt for prompt in prompts if len(self.answered_by[prompt]) < people])
        self.sampler = ThreadPoolExecutor(1)
        self.questions = [self.sampler.submit(self._make_one) for _ in range(AHEAD)]

    def _make_one(self) -> Question | None:
        """Return the question of the next prompt that has one; None if no prompt is left."""
        for prompt in self.unasked:
            if question := self.make(prompt):
                question.key = prompt
                return question
            self.alike += 1
        return None

    def stop(self) -> None:
        """Stop sampling after the current prompt, because a process must not end during a forward pass."""
        self.sampler.shutdown(cancel_futures=True)

    def _takers(self, question: Question, patience: float = math.inf) -> set[str]:
        """Return who has answered the question, or opened it in the last `patience` seconds."""
        since = time.monotonic() - patience
        opened = {who for who, (shown, start) in self.open.items() if shown is question and start > since}
        return self.answered_by[question.key] | opened

    def _available(self, annotator: str, patience: float = math.inf) -> Iterator[Question]:
        """Yield the questions that the annotator may be given. Waits for the model; raises what the model raised."""
        for future in self.questions:
            question = future.result()
            takers = self._takers(question, patience) if question else set()
            if question and len(takers) < self.people and annotator not in takers:
                yield question

    def next(self, annotator: str) -> Question | None:
        """Return the annotator's open question, else a new one, else None. Waits and raises as `_available` does."""
        with self.lock:
            if annotator not in self.open:
                question = next(self._available(annotator), None) or next(self._available(annotator, ABANDONED), None)
                if question is None:
                    return None
                if not self._takers(question):
                    self.questions.append(self.sampler.submit(self._make_one))
                self.open[annotator] = question, time.monotonic()
            return self.open[annotator][0]

    def order(self, question: Question, annotator: str) -> list[int]:
        """Return the random order of the answers on the page. It depends on their texts, so it is always the same."""
        keys = [seed_of("place", self.seed, annotator, question.prompt, answer.text) for answer in question.answers]
        return sorted(range(len(keys)), key=keys.__getitem__)

    def shown(self, annotator: str, index: int | None = None) -> dict:
        """Return the next question, or that of earlier answer `index`, as a person sees it, and their progress."""
        row = {} if index is None else self.earlier_row(annotator, index)
        question = question_of(row) if row else self.next(annotator)
        if question is None:
            return self.progress(annotator) | {"prompt": None}
        shown = self.progress(annotator) | {"prompt": turns_of(question), "number": question.number}
        answers = [question.answers[i] for i in self.order(question, annotator)]
        shown |= {"responses": [answer.text for answer in answers], "cut": [not answer.ended for answer in answers]}
        earlier = {"index": index, "comment": row.get("comment", ""), "sure": row.get("sure", 0)}
        return shown | earlier | {"said": self.said(row)} if row else shown

    def progress(self, annotator: str) -> dict:
        """Return the number of answered and of remaining questions of this annotator, and the seconds remaining."""
        with self.lock:
            mine = self.earlier(annotator)
            answered = [self.answered_by[prompt] for prompt in self.prompts]
            left = sum(len(people) < self.people and annotator not in people for people in answered) - self.alike
            pace = statistics.median(row["seconds"] for row in mine[-20:]) if mine else None
            return {"done": len(mine), "left": left, "seconds_left": pace and pace * left}

    def answer(self, annotator: str, number: int, verdict: str | list[int], comment: str = "", sure: int = 0) -> None:
        """Save a verdict on the open question: "tie", "bad", "skip", or the positions on the page, best first.

        `sure` is from 1 to 3, or 0 if unsaid. Raises ValueError if an argument is wrong or the question is not open to
        the annotator, and InputError if the write fails; the file then stays unchanged.
        """
        with self.lock:
            question, since = self.open.get(annotator, (None, self.began))
            if question is None:  # the server has started again since the page got the question
                question = next((each for each in self._available(annotator) if each.number == number), None)
            if question is None or question.number != number:
                raise ValueError("this question is no longer open; your earlier answers show what is saved")
            row = self._row(question, annotator, verdict, comment, sure)
            row |= {"seconds": round(time.monotonic() - since, 2), "seed": self.seed}
            row["time"] = time.strftime(STAMP, time.gmtime())
            self._write([*self.rows, row])
            self.answered_by[question.key].add(annotator)
            self.open.pop(annotator, None)
            if len(self.answered_by[question.key]) >= self.people:
                self.open = {who: opened for who, opened in self.open.items() if opened[0] is not question}

    def _row(self, question: Question, annotator: str, verdict: object, comment: object, sure: object) -> dict:
        """Return the columns of a verdict. Raises ValueError if one is wrong."""
        order = self.order(question, annotator)
        if verdict in VERDICTS:
            row = {"verdict": verdict, "checkpoint": question.checkpoints} | columns("responses", question.answers)
        elif isinstance(verdict, list) and {*map(type, verdict)} == {int} and sorted(verdict) == sorted(order):
            best_first = [order[place] for place in verdict]
            row = {"checkpoint": [question.checkpoints[i] for i in best_first], "position": verdict[0]}
            row |= preference([question.answers[i] for i in best_first])
        else:
            raise ValueError("a verdict is tie, bad, skip, or every place once, best first")
        if not isinstance(comment, str) or len(comment) > LONGEST_COMMENT:
            raise ValueError(f"a comment has at most {LONGEST_COMMENT:,} characters")
        if type(sure) is not int or sure not in range(4):
            raise ValueError("how sure one is goes from 1 to 3")
        f"{annotator}{comment}".encode()  # raises ValueError for half a character, which no reader of the file takes
        row = {"prompt": question.prompt} | question.about | row
        said = {"comment": comment, "sure": sure, "annotator": annotator}
        return row | {name: value for name, value in said.items() if value}

    def earlier(self, annotator: str) -> list[dict]:
        """Return the annotator's rows of the file, the oldest first."""
        return [row for row in self.rows if row["annotator"] == annotator]

    def earlier_row(self, annotator: str, index: int) -> dict:
        """Return row `index` of those that `earlier` gives. Raises ValueError if there is none."""
        rows = self.earlier(annotator)
        if type(index) is not int or not 0 <= index < len(rows):
            raise ValueError("there is no such earlier answer")
        return rows[index]

    def revise(self, annotator: str, index: int, verdict: str | list[int], comment: str = "", sure: int = 0) -> None:
        """Replace the annotator's row `index` of those that `earlier` gives. Arguments and errors as in `answer`."""
        with self.lock:
            old = self.earlier_row(annotator, index)
            new = self._row(question_of(old), annotator, verdict, comment, sure)
            new |= {name: old[name] for name in ("seconds", "seed", "time") if name in old}
            new["revised"] = time.strftime(STAMP, time.gmtime())
            self._write([new if row is old else row for row in self.rows])

    def _write(self, rows: list[dict]) -> None:
        write_jsonl(self.out, rows)  # in place of the old file, so that a kill leaves the one or the other
        self.rows = rows

    def said(self, row: dict) -> str | list[int]:
        """Return the verdict of a row as `answer` takes it."""
        if is_verdict(row):
            return row["verdict"]
        order = self.order(question_of(row), row["annotator"])  # the answers of a preference stand best first
        return [order.index(i) for i in range(len(order))]


def question_of(row: dict) -> Question:
    """Return the question that a row answers."""
    return Question(row["prompt"], given_answers(row), row["checkpoint"], row)


def key_of(row: dict) -> str:
    """Return the prompt of a row if it is a text, else a text that stands for its messages and what goes with them."""
    prompt = row["prompt"]
    return prompt if isinstance(prompt, str) else json.dumps([row.get(name) for name in ("prompt", *ABOUT)])


def turns_of(question: Question) -> list[dict[str, str]]:
    """Return each turn of a conversation as {"role", "content"}; of a text that is none its only turn, of no role."""
    prompt = question.prompt
    if isinstance(prompt, str):
        dialogue = prompt.rstrip().endswith("\n\nAssistant:")  # as in HH: its last turn is still to come
        return dialogue and turns(prompt)[:-1] or [{"role": "", "content": prompt}]

    def said(message: dict) -> str:
        parts = [message[part] for part in ("content", "tool_calls") if message.get(part)]
        return "\n".join(part if isinstance(part, str) else json.dumps(part, ensure_ascii=False) for part in parts)

    tools = [{"role": "tools", "content": question.about["tools"]}] if "tools" in question.about else []
    return [{"role": each["role"], "content": said(each)} for each in tools + prompt]
