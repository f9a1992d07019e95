"""Where chance is part of the method: sampling, KL estimates, labels, and what a reward model learns from them."""

import itertools
import math

import numpy as np
import pytest
import torch

import data
import ppo
import reward
from common import cli, compare, measure, nets, runs
from model import ScalarModel, sample
from tests.conftest import make_gpt, write


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_follow_the_softmax_at_the_temperature_by_chi_square(temperature):
    logits, n = torch.randn(40, generator=torch.Generator().manual_seed(0)), 400_000
    uniform = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    counts = sample(logits.expand(n, -1), uniform, temperature).bincount(minlength=40)
    expected = n * (logits.double() / temperature).softmax(0)
    statistic = ((counts - expected) ** 2 / expected).sum()
    assert expected.min() > 5 and abs(statistic - 39) < 5 * math.sqrt(2 * 39)  # 39 degrees of freedom, five sigma


def test_top_k_and_top_p_keep_exactly_their_set():
    logits = torch.tensor([0.05, 0.4, 0.25, 0.2, 0.1]).log()
    uniform = torch.linspace(0, 0.9999, 5000, dtype=torch.float64)
    drawn = lambda **kw: set(sample(logits.expand(5000, -1), uniform, **kw).tolist())  # noqa: E731
    assert drawn(top_k=2) == {1, 2} and drawn(top_k=5) == {0, 1, 2, 3, 4}
    assert drawn(top_p=0) == {1}
    assert drawn(top_p=0.6) == {1, 2} and drawn(top_p=0.7) == {1, 2, 3} and drawn(top_p=0.0001) == {1}
    assert drawn(top_p=0.9, top_k=1) == {1}
    assert len(set(sample(torch.zeros(5000, 4), uniform, top_k=2).tolist())) == 2  # equals


@pytest.mark.parametrize("top_k, top_p", [(4, 0.5), (4, 0.9), (10, 0.3), (2, 1.0), (0, 0.7)])
def test_top_k_and_top_p_together_keep_what_transformers_keeps(top_k, top_p):
    """top-p is a share of the mass that top-k has kept."""
    warpers = pytest.importorskip("transformers.generation.logits_process")
    logits = torch.randn(1, 20, generator=torch.Generator().manual_seed(0))
    theirs = warpers.TopPLogitsWarper(top_p)(None, warpers.TopKLogitsWarper(top_k)(None, logits) if top_k else logits)
    uniform = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    drawn = sample(logits.expand(20_000, -1), uniform, 1.0, top_k, top_p)
    share = drawn.bincount(minlength=20) / 20_000
    torch.testing.assert_close(share, theirs.softmax(-1)[0], rtol=0, atol=2e-4)


def test_what_top_k_and_top_p_keep_is_drawn_in_the_softmaxs_proportions():
    logits, n = torch.randn(30, generator=torch.Generator().manual_seed(0)), 200_000
    uniform = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    p = logits.double().softmax(0)
    order = p.argsort(descending=True)
    for kept, options in (
        (order[:7], {"top_k": 7}),
        (order[: int((p[order].cumsum(0) < 0.8).sum()) + 1], {"top_p": 0.8}),
    ):
        counts = sample(logits.expand(n, -1), uniform, **options).bincount(minlength=30)
        expected = n * p[kept] / p[kept].sum()
        assert counts.sum() == counts[kept].sum()
        assert ((counts[kept] - expected) ** 2 / expected).sum() < len(kept) + 5 * math.sqrt(2 * len(kept))


def test_the_means_of_k1_and_k3_are_the_enumerated_kl():
    """k1 = log π/π₀ is what stage 3 charges, k3 = π₀/π − 1 + log π/π₀ the other unbiased estimate (Schulman 2020)."""
    policy, ref = (make_gpt(seed, vocab_size=5, eos=4, block_size=4) for seed in (0, 1))
    cfg, n = ppo.Config(response_len=3, minibatch_size=10_000), 20_000
    with torch.no_grad():
        batch = ppo.rollout(policy, [[0]] * n, cfg, torch.Generator().manual_seed(0))
        batch |= ppo.read(
            batch,
            policy,
            ref,
            ScalarModel(make_gpt(2, vocab_size=5, eos=4, block_size=4)),
            lambda part: part["length"].float(),
            cfg,
        )
        responses = [list(w) + [4] * (len(w) < 3) for r in range(4) for w in itertools.product(range(4), repeat=r)]
        rows = [data.Row([0, *response], 1) for response in responses]
        logp, ref_logp = (net.logprobs(*data.pad(rows)).double().sum(1) for net in (policy, ref))
    exact = (logp.exp() * (logp - ref_logp)).sum().item()
    assert logp.exp().sum().item() == pytest.approx(1, abs=1e-5) and exact > 0.1
    k1 = ((batch["logp"] - batch["ref_logp"]) * batch["mask"]).sum(1).double()
    k3 = (-k1).exp() - 1 + k1
    for estimate in (k1, k3):
        assert abs(estimate.mean().item() - exact) < 4 * estimate.std().item() / math.sqrt(n)
    metrics = measure.rollout_metrics(batch | ppo.estimate(batch, 0.1, cfg), [], 0.1)
    assert metrics["objective/kl"] == pytest.approx(k1.mean().item(), rel=1e-4)


@pytest.mark.parametrize("temperature", [0.1, 0.25, 1.0])
def test_labels_drawn_at_a_temperature_give_its_win_rates(temperature):
    n, better = 20_000, 0.2
    answers = [[("aaa", True), ("a", True)]] * n
    judge = lambda rows: [len(row["response"]) / 10 for row in rows]  # noqa: E731
    rows = compare.simulate([{"prompt": "p"}] * n, ["p"] * n, answers, judge, temperature, seed=0)
    expected = 1 / (1 + math.exp(-better / temperature))  # Bradley and Terry 1952
    share = np.mean([row["chosen"] == "aaa" for row in rows])
    assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / n)
    assert all(abs(row["p_chosen"] - (expected if row["chosen"] == "aaa" else 1 - expected)) < 1e-3 for row in rows)


def test_a_reward_model_trained_on_noisy_labels_recovers_the_judges_ordering(folders, encoding):
    """Twelve responses of a known worth, compared with noise: the scores come out in the order of the worths."""
    worth = {f" {a} {b}.": x + y for (a, x), (b, y) in itertools.product(
        [("yes", 0.9), ("tale", 0.6), ("fox", 0.3), ("no", 0.0)], [("me", 0.2), ("ask", 0.1), ("tell", 0.0)]
    )}  # fmt: skip
    texts, rng = list(worth), np.random.default_rng(0)
    prompts = [f"{a} {b} {c}." for a, b, c in itertools.product(["ask", "tell", "me", "yes", "no", "fox"], repeat=3)]
    answers = [[(texts[i], True) for i in rng.permutation(12)[:6]] for _ in prompts]
    judge = lambda rows: [worth[row["response"]] for row in rows]  # noqa: E731
    rows = compare.simulate([{"prompt": prompt} for prompt in prompts], prompts, answers, judge, 0.2, seed=0)
    options = ["--data", write(folders["tmp"] / "noisy.jsonl", rows), "--init", folders["sft"], "--response_len", 8]
    options += ["--out", folders["tmp"] / "rm", "--lr", 2e-3, "--batch_size", 2, "--n_prompts", 216]
    reward.train(cli.parse(reward.Config, [str(option) for option in options]))
    model, _ = nets.load_scalar(folders["tmp"] / "rm")
    tokens, _, length = data.pad([data.encode_row(encoding, model.config.eos, "ask fox me.", text) for text in texts])
    with torch.no_grad():
        scores = model.scores(tokens, length).numpy()
    ranks = [np.argsort(np.argsort(x)) for x in (scores, np.array(list(worth.values())))]
    assert np.corrcoef(*ranks)[0, 1] > 0.95  # Spearman's
    last = runs.read_metrics(folders["tmp"] / "rm")[-1]
    assert last["eval/accuracy"] > last["eval/accuracy_ceiling"] - 0.05
