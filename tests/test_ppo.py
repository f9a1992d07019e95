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
from tests.conftest import make_gpt, run, write

CPU = torch.autocast("cpu", enabled=False)
PROMPTS = [[1], [2, 3, 4, 5], [6, 7], [8, 9, 10], [11], [12, 13]]


def make_batch(policy, ref, value, cfg, prompts=PROMPTS, seed=0):
    batch = ppo.rollout(policy, prompts, cfg, torch.Generator().manual_seed(seed))
    reward = ScalarModel(copy.deepcopy(ref)).eval()
    return batch | ppo.read(batch, policy, ref, value, ppo.scorer(reward, None), cfg)


@pytest.fixture
def nets():
    policy = make_gpt()
    policy.config.dropout = 0.5  # must not matter: stage 3 runs in eval mode
    ref = common.freeze(copy.deepcopy(policy), CPU)
    torch.manual_seed(1)
    return policy, ref, ScalarModel(copy.deepcopy(policy)).eval()


def random_batch(rng, rows=5, columns=7):
    lengths = rng.integers(1, columns + 1, rows)
    lengths[0] = columns
    mask = torch.tensor(np.arange(columns) < lengths[:, None])
    draw = lambda: torch.tensor(rng.normal(size=(rows, columns))) * mask  # noqa: E731
    return {
        "mask": mask, "logp": draw(), "ref_logp": draw(), "values": draw(),
        "score": torch.tensor(rng.normal(size=rows)), "ended": torch.tensor(rng.random(rows) < 0.5),
    }  # fmt: skip


def estimate_by_hand(batch, beta, cap, gamma, lam):
    """Rewards, advantages (not whitened) and returns, one token at a time from the end, in float64."""
    shape = batch["mask"].shape
    rewards, advantages, returns = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    for b in range(shape[0]):
        n = int(batch["mask"][b].sum())
        score = float(batch["score"][b])
        if not batch["ended"][b]:
            score = min(score, cap)
        for t in range(n):
            rewards[b, t] = -beta * float(batch["logp"][b, t] - batch["ref_logp"][b, t]) + (score if t == n - 1 else 0)
        for t in range(n):  # GAE as its defining sum
            for k in range(t, n):
                after = float(batch["values"][b, k + 1]) if k + 1 < n else 0.0
                delta = rewards[b, k] + gamma * after - float(batch["values"][b, k])
                advantages[b, t] += (gamma * lam) ** (k - t) * delta
            returns[b, t] = advantages[b, t] + float(batch["values"][b, t])
    return rewards, advantages, returns


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (1.0, 0.0)])
def test_rewards_gae_returns_and_whitening_equal_the_defining_sums(gamma, lam):
    for seed in range(5):
        batch = random_batch(np.random.default_rng(seed))
        got = ppo.estimate(batch, 0.3, -1.0, ppo.Config(gamma=gamma, lam=lam))
        rewards, advantages, returns = estimate_by_hand(batch, 0.3, -1.0, gamma, lam)
        mask = batch["mask"].numpy()
        real = advantages[mask]
        white = np.where(mask, (advantages - real.mean()) / np.sqrt(real.var() + 1e-8), 0)
        for name, expected in (("rewards", rewards), ("returns", returns), ("advantages", white)):
            np.testing.assert_allclose(got[name].numpy(), expected, atol=1e-9, err_msg=name)


def test_an_unended_response_gets_the_lower_of_its_score_and_the_cap():
    batch = random_batch(np.random.default_rng(0))
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


def test_clipped_losses_equal_their_equations_token_by_token():
    rng = np.random.default_rng(0)
    logp, old, adv, values, old_values, returns = (torch.tensor(rng.normal(size=(6, 9))) for _ in range(6))
    policy, _ = ppo.policy_loss(logp, old, adv, 0.2)
    value = ppo.value_loss(values, old_values, returns, 0.2)
    for at in np.ndindex(6, 9):
        rho = math.exp(logp[at] - old[at])
        a = float(adv[at])
        assert abs(float(policy[at]) - -min(rho * a, min(max(rho, 0.8), 1.2) * a)) < 1e-12
        v, o, r = float(values[at]), float(old_values[at]), float(returns[at])
        near = o + min(max(v - o, -0.2), 0.2)
        assert abs(float(value[at]) - 0.5 * max((v - r) ** 2, (near - r) ** 2)) < 1e-12


def test_a_value_clipped_on_the_wrong_side_still_gets_a_gradient():
    values = torch.tensor([1.0], requires_grad=True)  # moved away from its return, by more than the clip range
    ppo.value_loss(values, torch.tensor([0.0]), torch.tensor([-1.0]), 0.2).sum().backward()
    assert values.grad.item() == 2.0


def test_adaptive_beta_follows_ziegler_et_al():
    cfg = ppo.Config(kl_target=6.0, horizon=10_000)
    for kl in (0.0, 5.5, 6.0, 6.6, 60.0):
        error = np.clip(kl / 6.0 - 1, -0.2, 0.2)
        assert abs(ppo.adapt(0.1, kl, 256, cfg) - 0.1 * (1 + error * 256 / 10_000)) < 1e-12
    assert ppo.adapt(0.1, 60.0, 256, ppo.Config()) == 0.1


def test_ratio_is_one_and_kl_is_zero_before_the_first_update(nets):
    policy, ref, value = nets
    cfg = ppo.Config(response_len=16, minibatch_size=3, epochs=1, temperature=0.8)
    batch = make_batch(policy, ref, value, cfg)
    assert (batch["logp"] - batch["ref_logp"]).abs().max() == 0
    whole = policy.logprobs(batch["tokens"], batch["prompt_len"], batch["length"], 0.8)
    _, ratio = ppo.policy_loss(whole, batch["logp"], batch["values"], 0.2)
    assert (ratio - 1)[batch["mask"]].abs().max() < 1e-5


def test_frozen_copy_in_bfloat16_starts_at_kl_zero_too(nets):
    policy, _, value = nets
    autocast = torch.autocast("cpu", torch.bfloat16)
    ref = common.freeze(copy.deepcopy(policy), autocast)
    assert ref.h[0].mlp.c_fc.weight.dtype == torch.bfloat16
    with autocast:
        batch = make_batch(policy, ref, value, ppo.Config(response_len=16))
    assert (batch["logp"] - batch["ref_logp"]).abs().max() == 0


def test_the_logged_logprobs_are_those_of_the_distribution_that_was_sampled(nets):
    policy, ref, value = nets
    cfg = ppo.Config(response_len=1, temperature=0.5)
    batch = make_batch(policy, ref, value, cfg, prompts=[[1, 2, 3]] * 20_000)
    counts = batch["tokens"][:, 3].bincount(minlength=61)
    top = counts.argmax()
    expected = batch["logp"][batch["tokens"][:, 3] == top][0].exp().item()
    assert abs(counts[top].item() / 20_000 - expected) < 5 * math.sqrt(expected * (1 - expected) / 20_000)


def test_policy_gradient_at_ratio_one_is_reinforce(nets):
    policy, ref, value = nets
    cfg = ppo.Config(response_len=16)
    batch = make_batch(policy, ref, value, cfg)
    batch |= ppo.estimate(batch, 0.1, -1.0, cfg)
    where = batch["tokens"], batch["prompt_len"], batch["length"]
    n = batch["mask"].sum()
    logp = policy.logprobs(*where)
    parameters = list(policy.parameters())
    losses, _ = ppo.policy_loss(logp, batch["logp"], batch["advantages"], 0.2)
    mine = torch.autograd.grad((losses * batch["mask"]).sum() / n, parameters, retain_graph=True)
    reinforce = torch.autograd.grad(-(logp * batch["advantages"]).sum() / n, parameters)
    for a, b in zip(mine, reinforce):
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-8


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_an_update_does_not_change_with_the_micro_batch_size(nets, micro_batch_size):
    policy, ref, value = nets
    cfg = ppo.Config(response_len=16, minibatch_size=3, epochs=2)
    batch = make_batch(policy, ref, value, cfg)
    batch |= ppo.estimate(batch, 0.1, -1.0, cfg)
    results = []
    for size in (0, micro_batch_size):
        nets = copy.deepcopy(policy), copy.deepcopy(value)
        optimizers = [torch.optim.SGD(net.parameters(), lr=0.1) for net in nets]
        cfg.micro_batch_size = size
        ppo.update(*nets, *optimizers, batch, 0.1, cfg, CPU, seed=0)
        results.append([p for net in nets for p in net.parameters()])
    for a, b in zip(*results):
        assert (a - b).abs().max() < 1e-6


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


def test_frozen_copy_and_reward_model_end_bit_identical_to_how_they_began(folders, monkeypatch):
    kept = []
    freeze = common.freeze
    monkeypatch.setattr(common, "freeze", lambda m, a: kept.append((freeze(m, a), copy.deepcopy(m.state_dict()))) or m)
    ppo.train(common.parse(ppo.Config, [str(w) for w in options(folders, out=folders["tmp"] / "ppo", lr=0.01)]))
    assert len(kept) == 2
    for net, before in kept:
        assert all(torch.equal(before[name], x) for name, x in net.state_dict().items())
    started, _ = common.load_gpt(folders["sft"])
    ended, _ = common.load_gpt(folders["tmp"] / "ppo")
    assert any(not torch.equal(a, b) for a, b in zip(started.parameters(), ended.parameters()))


def lines_without_times(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("time/") and k != "tokens_per_s"} for line in lines]


def test_same_seed_same_metrics_and_a_resumed_run_is_the_same_run(folders, monkeypatch):
    tmp = folders["tmp"]
    for name in ("a", "b"):
        assert run("ppo.py", *options(folders, out=tmp / name)).returncode == 0
    assert lines_without_times(tmp / "a") == lines_without_times(tmp / "b")

    save = common.Run.save

    def save_then_die(self, *args, **parts):
        save(self, *args, **parts)
        raise KeyboardInterrupt

    monkeypatch.setattr(common.Run, "save", save_then_die)
    cfg = common.parse(ppo.Config, [str(w) for w in options(folders, out=tmp / "c", save_every=2)])
    with pytest.raises(KeyboardInterrupt):
        ppo.train(cfg)
    assert len(lines_without_times(tmp / "c")) == 2
    with open(tmp / "c" / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "objective/kl": 99}\n{"step": 3, "obj')  # a third step that was never saved
    done = run("ppo.py", *options(folders, out=tmp / "c", save_every=2), "--resume")
    assert done.returncode == 0, done.stderr
    assert lines_without_times(tmp / "c") == lines_without_times(tmp / "a")


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


def test_prompts_that_do_not_fit_are_counted_and_never_cut(folders):
    long = write(folders["tmp"] / "long.jsonl", [{"prompt": "ask me. " * n} for n in (1, 2, 50, 60)])
    done = run("ppo.py", *options(folders, data=long, out=folders["tmp"] / "x"))
    assert done.returncode == 2 and "2 of 4 prompts" in done.stderr and "--drop_long" in done.stderr
