"""tools/get/hh.py, on a small data set in the exact form of the public files."""

import gzip
import json
import sys

import pytest

from data import InputError
from tests.conftest import run, write
from tools.get import hh

ASK = "\n\nHuman: what is red {}?\n\nAssistant:"
LONG = "\n\nHuman: hi {}\n\nAssistant: Hello!  What can I do?\n\nHuman: name a fruit\n\nwith a long name\n\nAssistant:"


def made_up(n=60):
    """n dialogues of two kinds, and one of each sort that must be left out."""
    rows = []
    for i in range(n):
        before = (LONG if i % 2 else ASK).format(i)
        rows.append({"chosen": f"{before} a pomegranate\n\nor a fox {i}", "rejected": f"{before} I don’t know."})
    rows.append({"chosen": f"{ASK} one", "rejected": f"{LONG} two"})
    rows.append({"chosen": f"{ASK} the same", "rejected": f"{ASK} the same "})
    rows.append({"chosen": f"{ASK} ", "rejected": f"{ASK} something"})
    rows.append({"chosen": f"{ASK} yes\n\nHuman: thanks", "rejected": f"{ASK} yes\n\nHuman: no"})
    return rows


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(hh, "FOLDER", tmp_path / "hh")
    return tmp_path / "hh"


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def call(monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", ["hh.py", *map(str, options)])
    hh.main()


def test_a_dialogue_becomes_a_prompt_and_two_answers_and_what_is_left_out_is_counted(
    tmp_path, folder, monkeypatch, capsys
):
    call(monkeypatch, "--source", write(tmp_path / "a.jsonl", made_up()))
    pairs = read(folder / "compare.jsonl")
    said = capsys.readouterr().out
    for why in ("part before the last answer: 1", "the same: 1", "an empty answer: 1", "end with the assistant: 1"):
        assert why in said
    for row in pairs:
        i = int(row["chosen"].rsplit(" ", 1)[1])
        assert row["chosen"] == f" a pomegranate\n\nor a fox {i}" and row["rejected"] == " I don’t know."
        assert row["prompt"] == (LONG if i % 2 else ASK).format(i)
    assert read(folder / "sft.jsonl") == [{"prompt": r["prompt"], "completion": r["chosen"]} for r in pairs]
    assert read(folder / "ppo.jsonl") == [{"prompt": r["prompt"]} for r in pairs]
    held_out = {row["prompt"] for row in read(folder / "eval.jsonl")}
    assert len(pairs) + len(held_out) == 60 and held_out and held_out.isdisjoint(row["prompt"] for row in pairs)


def test_conversations_are_lists_of_role_and_content(tmp_path, folder, monkeypatch):
    call(monkeypatch, "--messages", "--source", write(tmp_path / "a.jsonl", made_up()))
    row = next(row for row in read(folder / "compare.jsonl") if len(row["prompt"]) == 3)
    (answer,) = row["chosen"]
    i = answer["content"].rsplit(" ", 1)[1]
    assert answer == {"role": "assistant", "content": f"a pomegranate\n\nor a fox {i}"}
    assert row["prompt"] == [
        {"role": "user", "content": f"hi {i}"},
        {"role": "assistant", "content": "Hello!  What can I do?"},
        {"role": "user", "content": "name a fruit\n\nwith a long name"},
    ]


@pytest.mark.parametrize("content, words", [
    (None, "give a readable file"), (b"not gzip", "Not a gzipped file"),
    (gzip.compress("\n".join(map(json.dumps, made_up())).encode())[:300], "fetch it again"),
    (gzip.compress(b'{"chosen": "a"}\n', mtime=0), "a.jsonl.gz:1: no column"),
    (gzip.compress(json.dumps(made_up()[0]).encode()), "too few dialogues"),
])  # fmt: skip
def test_a_bad_source_is_named_and_nothing_is_written(tmp_path, folder, monkeypatch, content, words):
    if content:
        (tmp_path / "a.jsonl.gz").write_bytes(content)
    with pytest.raises(InputError, match=words):
        call(monkeypatch, "--source", tmp_path / "a.jsonl.gz")
    assert not folder.exists()


@pytest.mark.parametrize("options, words", [
    (["--sets", "helpful-base,funny"], "there is no funny"), (["--frobnicate"], "--frobnicate"),
    (["--source", "nowhere.jsonl"], "nowhere.jsonl: "),
])  # fmt: skip
def test_a_bad_option_is_one_sentence(options, words):
    done = run("tools/get/hh.py", *options)
    assert done.returncode == 2 and done.stderr.startswith("tools.get.hh: ") and words in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1


HELP = """
import runpy, sys, warnings
warnings.simplefilter("error")
for name in sys.argv[1:]:
    sys.argv = [name, "--help"]
    try:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        assert not end.code
"""


def test_a_command_starts_without_a_warning(tmp_path):
    """Python warns if a package imports the file that is to be run."""
    names = ["tools.get.hh", "tools.get.imdb", "tools.hf", "tools.label", "tools.page"]
    (tmp_path / "help.py").write_text(HELP)
    done = run(tmp_path / "help.py", *names)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert done.stdout.count("usage: ") == len(names)
