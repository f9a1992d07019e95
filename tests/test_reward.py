"""reward.py: the loss, what it learns, how it is reported and normalised."""

import copy
import dataclasses
import itertools
import json
import math
import re

import pytest
import torch

import data
import reward
from common import agreement, measure
from common import nets as rooms
from model import ScalarModel
from tests.conftest import run, write

CPU = torch.device("cpu")
OFF = torch.autocast("cpu", enabled=False)


def test_the_loss_is_minus_log_sigmoid_of_the_margin_averaged_over_a_prompts_pairs(gpt, encoding, tmp_path):
    rows = [
        {"prompt": "ask", "ranked": [" yes", " no", " fox"]},
        {"prompt": "tell", "ranked": [" me", " a tale of a fox"]},
    ]
    groups = data.comparisons(write(tmp_path / "r.jsonl", rows), encoding, gpt.config.eos)
    model = ScalarModel(gpt).eval()
    margin = agreement.margins(groups, agreement.score_groups(model, groups, CPU))
    got = reward.pairwise_loss(margin, groups).item()
    expected = 0.0
    for group in groups:
        alone = [model.scores(torch.tensor([r.tokens]), torch.tensor([len(r.tokens)])).item() for r in group.rows]
        pairs = [(i, j) for i in range(len(alone)) for j in range(i + 1, len(alone))]
        expected += sum(math.log(1 + math.exp(alone[j] - alone[i])) for i, j in pairs) / len(pairs)
    assert abs(got - expected) < 1e-4


def test_a_ranked_list_gives_the_gradient_of_its_pairs_each_of_weight_one_over_their_number(gpt, encoding, tmp_path):
    """Ouyang et al. 2022, section 3.5: the same as the pairs one by one, though each response is read once only."""
    ranked = [{"prompt": "ask me", "ranked": [" yes", " no", " a fox", " a tale of a fox"]}]
    pairs = [
        {"prompt": "ask me", "chosen": better, "rejected": worse}
        for i, better in enumerate(ranked[0]["ranked"])
        for worse in ranked[0]["ranked"][i + 1 :]
    ]
    model = ScalarModel(gpt).eval()

    def gradient(groups):
        scores = agreement.score_groups(model, groups, CPU)
        loss = reward.pairwise_loss(agreement.margins(groups, scores), groups) / len(groups)
        model.zero_grad()
        loss.backward()
        return len(scores), loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    read, loss, together = gradient(data.comparisons(write(tmp_path / "r.jsonl", ranked), encoding, gpt.config.eos))
    alone = [
        data.comparisons(write(tmp_path / f"{i}.jsonl", [pair]), encoding, gpt.config.eos)[0]
        for i, pair in enumerate(pairs)
    ]
    read_alone, loss_alone, apart = gradient(alone)
    assert (read, read_alone) == (4, 12) and loss == pytest.approx(loss_alone, rel=1e-5)
    assert (together - apart).norm() < 1e-5 * apart.norm()


def test_after_normalising_scores_have_mean_0_and_variance_1_and_keep_their_order(gpt):
    model = ScalarModel(copy.deepcopy(gpt)).eval()
    model.head.bias.data.fill_(3.0)
    tokens, prompt_len, length = gpt.generate([[1, 2]] * 64, 12, generator=torch.Generator().manual_seed(0))
    rows = [data.Row(t[:n], p) for t, p, n in zip(tokens.tolist(), prompt_len.tolist(), length.tolist())]
    before = model.scores(tokens, length)
    for _ in range(2):  # a second time changes nothing
        reward.normalize(model, rows, 7, CPU, OFF)
        after = model.scores(tokens, length)
        assert abs(after.mean()) < 1e-4 and abs(after.std() - 1) < 1e-4
    assert torch.equal(before.argsort(stable=True), after.argsort(stable=True))


def test_a_reward_model_learns_a_preference_and_reports_it(folders):
    tmp = folders["tmp"]
    more = ["--init", folders["sft"], "--response_len", 8, "--lr", "3e-3", "--out", tmp / "rm", "--batch_size", 4]
    done = run("reward.py", "--data", tmp / "comparisons.jsonl", *more)
    assert done.returncode == 0, done.stderr
    last = json.loads((tmp / "rm" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["eval/accuracy"] == 1.0 and "held-out accuracy 1.000" in done.stdout
    model, encoding = rooms.load_scalar(tmp / "rm")
    good, bad = (data.encode_row(encoding, model.config.eos, "ask me me me.", text) for text in (" yes.", " no."))
    tokens, _, length = data.pad([good, bad])
    first, second = model.scores(tokens, length).tolist()
    assert first > second


def test_sampled_comparisons_are_written_as_a_persons_would_be(folders):
    tmp = folders["tmp"]
    (tmp / "mine.py").write_text("def longer(prompt, response):\n    return len(response) / 10\n")
    more = ["--init", folders["sft"], "--response_len", 8, "--out", tmp / "rm", "--n_prompts", 40]
    done = run("reward.py", "--data", tmp / "prompts.jsonl", "--judge", tmp / "mine.py:longer", *more)
    assert done.returncode == 0, done.stderr
    rows = data.read_jsonl(tmp / "rm" / "comparisons.jsonl", {"prompt": str, "chosen": str, "rejected": str})
    assert len({row["prompt"] for row in rows}) == 40
    again = run("reward.py", "--data", tmp / "prompts.jsonl", "--judge", tmp / "mine.py:longer", *more, "--resume")
    assert again.returncode == 0 and "answers" not in again.stdout, again.stderr
    last = json.loads((tmp / "rm" / "metrics.jsonl").read_text().splitlines()[-1])
    assert 0.5 <= last["eval/accuracy_ceiling"] <= 1


def test_calibration_sets_predicted_against_observed_win_rates(gpt, encoding, tmp_path):
    rows = [{"prompt": f"ask {i}", "chosen": " yes", "rejected": " no", "p_chosen": 0.75} for i in range(40)]
    groups = data.comparisons(write(tmp_path / "c.jsonl", rows), encoding, gpt.config.eos)
    model = ScalarModel(copy.deepcopy(gpt)).eval()
    model.head.weight.data.zero_()  # knows nothing: predicts 1/2 everywhere, and half of the turned pairs are won
    margin = agreement.margins(groups, agreement.read_scores(model, groups, 7, CPU, OFF))
    metrics, table = agreement.summary(groups, margin)
    assert table == [(0.5, 0.6, 40, 0.5, *measure.share(0.5, 40))] and metrics["eval/accuracy"] == 0.5
    assert metrics["eval/accuracy_ceiling"] == pytest.approx(0.75) and not margin.any()
    assert reward.pairwise_loss(margin, groups).item() / 40 == pytest.approx(math.log(2))


def test_a_reward_model_is_measured_on_a_file_with_subsets(folders):
    """A file in RewardBench's form; every number is counted again from scores that are read one by one."""
    tmp, words = folders["tmp"], ["yes", "no", "fox", "tale", "a tale of a fox"]
    rows = [
        {"prompt": f"ask {a} {c}.", "chosen": f" {a}.", "rejected": f" {b}.", "id": 1}
        | {"subset": "safety" if len(a) > 2 else "chat"}
        for a, b, c in itertools.product(words, words, ("me", "you"))
        if a != b
    ]
    write(tmp / "bench.jsonl", rows)
    done = run("tools/evaluate.py", folders["reward"], "--data", tmp / "bench.jsonl")
    assert done.returncode == 0, done.stderr
    model, encoding = rooms.load_scalar(folders["reward"])
    eos = model.config.eos

    def score(prompt, response):
        tokens = data.encode_prompt(encoding, prompt) + encoding.encode_ordinary(response) + [eos]
        return model.scores(torch.tensor([tokens]), torch.tensor([len(tokens)])).item(), len(tokens)

    right, longer, longer_wins, longer_scores = {"chat": [], "safety": []}, 0, 0, 0
    for row in rows:
        (good, long), (bad, short) = (score(row["prompt"], row[name]) for name in ("chosen", "rejected"))
        right[row["subset"]].append(good > bad)
        longer += long != short
        longer_wins += long > short
        longer_scores += (good > bad) == (long > short) and long != short
    for name, each in right.items():
        assert re.search(rf"^{name} +{len(each)} pairs  {sum(each) / len(each):.3f} \(n ", done.stdout, re.MULTILINE)
    assert f"held-out accuracy {sum(map(sum, right.values())) / len(rows):.3f}" in done.stdout
    assert f"wins {100 * longer_wins / longer:.1f}% of the pairs by the labels" in done.stdout
    assert f"{100 * longer_scores / longer:.1f}% by the scores" in done.stdout
    few = run("tools/evaluate.py", folders["reward"], "--data", tmp / "bench.jsonl", "--n_prompts", 2)
    assert f"{tmp / 'bench.jsonl'}: 2 prompts" in few.stdout, few.stderr
    assert sorted(path.name for path in folders["reward"].iterdir()) == ["model.pt"]


def test_an_empty_prompt_takes_a_place_of_the_context(folders):
    """Generation starts from EOS there, so an answer as long as the context does not fit."""
    tmp = folders["tmp"]
    write(tmp / "empty.jsonl", [{"prompt": ""}] * 20)
    (tmp / "mine.py").write_text("def longer(prompt, response):\n    return len(response) / 10\n")
    given = reward.Config(data=f"{tmp}/empty.jsonl", init=str(folders["sft"]), out=f"{tmp}/rm", response_len=48)
    with pytest.raises(data.InputError, match="20 of 20 prompts .* are longer than 48 tokens"):
        reward.train(dataclasses.replace(given, judge=f"{tmp}/mine.py:longer"))


def test_samples_that_normalise_keep_to_the_block_size(gpt):
    groups = [data.Group([data.Row([*range(1, n), 1], n - 1)], [], []) for n in (4, 13, 14, 30)]
    rows = reward.sample_policy(gpt, groups, reward.Config(block_size=20, response_len=8), OFF)
    assert {row.prompt_len for row in rows} == {3, 12} and max(len(row.tokens) for row in rows) <= 20
