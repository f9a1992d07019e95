"""common/measure.py and tools/evaluate.py: metrics, the report and best-of-n, against numpy and lists of every case."""

import itertools
import json
import math
import re

import numpy as np
import pytest
import torch

import ppo
from common import agreement, dist
from common.measure import (
    ENDED,
    KL,
    held_out,
    paired,
    report,
    rollout_metrics,
    share,
    summary,
)
from data import Group, InputError, Prompt, Row
from tests.conftest import make_gpt, ragged
from tools import evaluate
from tools.evaluate import best_of_table, by_source_and_length, expected_at_best, of_its_run


def test_metrics_of_an_iteration_are_numpys_over_responses_and_over_tokens():
    batch = ragged(np.random.default_rng(0), rows=9)
    batch |= ppo.estimate(batch, 0.1, ppo.Config())
    batch["entropy"] = batch["values"].abs()
    got = rollout_metrics(batch, [], 0.1)
    mask = batch["mask"].numpy()
    logp, ref, values, returns = (batch[name].numpy() for name in ("logp", "ref_logp", "values", "returns"))
    kl = ((logp - ref) * mask).sum(1)
    score, length = batch["score"].numpy(), mask.sum(1)
    final = np.where(batch["ended"].numpy(), score, np.minimum(score, -1))
    expected = {
        "objective/kl": kl.mean(),
        "objective/kl_max": kl.max(),
        "objective/entropy": -(logp * mask).sum(1).mean(),
        "objective/scores": score.mean(),
        "objective/scores_std": score.std(),
        "objective/non_score_reward": -0.1 * kl.mean(),
        "objective/rlhf_reward": final.mean() - 0.1 * kl.mean(),
        "score_length_correlation": np.corrcoef(score, length)[0, 1],
        "token_entropy": np.abs(values)[mask].mean(),
        "value/explained_variance": 1 - (returns - values)[mask].var() / returns[mask].var(),
    }
    for name, x in expected.items():
        assert got[name] == pytest.approx(x, rel=1e-5), name
    batch["score"] = torch.ones_like(batch["score"])
    assert rollout_metrics(batch, [], 0.1)["score_length_correlation"] == 0  # not 0 / 0
    batch["returns"] = 5.0 * batch["mask"]
    assert rollout_metrics(batch, [], 0.1)["value/explained_variance"] == 0  # what does not vary cannot be explained


def table(**columns):
    n = len(next(iter(columns.values())))
    final = columns.get("final score") or columns["score"]
    rows = [{"prompt": "p", "response": "r"}] * n
    return columns | {"final score": final, KL: [2.0] * n, ENDED: [1.0] * n, "rows": rows}


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


@pytest.mark.parametrize("p, n", [(0.6875, 8), (1.0, 8), (0.0, 512), (0.5, 1), (0.838, 321.7)])
def test_the_interval_of_a_share_holds_the_shares_from_which_it_is_1_96_standard_errors_away(p, n):
    """Wilson 1927: the ends are the solutions q of (p − q)² = 1.96² q (1 − q) / n."""
    z2 = 1.96**2 / n
    low, high = np.sort(np.roots([1 + z2, -2 * p - z2, p * p]).real)
    assert share(p, n) == pytest.approx((p, low, high), abs=1e-9)


def test_a_win_rate_counts_ties_half_and_goes_by_the_final_score():
    before = table(score=[0.0] * 8, **{"final score": [0.0] * 4 + [1.0] * 4})
    after = table(score=[9.0] * 8, **{"final score": [1.0] * 4 + [1.0] * 3 + [0.0]})  # a cap takes all from the last
    found = paired(before, after, {})
    assert found["win_rate"] == share((4 + 3 / 2) / 8, 8) and found["by"] == "final score"
    row = next(line for line in report(found).splitlines() if line.startswith("win rate"))
    assert "0.688 [0.356, 0.898] of 0.950 possible at this KL" in row  # by hand: (0.6875 + 0.2401 ± 0.4010) / 1.4802
    by_judge = paired(before | {"judge": [0.0] * 8}, after | {"judge": [1.0] * 8}, {"judge": len})
    assert by_judge["win_rate"][0] == 1


def test_fewer_than_ten_values_have_no_error_but_their_number():
    few = report(paired(table(score=[0.5] * 9), table(score=[1.0] * 9), {}))
    assert re.search(r"^score +0.500 \(n 9\) +1.000 \(n 9\) +0.500 \(n 9\)$", few, re.MULTILINE) and "±" not in few
    ten = report(paired(table(score=[0.0, 1.0] * 5), table(score=[1.0] * 10), {}))
    assert f"0.500 ± {(2.5 / 9) ** 0.5 / 10**0.5:.3f}" in ten


def test_best_of_n_is_drawn_by_the_final_score():
    """Of two answers the longer scores more, and is capped."""
    columns = {"score": torch.tensor([[2.0, 1.0]] * 10), "final score": torch.tensor([[-1.0, 1.0]] * 10)}
    last = best_of_table(columns, [1, 2]).splitlines()[-1]
    assert last.split()[2::3] == ["1.000", "1.000"]


@pytest.mark.parametrize("sharded", [False, True])
def test_processes_ask_judges_once_about_each_prompt_and_with_shard_have_as_many_parts(sharded, monkeypatch):
    monkeypatch.setattr(dist, "WORLD", 3)
    monkeypatch.setattr(dist, "is_sharded", lambda net: sharded)
    prompts = [Prompt([i], {}) for i in range(130)]  # of at most 128: two parts
    asked, parts, policy = [], [], make_gpt()

    def answer(policy, prompts, rng):
        n = len(prompts)
        parts[-1].append(n)
        batch = {
            "tokens": torch.tensor([prompt.ids for prompt in prompts]),
            "prompt_len": torch.zeros(n).long(),
            "length": torch.ones(n).long(),
        }
        batch |= {"ended": torch.zeros(n, dtype=torch.bool), "mask": torch.ones(n, 1), "logp": torch.zeros(n, 1)}
        return batch | {"ref_logp": torch.zeros(n, 1), "score": torch.zeros(n), "final_score": torch.zeros(n)}

    class Text:
        decode = staticmethod(lambda ids: " ".join(map(str, ids)))

    judge = lambda rows: asked.extend(row["response"] for row in rows) or [0.0] * len(rows)  # noqa: E731
    for rank in range(3):
        monkeypatch.setattr(dist, "RANK", rank)
        monkeypatch.setattr(dist, "gather_objects", lambda x: [x] if x else [{0: dict.fromkeys(["score"], [0.0])}])
        parts.append([])
        held_out(answer, Text, {"judge": judge}, policy, prompts, "key")
    assert sorted(map(int, asked)) == list(range(130))
    assert list(map(len, parts)) == ([1, 1, 1] if sharded else [1, 1, 0])


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_best_of_n_is_the_mean_over_all_choices_of_n_answers(n):
    rng = np.random.default_rng(n)
    scores, values = rng.normal(size=(4, 5)), rng.normal(size=(4, 5))
    expected = []
    for s, v in zip(scores, values):
        expected.append(np.mean([v[max(each, key=lambda i: s[i])] for each in itertools.combinations(range(5), n)]))
    got = expected_at_best(torch.tensor(scores), torch.tensor(values), n)
    assert got.tolist() == pytest.approx(expected)


def test_the_best_policy_is_that_of_the_judge_or_without_one_of_final_score_less_beta_kl():
    columns = {"my.py:judge": [0.2, 0.4], "score": [1.0, 3.0], "final score": [1.0, -1.0], KL: [4.0, 6.0]}
    assert summary(columns, {"my.py:judge": len}, 0.1)[1] == pytest.approx(0.3)
    found, goodness = summary(columns, {}, 0.1)
    assert goodness == pytest.approx(0 - 0.5)
    assert found == {"eval/score": 2, "eval/final_score": 0, "eval/kl": 5}


def test_the_error_of_an_accuracy_takes_the_pairs_of_one_prompt_together():
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 6, 400)
    right = torch.tensor(np.repeat(rng.random(400) < 0.7, sizes), dtype=torch.float64)  # alike within a prompt
    cluster = torch.tensor(np.repeat(np.arange(400), sizes))
    got = agreement.clustered_error(right, cluster)
    parts = right.split(sizes.tolist())
    means = []
    for _ in range(2000):  # the bootstrap over prompts
        chosen = [parts[i] for i in rng.integers(0, 400, 400)]
        means.append(torch.cat(chosen).mean().item())
    assert got == pytest.approx(np.std(means), rel=0.1)
    n, order = len(right), torch.tensor(rng.permutation(len(right)))
    assert agreement.clustered_error(right[order], cluster[order]) == pytest.approx(got)  # wherever the pairs stand
    alone = agreement.clustered_error(right, torch.arange(n))
    assert alone == pytest.approx(right.std().item() / math.sqrt(n)) and got > 1.5 * alone


def some_groups(rng, n_prompts, pairs=1):
    """Groups of one pair each, `pairs` of them for every prompt, and their margins."""
    groups = [Group([Row([p, 9, 1], 2), Row([p, 9, 2], 2)], [(0, 1)], [math.nan]) for p in range(n_prompts)] * pairs
    return groups, torch.tensor(rng.normal(0.5, 1, len(groups)))


def test_rows_of_a_prompt_are_one_cluster_and_nothing_depends_on_their_order():
    rng = np.random.default_rng(0)
    groups, margin = some_groups(rng, 30, pairs=5)
    margin = margin.view(5, 30)[0].repeat(5)  # five times the same pair tells no more than once
    got, calibration = agreement.summary(groups, margin)
    order = rng.permutation(len(groups)).tolist()
    shuffled, same = agreement.summary([groups[i] for i in order], margin[order])
    assert shuffled == pytest.approx(got) and [row[:3] for row in same] == [row[:3] for row in calibration]
    p, n = got["eval/accuracy"], 29  # a sample's variance has n − 1
    assert got["eval/prompts"] == 30
    assert (got["eval/accuracy_low"], got["eval/accuracy_high"]) == pytest.approx(share(p, n)[1:])
    right = margin > 0
    for low, high, n, predicted, observed, *ends in calibration:
        inside = (margin.abs().sigmoid() >= low) & (margin.abs().sigmoid() < high)
        assert n == inside.sum() and observed == pytest.approx(right[inside].double().mean().item())
        assert low <= predicted < high
        prompts = n / 5  # each with five equal pairs
        free = prompts - 1 if 0 < observed < 1 else prompts
        assert ends == (pytest.approx(share(observed, free)[1:]) if prompts >= 10 else [])
    assert any(len(row) == 7 for row in calibration) and any(len(row) == 5 for row in calibration)


def test_an_accuracy_of_few_prompts_has_their_number_and_one_of_1_has_a_width():
    groups, margin = some_groups(np.random.default_rng(0), 9)
    found, calibration = agreement.summary(groups, margin)
    assert f"held-out accuracy {found['eval/accuracy']:.3f} (n 9)" in agreement.report(found, calibration)
    groups, margin = some_groups(np.random.default_rng(0), 50, pairs=2)
    found, calibration = agreement.summary(groups, margin.abs())
    assert "held-out accuracy 1.000 [0.929, 1.000]" in agreement.report(found, calibration)  # Wilson's for 50 of 50


def test_responses_of_equal_length_say_so():
    groups, _ = some_groups(np.random.default_rng(0), 12)
    said = by_source_and_length(groups, torch.arange(24.0))
    assert said == "the two responses of every pair are equally long"


def test_options_on_the_command_line_stand_over_those_of_the_run_even_where_they_are_the_defaults(tmp_path):
    run = {"stage": "ppo", "options": {"temperature": 0.7, "response_len": 9, "device": "meta", "judge": "", "lora": 4}}
    (tmp_path / "config.json").write_text(json.dumps(run))
    cfg = of_its_run(str(tmp_path), [str(tmp_path), "--temperature", "1.0"])
    assert (cfg.temperature, cfg.response_len, cfg.device, cfg.lora) == (1.0, 9, "auto", 4)
    (tmp_path / "config.json").write_text(json.dumps(run | {"stage": "sft"}))
    assert of_its_run(str(tmp_path), [str(tmp_path)]) == evaluate.Config()
    assert of_its_run("a run of no file", ["DIR", "--seed", "3"]).seed == 3
    for damaged in ({"options": []}, {"inputs": "x"}):
        (tmp_path / "config.json").write_text(json.dumps(damaged))
        with pytest.raises(InputError, match="config.json: .* is no JSON object; remove the file"):
            of_its_run(str(tmp_path), [str(tmp_path)])
