"""ppo.py: its mathematics against slow float64 loops, and what must hold before and after an update."""

import copy
import json
import math

import numpy as np
import pytest
import torch

import common
import data
import ppo
import reward
from model import ScalarModel
from tests.conftest import flat, make_gpt, ragged, run

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
    given |= {
        "iterations": 3,
        "batch_size": 8,
        "minibatch_size": 4,
        "response_len": 8,
        "epochs": 2,
        "eval_prompts": 8,
    } | more
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


def train(folders, **more):
    ppo.train(common.parse(ppo.Config, [str(word) for word in options(folders, **more)]))
    return common.read_metrics(more["out"])


def test_without_a_value_net_the_policy_takes_the_same_step(nets):
    policy, ref, value = nets
    cfg = ppo.Config(response_len=16, minibatch_size=3)
    batch = make_batch(policy, ref, value, cfg)
    batch |= ppo.estimate(batch, 0.1, -1.0, cfg)
    steps = []
    for net in (value, None):
        moved, judge = copy.deepcopy(policy), copy.deepcopy(net)
        optimizers = [
            torch.optim.SGD(moved.parameters(), lr=1.0),
            judge and torch.optim.SGD(judge.parameters(), lr=1.0),
        ]
        metrics = ppo.update(moved, judge, *optimizers, batch, 0.1, cfg, CPU, seed=0)
        steps.append(flat(moved))
    assert torch.equal(*steps) and not torch.equal(steps[0], flat(policy)) and metrics["loss/value_avg"] == 0


def test_each_net_learns_at_a_rate_of_its_own(nets):
    policy, ref, value = nets
    cfg = ppo.Config(response_len=16, minibatch_size=6, epochs=1, max_grad_norm=1e-3)
    batch = make_batch(policy, ref, value, cfg)
    batch |= ppo.estimate(batch, 0.1, -1.0, cfg)
    before = flat(policy), flat(value)
    optimizers = [torch.optim.SGD(net.parameters(), lr=1.0) for net in (policy, value)]
    ppo.update(policy, value, *optimizers, batch, 2.0, cfg, CPU, seed=0, value_lr=5.0)
    assert (flat(policy) - before[0]).norm().item() == pytest.approx(2e-3, rel=2e-2)
    assert (flat(value) - before[1]).norm().item() == pytest.approx(5e-3, rel=2e-2)


def test_the_share_of_clipped_tokens_is_that_of_trl_where_the_clipped_branch_is_the_larger_loss(nets):
    policy, ref, value = nets
    cfg = ppo.Config(response_len=16, minibatch_size=6, epochs=1, cliprange_value=0.01)
    batch = make_batch(policy, ref, value, cfg)
    batch |= ppo.estimate(batch, 0.1, -1.0, cfg)
    mask = batch["mask"]
    noise = torch.randn(mask.shape, generator=torch.Generator().manual_seed(0))
    moved = batch | {"logp": (batch["logp"] + 0.3 * noise) * mask, "values": (batch["values"] + 0.1 * noise) * mask}
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.0) for net in (policy, value)]
    metrics = ppo.update(policy, value, *optimizers, moved, 0.0, cfg, CPU, seed=0)
    ratio = (batch["logp"] - moved["logp"]).exp()
    clipped = -moved["advantages"] * ratio.clamp(0.8, 1.2) > -moved["advantages"] * ratio
    assert metrics["policy/clipfrac_avg"] == pytest.approx(clipped[mask].float().mean().item(), abs=1e-3)
    assert metrics["policy/clipfrac_avg"] < ((ratio - 1).abs() > 0.2)[mask].float().mean().item()
    old, new, returns = moved["values"], batch["values"], batch["returns"]
    near = old + (new - old).clamp(-0.01, 0.01)
    worse = (near - returns).square() > (new - returns).square()
    assert metrics["val/clipfrac_avg"] == pytest.approx(worse[mask].float().mean().item(), abs=1e-3)


def test_ppo_goes_on_from_a_ppo_run_against_the_first_start(folders):
    tmp = folders["tmp"]
    train(folders, out=tmp / "one", lr=0.01, value_warmup=0)
    (line,) = train(folders, init=tmp / "one", ref=folders["sft"], out=tmp / "two", iterations=1, lr=0.0)
    assert line["objective/kl"] > 0.01  # of the policy that --init names
    (line,) = train(folders, init=tmp / "one", out=tmp / "three", iterations=1, lr=0.0)
    assert line["objective/kl"] == 0


def test_a_run_is_prolonged_at_the_rates_of_the_longer_run(folders):
    tmp = folders["tmp"]
    train(folders, out=tmp / "ppo", iterations=4, value_warmup=1, lr_warmup=1)
    cfg = common.parse(ppo.Config, [str(w) for w in options(folders, out=tmp / "ppo", iterations=8, value_warmup=1)])
    cfg.lr_warmup, cfg.resume = 1, True
    ppo.train(cfg)
    lines = common.read_metrics(tmp / "ppo")
    assert [line["lr"] / cfg.lr for line in lines] == pytest.approx(
        [0, 3 / 4, 2 / 4, 1 / 4, 4 / 8, 3 / 8, 2 / 8, 1 / 8]
    )
    cfg.iterations = 6
    with pytest.raises(common.InputError, match="was made with --iterations 8; give as many, or more"):
        ppo.train(cfg)


def test_the_best_policy_on_held_out_prompts_is_kept(folders):
    tmp = folders["tmp"]
    (tmp / "mine.py").write_text("def shorter(prompt, response):\n    return -len(response.encode())\n")
    more = dict(judge=f"{tmp}/mine.py:shorter", reward=f"{tmp}/mine.py:shorter", eval_every=1, lr=0.01, iterations=6)
    lines = train(folders, out=tmp / "ppo", **more)
    found = [line["eval/judge"] for line in lines]
    assert len(found) == 6 and len(set(found)) > 1
    best, encoding = common.load_gpt(tmp / "ppo" / "best.pt")
    _, held_out = data.prompts_and_held_out(tmp / "prompts.jsonl", "", encoding, 40, False, 8)
    score = ppo.scorer(lambda prompt, response: -len(response.encode()), encoding, best.config.eos)
    cfg = ppo.Config(response_len=8, minibatch_size=4)
    batch = ppo.rollout(best, held_out, cfg, common.generator("evaluate", 0, 0))
    batch |= ppo.read(batch, best, best, None, score, cfg)
    assert batch["score"].mean().item() == pytest.approx(max(found))


def test_beta_does_not_adapt_while_the_policy_stands_still(folders):
    more = {"iterations": 4, "value_warmup": 2, "kl_target": 0.5, "horizon": 100, "lr": 0.01}
    betas = [line["kl_coef"] for line in train(folders, out=folders["tmp"] / "ppo", **more)]
    assert betas[0] == betas[1] == betas[2] == 0.05 and betas[3] < 0.05


def test_held_out_prompts_that_trained_the_reward_model_are_counted(folders, capsys):
    tmp = folders["tmp"]
    more = ["--data", tmp / "comparisons.jsonl", "--init", folders["sft"], "--response_len", 8, "--out", tmp / "rm"]
    reward.train(common.parse(reward.Config, [str(word) for word in more]))
    train(folders, reward=tmp / "rm", out=tmp / "ppo", eval_data=tmp / "prompts.jsonl", eval_prompts=125, iterations=1)
    assert "125 held out (113 of them trained the reward model)" in capsys.readouterr().out  # it held out a tenth, 12


def test_a_resumed_run_keeps_no_second_copy_of_what_was_saved(folders, monkeypatch):
    train(folders, out=folders["tmp"] / "ppo", iterations=2)
    cfg = common.parse(ppo.Config, [str(w) for w in options(folders, out=folders["tmp"] / "ppo", iterations=3)])
    cfg.resume, kept = True, []
    begin = common.Run.begin_step
    monkeypatch.setattr(common.Run, "begin_step", lambda self: (kept.append(self.state), begin(self))[1])
    ppo.train(cfg)
    assert len(kept) == 1 and not any(isinstance(x, dict) and "state" in x for x in kept[0].values())
    assert "model" not in kept[0] and "value" not in kept[0]
