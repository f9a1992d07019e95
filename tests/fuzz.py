"""Thousands of bad inputs, each of which must be read as it is or refused in one sentence, and must change no file.

    python -m tests.fuzz                     4,800 inputs: files, models, states and pages of runs, Hugging Face
                                             folders, command lines
    python -m tests.fuzz --seed 1 --each 5000

An input is a good one with a few things broken at random. It prints how many were read, refused and neither.
"""

import argparse
import contextlib
import io
import json
import random
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import tiktoken
import torch

import data
import ppo
import reward
import sft
from common import cli, nets, runs
from data import InputError, chat
from data.label import read_answers
from tests.conftest import make_gpt
from tools import hf, label, page
from tools.get import imdb
from tools.label.report import report

ODD = [None, True, 0, -1, 7, 10**30, 10**400, 0.5, -0.0, 1e300, float("nan"), float("inf"), "", " ", "x", "\ud800"]
ODD += ["\x00", "é" * 40, "<|endoftext|>", "a\r\nb", "tie", "nan", "-1"]
ODD += [[], [[]], ["a"], ["a", "a"], ["a", "b", 3], {}, {"a": 1}]
JUNK = [b"\xff", b"\x00", b"{", b"[" * 5000, b'{"a":' * 5000, b"\n\n", b"\r", b"", b"\xef\xbb\xbf", b'"', b"1e999"]
JUNK += [b"\\ud800", b"-Infinity", b"NaN", b"9" * 5000, b" " * 10**5, b', "prompt": 3', b', "text": null']
PAIR = {"prompt": "a", "chosen": "b", "rejected": "c", "p_chosen": 0.7, "chosen_ids": [1, 2], "chosen_ended": True}
ANSWER = {"checkpoint": ["m", "m"], "annotator": "x", "seconds": 1.5}
GOOD = {  # a good row → what reads such rows
    "text": {"text": "tell me a tale.", "label": 1},
    "completions": {"prompt": "ask me.", "completion": " yes.", "completion_ended": True},
    "pairs": PAIR,
    "ranked": {"prompt": "a", "ranked": [" yes.", " no.", " fox."], "ranked_ended": [True, True, False]},
    "tie": {"prompt": "a", "verdict": "tie", "responses": ["b", "c"]} | ANSWER,
    "answer": {"prompt": "a", "chosen": "b", "rejected": "c", "position": 0} | ANSWER,
    "hh": {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
}


def broken(value: object, rng: random.Random) -> object:
    """A JSON value like `value` with one thing in it replaced, left out, doubled or renamed."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key = rng.choice(list(value))
        kind = rng.random()
        if kind < 0.6:
            return value | {key: broken(value[key], rng)}
        if kind < 0.8:
            return {k: v for k, v in value.items() if k != key}
        return value | {rng.choice(["verdict", "ranked", "prompt", "text", "x"]): rng.choice(ODD)}
    if isinstance(value, list) and value and rng.random() < 0.7:
        place = rng.randrange(len(value))
        return [*value[:place], broken(value[place], rng), *value[place + rng.randrange(2) :]]
    return rng.choice(ODD)


def bad_file(path: Path, kind: str, rng: random.Random) -> None:
    """JSONL of this kind in which some rows, some bytes or the end are broken."""
    good = GOOD[kind]
    rows: list[object] = [good] * rng.randrange(1, 30)
    for _ in range(rng.randrange(1, 4)):
        rows[rng.randrange(len(rows))] = broken(good, rng)
    content = "\n".join(map(json.dumps, rows)).encode()
    if rng.random() < 0.3:
        place = rng.randrange(len(content))
        content = content[:place] + rng.choice(JUNK) + content[place + rng.randrange(3) :]
    if rng.random() < 0.05:
        content = content.replace(b"\n", b"\r\n")
    if rng.random() < 0.1:
        content = content[: rng.randrange(len(content) + 1)]
    path.write_bytes(content)


def read_file(path: Path, kind: str, encoding: tiktoken.Encoding) -> None:
    """Read a file of this kind with each of its readers; the last may refuse it, the others may too."""
    sources = {"chosen": str, "rejected": str}
    readers: dict[str, list[Callable]] = {
        "text": [
            lambda: data.token_stream(path, encoding, 299, path.with_name("stream")),
            lambda: list(imdb.reviews(path)),
        ],
        "completions": [lambda: data.completions(path, encoding, 299), lambda: data.prompts(path, encoding)],
        "hh": [lambda: [chat.split_dialogue(row) for row in data.read_jsonl(path, sources)]],
    }
    compared = [lambda: data.comparisons(path, encoding, 299), lambda: report(read_answers(path))]
    refusals = []
    for read in readers.get(kind, compared):
        try:
            read()
        except InputError as error:
            refusals.append(error)
    if refusals:
        raise refusals[0]


def bad_bytes(path: Path, good: bytes, rng: random.Random) -> None:
    """A file with some wrong bytes, or without its end."""
    content = bytearray(good)
    for _ in range(rng.randrange(1, 40)):
        content[rng.randrange(len(content))] = rng.randrange(256)
    path.write_bytes(content[: rng.choice([len(content), rng.randrange(len(content))])])


def use_run_folder(path: Path) -> None:
    model, encoding = nets.load(path)
    if hasattr(model, "generate"):
        tokens, _, _ = model.generate([[1, 2]], 3, generator=torch.Generator().manual_seed(0))
        encoding.decode(tokens[0].tolist())
    for prompt in ("ask <|endoftext|> me\t\x00é", [{"role": "user", "content": "ask me"}]):
        data.encode_prompt(encoding, prompt)
    data.encode_text(encoding, "ask <|endoftext|> me\t\x00é")


def good_run(folder: Path, init: Path) -> ppo.Config:
    """A run of ppo.py that has ended, with the files that a page shows."""
    (folder.parent / "f.py").write_text("def f(prompt, response):\n    return len(response)\n")
    prompts = folder.with_name("prompts.jsonl")
    prompts.write_text("".join(json.dumps({"prompt": f"ask me {i}."}) + "\n" for i in range(20)))
    given = dict(data=str(prompts), init=str(init), reward=f"{folder.parent}/f.py:f", out=str(folder))
    cfg = ppo.Config(**given, iterations=1, batch_size=2, minibatch_size=2, response_len=4, eval_prompts=2)
    with patch.object(runs, "write_page", lambda folder: None), contextlib.redirect_stdout(io.StringIO()):
        ppo.train(cfg)
    return cfg


def bad_page(folder: Path, good: dict[str, bytes], rng: random.Random) -> None:
    """A run folder in which one of the files that a page shows is broken."""
    for name, content in good.items():
        (folder / name).write_bytes(content)
    name = rng.choice(list(good))
    if name.endswith(".json") and rng.random() < 0.6:
        return (folder / name).write_text(json.dumps(broken(json.loads(good[name]), rng)))
    if name == "metrics.jsonl" and rng.random() < 0.6:
        row = json.loads(good[name])
        return (folder / name).write_text(
            "".join(json.dumps(each) + "\n" for each in (row, row | {rng.choice(list(row)): rng.choice(ODD)}))
        )
    place = rng.randrange(len(good[name]))
    (folder / name).write_bytes(good[name][:place] + rng.choice(JUNK) + good[name][place + rng.randrange(3) :])


def resume(cfg: ppo.Config) -> None:
    runs.Run(replace(cfg, resume=True)).lock.close()


def bad_hugging_face_folder(folder: Path, good: dict[str, bytes], rng: random.Random) -> None:
    for name, content in good.items():
        (folder / name).write_bytes(content)
    name = rng.choice(list(good))
    if name.endswith(".json") and rng.random() < 0.8:
        spec = json.loads(good[name])
        for _ in range(rng.randrange(1, 3)):
            spec = broken(spec, rng)
        (folder / name).write_text(json.dumps(spec))
        return
    content = bytearray(good[name])
    for _ in range(rng.randrange(1, 9)):
        content[rng.randrange(min(len(content), 3000))] = rng.randrange(256)
    (folder / name).write_bytes(content[: rng.choice([len(content), rng.randrange(len(content))])])


def use_hugging_face_folder(folder: Path) -> None:
    model, encoding = hf.read_model(folder)
    encoding.decode(encoding.encode_ordinary("tell me"))


def parse_options(rng: random.Random) -> None:
    config = rng.choice([sft.Config, reward.Config, ppo.Config, label.Config])
    names = list(config.__dataclass_fields__)
    values = ["nan", "inf", "-inf", "-1", "0", "1e400", "9" * 30, "", " ", "x", "--", "1.5", "-0", "0x10", "True", "é"]
    words = []
    for _ in range(rng.randrange(1, 4)):
        words += [f"--{rng.choice(names)}", rng.choice(values)][: rng.choice([1, 2, 2, 2])]
    cli.parse(config, words)


def states(folder: Path) -> dict[Path, tuple[int, int]]:
    """When each file was last written, and its size."""
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*") if path.is_file()}


def sweep(seed: int, each: int, say: Callable[[str], None] = lambda text: None) -> tuple[Counter, list[str]]:
    """How many inputs were read, refused, at fault; and what the faults are."""
    rng, counts, faults = random.Random(seed), Counter(), []
    encoding = data.learn_bpe(["ask me. yes yes no. tell me a tale of a fox. yes! no?"] * 9, 300)
    with tempfile.TemporaryDirectory() as name:
        here = Path(name)
        (here / "run").mkdir()
        model = make_gpt(vocab_size=encoding.n_vocab, eos=encoding.eot_token, n_layer=1)
        nets.save_model(model, encoding, here / "run" / "model.pt")
        saved = (here / "run" / "model.pt").read_bytes()
        hf.convert(str(here / "run"), here / "hf")
        good = {path.name: path.read_bytes() for path in (here / "hf").iterdir()}
        (here / "start").mkdir()
        nets.save_model(model, encoding, here / "start" / "model.pt")
        cfg = good_run(here / "ppo", here / "start")
        state = (here / "ppo" / "state.pt").read_bytes()
        shown = {path.name: path.read_bytes() for path in (here / "ppo").iterdir() if path.suffix != ".pt"}

        def one(kind: str) -> Callable[[], None]:
            if kind == "files":
                rows = rng.choice(list(GOOD))
                bad_file(here / "bad.jsonl", rows, rng)
                return lambda: read_file(here / "bad.jsonl", rows, encoding)
            if kind == "run folders":
                bad_bytes(here / "run" / "model.pt", saved, rng)
                return lambda: use_run_folder(here / "run")
            if kind == "states":
                bad_bytes(here / "ppo" / "state.pt", state, rng)
                return lambda: resume(cfg)
            if kind == "pages":
                bad_page(here / "ppo", shown, rng)
                return lambda: page.page([str(here / "ppo")])
            if kind == "Hugging Face folders":
                bad_hugging_face_folder(here / "hf", good, rng)
                return lambda: use_hugging_face_folder(here / "hf")
            return lambda: parse_options(rng)

        for kind in ("files", "run folders", "states", "pages", "Hugging Face folders", "command lines"):
            tally = Counter()
            for number in range(each):
                use = one(kind)
                (here / "stream").unlink(missing_ok=True)
                before = states(here)
                printed = io.TextIOWrapper(io.BytesIO(), "utf-8")
                outcome = "read"
                try:
                    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
                        use()
                except InputError as error:
                    outcome = "refused"
                    if "\n" in str(error).strip():
                        outcome = "at fault"
                        faults.append(f"{kind} {number}: more than one line: {error}")
                except SystemExit:
                    outcome = "refused" if kind == "command lines" else "at fault"
                except BaseException as error:  # tiktoken's panic is no Exception
                    outcome = "at fault"
                    at = error.__traceback__
                    while at.tb_next:
                        at = at.tb_next
                    where = f"{Path(at.tb_frame.f_code.co_filename).name}:{at.tb_lineno}"
                    faults.append(f"{kind} {number}: {type(error).__name__} in {where}: {str(error)[:150]}")
                (here / "stream").unlink(missing_ok=True)
                if before != states(here):
                    outcome = "at fault"
                    faults.append(f"{kind} {number}: a file has changed")
                tally[outcome] += 1
            counts += tally
            say(f"{kind}: {tally['read']:,} read, {tally['refused']:,} refused, {tally['at fault']:,} at fault")
    return counts, faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--each", type=int, default=800, help="inputs of each of six kinds")
    options = parser.parse_args()
    _, faults = sweep(options.seed, options.each, print)
    print("\n".join(faults))


if __name__ == "__main__":
    main()
