"""Comparisons from people: sample several responses to a prompt, ask which is better, append the answer to a JSONL."""

import getpass
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tiktoken

import common
from common.compare import sample_responses, simulate
from data.chat import escaped, render
from data.files import InputError, is_verdict, write_jsonl
from data.label import Answer, read_answers
from data.rows import Prompt, keep_short, prompt_texts
from data.tokenizer import encode_prompt
from tools.label.report import anonymous, report
from tools.label.server import Server
from tools.label.sitting import Question, Sitting, alone
from tools.label.terminal import ask_in_terminal


@dataclass
class Config:
    # questions
    init: str = "out/sft"  # run folder of the model that answers; several, separated by commas, take turns
    prompts: str = ""  # JSONL "prompt"
    out: str = "comparisons.jsonl"  # answers are appended to this file
    samples: int = 2  # responses to a prompt: people compare 2 and rank more
    response_len: int = 64  # longest response, in tokens
    temperature: float = 1.0  # of the samples
    n_prompts: int = 0  # use this many prompts from the start of the file; 0: all
    people: int = 1  # how many people answer each question
    seed: int = 0  # of the samples and of the order on the page
    device: str = "auto"  # auto, cpu, cuda or mps
    # page
    host: str = "127.0.0.1"  # address to serve on; 0.0.0.0: every network of this machine
    port: int = 8000  # 0: any free port
    allow_host: str = ""  # other names of this machine that a proxy or a browser uses, separated by commas
    instructions: str = ""  # text file that is shown to the annotators
    # without a page
    terminal: bool = False  # ask in the terminal instead of on a page
    annotator: str = ""  # name for --terminal; empty: the login name
    judge: str = ""  # a simulated person, FILE.py:function
    label_temperature: float = 0.1  # of the simulated person: with 0.1, a response that scores 0.1 more wins in 73%
    report: bool = False  # print a summary of --out
    anonymous: str = ""  # write the answers of --out to this file, with P1, P2 … in place of names


def prepare(cfg: Config) -> tuple[list[str], Callable[[str], Question | None]]:
    """Return the different prompts and a function prompt → question. Its questions depend only on seed and prompt."""
    if not cfg.prompts:
        raise InputError("--prompts: name a JSONL file with prompts")
    device = common.pick_device(cfg.device)
    names = cfg.init.split(",")
    if len(set(names)) < len(names):
        raise InputError(f"--init {cfg.init}: names a model twice; name each once")
    models = [(name, *common.load_gpt(name, device, "--init")) for name in names]
    prompts = list(dict.fromkeys(as_text(models[0][2], prompt) for prompt in prompt_texts(cfg.prompts)))
    prompts = prompts[: cfg.n_prompts or None]
    if cfg.samples < max(2, len(models)):
        raise InputError(f"--samples {cfg.samples}: give at least 2, and one for each model of --init")

    def make(prompt: str) -> Question | None:
        answers: list[Answer] = []
        checkpoints: list[str] = []
        for attempt in range(5):  # sample again if some answers are the same
            for j, (name, model, encoding) in enumerate(models):
                n = len(range(j, cfg.samples, len(models))) - checkpoints.count(name)
                seed = common.seed_of("question", cfg.seed, attempt, j, prompt)
                shape = cfg.response_len, cfg.temperature, seed
                for answer in sample_responses(model, encoding, [prompt], n, *shape)[0] if n else []:
                    if answer.text not in [other.text for other in answers]:
                        answers.append(answer)
                        checkpoints.append(name)
        return Question(prompt, answers, checkpoints) if len(answers) == cfg.samples else None

    for _, model, encoding in models:
        lengths = [len(encode_prompt(encoding, prompt)) + cfg.response_len for prompt in prompts]
        what = f"prompts of {cfg.prompts} (with --response_len {cfg.response_len})"
        prompts = keep_short(prompts, lengths, model.config.block_size, what)
    return prompts, make


def as_text(encoding: tiktoken.Encoding, prompt: Prompt) -> str:
    """Return a prompt as text. Raises InputError if a message spells a special token, which text would make one."""
    if isinstance(prompt, str):
        return prompt
    _, marks = escaped(encoding, prompt)
    if marks:
        raise InputError(f"--prompts: a message spells {next(iter(marks.values()))}, a special token; leave it out")
    return render(encoding, prompt)


def label(cfg: Config) -> None:
    path = Path(cfg.out)
    if cfg.report or cfg.anonymous:
        if not path.exists():
            raise InputError(f"--out {path}: no such file; name a file with answers")
        rows = read_answers(path)
        return print(export(rows, Path(cfg.anonymous)) if cfg.anonymous else report(rows))
    if cfg.judge and path.exists():
        raise InputError(f"--out {path}: exists already; name a new file for the simulated person")
    with alone(path):
        label_alone(cfg, path)


def label_alone(cfg: Config, path: Path) -> None:
    answered = read_answers(path, repair=True)
    kind = "chosen" if cfg.samples == 2 else "ranked"
    if any(not is_verdict(row) and kind not in row for row in answered):
        raise InputError(f"--samples {cfg.samples}: {path} compares another number of responses; use another file")
    instructions = read_instructions(cfg.instructions)
    prompts, make = prepare(cfg)
    if cfg.judge:
        judge = common.load_function(cfg.judge)
        questions = [question for question in map(make, prompts) if question]
        answers = [question.answers for question in questions]
        rows = simulate([q.prompt for q in questions], answers, judge, cfg.label_temperature, cfg.seed)
        write_jsonl(path, rows)
        return print(f"{path}: {len(rows):,} comparisons of {len(questions):,} prompts")
    sitting = Sitting(prompts, make, path, cfg.people, cfg.seed)
    try:
        if cfg.terminal:
            ask_in_terminal(sitting, cfg.annotator or login_name(), instructions)
        else:
            serve(sitting, cfg, instructions)
    except (EOFError, KeyboardInterrupt):
        print(f"\n{path} holds {len(sitting.rows):,} answers; the same command continues")
    finally:
        sitting.stop()
    if sitting.alike:
        print(f"{sitting.alike:,} prompts were omitted, because the model does not give enough different responses")


def export(rows: list[dict], path: Path) -> str:
    """Write rows without people's names. Returns what to tell the user."""
    if path.exists():
        raise InputError(f"--anonymous {path}: exists already; name a new file")
    write_jsonl(path, anonymous(rows))
    comments = sum("comment" in row for row in rows)
    people = len({row["annotator"] for row in rows})
    read = f"; {comments:,} have comments, which may contain names: read them before you share the file"
    return f"{path}: {len(rows):,} answers of {people:,} people{read if comments else ''}"


def read_instructions(name: str) -> str:
    try:
        return Path(name).read_text(encoding="utf-8-sig").strip() if name else ""
    except OSError as error:
        raise InputError(f"--instructions {name}: {error.strerror}; name a text file") from None
    except UnicodeDecodeError:
        raise InputError(f"--instructions {name}: not UTF-8; save the file as UTF-8") from None


def login_name() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        raise InputError("--annotator: this user has no login name; give a name") from None


def serve(sitting: Sitting, cfg: Config, instructions: str) -> None:
    try:
        server = Server(sitting, cfg.host, cfg.port, cfg.allow_host, instructions)
    except (OSError, OverflowError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise InputError(
            f"--host {cfg.host} --port {cfg.port}: {why}; give another, or port 0 for any free port"
        ) from None
    here, *elsewhere = server.addresses
    print(f"Open {here}")
    for address in elsewhere:
        print(f"From other machines: {address}")
    for name in sorted(server.names):
        print(f"Through {name}: the same path, /{server.token}/")
    print(f"Answers go to {cfg.out}. Ctrl-C stops.", flush=True)
    with server:
        server.serve_forever()
