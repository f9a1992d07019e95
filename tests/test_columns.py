"""A reward or a judge gets the columns of its prompt's row that its parameters name, in every stage."""

import contextlib
import json
import math
import re

import pytest
import torch

import data
import ppo
import reward
from common import cli, judges, measure
from data import InputError
from tests.conftest import ROOT, run, write

SUMS = [{"prompt": f"{a} + {b} =", "answer": str(a + b), "level": a} for a in range(9) for b in range(9)]
CODE = """
import functools, json, operator
def exact(prompt, response, answer):  # of the sum that its prompt asks for, and of no other
    a, b = prompt.removesuffix(" =").split(" + ")
    assert answer == str(int(a) + int(b))
    return float(response.strip().startswith(answer)) + len(response) / 1000
def lists(prompts, responses, answer):
    return [exact(*each) for each in zip(prompts, responses, answer)]
def given(prompt, response, level=0, weight=7):
    return level + weight / 100
def all_of_them(prompt, response, **columns):
    assert not {"prompt", "response"} & columns.keys()
    return columns["level"] + int(columns["answer"]) / 100
def all_lists(prompts, responses, answer, **columns):
    return [int(a) + level / 100 for a, level in zip(answer, columns["level"])]
def plain(p, r):
    return len(p) + len(r)
def wrapped(*texts, **more):
    return plain(*texts, **more)
class Judge:
    def __call__(self, prompt, response, level):
        return level
    def method(self, prompt, response, *, level):
        return 2 * level
instance, method = Judge(), Judge().method
part = functools.partial(given, weight=3)
same = operator.eq  # a function in C
def wrong(prompt, response, solution):
    return 0.0
"""


@pytest.fixture
def mine(folders):
    (folders["tmp"] / "mine.py").write_text(CODE)
    write(folders["tmp"] / "sums.jsonl", SUMS)
    return f"{folders['tmp']}/mine.py"


def options(folders, **more):
    given = {"data": folders["tmp"] / "sums.jsonl", "init": folders["sft"], "device": "cpu"} | more
    return [str(word) for name, value in given.items() for word in (f"--{name}", value)]


@pytest.mark.parametrize("function, worth", [
    ("exact", lambda row: float(row["response"].strip().startswith(row["answer"])) + len(row["response"]) / 1000),
    ("lists", lambda row: float(row["response"].strip().startswith(row["answer"])) + len(row["response"]) / 1000),
    ("given", lambda row: row["level"] + 0.07),
    ("all_of_them", lambda row: row["level"] + int(row["answer"]) / 100),
    ("all_lists", lambda row: int(row["answer"]) + row["level"] / 100),
    ("plain", lambda row: len(row["prompt"]) + len(row["response"])),
    ("wrapped", lambda row: len(row["prompt"]) + len(row["response"])),
    ("instance", lambda row: row["level"]),
    ("method", lambda row: 2 * row["level"]),
    ("part", lambda row: row["level"] + 0.03),
    ("same", lambda row: 0),
])  # fmt: skip
def test_a_function_gets_the_columns_that_its_parameters_name(mine, function, worth):
    rows = [row | {"response": f" {i}"} for i, row in enumerate(SUMS)]
    assert judges.load_function(f"{mine}:{function}")(rows) == pytest.approx([worth(row) for row in rows])


def test_a_column_that_is_null_in_some_rows_takes_the_default_and_in_lists_none(tmp_path):
    (tmp_path / "m.py").write_text(
        "def one(prompt, response, hint='x'):\n    return len(hint)\n"
        "def lists(prompts, responses, hint=()):\n    return [len(h or '') for h in hint] or [9.0] * len(prompts)\n"
    )
    rows = [{"prompt": "", "response": "", "hint": "abc"}, {"prompt": "", "response": ""}]
    one, lists = (judges.load_function(f"{tmp_path}/m.py:{name}") for name in ("one", "lists"))
    assert one(rows) == [3, 1] and lists(rows) == [3, 0] and lists(rows[1:]) == [9]


def test_a_missing_column_ends_a_run_before_it_begins_with_one_sentence(mine, folders):
    tmp = folders["tmp"]
    words = 'mine.py:wrong: its parameter "solution" is no column of a row, which has prompt, answer, level; rename'
    less = {"response_len": 4, "out": tmp / "out"}
    some = less | {"iterations": 1, "batch_size": 8}
    for more in ({"reward": f"{mine}:wrong"}, {"reward": f"{mine}:exact", "judge": f"{mine}:exact,{mine}:wrong"}):
        with pytest.raises(InputError, match=words):
            ppo.train(cli.parse(ppo.Config, options(folders, **some, **more)))
    with pytest.raises(InputError, match=words):
        reward.train(cli.parse(reward.Config, options(folders, judge=f"{mine}:wrong", **less)))
    assert not (tmp / "out").exists()
    with pytest.raises(InputError, match="sums.jsonl:f: no such Python file; a function is named path"):
        judges.load_function(f"{tmp}/sums.jsonl:f")


def test_ppo_and_evaluate_reward_and_judge_by_columns_which_no_file_of_the_run_takes_in(mine, folders):
    tmp = folders["tmp"]
    given = {"reward": f"{mine}:exact", "judge": f"{mine}:lists,{mine}:all_of_them", "out": tmp / "ppo"}
    given |= {
        "iterations": 1,
        "batch_size": 8,
        "minibatch_size": 4,
        "response_len": 4,
        "micro_batch_size": 3,
        "eval_prompts": 16,
    }
    with contextlib.redirect_stdout(None):
        ppo.train(cli.parse(ppo.Config, options(folders, **given)))
    answers = json.loads((tmp / "ppo" / "rollout.json").read_text())["answers"]
    report = json.loads((tmp / "ppo" / "report.json").read_text())
    assert len(answers) == 8 and "level" not in answers[0] and "answer" not in answers[0]
    known = {row["prompt"]: row for row in SUMS}
    for answer in report["answers"]:
        row = known[answer["prompt"]]
        assert answer.keys() == {"prompt", "before", "after"}
        for side in ("before", "after"):
            right = float(answer[side]["text"].strip().startswith(row["answer"]))
            assert answer[side]["score"] == pytest.approx(right + len(answer[side]["text"]) / 1000, abs=1e-6)
            assert answer[side][f"{mine}:all_of_them"] == row["level"] + int(row["answer"]) / 100
    done = run("tools/evaluate.py", tmp / "ppo", "--best_of", "1,2")
    assert done.returncode == 0, done.stderr
    rows = [known[answer["prompt"]] for answer in report["answers"]]
    mean = sum(row["level"] + int(row["answer"]) / 100 for row in rows) / len(rows)
    assert re.search(r"mine.py:all_of_them +(\S+)", done.stdout)[1] == f"{mean:.3f}"


def test_the_judge_of_reward_py_compares_by_columns(mine, folders):
    tmp = folders["tmp"]
    (tmp / "mine.py").write_text(CODE + "def levels(prompt, response, level):\n    return level * len(response)\n")
    given = options(folders, judge=f"{mine}:levels", out=tmp / "rm", samples=2, response_len=6, label_temperature=1)
    with contextlib.redirect_stdout(None):
        reward.train(cli.parse(reward.Config, given))
    known = {row["prompt"]: row["level"] for row in SUMS}
    for row in data.read_jsonl(tmp / "rm" / "comparisons.jsonl", {"prompt": str}):
        margin = known[row["prompt"]] * (len(row["chosen"]) - len(row["rejected"]))
        assert row["p_chosen"] == pytest.approx(1 / (1 + math.exp(-margin)), abs=1e-4) and "level" not in row


def test_a_batch_without_columns_is_scored_as_before(gpt, encoding):
    prompts = [encoding.encode_ordinary("ask me")] * 4
    batch = ppo.rollout(gpt, prompts, ppo.Config(response_len=4), torch.Generator().manual_seed(0))
    rows = measure.as_rows(batch, encoding, encoding.eot_token)
    assert [sorted(row) for row in rows] == [["prompt", "response"]] * 4
    batch["columns"] = [{"level": i, "response": "of the file"} for i in range(4)]
    assert measure.as_rows(batch, encoding, encoding.eot_token) == [{"level": i} | row for i, row in enumerate(rows)]
    part = ppo.select(batch, torch.tensor([2, 0]))
    assert "columns" not in part and torch.equal(part["length"], batch["length"][[2, 0]])


def test_the_example_of_the_readme_is_a_reward_by_column(tmp_path):
    text = (ROOT / "data" / "README.md").read_text()
    (tmp_path / "arithmetic.py").write_text(text.split("# arithmetic.py")[1].partition("\n")[2].split("```")[0])
    exact = judges.load_function(f"{tmp_path}/arithmetic.py:exact")
    rows = [{"prompt": "1 + 2 =", "answer": "3", "response": text} for text in (" 3", " 13", "3.", " I think 3", " 4")]
    assert exact(rows) == [1, 0, 1, 1, 0]


def test_parameters_in_the_wrong_order_are_refused_and_lists_go_by_the_first_name(tmp_path):
    (tmp_path / "my.py").write_text(
        "def swapped(response, prompt):\n    return 0.0\n"
        "def lists(prompts, completions, **columns):\n    return [len(p + c) for p, c in zip(prompts, completions)]\n"
    )
    with pytest.raises(InputError, match="its first parameters are response, prompt; write it with .prompt, response"):
        judges.load_function(f"{tmp_path}/my.py:swapped")
    rows = [{"prompt": "ab", "response": "c", "answer": "d"}, {"prompt": "a", "response": "", "answer": "d"}]
    assert judges.load_function(f"{tmp_path}/my.py:lists")(rows) == [3.0, 1.0]


@pytest.mark.parametrize("function, words", [
    ("completions, **kwargs", "its first parameters are completions, kwargs"),
    ("solution_str, answer", "its first parameters are solution_str, answer; write it with"),
    ("prompt, answer", 'its parameter "answer" is the prompt or the response, and a column is called so too'),
    ("level, solution_str, answer", 'its parameter "level" is the prompt'),
])  # fmt: skip
def test_a_column_never_stands_where_the_prompt_or_the_response_does(tmp_path, function, words):
    (tmp_path / "m.py").write_text(f"def f({function}):\n    return 1.0\n")
    with pytest.raises(InputError, match=words):
        judges.load_function(f"{tmp_path}/m.py:f")([row | {"response": ""} for row in SUMS])


def test_a_file_that_turns_gradients_off_turns_them_off_for_itself_alone(tmp_path):
    (tmp_path / "m.py").write_text("import torch\ntorch.set_grad_enabled(False)\ndef f(p, r): return 1.0\n")
    judges.load_function(f"{tmp_path}/m.py:f")
    assert torch.is_grad_enabled()
