"""Comparisons from people: ask which of several responses to a prompt is better, append the answer to a JSONL.

python -m tools.label --init out/sft --prompts PROMPTS.jsonl --out mine.jsonl    show people a page in the browser
python -m tools.label … --init out/sft,out/ppo        two models answer; the page does not name them
python -m tools.label --prompts LOGS.jsonl --out mine.jsonl     ask about responses that the rows hold already
python -m tools.label … --samples 4                   rank four responses instead of choosing between two
python -m tools.label --out mine.jsonl --report       summarise a file: counts, position bias, agreement
"""

import html
import itertools
import json
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import cli, folders, nets
from common.cli import Count, Number, Whole
from common.compare import sample_responses
from data.batches import keep_short
from data.chat import template_variables
from data.files import InputError, first_row, replacing
from data.label import Answer, read_answers
from data.rng import seed_of
from data.rows import answered, prompt_rows
from data.tokenizer import encode_prompt
from tools import web
from tools.label.report import alpha, report, summarise
from tools.label.sitting import Question, Sitting, key_of, question_of, turns_of

PAGE = Path(__file__).with_name("page.html")


@dataclass
class Config:
    # questions
    init: str = "out/sft"  # run folder of the model that answers; several, separated by commas, take turns
    prompts: str = ""  # JSONL "prompt" or "messages"; with "responses", or "chosen" and "rejected", no model answers
    out: str = "comparisons.jsonl"  # file of the answers; those that it has stay
    samples: Count = 2  # responses to a prompt: people compare 2 and rank more
    response_len: Count = 64  # longest response, in tokens
    temperature: Number = 1.0  # of the samples
    n_prompts: Whole = 0  # use this many prompts from the start of the file; 0: all
    people: Count = 1  # how many people answer each question
    seed: Whole = 0  # of the samples and of the order on the page
    device: str = "auto"  # auto, cpu, cuda or mps
    # page
    host: str = "127.0.0.1"  # address to serve on; 0.0.0.0: every network of this machine
    port: int = 8000  # 0: any free port
    instructions: str = ""  # text file that is shown to the annotators
    # without a page
    report: bool = False  # print a summary of --out
    json: str = ""  # file for the numbers of --report


def prepare(cfg: Config) -> tuple[list[str], Callable[[str], Question | None]]:
    """Return the keys of the prompts and a function key → question. Its questions depend only on seed and prompt."""
    names = cfg.init.split(",")
    if len(set(names)) < len(names) or cfg.samples < max(2, len(names)):
        raise InputError(f"--init {cfg.init} --samples {cfg.samples}: name each model once, and sample two or more")
    print(f"loading {cfg.init}", flush=True)
    models = [(name, *nets.load_gpt(name, cli.pick_device(cfg.device), "--init")) for name in names]
    rows = {key_of(row): row for row in prompt_rows(cfg.prompts)}
    prompts, ids = list(rows)[: cfg.n_prompts or None], {}  # ids: (model, key) → tokens
    what = f"prompts of {cfg.prompts} (with --response_len {cfg.response_len})"
    for name, model, encoding in models:
        for prompt in prompts:
            variables = template_variables(rows[prompt], cfg.prompts)
            ids[name, prompt] = encode_prompt(encoding, rows[prompt]["prompt"], variables)
        lengths = [max(1, len(ids[name, prompt])) + cfg.response_len for prompt in prompts]
        prompts = keep_short(prompts, lengths, model.config.block_size, what)

    def make(prompt: str) -> Question | None:
        found: dict[str, tuple[Answer, str]] = {}  # text → answer, checkpoint
        for attempt, (j, (name, model, encoding)) in itertools.product(range(5), enumerate(models)):
            n = len(range(j, cfg.samples, len(models))) - [by for _, by in found.values()].count(name)
            if n:  # at a later attempt: because some answers were the same
                shape = cfg.response_len, cfg.temperature, seed_of("question", cfg.seed, attempt, j, prompt)
                for answer in sample_responses(model, encoding, [ids[name, prompt]], n, *shape)[0]:
                    found.setdefault(answer.text, (answer, name))
        made = map(list, zip(*found.values()))
        return Question(rows[prompt]["prompt"], *made, rows[prompt]) if len(found) == cfg.samples else None

    return prompts, make


def given_questions(cfg: Config) -> tuple[list[int], Callable[[int], Question]]:
    """Return the numbers of the questions about responses that the rows hold, and a function number → question."""
    if (cfg.init, cfg.samples) != (Config.init, Config.samples):
        raise InputError(f"--init, --samples: no model answers, as {cfg.prompts} holds responses; leave them out")
    questions = {each.number: each for each in map(question_of, answered(cfg.prompts, print))}
    if not questions:
        raise InputError(f"{cfg.prompts}: no row holds two different responses; give one that does")
    print(f"{cfg.prompts}: {len(questions):,} questions about responses that it holds")
    return list(questions)[: cfg.n_prompts or None], questions.__getitem__


def label(cfg: Config) -> None:
    """Report on --out, or ask people until no question is left or Ctrl-C stops it."""
    path = Path(cfg.out)
    if cfg.report or cfg.json:
        if not path.exists():
            raise InputError(f"--out {path}: no such file; name a file with answers")
        rows = read_answers(path)
        if cfg.json:
            with replacing(cfg.json) as file:
                json.dump(summarise(rows), file, indent=1)
        return print(report(rows))
    if not cfg.prompts:
        raise InputError("--prompts: name a JSONL file with prompts")
    given = not first_row(cfg.prompts).keys().isdisjoint(("responses", "chosen", "ranked"))
    instructions = Path(cfg.instructions).read_text("utf-8-sig", "replace").strip() if cfg.instructions else ""
    with folders.lock(path):
        rows = read_answers(path, repair=True)
        if not given and any(len(row["checkpoint"]) != cfg.samples for row in rows):
            raise InputError(f"--samples {cfg.samples}: {path} compares another number of responses; use another file")
        sitting = Sitting(*(given_questions if given else prepare)(cfg), path, cfg.people, cfg.seed)
        try:
            with Server(sitting, cfg.host, cfg.port, instructions) as server:
                note = "; elsewhere with this machine's name for localhost" if cfg.host in web.EVERYWHERE else ""
                print(f"Open {server.address}{note}\nAnswers go to {path}. Ctrl-C stops.", flush=True)
                server.serve_forever()
        except KeyboardInterrupt:
            print(f"\n{path} holds {len(sitting.rows):,} answers; the same command continues")
        finally:
            sitting.stop()
    if sitting.alike:
        print(f"{sitting.alike:,} prompts were omitted, because the model does not give enough different responses")


class Server(web.Server):
    """/TOKEN/ is the page. /TOKEN/next, answer, earlier and revise take and return JSON."""

    def __init__(self, sitting: Sitting, host: str, port: int, instructions: str = ""):
        super().__init__(host, port, lasting_token(sitting.out))
        page = web.secured(PAGE.read_text(encoding="utf-8"), connect=True)
        self.sitting, self.page = sitting, page.replace("INSTRUCTIONS", html.escape(instructions))

    def respond(self, action: str, asked: Any) -> web.Reply:
        if not action:
            return 200, self.page, "text/html"
        if action not in ("next", "answer", "earlier", "revise"):
            return web.NOT_FOUND
        name, sitting = asked["annotator"], self.sitting
        if not isinstance(name, str) or not 0 < len(name.strip()) <= 40:
            raise ValueError("a name has 1 to 40 characters")
        annotator, index = name.strip(), asked.get("index")
        given = asked.get("verdict"), asked.get("comment", ""), asked.get("sure", 0)
        if action == "answer":
            sitting.answer(annotator, asked["number"], *given)
        if action == "revise":
            sitting.revise(annotator, index, *given)
        if action == "earlier" and index is None:
            rows = sitting.earlier(annotator)
            turns = [turns_of(question_of(row))[-1]["content"] for row in rows]
            found = {"earlier": [{"prompt": text[:200], "said": sitting.said(row)} for text, row in zip(turns, rows)]}
        else:
            found = sitting.shown(annotator, index if action == "earlier" else None)
        return 200, json.dumps(found), "application/json"


def lasting_token(out: Path) -> str:
    """Return the token kept beside the answers, so that an address that people have outlives a restart."""
    path = Path(f"{out}.token")
    if not path.exists() or not re.fullmatch(r"[\w-]{22}", path.read_text(errors="replace"), re.ASCII):
        path.unlink(missing_ok=True)
        path.touch(mode=0o600, exist_ok=False)
        path.write_text(secrets.token_urlsafe(16))
    return path.read_text()
