"""Comparisons from people: sample several responses to a prompt, ask which is better, append the answer to a JSONL.

    python -m data.label --init out/sft --prompts PROMPTS.jsonl --out mine.jsonl       a page in the browser, for people
    python -m data.label … --init out/sft,out/ppo        two models answer; nothing on the page says which is which
    python -m data.label … --samples 4                   a ranking of four in place of a choice between two
    python -m data.label … --terminal                    the same in the terminal
    python -m data.label … --judge FILE.py:function      a simulated person decides every pair
    python -m data.label --out mine.jsonl --report       what is in a file: counts, position bias, agreement

A row is {"prompt", "chosen", "rejected"}, or {"prompt", "ranked"} (best first) where there are more than two, with the
time, annotator, checkpoint, seed, seconds taken and the place where the preferred one was shown. A tie or a skip is a
row with "verdict", which readers leave out. Every answer is on disk before the next question is shown, so nothing is
lost; starting again continues. What a prompt gets for responses depends on seed and prompt alone.

The page is served on this machine alone unless --host says otherwise, under an address with a random token.
"""

import fcntl
import getpass
import itertools
import json
import math
import os
import random
import re
import secrets
import statistics
import threading
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import tiktoken
import torch

from data import InputError, encode_prompt, fit, read_jsonl, write_jsonl
from model import GPT

Answer = tuple[str, bool]  # a response, and whether it ended with EOS before the length limit cut it
PAGE = Path(__file__).with_name("label.html")
AHEAD = 16  # prompts that are answered before somebody asks for them
ABANDONED = 300  # seconds after which a question that one person has open goes to another, when nothing else is left
LONGEST_BODY = 2**14  # bytes of a request


# --- sampling, and a simulated person ---------------------------------------------------------------------------------


def sample_responses(
    model: GPT,
    encoding: tiktoken.Encoding,
    prompts: list[str],
    samples: int,
    response_len: int,
    temperature: float,
    seed: int,
) -> list[list[Answer]]:
    """`samples` responses to each prompt, as (text, whether it ended with EOS before `response_len` tokens)."""
    repeated = [ids for prompt in prompts for ids in [encode_prompt(encoding, prompt)] * samples]
    generator = torch.Generator().manual_seed(seed)
    texts = []
    rows = min(512, max(1, 2**16 // (max(map(len, repeated)) + response_len)))  # bounds the cache
    for start in range(0, len(repeated), rows):
        part = repeated[start : start + rows]
        tokens, prompt_len, length = model.generate(part, response_len, temperature=temperature, generator=generator)
        for row, first, end in zip(tokens.tolist(), prompt_len.tolist(), length.tolist()):
            ended = row[end - 1] == model.config.eos
            texts.append((encoding.decode(row[first : end - ended]), ended))
    return [texts[i : i + samples] for i in range(0, len(texts), samples)]


def simulate(
    prompts: list[str],
    responses: list[list[Answer]],
    judge: Callable[[str, str], float],
    temperature: float,
    seed: int,
) -> list[dict]:
    """Every pair of responses to a prompt, decided with probability σ((judge a − judge b) / temperature) for a.

    That is the model of Bradley and Terry (1952). "p_chosen" is the probability that the choice had: with it, a reader
    can tell how much of the labels is noise. Pairs of the same text are left out.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for prompt, answers in zip(prompts, responses):
        scores = [judge(prompt, text) for text, _ in answers]
        for a, b in itertools.combinations(range(len(answers)), 2):
            if answers[a] == answers[b]:
                continue
            p = 0.5 + 0.5 * math.tanh((scores[a] - scores[b]) / temperature / 2)  # σ, which cannot overflow
            if rng.random() >= p:
                a, b, p = b, a, 1 - p
            rows.append({"prompt": prompt} | preference([answers[a], answers[b]]) | {"p_chosen": round(p, 4)})
    return rows


def preference(ordered: list[Answer]) -> dict:
    """The columns of a row that say what was preferred, from two or more responses, best first."""
    if len(ordered) > 2:
        return {"ranked": [text for text, _ in ordered], "ranked_ended": [ended for _, ended in ordered]}
    (chosen, chosen_ended), (rejected, rejected_ended) = ordered
    both = {"chosen": chosen, "rejected": rejected}
    return both | {"chosen_ended": chosen_ended, "rejected_ended": rejected_ended}


# --- a sitting: who gets which question, and where the answers go -----------------------------------------------------


@dataclass(eq=False)
class Question:
    prompt: str
    answers: list[Answer]
    checkpoints: list[str]  # of each answer
    number: int = 0  # of its prompt


class Sitting:
    """Questions made ahead in the background, handed to annotators, and their answers, appended to one file.

    `make` makes a prompt's question, or None where the model says the same every time. Every method may be called from
    any thread. A question that somebody has open is offered to nobody else, until `people` have answered it.
    """

    def __init__(self, prompts: list[str], make: Callable[[str], Question | None], out: Path, people: int, seed: int):
        self.out, self.people, self.seed = out, people, seed
        self.rows = read_answers(out, repair=True)
        self.by: dict[str, set[str]] = {prompt: set() for prompt in prompts}  # who has answered it
        for row in self.rows:
            self.by.setdefault(row["prompt"], set()).add(row["annotator"])
        self.prompts, self.alike = prompts, 0  # alike: prompts left out, since the model says the same every time
        self.waiting: list[Question] = []  # made, and not yet answered by enough
        self.open: dict[str, tuple[Question, float]] = {}  # annotator → what they look at, and since when
        self.past: defaultdict[str, list[Question]] = defaultdict(list)  # annotator → what they answered here
        self.changed = threading.Condition()
        self.making, self.stopping, self.error = True, False, ""
        left = [(i, prompt) for i, prompt in enumerate(prompts) if len(self.by[prompt]) < people]
        self.maker = threading.Thread(target=self._make_ahead, args=(left, make), daemon=True)
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
        """End the sampling, once the prompt at hand is answered: a process must not end in the middle of a forward."""
        with self.changed:
            self.stopping = True
            self.changed.notify_all()
        self.maker.join()

    def _takers(self, question: Question) -> set[str]:
        """Who has answered a question or has it open."""
        return self.by[question.prompt] | {who for who, (shown, _) in self.open.items() if shown is question}

    def next(self, annotator: str) -> Question | None:
        """What `annotator` looks at, now or next; None where nothing is left. Raises OSError where sampling failed."""

        def pick() -> Question | None:
            for question in self.waiting:
                takers = self._takers(question)
                if len(takers) < self.people and annotator not in takers:
                    return question
            return None

        with self.changed:
            self.changed.wait_for(lambda: annotator in self.open or pick() or not self.making)
            if annotator not in self.open:  # another request of theirs may have opened one meanwhile
                if (question := pick()) is None:
                    if self.error:
                        raise OSError(self.error)
                    before = time.monotonic() - ABANDONED
                    old = [
                        who
                        for who, (q, since) in self.open.items()
                        if since < before and annotator not in self.by[q.prompt]
                    ]
                    if not old:
                        return None
                    question = self.open.pop(old[0])[0]
                self.open[annotator] = question, time.monotonic()
                self.changed.notify_all()
            return self.open[annotator][0]

    def order(self, question: Question, annotator: str) -> list[int]:
        """Which answer stands at which place: a random order that a reload does not change."""
        key = f"{self.seed} {annotator} {question.prompt}"
        return random.Random(zlib.crc32(key.encode("utf-8", "replace"))).sample(range(n := len(question.answers)), n)

    def answer(self, annotator: str, number: int, verdict: str | list[int]) -> None:
        """Append a verdict on the open question: "tie", "skip", or the places as shown, best first.

        Raises ValueError where it is none of these, or where the annotator has another question open; OSError where it
        cannot be written, and then the file is as it was.
        """
        with self.changed:
            question, since = self.open.get(annotator, (None, 0.0))
            if question is None or question.number != number:
                raise ValueError("this question is no longer open; reload the page")
            order, prompt = self.order(question, annotator), question.prompt
            row: dict = {"prompt": prompt}
            if verdict in ("tie", "skip"):
                row |= {"verdict": verdict, "responses": [text for text, _ in question.answers]}
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
            self.by[prompt].add(annotator)
            self.past[annotator].append(question)
            del self.open[annotator]
            if len(self.by[prompt]) >= self.people:
                self.waiting.remove(question)
            self.changed.notify_all()

    def undo(self, annotator: str) -> bool:
        """Take the annotator's last answer of this sitting out of the file, and show its question again."""
        with self.changed:
            if not self.past[annotator]:
                return False
            question = self.past[annotator].pop()
            at = max(
                i
                for i, row in enumerate(self.rows)
                if (row["annotator"], row["prompt"]) == (annotator, question.prompt)
            )
            write_jsonl(self.out, self.rows[:at] + self.rows[at + 1 :])
            del self.rows[at]
            self.by[question.prompt].discard(annotator)
            if question not in self.waiting:
                self.waiting.insert(0, question)
            self.open[annotator] = question, time.monotonic()
            self.changed.notify_all()
            return True

    def progress(self, annotator: str) -> dict:
        """How many this annotator has answered, how many are left for them, and the seconds that will take."""
        with self.changed:
            mine = [row for row in self.rows if row["annotator"] == annotator]
            full = sum(len(self.by[p]) >= self.people or annotator in self.by[p] for p in self.prompts)
            left = len(self.prompts) - self.alike - full
            pace = statistics.median(row["seconds"] for row in mine[-20:]) if mine else None
            return {"done": len(mine), "left": left, "seconds_left": pace and pace * left}


def read_answers(path: Path, repair: bool = False) -> list[dict]:
    """The rows of a label file. `repair` takes a last line out that a kill cut short, since nobody saw it accepted."""
    if not path.exists() or path.stat().st_size == 0:
        return []
    if repair:
        whole, _, rest = path.read_bytes().rpartition(b"\n")
        if rest:
            with open(path, "r+b") as file:
                file.truncate(len(whole) + bool(whole))
    columns = {"prompt": str, "annotator": str, "seconds": float}
    return read_jsonl(path, columns, verdicts=True) if path.stat().st_size else []


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Raises InputError where another process is labelling into `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{path}.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"--out {path}: another labelling session writes to it; stop that one first") from None
        yield


# --- the page ---------------------------------------------------------------------------------------------------------


class Handler(BaseHTTPRequestHandler):
    """GET /TOKEN/ is the page; POST /TOKEN/next, answer and undo take and give JSON. Everything else is 404."""

    timeout = 30  # seconds that a client may be silent for
    server: "Server"

    def _reply(self, code: int, content: bytes, kind: str = "text/plain; charset=utf-8") -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("X-Frame-Options", "DENY")
        policy = f"default-src 'none'; connect-src 'self'; script-src 'nonce-{self.server.nonce}'; "
        policy += f"style-src 'nonce-{self.server.nonce}'; base-uri 'none'; form-action 'none'"
        self.send_header("Content-Security-Policy", policy)
        self.end_headers()
        self.wfile.write(content)

    def _refused(self) -> bool:
        """Whether the request was answered already: wrong token, or sent from another site or to another name."""
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        token = (self.path.split("/") + [""])[1]
        if not secrets.compare_digest(token.encode("utf-8", "replace"), self.server.token.encode()):
            self._reply(404, b"not found")
        elif not self.server.known(host) or origin not in (None, f"http://{host}", f"https://{host}"):
            self._reply(403, b"forbidden")
        else:
            return False
        return True

    def do_GET(self) -> None:
        if self._refused():
            return
        if self.path != f"/{self.server.token}/":
            return self._reply(404, b"not found")
        self._reply(200, self.server.page, "text/html; charset=utf-8")

    def do_POST(self) -> None:
        if self._refused():
            return
        action = self.path.removeprefix(f"/{self.server.token}/")
        if action not in ("next", "answer", "undo"):
            return self._reply(404, b"not found")
        size = self.headers.get("Content-Length", "")
        if not size.isascii() or not size.isdigit():
            return self._reply(411, b"length required")
        if len(size) > 9 or int(size) > LONGEST_BODY:
            return self._reply(413, b"too large")
        try:
            asked = json.loads(self.rfile.read(int(size)))
            annotator = asked["annotator"]
            if not isinstance(annotator, str) or not 0 < len(annotator.strip()) <= 40:
                raise ValueError("a name has 1 to 40 characters")
            self._reply(200, json.dumps(self._do(action, annotator.strip(), asked)).encode(), "application/json")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            self._reply(400, str(error).encode())
        except OSError as error:  # the answer could not be written, or sampling failed
            self._reply(500, str(error).encode())

    def _do(self, action: str, annotator: str, asked: dict) -> dict:
        sitting = self.server.sitting
        if action == "answer":
            sitting.answer(annotator, asked["number"], asked["verdict"])
        undone = action == "undo" and sitting.undo(annotator)
        question = sitting.next(annotator)
        shown = sitting.progress(annotator) | {"undone": undone, "prompt": None}
        if question:
            answers = [question.answers[i] for i in sitting.order(question, annotator)]
            shown |= {"prompt": question.prompt, "number": question.number, "responses": [text for text, _ in answers]}
            shown["cut"] = [not ended for _, ended in answers]
        return shown

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    request_queue_size = 256
    daemon_threads = True

    def __init__(self, sitting: Sitting, host: str, port: int):
        super().__init__((host, port), Handler)
        self.sitting, self.token, self.nonce = sitting, secrets.token_urlsafe(16), secrets.token_urlsafe(16)
        self.host = host
        self.page = PAGE.read_bytes().replace(b"NONCE", self.nonce.encode())
        self.address = f"http://{host}:{self.server_port}/{self.token}/"

    def known(self, host: str) -> bool:
        """Whether a Host header is ours: a name that somebody else made point here (DNS rebinding) is not.

        Any port will do, since a tunnel may come from another.
        """
        name = host.partition(":")[0]
        return name in ("localhost", self.host) or re.fullmatch(r"[0-9]+(\.[0-9]+){3}", name) is not None


# --- the terminal -----------------------------------------------------------------------------------------------------


def ask_in_terminal(sitting: Sitting, annotator: str) -> None:
    """The same sitting by input(): places in order, best first; t a tie, s to skip, u to undo, q to stop."""
    while question := sitting.next(annotator):
        order, shown = sitting.order(question, annotator), sitting.progress(annotator)
        pace = f", about {shown['seconds_left'] / 60:.0f} min left" if shown["seconds_left"] else ""
        print(f"\n{'─' * 72}\n{shown['done']} done, {shown['left']} to go{pace}\n\n{visible(question.prompt)}")
        for place, i in enumerate(order, 1):
            text, ended = question.answers[i]
            print(f"\n[{place}] {visible(text)}{'' if ended else ' …'}")
        best_first = "1 or 2" if len(order) == 2 else "the order, best first (as 312)"
        said = input(f"\nBetter: {best_first}; t tie, s skip, u undo, q quit > ").strip().lower()
        if said == "q":
            return
        if said == "u":
            print("taken back" if sitting.undo(annotator) else "nothing to take back")
            continue
        verdict: str | list[int] = {"t": "tie", "s": "skip"}.get(said, said)
        if verdict == said:
            verdict = [int(digit) - 1 for digit in re.findall(r"\d", said)]
            if len(order) == 2 and verdict in ([0], [1]):
                verdict.append(1 - verdict[0])
        try:
            sitting.answer(annotator, question.number, verdict)
        except ValueError as error:
            print(f"{error}, please")
    print("\nThat was the last one. Thank you.")


def visible(text: str) -> str:
    """Text without the control characters that could move a terminal's cursor."""
    return re.sub(r"[^\n\t\x20-\x7e\xa0-\U0010ffff]", "�", text)


# --- the report -------------------------------------------------------------------------------------------------------


def report(rows: list[dict]) -> str:
    """Counts by annotator, position bias, wins by checkpoint, and agreement where two people had the same prompt."""
    preferred = [row for row in rows if "verdict" not in row]
    lines = ["annotator             preferences   ties  skips   median seconds"]
    for who in sorted({row["annotator"] for row in rows}):
        mine = [row for row in rows if row["annotator"] == who]
        kinds = Counter(row.get("verdict", "preferred") for row in mine)
        pace = statistics.median(row["seconds"] for row in mine)
        lines.append(f"{who:<20} {kinds['preferred']:>12} {kinds['tie']:>6} {kinds['skip']:>6} {pace:>16.1f}")
    if preferred:
        places = Counter(row["position"] for row in preferred)
        n = len(preferred)
        share, chance = places[0] / n, statistics.mean(1 / len(row.get("ranked", "12")) for row in preferred)
        lines.append(
            f"\nposition: the first shown was preferred in {share:.3f} ± {math.sqrt(share * (1 - share) / n):.3f} "
            f"of {n} (no bias would be {chance:.3f})"
        )
    pairs = [row["checkpoint"] for row in preferred if len(set(row["checkpoint"])) > 1]
    for name in sorted({name for pair in pairs for name in pair}):
        against = [pair[0] == name for pair in pairs if name in pair]
        lines.append(
            f"{name} was preferred in {sum(against)} of the {len(against)} questions that it was in with another"
        )
    alike: defaultdict[tuple, list] = defaultdict(list)  # (prompt, the responses) → the best, for each person
    for row in rows:
        if row.get("verdict") != "skip":
            texts = row.get("responses") or row.get("ranked") or [row["chosen"], row["rejected"]]
            alike[row["prompt"], *sorted(texts)].append(None if "verdict" in row else texts[0])
    twice = [list(itertools.combinations(best, 2)) for best in alike.values() if len(best) > 1]
    if twice:
        same = [a == b for pair in twice for a, b in pair]
        lines.append(f"agreement on the best: {sum(same)} of {len(same)} pairs of people who had the same question")
    else:
        lines.append("agreement: no question was judged by two people (--people 2 asks for that)")
    return "\n".join(lines)


# --- command line -----------------------------------------------------------------------------------------------------


@dataclass
class Config:
    init: str = "out/sft"  # run folder of the model that answers; several (commas) answer in turn
    prompts: str = ""  # JSONL "prompt"
    out: str = "comparisons.jsonl"  # file that answers are appended to
    samples: int = 2  # responses to a prompt: 2 are compared, more are ranked
    response_len: int = 64  # longest response, in tokens
    temperature: float = 1.0  # of the samples
    n_prompts: int = 0  # use the first so many prompts; 0: all
    drop_long: bool = False  # leave out prompts that with the response exceed the model's context
    people: int = 1  # how many people answer each question
    seed: int = 0  # of samples and of the order they are shown in
    device: str = "auto"  # auto, cpu, cuda or mps
    host: str = "127.0.0.1"  # address to serve on; 0.0.0.0: every network of this machine
    port: int = 8000  # 0: any that is free
    terminal: bool = False  # ask here in place of a page
    annotator: str = ""  # name for --terminal; empty: the login name
    judge: str = ""  # a simulated person, FILE.py:function
    label_temperature: float = 0.1  # of the simulated person's choices: 0.1 judges 0.1 better right in 73%
    report: bool = False  # print what is in --out


def prepare(cfg: Config) -> tuple[list[str], Callable[[str], Question | None]]:
    """The different prompts, and a function prompt → question, which depends on the seed and the prompt alone."""
    import common

    if not cfg.prompts:
        raise InputError("--prompts: name a JSONL file with prompts")
    rows = read_jsonl(cfg.prompts, {"prompt": str})
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))[: cfg.n_prompts or None]
    device = common.pick_device(cfg.device)
    names = cfg.init.split(",")
    if len(set(names)) < len(names):
        raise InputError(f"--init {cfg.init}: names a model twice; name each once")
    models = [(name, *common.load_gpt(name, device, "--init")) for name in names]
    if cfg.samples < max(2, len(models)):
        raise InputError(f"--samples {cfg.samples}: give at least 2, and one for each model of --init")

    def make(prompt: str) -> Question | None:
        answers: list[Answer] = []
        checkpoints: list[str] = []
        for attempt in range(5):  # as long as there are too few different ones
            for j, (name, model, encoding) in enumerate(models):
                n = len(range(j, cfg.samples, len(models))) - checkpoints.count(name)
                seed = common.seed_of(cfg.seed, attempt, j, zlib.crc32(prompt.encode("utf-8", "replace")))
                shape = cfg.response_len, cfg.temperature, seed
                for answer in sample_responses(model, encoding, [prompt], n, *shape)[0] if n else []:
                    if answer[0] not in [text for text, _ in answers]:
                        answers.append(answer)
                        checkpoints.append(name)
        return Question(prompt, answers, checkpoints) if len(answers) == cfg.samples else None

    for _, model, encoding in models:
        lengths = [len(encode_prompt(encoding, prompt)) + cfg.response_len for prompt in prompts]
        what = f"prompts of {cfg.prompts} (with --response_len {cfg.response_len})"
        prompts = fit(prompts, lengths, model.config.block_size, cfg.drop_long, what)
    return prompts, make


def label(cfg: Config) -> None:
    import common

    out = Path(cfg.out)
    if cfg.report:
        if not out.exists():
            raise InputError(f"--out {out}: no such file; name the one that was labelled into")
        return print(report(read_answers(out)))
    prompts, make = prepare(cfg)
    if cfg.judge:
        judge = common.load_function(cfg.judge)
        if out.exists():
            raise InputError(f"--out {out}: exists already; name a new file for the simulated person")
        questions = [question for question in map(make, prompts) if question]
        answers = [question.answers for question in questions]
        rows = simulate([q.prompt for q in questions], answers, judge, cfg.label_temperature, cfg.seed)
        write_jsonl(out, rows)
        return print(f"{out}: {len(rows):,} comparisons of {len(questions):,} prompts")
    with alone(out):
        kind = "chosen" if cfg.samples == 2 else "ranked"
        if any("verdict" not in row and kind not in row for row in read_answers(out)):
            raise InputError(f"--samples {cfg.samples}: {out} holds answers of another number; name another file")
        sitting = Sitting(prompts, make, out, cfg.people, cfg.seed)
        try:
            if cfg.terminal:
                ask_in_terminal(sitting, cfg.annotator or getpass.getuser())
            else:
                serve(sitting, cfg)
        except (EOFError, KeyboardInterrupt):
            print(f"\n{out} holds {len(sitting.rows):,} answers; the same command goes on from there")
        finally:
            sitting.stop()
    if sitting.alike:
        print(f"{sitting.alike:,} prompts were left out, since the model always gives them the same response")


def serve(sitting: Sitting, cfg: Config) -> None:
    try:
        server = Server(sitting, cfg.host, cfg.port)
    except OSError as error:
        raise InputError(f"--port {cfg.port}: {error.strerror}; give another, or 0 for any that is free") from None
    print(f"Open {server.address}\nAnswers go to {cfg.out}. Ctrl-C stops.", flush=True)
    with server:
        server.serve_forever()


def main() -> None:
    import common

    label(common.parse(Config))


if __name__ == "__main__":
    import common

    common.run_main(main)
