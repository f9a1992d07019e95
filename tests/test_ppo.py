"""ppo.py: its mathematics against slow float64 loops, and what must hold before and after an update."""

import copy
import json
import math

import numpy as np
import pytest
import torch

import common
import ppo
from model import ScalarModel
from tests.conftest import make_gpt, ragged, run

CPU = torch.autocast("cpu", enabled=False)
PROMPTS = [[1], [2, 3, 4, 5], [6, 7], [8, 9, 10], [11], [12, 13]]


def make_batch(policy, ref, value, cfg, prompts=PROMPTS, seed=0):
    batch = ppo.rollout(policy, prompts, cfg, torch.Generator().manual_seed(seed))
    reward = ScalarModel(copy.deepcopy(ref)).eval()
    return batch | ppo.read(batch, policy, ref, value, ppo.scorer(reward, None, 60), cfg)


@pytest.fixture
def nets():
    policy = make_gpt()
    policy.config.dropout = 0.5  # must not matter: stage 3 runs in eval mode
    ref = common.freeze(copy.deepcopy(policy), CPU)
    torch.manual_seed(1)
    return policy, ref, ScalarModel(copy.deepcopy(policy)).eval()


def test_frozen_copy_in_bfloat16_starts_at_kl_zero_too(nets):
    policy, _, value = nets
    autocast = torch.autocast("cpu", torch.bfloat16)
    ref = common.freeze(copy.deepcopy(policy), autocast)
    assert ref.h[0].mlp.c_fc.weight.dtype == torch.bfloat16
    with autocast:
        batch = make_batch(policy, ref, value, ppo.Config(response_len=16))
    assert (batch["logp"] - batch["ref_logp"]).abs().max() == 0


def test_an_unended_response_gets_the_lower_of_its_score_and_the_cap():
    batch = ragged(np.random.default_rng(0))
    batch["score"] = torch.tensor([2.0, 2.0, -3.0, -3.0, 0.0])
    batch["ended"] = torch.tensor([True, False, True, False, False])
    got = ppo.estimate(batch, 0.0, -1.0, ppo.Config())["final_score"]
    assert got.tolist() == [2.0, -1.0, -3.0, -3.0, -1.0]
    assert ppo.estimate(batch, 0.0, math.inf, ppo.Config(score_clip=2.5))["final_score"].tolist() == [
        2,
        2,
        -2.5,
        -2.5,
        0,
    ]


def test_score_gae_and_value_see_the_same_token(nets):
    """With γ = λ = 1 and no KL the return of every token is the score of the whole response."""
    policy, ref, value = nets
    cfg = ppo.Config(response_len=16, lam=1.0)
    batch = make_batch(policy, ref, value, cfg)
    got = ppo.estimate(batch, 0.0, math.inf, cfg)
    expected = (batch["score"][:, None] * batch["mask"]).float()
    torch.testing.assert_close(got["returns"], expected, rtol=0, atol=1e-5)


def options(folders, **more):
    given = {"data": folders["tmp"] / "prompts.jsonl", "init": folders["sft"], "reward": folders["reward"]}
    given |= {"iterations": 3, "batch_size": 8, "minibatch_size": 4, "response_len": 8, "eval_prompts": 8} | more
    return [word for name, value in given.items() for word in (f"--{name}", value)]


def lines_without_times(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("time/") and k != "tokens_per_s"} for line in lines]


def test_same_seed_same_metrics(folders):
    for name in ("a", "b"):
        assert run("ppo.py", *options(folders, out=folders["tmp"] / name)).returncode == 0
    assert lines_without_times(folders["tmp"] / "a") == lines_without_times(folders["tmp"] / "b")


def test_a_python_function_can_be_the_reward_and_its_score_goes_up(folders):
    tmp = folders["tmp"]
    (tmp / "mine.py").write_text("def longer(prompt, response):\n    return len(response.encode()) / 8\n")
    more = dict(reward=f"{tmp}/mine.py:longer", judge=f"{tmp}/mine.py:longer", out=tmp / "r", lr=0.003, kl_coef=0.0)
    done = run("ppo.py", *options(folders, **more | {"iterations": 15, "batch_size": 32, "minibatch_size": 16}))
    assert done.returncode == 0, done.stderr
    lines = lines_without_times(tmp / "r")
    first, last = (np.mean([line["objective/judge"] for line in part]) for part in (lines[:3], lines[-3:]))
    assert last > first and all(line["objective/judge"] == pytest.approx(line["objective/scores"]) for line in lines)


def test_evaluation_alone_writes_nothing(folders):
    tmp = folders["tmp"]
    assert run("ppo.py", *options(folders, out=tmp / "ppo")).returncode == 0
    before = {p.name: p.read_bytes() for p in (tmp / "ppo").iterdir() if p.suffix != ".png"}
    done = run("ppo.py", *options(folders, out=tmp / "ppo", iterations=0))
    assert done.returncode == 0 and "held-out prompts" in done.stdout, done.stderr
    assert before == {p.name: p.read_bytes() for p in (tmp / "ppo").iterdir() if p.suffix != ".png"}


def test_a_judge_called_score_does_not_hide_behind_the_reward_models_score(folders):
    tmp = folders["tmp"]
    for name in ("one", "two"):
        (tmp / f"{name}.py").write_text(f"def score(prompt, response):\n    return {len(name)} + ({name!r} == 'two')\n")
    judge = f"{tmp}/one.py:score,{tmp}/two.py:score"
    done = run(
        "ppo.py", *options(folders, judge=judge, iterations=0, out=folders["sft"].parent / "sft2", init=tmp / "sft")
    )
    assert done.returncode == 2  # nothing there to evaluate
    done = run("ppo.py", *options(folders, judge=judge, iterations=1, out=tmp / "ppo"))
    assert done.returncode == 0, done.stderr
    assert "one.py:score     3.000" in done.stdout and "two.py:score     4.000" in done.stdout
