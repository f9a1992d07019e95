"""common/measure.py and tools/evaluate.py: metrics, the report and best-of-n, against numpy and lists of every case."""

import itertools
import math

import numpy as np
import pytest
import torch

import ppo
from common.measure import KL, clustered_error, paired, report, rollout_metrics, summary
from tests.conftest import ragged
from tools.evaluate import expected_at_best


def test_metrics_of_an_iteration_are_numpys_over_responses_and_over_tokens():
    batch = ragged(np.random.default_rng(0), rows=9)
    batch |= ppo.estimate(batch, 0.1, ppo.Config())
    batch["entropy"] = batch["values"].abs()
    got = rollout_metrics(batch, [], 0.1)
    mask = batch["mask"].numpy()
    logp, ref, values, returns = (batch[name].numpy() for name in ("logp", "ref_logp", "values", "returns"))
    kl = ((logp - ref) * mask).sum(1)
    score, length = batch["score"].numpy(), mask.sum(1)
    expected = {
        "objective/kl": kl.mean(),
        "objective/kl_max": kl.max(),
        "objective/entropy": -(logp * mask).sum(1).mean(),
        "objective/scores": score.mean(),
        "objective/scores_std": score.std(),
        "score_length_correlation": np.corrcoef(score, length)[0, 1],
        "token_entropy": np.abs(values)[mask].mean(),
        "value/explained_variance": 1 - (returns - values)[mask].var() / returns[mask].var(),
    }
    for name, x in expected.items():
        assert got[name] == pytest.approx(x, rel=1e-5), name
    batch["score"] = torch.ones_like(batch["score"])
    assert rollout_metrics(batch, [], 0.1)["score_length_correlation"] == 0  # not 0 / 0


def table(**columns):
    return columns | {"rows": [{"prompt": "p", "response": "r"}] * len(next(iter(columns.values())))}


def test_a_change_on_the_same_prompts_carries_the_paired_error():
    rng = np.random.default_rng(0)
    before = rng.normal(size=50)
    after = before + 1 + 0.1 * rng.normal(size=50)  # the prompts differ much more than the change does
    text = report(paired(table(score=before.tolist()), table(score=after.tolist()), {}))
    row = next(line for line in text.splitlines() if line.startswith("score"))
    cells = [(x.mean(), x.std(ddof=1) / 50**0.5) for x in (before, after, after - before)]
    assert [float(word) for word in row.split() if word not in ("score", "±")] == pytest.approx(
        [number for cell in cells for number in cell], abs=6e-4
    )
    assert cells[2][1] < cells[0][1] / 5


def test_a_win_rate_counts_ties_half_and_carries_its_error():
    text = report(paired(table(score=[0.0] * 4 + [1.0] * 4), table(score=[1.0] * 4 + [1.0] * 3 + [0.0]), {}))
    row = next(line for line in text.splitlines() if line.startswith("win rate"))
    wins = np.array([1] * 4 + [0.5] * 3 + [0])
    assert f"{wins.mean():.3f} ± {wins.std(ddof=1) / 8**0.5:.3f}" in row


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_best_of_n_is_the_mean_over_all_choices_of_n_answers(n):
    rng = np.random.default_rng(n)
    scores, values = rng.normal(size=(4, 5)), rng.normal(size=(4, 5))
    expected = []
    for s, v in zip(scores, values):
        expected.append(np.mean([v[max(each, key=lambda i: s[i])] for each in itertools.combinations(range(5), n)]))
    got = expected_at_best(torch.tensor(scores), torch.tensor(values), n)
    assert got.tolist() == pytest.approx(expected)


def test_the_best_policy_is_that_of_the_judge_or_without_one_of_score_less_beta_kl():
    columns = table(**{"my.py:judge": [0.2, 0.4], "score": [1.0, 3.0], KL: [4.0, 6.0]})
    assert summary(columns, {"my.py:judge": len}, 0.1)[1] == pytest.approx(0.3)
    assert summary(columns, {}, 0.1)[1] == pytest.approx(2 - 0.5)


def test_the_error_of_an_accuracy_takes_the_pairs_of_one_prompt_together():
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 6, 400)
    right = torch.tensor(np.repeat(rng.random(400) < 0.7, sizes), dtype=torch.float64)  # alike within a prompt
    got = clustered_error(right, sizes.tolist())
    parts = right.split(sizes.tolist())
    means = []
    for _ in range(2000):  # the bootstrap over prompts
        chosen = [parts[i] for i in rng.integers(0, 400, 400)]
        means.append(torch.cat(chosen).mean().item())
    assert got == pytest.approx(np.std(means), rel=0.1)
    n = len(right)
    alone = clustered_error(right, [1] * n)
    assert alone == pytest.approx(right.std().item() / math.sqrt(n)) and got > 1.5 * alone
