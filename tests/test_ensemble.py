"""Several reward models: --reward a,b,c --combine mean, min or lcb, against numpy and what each of them says alone."""

import copy
import re

import numpy as np
import pytest
import torch

import data
import ppo
from common import cli, folders, nets, runs
from model import ScalarModel
from tests.conftest import make_gpt, run

BY_HAND = {"mean": lambda x: x.mean(0), "min": lambda x: x.min(0), "lcb": lambda x: x.mean(0) - x.std(0)}


@pytest.fixture
def three(folders, gpt, encoding):
    """Three reward models of one trunk, with heads of their own: `folders`, and their names as --reward takes them."""
    for i in range(3):
        torch.manual_seed(i)
        model = ScalarModel(copy.deepcopy(gpt))
        model.bias.fill_(i / 10)
        (folders["tmp"] / f"rm{i}").mkdir()
        nets.save_model(model, encoding, folders["tmp"] / f"rm{i}" / "model.pt")
    return folders | {"rewards": ",".join(str(folders["tmp"] / f"rm{i}") for i in range(3))}


def parsed(three, **options):
    given = {"data": three["tmp"] / "prompts.jsonl", "init": three["sft"], "reward": three["rewards"]}
    given |= {"iterations": 2, "batch_size": 8, "minibatch_size": 4, "response_len": 8, "eval_prompts": 12}
    given |= {"out": three["tmp"] / "ppo", "lr": 0.01, "device": "cpu"} | options
    words = [str(word) for name, value in given.items() for word in (f"--{name}", value)[: 1 if value is True else 2]]
    return cli.parse(ppo.Config, words)


def alone(three, batch) -> np.ndarray:
    """What each of the three says of whole answers: (3, B), in float64."""
    models = [nets.load_scalar(name)[0] for name in three["rewards"].split(",")]
    with torch.no_grad():
        return torch.stack([model.scores(batch["tokens"], batch["length"]) for model in models]).double().numpy()


@pytest.mark.parametrize("how", BY_HAND)
def test_the_scores_of_several_are_combined_as_numpy_combines_them(three, gpt, how):
    cfg, models = parsed(three, combine=how), [nets.load_scalar(name)[0] for name in three["rewards"].split(",")]
    batch = ppo.rollout(gpt, [[1], [2, 3], [4]] * 6, cfg, torch.Generator().manual_seed(0))
    each = alone(three, batch)
    np.testing.assert_allclose(ppo.scorer(models, None, gpt.config.eos, cfg)(batch), BY_HAND[how](each), atol=1e-5)
    np.testing.assert_allclose(batch["disagreement"], each.std(0), atol=1e-5)
    assert each.std(0).min() > 1e-3


def test_a_policy_trained_on_three_by_min_gets_the_least_of_what_each_says_alone(three, monkeypatch):
    batches, read = [], ppo.read
    monkeypatch.setattr(ppo, "read", lambda batch, *rest: batches.append(batch | read(batch, *rest)) or batches[-1])
    ppo.train(parsed(three, combine="min", unended_cap="inf"))
    for line, batch in zip(runs.read_metrics(three["tmp"] / "ppo"), batches, strict=False):
        each = alone(three, batch)
        np.testing.assert_allclose(batch["score"], each.min(0), atol=1e-5)
        assert line["objective/scores"] == pytest.approx(each.min(0).mean(), abs=1e-5)
        assert line["objective/disagreement"] == pytest.approx(each.std(0).mean(), abs=1e-5)
    assert line["step"] == 1


def test_a_list_of_one_scores_as_the_model_alone(gpt):
    cfg, model = ppo.Config(response_len=8), ScalarModel(gpt).eval()
    batch = ppo.rollout(gpt, [[1], [2, 3]] * 8, cfg, torch.Generator().manual_seed(0))
    one, listed = (ppo.scorer(each, None, gpt.config.eos, cfg)(batch) for each in (model, [model]))
    assert torch.equal(one, listed) and "disagreement" not in batch


def test_the_value_net_starts_from_the_first_and_a_function_may_be_one_of_them(three):
    (three["tmp"] / "f.py").write_text("def f(prompt, response):\n    return -99.0\n")
    device, autocast = cli.setup(ppo.Config(device="cpu"))
    first, function = three["rewards"].split(",")[0], f"{three['tmp']}/f.py:f"
    cfg = parsed(three, reward=f"{first},{function}", combine="min")
    policy, _, value, score, _ = ppo.build(cfg, device, autocast)
    assert torch.equal(value.head.weight, nets.load_scalar(first)[0].head.weight)
    batch = ppo.rollout(policy, [[1], [2, 3]], cfg, torch.Generator().manual_seed(0))
    assert score(batch).tolist() == [-99.0, -99.0]
    _, _, value, _, _ = ppo.build(parsed(three, reward=f"{function},{first}"), device, autocast)
    assert not value.head.weight.any()


@pytest.mark.slow
def test_evaluation_measures_by_all_of_them_and_shows_where_they_disagree(three):
    ppo.train(parsed(three, combine="lcb"))
    done = run("tools/evaluate.py", three["tmp"] / "ppo", "--best_of", "1,3", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert re.search(r"^disagreement +\d", done.stdout, re.MULTILINE)
    best = done.stdout.split("best of n by the final score")[1].splitlines()
    assert "disagreement" in best[0]
    assert float(best[2].split()[5]) > float(best[1].split()[5])  # the final score that --combine makes


def test_several_that_do_not_fit_are_refused_in_a_sentence(three, monkeypatch):
    first, second, _ = three["rewards"].split(",")
    other = data.learn_bpe(["the quick brown fox jumps over the lazy dog"] * 9, 300)
    strange = ScalarModel(make_gpt(vocab_size=other.n_vocab, eos=other.eot_token))
    (three["tmp"] / "strange").mkdir()
    nets.save_model(strange, other, three["tmp"] / "strange" / "model.pt")
    for options, said in (
        ({"combine": "median"}, "--combine median: give mean, min or lcb"),
        ({"reward": f"{first},nowhere"}, "--reward nowhere: no model.pt there; .* bring it in with tools.hf"),
        ({"reward": f"{first},{three['tmp']}/strange"}, "--reward .*strange: was trained with another vocabulary"),
        ({"reward": f"{first},{three['tmp']}/f.py:f"}, "f.py:f: no such Python file"),
        ({"out": second}, f"--out {second}: is --reward too"),
    ):
        with pytest.raises(data.InputError, match=said):
            ppo.train(parsed(three, **options))
    assert not (three["tmp"] / "ppo").exists()


def test_a_run_on_several_is_not_resumed_once_one_of_them_has_changed(three):
    ppo.train(parsed(three))
    names = three["rewards"].split(",")
    assert len(folders.fingerprint(three["rewards"]).split()) == 3
    model, encoding = nets.load_scalar(names[1])
    model.bias.fill_(9.0)
    nets.save_model(model, encoding, three["tmp"] / "rm1" / "model.pt")
    with pytest.raises(data.InputError, match="--resume: --reward .* has changed since"):
        ppo.train(parsed(three, resume=True))
    with pytest.raises(data.InputError, match="--combine mean; give the same options"):
        ppo.train(parsed(three, resume=True, combine="min"))
