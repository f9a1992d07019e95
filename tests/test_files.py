"""data/files.py: several files as one, and the files that are refused with a sentence that helps."""

import csv
import json
import os
import subprocess
import sys

import pytest

import data
from common.folders import fingerprint
from data import InputError
from data.files import numbered
from tests.conftest import write


@pytest.fixture
def shards(tmp_path):
    """A folder of two files, of which the second by name is written first."""
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "b.jsonl", [{"prompt": "three"}])
    write(folder / "a.jsonl", [{"prompt": "one"}, {"prompt": "two"}])
    (folder / "README.md").write_text("no rows")
    return folder


def test_a_folder_and_a_pattern_are_their_files_by_name(shards):
    for path in (shards, f"{shards}/*.jsonl", f"{shards}/[ab]*"):
        assert data.prompt_texts(path) == ["one", "two", "three"] and data.has_rows(path)
        assert data.first_row(path) == {"prompt": "one"}
    assert data.prompt_rows(f"{shards}/b*.jsonl") == [{"prompt": "three"}]


def test_an_error_names_the_very_file_and_its_own_line(shards, encoding):
    with open(shards / "b.jsonl", "a") as file:
        file.write('\n{"prompt": 3}\n{"prompt": []}\n')
    with pytest.raises(InputError, match='b.jsonl:3: "prompt" is not a text'):
        data.prompts(shards, encoding)
    write(shards / "b.jsonl", [{"prompt": "three"}, {"prompt": []}])
    with pytest.raises(InputError, match="data/b.jsonl: row 2: a conversation is a list"):
        data.prompts(shards, encoding)
    write(shards / "b.jsonl", [{"prompt": "a", "completion": " b"}, {"prompt": "a", "completion": [3]}])
    with pytest.raises(InputError, match="data/b.jsonl: row 2: a message has"):
        data.completions(f"{shards}/b*", encoding, 7)
    assert [where for where, _ in numbered(shards, {})][1:3] == [f"{shards}/a.jsonl: row 2", f"{shards}/b.jsonl: row 1"]


def test_several_texts_are_as_many_documents(tmp_path, encoding):
    for name in ("b", "a"):
        (tmp_path / f"{name}.txt").write_text(f"tell me {name}\n")
    eos = encoding.eot_token
    stream = data.token_stream(tmp_path / "*.txt", encoding, eos, tmp_path / "ids")
    a, b = (encoding.encode_ordinary(f"tell me {name}\n") for name in "ab")
    assert stream.tolist() == [*a, eos, *b, eos] and list(data.documents(tmp_path)) == ["tell me a\n", "tell me b\n"]


def test_a_folder_without_rows_or_of_two_kinds_is_refused(shards, tmp_path):
    (shards / "c.txt").write_text("text")
    with pytest.raises(InputError, match=r"data: holds \.jsonl and \.txt; name files of one kind"):
        data.prompt_rows(shards)
    for path in (f"{tmp_path}/*.jsonl", tmp_path):
        with pytest.raises(InputError, match=r"holds no \.txt, .*; name files of one kind"):
            data.has_rows(path)


def test_the_fingerprint_of_a_folder_is_that_of_all_its_files(shards):
    before = fingerprint(str(shards))
    assert len(before.split()) == 2 and before == fingerprint(f"{shards}/*.jsonl")
    write(shards / "b.jsonl", [{"prompt": "four"}])
    assert before.split()[0] == fingerprint(str(shards)).split()[0] and before != fingerprint(str(shards))
    assert fingerprint("") == fingerprint(f"{shards}/*.csv") == ""


@pytest.mark.parametrize("name", ["x.csv", "x.tsv", "x.json", "x.jsonl", "an x.json"])
def test_a_file_of_another_form_is_refused_with_a_command_that_turns_it_into_jsonl(tmp_path, name):
    rows = [{"prompt": 'say "a, b"', "answer": "1\n2"}, {"prompt": "naïve\t?", "answer": ""}]
    with open(tmp_path / name, "w", newline="", encoding="utf-8") as file:
        if name in ("x.csv", "x.tsv"):
            table = csv.DictWriter(file, rows[0], delimiter="\t" if name == "x.tsv" else ",")
            table.writeheader()
            table.writerows(rows)
        else:
            json.dump(rows, file, indent=2)
    assert data.has_rows(tmp_path / name)
    with pytest.raises(InputError, match=f"{name}: .*: python -c ") as error:
        data.first_row(tmp_path / name)
    command = "python -c " + str(error.value).partition(": python -c ")[2]
    subprocess.run(command.replace("python", sys.executable, 1), shell=True, check=True, cwd=tmp_path, env=os.environ)
    made = tmp_path / f"{name.partition('.')[0]}-rows.jsonl"
    assert data.read_jsonl(made, {"prompt": str}) == rows
