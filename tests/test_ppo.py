"""ppo.py: its mathematics against slow float64 loops, and what must hold before and after an update."""

import copy
import json
import math
import re

import numpy as np
import pytest
import torch

import data
import ppo
import reward
from common import cli, compare, runs
from common import nets as rooms
from data.rng import generator
from model import GPT, ScalarModel
from tests.conftest import flat, make_gpt, ragged, run

CPU = torch.autocast("cpu", enabled=False)
PROMPTS = [[1], [2, 3, 4, 5], [6, 7], [8, 9, 10], [11], [12, 13]]


def make_batch(policy, ref, value, cfg, prompts=PROMPTS, seed=0):
    batch = ppo.rollout(policy, prompts, cfg, torch.Generator().manual_seed(seed))
    reward = ScalarModel(copy.deepcopy(ref)).eval()
    return batch | ppo.read(batch, policy, ref, value, ppo.scorer(reward, None, 60, cfg), cfg)


@pytest.fixture
def nets():
    policy = make_gpt()
    policy.config.dropout = 0.5  # must not matter: stage 3 runs in eval mode
    ref = rooms.freeze(copy.deepcopy(policy), CPU)
    torch.manual_seed(1)
    return policy, ref, ScalarModel(copy.deepcopy(policy)).eval()


def test_frozen_copy_in_bfloat16_starts_at_kl_zero_too(nets):
    policy, _, value = nets
    autocast = torch.autocast("cpu", torch.bfloat16)
    ref = rooms.freeze(copy.deepcopy(policy), autocast)
    assert ref.h[0].mlp.c_fc.weight.dtype == torch.bfloat16
    with autocast:
        batch = make_batch(policy, ref, value, ppo.Config(response_len=16))
    assert (batch["logp"] - batch["ref_logp"]).abs().max() == 0


def test_an_unended_response_gets_the_lower_of_its_score_and_the_cap():
    batch = ragged(np.random.default_rng(0))
    batch["score"] = torch.tensor([2.0, 2.0, -3.0, -3.0, 0.0])
    batch["ended"] = torch.tensor([True, False, True, False, False])
    for cap, expected in ((None, [2, -1, -3, -3, -1]), (0.5, [2, 0.5, -3, -3, 0]), (math.inf, [2, 2, -3, -3, 0])):
        assert ppo.estimate(batch, 0.0, ppo.Config(unended_cap=cap))["final_score"].tolist() == expected
    for mix, expected in (("a.py:f,out/reward", [2, -1, -3, -3, -1]), ("a.py:f,b.py:g", batch["score"].tolist())):
        assert ppo.final_scores(batch, ppo.Config(reward=mix)).tolist() == expected


def test_score_gae_and_value_see_the_same_token(nets):
    """With γ = λ = 1 and no KL the return of every token is the score of the whole response."""
    policy, ref, value = nets
    cfg = ppo.Config(response_len=16, lam=1.0, unended_cap=math.inf)
    batch = make_batch(policy, ref, value, cfg)
    got = ppo.estimate(batch, 0.0, cfg)
    expected = (batch["score"][:, None] * batch["mask"]).float()
    torch.testing.assert_close(got["returns"], expected, rtol=0, atol=1e-5)


def train(folders, **more):
    """ppo.py on the tiny folders; the rows of its metrics.jsonl."""
    given = {"data": folders["tmp"] / "prompts.jsonl", "init": folders["sft"], "reward": folders["reward"]}
    given |= {"iterations": 3, "batch_size": 8, "minibatch_size": 4, "response_len": 8, "epochs": 2, "eval_prompts": 8}
    given |= {"out": folders["tmp"] / "ppo"} | more
    words = [str(word) for name, value in given.items() for word in (f"--{name}", value)[: 1 if value is True else 2]]
    ppo.train(cli.parse(ppo.Config, words))
    return runs.read_metrics(given["out"])


def timeless(lines):
    return [{k: v for k, v in line.items() if not k.startswith("time/") and k != "tokens_per_s"} for line in lines]


def test_same_seed_same_metrics(folders):
    one, two = (timeless(train(folders, out=folders["tmp"] / name, iterations=2)) for name in "ab")
    assert one == two


def test_a_python_function_can_be_the_reward_and_its_score_goes_up(folders):
    tmp = folders["tmp"]
    (tmp / "mine.py").write_text("def longer(prompt, response):\n    return len(response.encode()) / 8\n")
    more = dict(reward=f"{tmp}/mine.py:longer", judge=f"{tmp}/mine.py:longer", lr=0.003, kl_coef=0.0)
    lines = train(folders, **more, iterations=12, batch_size=32, minibatch_size=16)
    first, last = (np.mean([line["objective/judge"] for line in part]) for part in (lines[:3], lines[-3:]))
    assert last > first and all(line["objective/judge"] == pytest.approx(line["objective/scores"]) for line in lines)


def test_a_finished_policy_is_measured_with_the_options_of_its_run_and_nothing_is_written(folders):
    tmp = folders["tmp"]
    for name in ("one", "two"):  # neither judge hides behind the other, nor behind the reward model's score
        (tmp / f"{name}.py").write_text(f"def score(prompt, response):\n    return {len(name)} + ({name!r} == 'two')\n")
    train(folders, judge=f"{tmp}/one.py:score,{tmp}/two.py:score", iterations=1)
    before = {path.name: path.read_bytes() for path in (tmp / "ppo").iterdir()}
    done = run("tools/evaluate.py", tmp / "ppo", "--best_of", "1,2")
    assert done.returncode == 0, done.stderr
    assert "8 held-out prompts" in done.stdout and "best of n by the final score" in done.stdout
    assert re.search(r"one.py:score +3.000 \(n 8\)", done.stdout)
    assert re.search(r"two.py:score +4.000 \(n 8\)", done.stdout)
    assert before == {path.name: path.read_bytes() for path in (tmp / "ppo").iterdir()}
    about = json.loads((tmp / "ppo" / "config.json").read_text())
    about["options"]["penalty"] = 0.1
    (tmp / "ppo" / "config.json").write_text(json.dumps(about))
    assert "--penalty: not in this ppo.py" in run("tools/evaluate.py", tmp / "ppo").stdout
    (tmp / "sft" / "model.pt").write_bytes((tmp / "ppo" / "model.pt").read_bytes())  # as in another folder
    done = run("tools/evaluate.py", tmp / "ppo")
    assert done.returncode == 2 and f"--init {tmp / 'sft'}: is not the model that it was in this run" in done.stderr


def test_each_net_learns_at_a_rate_of_its_own(nets):
    policy, ref, value = nets
    cfg = ppo.Config(response_len=16, minibatch_size=6, epochs=1, max_grad_norm=1e-3)
    batch = make_batch(policy, ref, value, cfg)
    batch |= ppo.estimate(batch, 0.1, cfg)
    before = flat(policy), flat(value)
    optimizers = [torch.optim.SGD(net.parameters(), lr=1.0) for net in (policy, value)]
    ppo.update(policy, value, *optimizers, batch, 2.0, 5.0, cfg, CPU, seed=0)
    assert (flat(policy) - before[0]).norm().item() == pytest.approx(2e-3, rel=2e-2)
    assert (flat(value) - before[1]).norm().item() == pytest.approx(5e-3, rel=2e-2)


def test_the_share_of_clipped_tokens_is_that_of_trl_where_the_clipped_branch_is_the_larger_loss(nets):
    policy, ref, value = nets
    cfg = ppo.Config(response_len=16, minibatch_size=6, epochs=1, cliprange_value=0.01)
    batch = make_batch(policy, ref, value, cfg)
    batch |= ppo.estimate(batch, 0.1, cfg)
    mask = batch["mask"]
    noise = torch.randn(mask.shape, generator=torch.Generator().manual_seed(0))
    moved = batch | {"logp": (batch["logp"] + 0.3 * noise) * mask, "values": (batch["values"] + 0.1 * noise) * mask}
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.0) for net in (policy, value)]
    metrics = ppo.update(policy, value, *optimizers, moved, 0.0, 0.0, cfg, CPU, seed=0)
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


def test_the_rates_fall_in_a_straight_line_once_the_value_net_has_had_its_warm_up():
    cfg = ppo.Config(iterations=16, value_warmup=2, lr=1.0, value_lr=2.0)
    policy, value = zip(*(ppo.rates(step, cfg) for step in range(16)))
    left = [(16 - step) / 16 for step in range(16)]
    assert policy == pytest.approx([left[i] * min(1, max(0, i - 1) / 4) for i in range(16)])
    assert value == pytest.approx([2 * x for x in left])
    assert [ppo.rates(0, ppo.Config(iterations=n, lr=1.0))[0] > 0 for n in (1, 3, 4, 8)] == [True, True, False, False]


def test_a_run_is_resumed_with_its_own_options_alone_and_from_a_state_of_this_version(folders):
    state = folders["tmp"] / "ppo" / "state.pt"
    train(folders)
    with pytest.raises(data.InputError, match="was made with --iterations 3; give the same options"):
        train(folders, iterations=4, resume=True)
    saved = torch.load(state, weights_only=True)
    for version in (None, 1):
        old = {name: x for name, x in saved.items() if name != "version"}
        torch.save(old if version is None else old | {"version": version}, state)
        with pytest.raises(data.InputError, match="state.pt is of another version of this project; start anew"):
            train(folders, resume=True)


def test_the_best_policy_on_held_out_prompts_is_kept(folders):
    tmp = folders["tmp"]
    (tmp / "mine.py").write_text("def shorter(prompt, response):\n    return -len(response.encode())\n")
    more = dict(judge=f"{tmp}/mine.py:shorter", reward=f"{tmp}/mine.py:shorter", eval_every=1, lr=0.01, iterations=6)
    lines = train(folders, out=tmp / "ppo", **more)
    found = [line["eval/judge"] for line in lines]
    assert len(found) == 6 and len(set(found)) > 1
    best, encoding = rooms.load_gpt(tmp / "ppo" / "best.pt")
    _, held_out = data.prompts_and_held_out(str(tmp / "prompts.jsonl"), "", encoding, 40, 8)
    cfg, value = ppo.Config(response_len=8, minibatch_size=4), ScalarModel(copy.deepcopy(best))
    shorter = lambda rows: [-len(row["response"].encode()) for row in rows]  # noqa: E731
    score = ppo.scorer(shorter, encoding, best.config.eos, cfg)
    batch = ppo.rollout(best, [prompt.ids for prompt in held_out], cfg, generator("evaluate", 0, 0))
    batch |= ppo.read(batch, best, best, value, score, cfg)
    assert batch["score"].mean().item() == pytest.approx(max(found))


def test_the_policy_that_is_kept_is_the_best_by_what_ppo_raises_with_the_beta_of_its_iteration(folders, monkeypatch):
    """A reward that likes length, with a cap that lowers most scores."""
    tmp, kept, keep = folders["tmp"], [], runs.Run.keep_best
    (tmp / "mine.py").write_text("def longer(prompt, response):\n    return len(response.encode()) / 8\n")
    monkeypatch.setattr(runs.Run, "keep_best", lambda self, *a: (kept.append(a[0]), keep(self, *a)))
    more = dict(reward=f"{tmp}/mine.py:longer", unended_cap=-1, kl_target=0.01, value_warmup=0)
    lines = train(folders, eval_every=1, lr=0.01, iterations=6, **more)
    by_score = [line["eval/score"] - line["kl_coef"] * line["eval/kl"] for line in lines]
    by_final = [line["eval/final_score"] - line["kl_coef"] * line["eval/kl"] for line in lines]
    assert kept == pytest.approx(by_final) and lines[-1]["kl_coef"] != lines[0]["kl_coef"]
    assert all(final < score for final, score in zip(by_final, by_score))  # the cap lowers what has no end
    state = torch.load(tmp / "ppo" / "state.pt", weights_only=True)
    assert state["goodness"] == pytest.approx(max(by_final))


def test_a_minibatch_that_does_not_divide_the_batch_is_refused_and_a_larger_one_is_said(folders, capsys):
    with pytest.raises(data.InputError, match="--batch_size has to be a multiple of --minibatch_size"):
        train(folders, batch_size=8, minibatch_size=3)
    whole, larger = (train(folders, batch_size=8, minibatch_size=size, iterations=1) for size in (8, 16))
    assert "--minibatch_size 16: a batch of 8 answers is one minibatch" in capsys.readouterr().out
    assert whole[0]["loss/policy_avg"] == larger[0]["loss/policy_avg"]


def test_a_decode_of_few_rows_at_a_time_gives_the_answers_of_one_of_all(nets, encoding, folders, monkeypatch):
    """In a rollout, an evaluation, simulated comparisons and the samples that normalise; so memory is bounded there."""
    policy, ref, value = nets
    wide, rows, generate = [], [[1], [2, 3, 4, 5], [6, 7], [8, 9, 10], [11], [12, 13], []], GPT.generate
    monkeypatch.setattr(GPT, "generate", lambda net, ids, *a, **k: wide.append(len(ids)) or generate(net, ids, *a, **k))
    monkeypatch.setattr(reward, "N_NORMALIZE", 150)
    found, texts = [], make_gpt(vocab_size=encoding.n_vocab, eos=encoding.eot_token)
    groups = [data.Group([data.Row([*row, 1], len(row))], [], []) for row in rows]
    for size in (0, 3):
        wide.clear()
        cfg = ppo.Config(response_len=9, micro_batch_size=size)
        read = ref, value, ppo.scorer(ScalarModel(copy.deepcopy(ref)).eval(), None, 60, cfg)
        batch = ppo.answer(cfg, CPU, read, policy, [data.Prompt(ids, {}) for ids in rows], generator("a"))
        answers = compare.sample_responses(texts, encoding, rows[:3], 4, 9, 1.0, 0, size and 1)
        sampled = reward.sample_policy(policy, groups, reward.Config(response_len=9, micro_batch_size=size), CPU)
        found.append((batch["tokens"].tolist(), batch["length"].tolist(), answers, sampled))
        assert max(wide) == (4 if size else 128)
    assert found[0] == found[1]


def test_a_target_alone_moves_beta_by_zieglers_formula_once_the_policy_moves(folders):
    """Ziegler et al. 2019, section 2.2, with K = 0.25, from the default β."""
    lines = train(folders, iterations=8, kl_target=0.5, lr=0.01)
    betas, beta = [line["kl_coef"] for line in lines], 0.05
    for i, line in enumerate(lines):
        assert betas[i] == pytest.approx(beta, rel=1e-9)
        if i >= 2:  # the value net's warm-up is over
            beta *= 1 + 0.25 * min(max((line["objective/kl"] - 0.5) / 0.5, -0.2), 0.2)
    assert betas[2] == 0.05 and betas[3] < 0.05
    assert len({line["kl_coef"] for line in train(folders, iterations=8, lr=0.01)}) == 1  # without a target it stays


def test_a_resumed_run_keeps_no_second_copy_of_what_was_saved(folders, monkeypatch):
    train(folders, iterations=2)
    kept, start = [], runs.Run.start
    monkeypatch.setattr(runs.Run, "start", lambda self, *a, **k: (start(self, *a, **k), kept.append(self.state)))
    train(folders, iterations=2, resume=True)
    assert len(kept) == 1 and not any(isinstance(x, dict) and "state" in x for x in kept[0].values())
    assert "model" not in kept[0] and "value" not in kept[0]


def test_select_cuts_tokens_and_the_window_and_leaves_what_a_fork_added_whole(nets):
    policy, ref, value = nets
    cfg = ppo.Config(response_len=7)
    batch = make_batch(policy, ref, value, cfg, PROMPTS * 8)
    batch |= ppo.estimate(batch, 0.1, cfg)
    batch["mine"] = torch.arange(48.0 * 7).view(48, 7)  # (B, 7), as wide as the window may be
    width = batch["length"] - batch["prompt_len"]
    assert width.max() == 7 and (short := (width < 7).nonzero()[:, 0]).numel()
    part = ppo.select(batch, short)
    r = int(width[short].max())
    assert torch.equal(part["mine"], batch["mine"][short])
    for name in ("logp", "ref_logp", "values", "entropy", "mask", "rewards", "advantages", "returns"):
        assert torch.equal(part[name], batch[name][short, :r])
    assert torch.equal(part["tokens"], batch["tokens"][short, : int(batch["length"][short].max())])
