"""tools/get/tldr.py, on a small data set in the exact form of the public files."""

import base64
import hashlib
import json
import sys

import pytest

from data import InputError
from tests.conftest import run, write
from tools.get import tldr

LINES = "\n\n".join(f"line {i} of a post about a fox that went to the lake" for i in range(12))


def post(i, text=LINES):
    return {"id": f"t3_{i}", "subreddit": "tales", "title": f"a fox {i}", "post": text, "summary": f"  fox {i} swam. "}


def comparison(i, **more):
    texts = [
        {"text": f" fox {i} swam", "policy": "ref", "note": None},
        {"text": f"a lake{i}", "policy": "sup4", "note": ""},
    ]
    info = {key: value for key, value in post(i).items() if key != "summary"}
    row = {"info": info, "summaries": texts, "choice": i % 2, "worker": "x", "batch": "batch3", "split": "train"}
    return row | {"extra": {"confidence": 8}} | more


def public_files():
    article = {"id": "9", "title": "t", "article": "long", "site": "cnn"}
    same = [{"text": " the same"}, {"text": "the same "}]
    odd = [comparison(7, split="valid1"), comparison(8, info=article), comparison(9, summaries=same)]
    files = {name: [comparison(i) for i in range(4)] for name in tldr.BATCHES}
    files |= {"batch3.json": [comparison(i) for i in range(4)] + odd, "train.jsonl": [post(i) for i in range(5)]}
    return files | {"valid.jsonl": [post(100, "short\n")]}


@pytest.fixture
def folder(tmp_path, monkeypatch, encoding):
    monkeypatch.setattr(tldr, "FOLDER", tmp_path / "tldr")
    monkeypatch.setattr(tldr, "gpt2_encoding", lambda: encoding)
    return tmp_path / "tldr"


def call(monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", ["tldr.py", *map(str, options)])
    tldr.main()


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def given(tmp_path, **changed):
    (tmp_path / "source").mkdir()
    for name, rows in (public_files() | changed).items():
        write(tmp_path / "source" / name, rows)
    return tmp_path / "source"


def test_prompts_end_in_tldr_and_answers_begin_with_one_space(tmp_path, folder, monkeypatch, capsys):
    call(monkeypatch, "--source", given(tmp_path), "--length", 10_000)
    whole = f"SUBREDDIT: r/tales\n\nTITLE: a fox 0\n\nPOST: {LINES}\n\nTL;DR:"
    assert read(folder / "sft.jsonl")[0] == {"prompt": whole, "completion": " fox 0 swam."}
    pairs = read(folder / "compare.jsonl")
    assert len(pairs) == 4 * len(tldr.BATCHES)
    assert pairs[0] == {"prompt": whole, "chosen": " fox 0 swam", "rejected": " a lake0"}
    assert pairs[1]["chosen"] == " a lake1" and pairs[1]["rejected"] == " fox 1 swam"
    assert len(read(folder / "ppo.jsonl")) == 5 and "short\n\n\nTL;DR:" in read(folder / "eval.jsonl")[0]["prompt"]
    said = capsys.readouterr().out
    assert "posts not cut: 82" in said and "not of a Reddit post: 1" in said
    assert "of the split valid1: 1" in said and "the same summary twice or of none: 1" in said


def test_a_long_post_is_cut_at_a_line_break_and_the_cuts_are_counted(tmp_path, folder, monkeypatch, capsys, encoding):
    one_line = [post(0, "a fox went to the lake " * 40)] + [post(i) for i in range(1, 5)]
    call(monkeypatch, "--source", given(tmp_path, **{"train.jsonl": one_line}), "--length", 150)
    made = [row["prompt"] for row in read(folder / "ppo.jsonl")]

    def size(text):
        return len(encoding.encode_ordinary(text))

    assert all(size(prompt) <= 150 and prompt.endswith("\n\nTL;DR:") for prompt in made)
    kept = made[1].split("POST: ")[1].removesuffix("\n\nTL;DR:")
    assert LINES.startswith(kept) and LINES[len(kept)] == "\n" and size(made[1] + LINES.split("\n\n")[1]) > 150
    assert size(made[0]) >= 148  # inside a line, as much as fits
    said = capsys.readouterr().out
    assert "posts cut at a line break: 80" in said and "posts cut inside a line: 1" in said and "not cut: 1" in said


def test_the_public_files_are_downloaded_once_and_checked(folder, server, monkeypatch):
    for name, rows in public_files().items():
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
        server.files[f"/{(tldr.POSTS | tldr.BATCHES)[name]}"] = content
    monkeypatch.setattr(tldr, "URL", server.url)
    place = f"/{tldr.BATCHES['batch7.json']}"
    right = server.files[place]
    server.md5[place] = base64.b64encode(hashlib.md5(right).digest()).decode()
    for wrong, words in ((right[:-9] + b"xxxxxxxx\n", "wrong checksum"), (None, "404")):
        server.files[place] = wrong
        with pytest.raises(InputError, match=words):
            call(monkeypatch)
        assert not (folder / "batch7.json").exists() and not (folder / "sft.jsonl").exists()
    server.files[place] = right
    monkeypatch.setattr(tldr, "URL", f"{server.url}/cut")
    with pytest.raises(InputError, match="only"):
        call(monkeypatch)
    monkeypatch.setattr(tldr, "URL", server.url)
    call(monkeypatch)
    server.files.clear()
    call(monkeypatch)
    assert len(read(folder / "compare.jsonl")) == 4 * len(tldr.BATCHES)


@pytest.mark.parametrize("options, words", [
    (["--length", 10], "--length 10"), (["--source", "nowhere"], "holds no batch3.json"),
    (["--init", "nowhere"], "--init nowhere"),
])  # fmt: skip
def test_bad_input_is_named_and_nothing_is_written(tmp_path, folder, monkeypatch, options, words):
    with pytest.raises(InputError, match=words):
        call(monkeypatch, "--source", given(tmp_path), *options)
    assert not folder.exists()


def test_from_the_command_line_it_is_one_sentence():
    done = run("tools/get/tldr.py", "--init", "nowhere")
    assert done.returncode == 2 and done.stderr.startswith("tools.get.tldr: --init nowhere: no model.pt")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("change", [
    {"choice": "1"}, {"choice": 2}, {"summaries": []}, {"summaries": [{"text": None}] * 2}, {"info": None},
])  # fmt: skip
def test_a_broken_row_is_named(tmp_path, folder, monkeypatch, change):
    rows = [comparison(0), comparison(1) | change]
    with pytest.raises(InputError, match=r"batch4\.json:( row )?2"):
        call(monkeypatch, "--source", given(tmp_path, **{"batch4.json": rows}))
