"""Agreement with code, equations and figures that are not ours: transformers, TRL, loops from the papers, textbooks."""

import math

import numpy as np
import pytest
import tiktoken
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import data
import ppo
from tests.conftest import FAMILIES, make_gpt, ragged, uneven
from tools import hf as weights
from tools.label import alpha, report

seeds = st.integers(0, 2**32 - 1)
BYTES = {bytes([i]): i for i in range(256)}
shapes = st.tuples(seeds, st.integers(1, 6), st.integers(1, 9))  # of a ragged batch: seed, rows, columns


def twin(ours, folder):
    """transformers' model with our weights, by way of a Hugging Face folder."""
    transformers = pytest.importorskip("transformers")
    names = {f"<|{i}|>": i for i in range(256, ours.config.vocab_size)}
    encoding = tiktoken.Encoding("bytes", pat_str=data.SPLIT, mergeable_ranks=BYTES, special_tokens=names)
    folder.mkdir()
    weights.write_model(ours, encoding, folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def losses(ours, theirs, tokens):
    """The mean loss a token of both; ours is summed over the window that begins at the second token."""
    B, T = tokens.shape
    mine = -ours.logprobs(tokens, torch.ones(B, dtype=torch.long), torch.full((B,), T)).sum() / (B * (T - 1))
    return mine, theirs(tokens, labels=tokens).loss


@pytest.fixture(scope="module", params=FAMILIES)
def twins(request, tmp_path_factory):
    """Our model of a family, and transformers' with the same weights."""
    ours = uneven(make_gpt(vocab_size=261, eos=260, n_embd=64, **{"n_head": 4} | FAMILIES[request.param]))
    return ours, twin(ours, tmp_path_factory.mktemp("twin") / "hf")


@pytest.mark.parametrize("bf16, near", [(False, 1e-4), (True, 5e-2)])
def test_logits_loss_and_gradients_agree_with_transformers(twins, bf16, near):
    """float32 to 1e-4 of each tensor's norm; under bfloat16 autocast to 5e-2, as the two round in different places."""
    ours, theirs = twins
    for model in twins:
        model.zero_grad()
    tokens = torch.randint(0, 261, (5, 29), generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        a, b = ours(tokens), theirs(tokens).logits
        loss, other = losses(ours, theirs, tokens)
    assert (a - b).norm() <= near * b.norm() and abs(loss - other) <= near * other
    loss.backward()
    other.backward()
    mine, parameters = dict(ours.named_parameters()), dict(theirs.named_parameters())
    for name, parameter in mine.items():
        others = [parameters.pop(other).grad for other in weights.their_names(name, ours.config)]
        g, h = parameter.grad, torch.cat([weights.turned(name, other, ours.config) for other in others])
        assert (g - h).norm() <= near * h.norm(), name  # by norm: the key bias has an exactly zero gradient
    assert not parameters


def test_greedy_generation_agrees_with_transformers_token_for_token(twins):
    ours, theirs = twins
    prompts = [[i, 2 * i % 60, 7][: 1 + i % 3] for i in range(6)]
    tokens, _, length = ours.generate(prompts, 20, temperature=0)
    for prompt, row, end in zip(prompts, tokens.tolist(), length.tolist()):
        given = torch.tensor([prompt])
        expected = theirs.generate(
            given, attention_mask=torch.ones_like(given), max_new_tokens=20, do_sample=False, eos_token_id=260,
            pad_token_id=260,
        )  # fmt: skip
        assert row[:end] == expected[0].tolist()


def estimate_by_hand(batch, beta, cap, gamma, lam):
    """Rewards, advantages (not whitened) and returns, as their defining sums (Ziegler et al. 2019, equation 2; Schulman
    et al. 2016, equation 16), one number at a time."""
    shape = batch["mask"].shape
    rewards, advantages, returns = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    for b in range(shape[0]):
        n = int(batch["mask"][b].sum())
        score = float(batch["score"][b])
        if not batch["ended"][b]:
            score = min(score, cap)
        for t in range(n):
            rewards[b, t] = -beta * float(batch["logp"][b, t] - batch["ref_logp"][b, t]) + (score if t == n - 1 else 0)
        for t in range(n):
            for k in range(t, n):
                after = float(batch["values"][b, k + 1]) if k + 1 < n else 0.0
                delta = rewards[b, k] + gamma * after - float(batch["values"][b, k])
                advantages[b, t] += (gamma * lam) ** (k - t) * delta
            returns[b, t] = advantages[b, t] + float(batch["values"][b, t])
    return rewards, advantages, returns


@settings(deadline=None)
@given(shapes, st.floats(0, 2), st.floats(-3, 3), st.floats(0, 1), st.floats(0, 1))
def test_rewards_gae_returns_and_whitening_equal_the_papers_sums(shape, beta, cap, gamma, lam):
    seed, rows, columns = shape
    batch = ragged(np.random.default_rng(seed), rows, columns)
    got = ppo.estimate(batch, beta, ppo.Config(gamma=gamma, lam=lam, unended_cap=cap))
    rewards, advantages, returns = estimate_by_hand(batch, beta, cap, gamma, lam)
    mask = batch["mask"].numpy()
    real = advantages[mask]
    white = np.where(mask, (advantages - real.mean()) / np.sqrt(real.var() + 1e-8), 0)
    for name, expected in (("rewards", rewards), ("returns", returns), ("advantages", white)):
        np.testing.assert_allclose(got[name].numpy(), expected, rtol=1e-6, atol=1e-6, err_msg=name)


@settings(deadline=None)
@given(shapes, st.floats(0.01, 0.9), st.floats(0.01, 2))
def test_clipped_losses_equal_the_papers_equations_token_by_token(shape, cliprange, cliprange_value):
    seed, *size = shape
    rng = np.random.default_rng(seed)
    logp, old, adv, values, old_values, returns = (torch.tensor(rng.normal(size=size)) for _ in range(6))
    policy, _ = ppo.policy_loss(logp, old, adv, cliprange)
    value = ppo.value_loss(values, old_values, returns, cliprange_value)
    for at in np.ndindex(*size):
        rho, a = math.exp(logp[at] - old[at]), float(adv[at])  # Schulman et al. 2017, equation 7
        objective = min(rho * a, min(max(rho, 1 - cliprange), 1 + cliprange) * a)
        assert float(policy[at]) == pytest.approx(-objective, rel=1e-9, abs=1e-9)
        v, o, r = float(values[at]), float(old_values[at]), float(returns[at])
        near = o + min(max(v - o, -cliprange_value), cliprange_value)
        assert float(value[at]) == pytest.approx(0.5 * max((v - r) ** 2, (near - r) ** 2), rel=1e-9, abs=1e-9)


@given(st.floats(0, 200), st.floats(0.1, 50), st.floats(0, 3))
def test_adaptive_beta_follows_ziegler_et_al(kl, target, beta):
    error = max(-0.2, min(0.2, (kl - target) / target))  # section 2.2, with K_β = 0.25
    assert ppo.adapt(beta, kl, ppo.Config(kl_target=target)) == pytest.approx(beta * (1 + 0.25 * error))
    assert ppo.adapt(beta, kl, ppo.Config()) == beta


@pytest.mark.slow
@settings(deadline=None)
@given(shapes)
def test_whitening_agrees_with_trl(shape):
    """TRL's variance is the unbiased one, n / (n − 1) of ours; its pads come out shifted and are filled afterwards."""
    trl = pytest.importorskip("trl.experimental.ppo.ppo_trainer")
    seed, rows, columns = shape
    batch = ragged(np.random.default_rng(seed), rows, columns + 1)
    x, mask = batch["values"], batch["mask"]
    n = int(mask.sum())
    assume(x[mask].var() > 1e-2)  # both add 1e-8 to the variance, TRL to the larger one
    expected = trl.masked_whiten(x, mask).masked_fill(~mask, 0) * math.sqrt(n / (n - 1))
    torch.testing.assert_close(ppo.whiten(x, mask), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_of_padded_responses_agree_with_trl(tmp_path, temperature):
    """TRL pads prompts on the left and shifts positions by hand; its columns of responses line up with our window."""
    trl = pytest.importorskip("trl.experimental.ppo.ppo_trainer")
    ours = make_gpt(vocab_size=261, eos=260)
    theirs = twin(ours, tmp_path / "hf")
    prompts, pad = [[1], [2, 3, 4, 5], [6, 7]], 59  # an id that is neither prompted with nor sampled
    tokens, prompt_len, length = ours.generate(prompts, 12, generator=torch.Generator().manual_seed(0))
    assert 59 not in tokens
    P, R = 4, int((length - prompt_len).max())
    rows = torch.full((3, P + R), pad)
    for b, (start, end) in enumerate(zip(prompt_len.tolist(), length.tolist())):
        rows[b, P - start : P + end - start] = tokens[b, :end]
    with torch.no_grad():
        logits = trl.forward(theirs, rows, pad).logits[:, P - 1 : -1] / temperature
        expected = trl.selective_log_softmax(logits, rows[:, P:]).masked_fill(rows[:, P:] == pad, 0)
    torch.testing.assert_close(ours.logprobs(tokens, prompt_len, length, temperature), expected, rtol=0, atol=1e-4)


# Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", sections A, B and C: a line for each observer, a
# column for each unit, a point where one is missing; and the alpha printed there.
TEXTBOOK = [
    (["0100000010", "1110010000"], 0.095),
    (["aabbdcccedda", "babbbccceddd"], 0.692),
    (["123321412...", "1233224125.3", ".3332342251.", "12332441251."], 0.743),
]


def units(observers):
    """Questions, each of its own prompt, from lines as in TEXTBOOK."""
    columns = enumerate(zip(*observers))
    return {(f"prompt {u}", ()): {i: v for i, v in enumerate(said) if v != "."} for u, said in columns}


def alpha_by_pairs(units):
    """1 − D_o / D_e by the definition: pairs within units, each weighted 1 / (n_u − 1), against pairs of all values."""
    shared = [list(said.values()) for said in units.values() if len(said) > 1]
    values = [value for said in shared for value in said]
    n = len(values)
    observed = sum(
        (said[i] != said[j]) / (len(said) - 1) for said in shared for i in range(len(said)) for j in range(len(said))
    )
    expected = sum(values[i] != values[j] for i in range(n) for j in range(n) if i != j)
    return 1 - (observed / n) / (expected / (n * (n - 1)))


@pytest.mark.parametrize("observers, published", TEXTBOOK)
def test_alpha_is_that_of_krippendorffs_examples(observers, published):
    value, low, high = alpha(units(observers))
    assert round(value, 3) == published == round(alpha_by_pairs(units(observers)), 3) and low < value < high


def test_alpha_and_its_interval_equal_pairs_counted_one_by_one():
    """Ragged units, several to a prompt. The interval: prompts drawn with other random numbers, alpha by its pairs."""
    rng, made = np.random.default_rng(0), {}
    for u in range(60):
        truth, people = rng.integers(3), rng.permutation(5)[: rng.integers(1, 6)]
        made[f"prompt {u // 2}", u] = {
            int(who): int(truth if rng.random() < 0.7 else rng.integers(3)) for who in people
        }
    value, low, high = alpha(made)
    assert value == pytest.approx(alpha_by_pairs(made), abs=1e-12)
    prompts = dict.fromkeys(prompt for prompt, _ in made)
    shared = [p for p in prompts if any(len(said) > 1 for (prompt, _), said in made.items() if prompt == p)]
    drawn = []
    for _ in range(200):
        picks = [shared[i] for i in rng.integers(len(shared), size=len(shared))]
        part = {(k, u): said for k, p in enumerate(picks) for (prompt, u), said in made.items() if prompt == p}
        drawn.append(alpha_by_pairs(part))
    assert np.percentile(drawn, [2.5, 97.5]) == pytest.approx([low, high], abs=0.04)
    one_each = {(u, u): said for (_, u), said in made.items()}
    assert alpha(one_each)[0] == pytest.approx(value)


def test_a_prompt_asked_twice_does_not_make_the_interval_narrower():
    once = units(TEXTBOOK[2][0])
    twice = {(prompt, copy): said for (prompt, _), said in once.items() for copy in range(2)}
    _, low, high = alpha(once)
    assert alpha(twice)[1:] == pytest.approx((low, high), abs=0.03)
    apart = {(f"{prompt} {copy}", ()): said for (prompt, copy), said in twice.items()}
    assert alpha(apart)[2] - alpha(apart)[1] < 0.85 * (high - low)


def test_a_value_is_the_best_response_wherever_it_stood_and_ties_and_all_bad_are_values():
    def row(prompt, who, verdict, swapped=False):
        a, b = ("x", "m1"), ("y", "m2")
        best, worst = (b, a) if verdict == "y" or swapped else (a, b)
        about = {"prompt": prompt, "annotator": who, "checkpoint": [best[1], worst[1]], "seconds": 1.0}
        if verdict in ("tie", "bad", "skip"):
            return about | {"verdict": verdict, "responses": [best[0], worst[0]]}
        return about | {"chosen": best[0], "rejected": worst[0], "position": 0}

    said = {"ann": ["x", "y", "tie", "bad", "skip"], "bob": ["x", "x", "tie", "tie", "x"], "cy": ["y", "y", "tie"]}
    answers = [
        row(f"q{i}", who, verdict, who == "bob" and len(verdict) > 1)
        for who, verdicts in said.items()
        for i, verdict in enumerate(verdicts)
    ]
    text = report(answers)
    four = units(["xytb.", "xxttx", "yyt.."])
    assert f"agreement: the same in 5 of 10 pairs of answers, alpha {alpha_by_pairs(four):.3f} (" in text
    for pair, same, lines in (
        ("ann and bob", "2 of 4", ["xytb.", "xxttx"]),
        ("ann and cy", "2 of 3", ["xyt", "yyt"]),
        ("bob and cy", "1 of 3", ["xxt", "yyt"]),
    ):
        assert f"{pair}: the same in {same} pairs of answers, alpha {alpha_by_pairs(units(lines)):.3f} (" in text
    assert "alpha undefined" in report([row("q", "ann", "x"), row("q", "bob", "x")])
    assert "no two people" in report([row("q", "ann", "x"), row("q", "bob", "skip")])
