"""tools/stress.py: how far a second reward model agrees with the favourites of the first, against numpy and by hand."""

import json
import re

import numpy as np
import pytest
import torch

import data
from common import nets, runs
from tests.conftest import run, write
from tools.evaluate import expected_at_best
from tools.stress import report, turn

SENTENCES = r"(trust this model to about|no turn up to) \d\.\d nats: `--kl_target` at most that"
SENTENCES += r"|do not trust this model: the second sees no rise"


def drawn(true, error=0.0, length=None, prompts=40, n=64):
    """What report reads: the second sees `true` (P, n), the first that and an error."""
    found = {"first": true + error, "second": true, "length": true if length is None else length}
    return {name: torch.tensor(x, dtype=torch.float64) for name, x in found.items()}


def test_a_curve_turns_at_the_first_n_that_no_larger_n_beats_by_more_than_its_error():
    noise = np.random.default_rng(0).normal(0, 0.1, (100, 1))  # of a prompt, so that a change has no error
    wiggle = np.random.default_rng(1).normal(0, 0.01, (100, 5))
    for means, place in (([0, 1, 2, 3, 4], 4), ([0, 1, 2, 1, 0], 2), ([4, 3, 2, 1, 0], 0), ([0, 2, 2, 2, 2], 1)):
        assert turn(torch.tensor(np.array(means) + noise + wiggle)) == place
    assert turn(torch.tensor([0, 2, 1, 2.001, 1] + noise + wiggle)) == 1  # later, but by less than the error


def test_where_the_error_has_the_longer_tail_the_best_answers_stop_getting_better():
    rng = np.random.default_rng(0)
    true = rng.normal(size=(40, 64))
    assert report(drawn(true)).splitlines()[-1] == "no turn up to 3.2 nats: `--kl_target` at most that"
    worse = np.where(rng.random((40, 64)) < 0.05, 9.0, 0.0)  # one answer in twenty fools the first
    text = report(drawn(np.where(worse > 0, -3.0, true), worse + worse / 3 + rng.normal(0, 0.01, (40, 64))))
    assert re.search(r"^trust this model to about (0\.2|0\.6) nats|^do not trust", text.splitlines()[-1])


def test_spread_length_and_preference_are_numpys():
    rng = np.random.default_rng(0)
    true, length = rng.normal(size=(40, 16)) + rng.normal(0, 3, (40, 1)), rng.integers(1, 9, (40, 16)).astype(float)
    found = drawn(true, 0.5 * length, length)
    text, first = report(found), found["first"].numpy()
    inside, longer = (x - x.mean(1, keepdims=True) for x in (first, length))
    assert f"within prompts {np.sqrt((inside**2).mean()):.3f}, in all {first.std(ddof=1):.3f}" in text
    assert f"length explains {np.corrcoef(inside.ravel(), longer.ravel())[0, 1] ** 2:.1%}" in text
    better = [[np.mean([x > y for y in row if y != x]) for x in row] for row in true]  # no two are equal
    share = expected_at_best(found["first"], torch.tensor(better), 16).mean().item()
    last = text.splitlines()[-3].split()
    assert last[0] == "16" and float(last[8]) == pytest.approx(share, abs=6e-4)
    assert float(text.splitlines()[-7].split()[8]) == pytest.approx(0.5)  # one answer is none preferred


@pytest.mark.slow
def test_a_run_is_stressed_by_a_second_model_of_half_its_prompts_and_ends_in_its_sentence(folders, monkeypatch):
    tmp = folders["tmp"]
    monkeypatch.chdir(tmp)
    (tmp / "j.py").write_text("def j(prompt, response):\n    return float('yes' in response)\n")
    options = ["--init", "sft", "--response_len", 8, "--out", "rm", "--seed", 3]
    assert run("reward.py", "--data", "comparisons.jsonl", *options, cwd=tmp).returncode == 0
    few = run("tools/stress.py", "rm", cwd=tmp)
    assert few.returncode == 2 and "8 held-out prompts are too few; name a file with more as --prompts" in few.stderr
    more = ["--prompts", "prompts.jsonl", "--n_prompts", 12, "--n", 16, "--judge", "j.py:j"]
    done = run("tools/stress.py", "rm", *more, cwd=tmp)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(SENTENCES, done.stdout.splitlines()[-1]) and "the judge " in done.stdout
    half, whole = (data.read_jsonl(tmp / name, {}) for name in ("rm-second.jsonl", "comparisons.jsonl"))
    assert len(half) == 63 and all(row in whole for row in half)
    its = json.loads((tmp / "rm-second" / "config.json").read_text())["options"]
    assert its["seed"] == 4 and its["init"] == "sft" and its["response_len"] == 8
    assert len(runs.read_metrics(tmp / "rm-second")) < len(runs.read_metrics(tmp / "rm"))
    trained = nets.load_scalar("rm-second")[0].head.weight
    again = run("tools/stress.py", "rm", *more, cwd=tmp)  # the second is taken as it is
    assert again.stdout.splitlines()[-1] == done.stdout.splitlines()[-1] and "loss" not in again.stdout
    assert torch.equal(trained, nets.load_scalar("rm-second")[0].head.weight)
    by_itself = run("tools/stress.py", "rm", "--second", "rm", *more, cwd=tmp)
    rows = [line.split() for line in by_itself.stdout.splitlines() if re.match(r" +\d+ +\d\.\d\d ", line)]
    assert len(rows) == 5 and all(row[2] == row[5] for row in rows)  # the first and the second are one


def test_comparisons_that_are_gone_and_a_folder_of_no_run_are_refused_in_a_sentence(folders, monkeypatch):
    tmp = folders["tmp"]
    monkeypatch.chdir(tmp)
    done = run("tools/stress.py", "reward", cwd=tmp)
    assert done.returncode == 2 and "reward: holds no config.json of a run" in done.stderr
    options = {"data": "gone.jsonl", "init": "sft", "response_len": 8}
    (tmp / "reward" / "config.json").write_text(json.dumps({"options": options}))
    done = run("tools/stress.py", "reward", cwd=tmp)
    assert done.returncode == 2 and "gone.jsonl: the comparisons of reward are gone; bring them back" in done.stderr
    write(tmp / "gone.jsonl", [{"prompt": "ask me", "chosen": " yes.", "rejected": " no."}])
    assert "too few to hold some out" in run("tools/stress.py", "reward", cwd=tmp).stderr
