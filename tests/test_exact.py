"""The exact world of letters and what is computed in it, against lists of every case, autograd and draws."""

import ast
import copy
import itertools
import json
import math
import sys

import numpy as np
import pytest
import torch

import ppo
from common.measure import win_rate_ceiling
from experiments import ceiling, critic, estimators, exact, exact_trl, gae, letters
from experiments.forks import HERE, patched
from experiments.recipe import changed
from tests.conftest import ROOT

SOURCE = (ROOT / "ppo.py").read_text()
PLACES = np.where(letters.TAKEN, letters.STEPS, 936)  # the last is no step


def policy(seed: int) -> np.ndarray:
    """log π (156, 6) of a random policy."""
    x = np.random.default_rng(seed).normal(size=(156, 6))
    return x - np.log(np.exp(x).sum(1, keepdims=True))


def jacobian(steps: np.ndarray) -> np.ndarray:
    """∂ log π / ∂ logits (936, 936) of a policy whose parameters are the logits of each state."""
    found = np.zeros((156, 6, 156, 6))
    for i in range(156):
        found[i, :, i] = np.eye(6) - np.exp(steps[i])
    return found.reshape(936, 936)


# --- the ceiling ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kl, highest", [(0.0, 0.5), (-0.1, 0.5), (0.1931, 0.676), (2.0, 0.950), (1e4, 1.0)])
def test_the_ceiling_on_a_win_rate(kl, highest):
    assert win_rate_ceiling(kl) == pytest.approx(highest, abs=5e-4)


@pytest.mark.parametrize("price", [3.0, 0.5, 0.1])
def test_the_best_law_of_ranks_that_steps_uphill_find_stands_at_the_ceiling(price):
    """max E[u] − price · KL over all laws on 4,000 ranks, by mirror ascent from a random law."""
    u, n = (np.arange(4000) + 0.5) / 4000, 4000
    p = np.random.default_rng(0).dirichlet(np.ones(n))
    for _ in range(400):
        logp = np.log(p) + 0.3 / price * (u - price * (np.log(p * n) + 1))
        p = np.exp(logp - logp.max())
        p /= p.sum()
    assert p @ u == pytest.approx(win_rate_ceiling(p @ np.log(p * n)), abs=1e-4)


def test_the_ceiling_rises_and_is_concave_and_no_law_of_ranks_is_above_it():
    wins = np.array([win_rate_ceiling(kl) for kl in np.linspace(0, 5, 101)])
    assert (np.diff(wins) > 0).all() and (np.diff(wins, 2) < 0).all()
    rng, u = np.random.default_rng(0), (np.arange(50) + 0.5) / 50
    for sharpness in (0.1, 1, 10):
        laws = np.sort(rng.dirichlet(np.full(50, sharpness), size=200)) + 1e-12
        assert all(p @ u <= win_rate_ceiling(p @ np.log(p * 50)) + 1e-9 for p in laws)


def test_best_of_n_lies_less_than_a_hundredth_below_the_ceiling():
    for n in (1, 2, 4, 16, 256, 4096):
        below = win_rate_ceiling(math.log(n) - (n - 1) / n) - n / (n + 1)
        assert -1e-9 < below < 0.01 and (n > 1 or below < 1e-5)


@pytest.mark.parametrize("beta", [3.0, 1.0, 0.3, 0.05])
def test_in_the_world_of_letters_no_policy_wins_more_than_its_kl_allows(beta):
    """π*, and the best of n drawn answers of the start, by the exact score, ties half."""
    start = letters.along(policy(0)).sum(1)
    best, _ = letters.optimum(start, beta)
    assert 0.5 < letters.win_rate(best, start) <= win_rate_ceiling(letters.kl(best, start))
    drawn = letters.PAID[np.random.default_rng(0).choice(781, size=(4000, 5), p=np.exp(start) / np.exp(start).sum())]
    four, one = drawn[:, :4].max(1), drawn[:, 4]
    wins = ((four > one) + 0.5 * (four == one)).mean()
    assert abs(wins - 0.8) < 0.03 and wins - 3 * (0.16 / 4000) ** 0.5 < win_rate_ceiling(math.log(4) - 0.75)


def test_the_figure_has_the_win_rates_of_a_report():
    sides = [(0.0, 1.0), (1.0, 1.0), (1.0, 0.0), (0.2, 0.3)]
    report = {"answers": [{"before": {"score": a}, "after": {"score": b}} for a, b in sides]}
    assert ceiling.wins(report, "score")[0] == 2.5 / 4
    names = ("ppo", "beta-0.3-64", "poor-0", "grpo-kl-in-the-loss-0.2", "sft")
    assert [ceiling.kind(name) for name in names] == [
        "PPO, each β", "PPO, each β", "PPO, reward model of 20 prompts", "forks", None,
    ]  # fmt: skip


# --- values and objective ---------------------------------------------------------------------------------------------


def test_what_a_policy_lacks_of_the_best_is_beta_times_its_kl_to_the_optimum():
    """By plain sums over the responses of two random policies."""
    logp, start = (letters.along(policy(seed)).sum(1) for seed in (1, 0))
    found, z = letters.landing(logp, start, 0.6), sum(math.exp(a + s / 0.6) for a, s in zip(start, letters.PAID))
    j = sum(math.exp(a) * (s - 0.6 * (a - b)) for a, b, s in zip(logp, start, letters.PAID))
    to_best = sum(math.exp(a) * (a - (b + s / 0.6 - math.log(z))) for a, b, s in zip(logp, start, letters.PAID))
    assert found["J"] == pytest.approx(j) and found["KL to π*"] == pytest.approx(to_best)
    assert 0.6 * math.log(z) - j == pytest.approx(0.6 * to_best)


def test_values_by_dynamic_programming_are_means_over_the_answers_through_a_state():
    steps, start = policy(1), policy(0)
    v, q = letters.values(steps, start, 0.6)
    p, to_come = letters.probabilities(steps), np.cumsum(gae.rewards(steps, start)[:, ::-1], 1)[:, ::-1]
    assert p.sum() == pytest.approx(1)
    for state, action in [(0, 0), (0, 5), (3, 2), (40, 5), (155, 4)]:
        t = len(letters.ENDED[state])
        here, taken = letters.STEPS[:, t] // 6 == state, letters.STEPS[:, t] == state * 6 + action
        here &= letters.TAKEN[:, t]
        assert v[state] == pytest.approx(p[here] @ to_come[here, t] / p[here].sum())
        assert q[state, action] == pytest.approx(p[taken] @ to_come[taken, t] / p[taken].sum())
    assert critic.visits(steps)[0] == pytest.approx(1)


@pytest.mark.parametrize("lam", [0.0, 0.8, 1.0])
def test_gae_is_ppos_own(lam):
    steps, start, values = policy(1), policy(0), np.random.default_rng(2).normal(size=156)
    x, v = letters.along(steps), np.where(letters.TAKEN, values[letters.STEPS // 6], 0.0)
    batch = {"logp": x, "ref_logp": letters.along(start), "values": v, "mask": letters.TAKEN, "score": letters.RAW}
    batch = {name: torch.tensor(each) for name, each in batch.items()} | {"ended": torch.arange(781) < 156}
    found = ppo.estimate(batch, gae.BETA, ppo.Config(lam=lam, unended_cap=letters.CAP))
    expected = (found["returns"] - batch["values"]).numpy()
    assert gae.gae(gae.rewards(steps, start), values, lam) == pytest.approx(expected, abs=1e-9)


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k, way, whole", list(itertools.product(estimators.K, estimators.WAYS, (False, True))))
def test_mean_and_variance_of_an_estimators_gradient_are_autograds_over_every_response(k, way, whole):
    steps, old, start = policy(1), policy(1) + 0.1 * policy(2), policy(0)
    old -= np.log(np.exp(old).sum(1, keepdims=True))
    p = letters.probabilities(old)
    logits = torch.tensor(steps, requires_grad=True)

    def along(table: torch.Tensor) -> torch.Tensor:
        found = torch.cat([table.flatten(), torch.zeros(1)])[PLACES]
        return found.sum(1, keepdim=True) if whole else found

    logp, before, ref = along(logits.log_softmax(-1)), along(torch.tensor(old)), along(torch.tensor(start))
    ratio, x = (logp - before).exp(), before - ref if way == "reward" else logp - ref
    term = {"k1": x, "k2": x.square() / 2, "k3": (-x).exp() - 1 + x}[k]
    if way == "reward":
        loss = ratio * term.flip(1).cumsum(1).flip(1)
    else:
        loss = (ratio if way == "ratio × loss" else ratio.detach()) * term
    exact = torch.autograd.grad(torch.tensor(p) @ loss.sum(1), logits, retain_graph=True)[0].flatten().numpy()

    J = jacobian(steps)
    value, weight = estimators.term(k, way, whole, steps, old, start, weighted=True)
    mean, variance = letters.moments(weight, p, J @ J.T)
    assert J.T @ mean == pytest.approx(exact, abs=1e-9)
    each = np.zeros((781, 937))
    np.add.at(each, (np.arange(781)[:, None], PLACES), weight * letters.TAKEN)
    each = each[:, :-1] @ J
    assert variance == pytest.approx(p @ ((each - exact) ** 2).sum(1))
    if way != "reward":
        assert value == pytest.approx((ratio * term).sum(1).detach().numpy())


def test_the_textbook_facts_about_the_estimators_hold_to_rounding():
    steps, start = policy(1), policy(0)
    J = jacobian(steps)
    p, products = letters.probabilities(steps), J @ J.T
    logits = torch.tensor(steps, requires_grad=True)
    logp = torch.cat([logits.log_softmax(-1).flatten(), torch.zeros(1)])[PLACES].sum(1)
    (logp.exp() @ (logp - torch.tensor(letters.along(start).sum(1)))).backward()
    exact = logits.grad.flatten().numpy()  # of KL(π ‖ π₀)

    def mean(k, way, whole, sampler=steps):
        _, weight = estimators.term(k, way, whole, steps, sampler, start, False)
        return J.T @ letters.moments(weight, p, products)[0]

    for whole in (False, True):
        assert mean("k1", "reward", whole) == pytest.approx(exact, abs=1e-9)
        assert mean("k1", "loss", whole) == pytest.approx(0, abs=1e-9)
        assert mean("k3", "ratio × loss", whole) == pytest.approx(mean("k2", "loss", whole), abs=1e-12)
    assert mean("k2", "loss", True) == pytest.approx(exact, abs=1e-9)
    length = np.linalg.norm(exact)
    assert np.linalg.norm(mean("k2", "loss", False) - exact) > 0.3 * length  # no token pays for the KL of later ones
    assert np.linalg.norm(mean("k3", "loss", True) - exact) > 0.3 * length


@pytest.mark.parametrize("k", ["k2", "k3"])
def test_a_policy_stands_still_where_score_and_loss_of_each_token_pull_alike(k):
    start, beta = policy(0), 0.6
    steps = letters.standstill(k, start, beta)
    J, p = jacobian(steps), letters.probabilities(steps)
    _, pull = estimators.term(k, "loss", False, steps, steps, start, False)
    score, _ = letters.moments(letters.PAID[:, None], p, J @ J.T)
    kl, _ = letters.moments(pull, p, J @ J.T)
    assert p.sum() == pytest.approx(1) and J.T @ score == pytest.approx(beta * J.T @ kl, abs=1e-9)
    assert np.abs(J.T @ score).max() > 1e-3


def test_leave_one_out_has_the_mean_and_the_variance_of_drawn_groups():
    steps, start, n, K = policy(1), policy(0), 4000, gae.K
    J, p = jacobian(steps), letters.probabilities(steps)
    total = gae.rewards(steps, start).sum(1)
    mean, variance = gae.leave_one_out(total, p, J @ J.T)
    each = np.zeros((781, 937))
    np.add.at(each, (np.arange(781)[:, None], PLACES), 1.0)
    each = each[:, :-1] @ J  # ∇ log π of each response
    drawn = np.random.default_rng(0).choice(781, size=(n, K), p=p / p.sum())
    r = total[drawn]
    advantage = r - (r.sum(1, keepdims=True) - r) / (K - 1)
    group = np.einsum("nk,nkd->nd", advantage, each[drawn]) / K
    square = K * ((group - J.T @ mean) ** 2).sum(1)
    assert abs(square.mean() - variance) < 4 * square.std() / n**0.5
    assert J.T @ mean == pytest.approx(((p * (total - p @ total))[:, None] * each).sum(0), abs=1e-9)


def test_rank_correlation_counts_a_value_as_often_as_its_weight():
    """Against Spearman's of a list in which each value stands as often."""
    a, b, often = np.array([3.0, 1.0, 2.0, 7.0]), np.array([1.0, 0.0, 5.0, 5.0]), np.array([2, 1, 3, 2])
    listed = [np.repeat(x, often) for x in (a, b)]
    ranks = [np.array([((x < y) + 0.5 * (x == y)).sum() for y in x]) for x in listed]
    assert critic.rank_correlation(a, b, often / 8) == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert critic.rank_correlation(a, 0 * a, often / 8) == 0


# --- what is changed in ppo.py ----------------------------------------------------------------------------------------


def test_what_the_experiments_change_in_ppo_is_in_it():
    for k, way in itertools.product(estimators.K, (*estimators.WAYS, "loss, by answer")):
        ast.parse(changed(SOURCE, estimators.changes(k, way)))
    for changes in ({critic.RATES: critic.KEEP}, {critic.FRESH: "value = None"}):
        ast.parse(changed(SOURCE, changes))


def test_a_diff_of_ones_own_gets_a_row_beside_the_table(tmp_path, monkeypatch, capsys):
    seen, mine = [], tmp_path / "mine.diff"
    landed = letters.landing(*(letters.along(policy(seed)).sum(1) for seed in (1, 0)), 0.6) | {"seconds": 1.0}
    monkeypatch.setattr(letters, "settle", lambda *run: seen.append(run) or landed)
    monkeypatch.setattr(exact, "RESULTS", tmp_path / "exact.json")
    exact.RESULTS.write_text(json.dumps({"found": {"PPO": {"0.6": [landed, landed]}}}))
    mine.write_text((HERE / "grpo.diff").read_text())
    words = ["exact", "--diff", str(mine), "--seeds", "0,1", "--betas", "0.6"]
    monkeypatch.setattr(sys, "argv", words)
    exact.main()
    assert [run[1:] for run in seen] == [(0.6, 0), (0.6, 1)] and seen[0][0] == patched(SOURCE, "grpo")
    rows = [line.split(" | ")[:2] for line in capsys.readouterr().out.splitlines()]
    assert rows[-2:] == [["| PPO", "0.6"], ["| mine.diff", "0.6"]]
    mine.write_text("".join(f"{line[0]}x{line[1:]}" if line.startswith("- ") else line for line in mine.open()))
    with pytest.raises(SystemExit, match="mine.diff: .*does not apply"):
        exact.main()


@pytest.mark.slow
def test_trl_reads_the_final_score_of_every_answer():
    """As TRL lays answers out: a pad, which no net can say, stands behind EOS."""
    utils, eos, pad = pytest.importorskip("trl.experimental.utils"), 5, 6
    world = exact_trl.World()
    rows = [[0, *map(letters.LETTERS.index, word)] + [eos] * (len(word) < letters.R) for word in letters.WORDS]
    answers = torch.tensor([row + [pad] * (1 + letters.R - len(row)) for row in rows])
    _, scores, _ = utils.get_reward(world, answers, pad, context_length=1)
    assert scores.numpy() == pytest.approx(letters.PAID)


@pytest.mark.slow
def test_the_inner_products_of_a_net_are_those_of_its_gradients(tmp_path):
    net = letters.policy_in(letters.world(tmp_path))
    products, mixed = letters.gram(net), copy.deepcopy(net)
    logp = letters.by_state(mixed(letters.prefixes())).log_softmax(-1).flatten()
    weight = torch.randn(936, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (weight @ logp).backward()
    gradient = torch.cat([p.grad.flatten() for p in mixed.parameters()])
    assert weight.numpy() @ products @ weight.numpy() == pytest.approx((gradient @ gradient).item())
    words = [0, 4, 17, 155, 200, 780]
    assert letters.log_probabilities(tmp_path / "start")[words] == pytest.approx(
        [one_by_one(net, letters.WORDS[i]) for i in words]
    )


def one_by_one(net, word: str) -> float:
    row = [0, *map(letters.LETTERS.index, word)] + [5] * (len(word) < letters.R)
    logp = net(torch.tensor([row])).log_softmax(-1)[0]
    return sum(logp[t - 1, row[t]].item() for t in range(1, len(row)))
