"""Mistakes that RLHF code is known for, each one a test that states the fact which the mistake breaks.

Above each test stands its mistake: the file, the right code, and what it looks like when it is wrong. `pytest -m slow`
makes every one of them, in a copy of the project, and sees the test below it fail.
"""

import copy
import json
import math
import re
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch

import data
import ppo
import reward
import sft
from common import about, cli, compare, dist, judges, lora, measure, runs
from common import nets as rooms
from data import InputError
from data.label import preference
from experiments.forks import patched
from model import GPT, GPTConfig, ScalarModel
from tests.conftest import ROOT, flat, make_gpt, ragged, run, write

CPU, OFF = torch.device("cpu"), torch.autocast("cpu", enabled=False)
PROMPTS = [[1], [2, 3, 4, 5], [6, 7], [8, 9, 10], [60, 11], [12, 13]]  # 60 is EOS: one prompt has it inside
MISTAKES: list[tuple[str, str, dict[str, str]]] = []  # test, file, right → wrong


def mistake(file: str, right: str, wrong: str, **more: str):
    """Marks the test that must fail once `right`, which stands in `file` exactly once, is replaced by `wrong`.

    A mistake of two places gives the second as `right2` and `wrong2`.
    """
    changes = {right: wrong} | ({more["right2"]: more["wrong2"]} if more else {})

    def mark(test):
        MISTAKES.append((test.__name__, file, changes))
        return test

    return mark


def forms() -> dict[str, tuple[str, str, dict[str, str]]]:
    """Every form of every mistake as in MISTAKES, by its name: the number above its test, and a letter."""
    numbered = re.findall(r"^# (\d+)\n[\s\S]*?^def (test_\w+)", Path(__file__).read_text(), re.MULTILINE)
    found = {}
    for number, test in numbered:
        own = [form for form in reversed(MISTAKES) if form[0] == test]  # decorators come from below
        found |= {f"{number}{letter}": form for letter, form in zip("abcdefgh", own)}
    return found


def plant(target: Path, file: str, changes: dict[str, str]) -> None:
    """Copy the project to the folder `target`, with a mistake in it."""
    shutil.copytree(ROOT, target, ignore=shutil.ignore_patterns(".*", "out", "__pycache__"))
    source = (target / file).read_text()
    for right, wrong in changes.items():
        assert source.count(right) == 1, f"{file} no longer holds, once, the line that this mistake changes"
        source = source.replace(right, wrong)
    (target / file).write_text(source)


@pytest.fixture
def nets():
    """A policy, its frozen copy, a value net and a reward model."""
    policy = make_gpt()
    ref = rooms.freeze(copy.deepcopy(policy), OFF)
    torch.manual_seed(1)
    return policy, ref, ScalarModel(copy.deepcopy(policy)).eval(), ScalarModel(copy.deepcopy(policy)).eval()


def rollout(nets, cfg, prompts=PROMPTS):
    policy, ref, value, scorer = nets
    batch = ppo.rollout(policy, prompts, cfg, torch.Generator().manual_seed(0))
    return batch | ppo.read(batch, policy, ref, value, ppo.scorer(scorer, None, 60, cfg), cfg)


def estimated(nets, cfg):
    """A rollout, with rewards, advantages and returns at β = 0.1."""
    batch = rollout(nets, cfg)
    return batch | ppo.estimate(batch, 0.1, cfg)


def update(nets, batch, cfg, lr=0.0):
    """ppo.py's own update by plain gradient descent, so that a step is the gradient."""
    policy, _, value, _ = nets
    optimizers = [torch.optim.SGD(net.parameters(), lr=lr) for net in (policy, value)]
    return ppo.update(policy, value, *optimizers, batch, lr, lr, cfg, OFF, seed=0)


def train_ppo(folders, **options):
    """ppo.py on the tiny folders; the rows of its metrics.jsonl."""
    given = {"data": folders["tmp"] / "prompts.jsonl", "init": folders["sft"], "reward": folders["reward"]}
    given |= {"iterations": 3, "batch_size": 8, "minibatch_size": 4, "response_len": 8, "eval_prompts": 8}
    given |= {"out": folders["tmp"] / "ppo", "epochs": 2} | options
    words = [str(word) for name, value in given.items() for word in (f"--{name}", value)[: 1 if value is True else 2]]
    ppo.train(cli.parse(ppo.Config, words))
    return runs.read_metrics(given["out"])


# 1
@mistake(  # sorted rows, not put back
    "ppo.py", "found[name][index.to(device), : x.shape[1]] = x", "found[name][: len(index), : x.shape[1]] = x"
)
@mistake("ppo.py", "ratio = (logp - old_logp).exp()", "ratio = (logp - old_logp.roll(1, 1)).exp()")
def test_ratio_is_one_and_kl_is_zero_before_the_first_update(nets):
    cfg = ppo.Config(response_len=16, minibatch_size=3, epochs=2, lr=0.0)
    batch = rollout(nets, cfg)
    assert torch.equal(batch["logp"], batch["ref_logp"]) and batch["logp"].any()
    metrics = update(nets, batch | ppo.estimate(batch, 0.1, cfg), cfg)
    assert abs(metrics["policy/ratio"] - 1) < 1e-5 and metrics["policy/clipfrac_avg"] == 0
    assert metrics["policy/approxkl"] < 1e-10


# 2
@mistake("ppo.py", "net.eval().requires_grad_(True)", "net.train().requires_grad_(True)")
@mistake("common/nets.py", "model.eval().requires_grad_(False)", "model.train().requires_grad_(False)")
def test_dropout_is_off_in_the_policy_and_in_the_reference(folders, gpt, encoding):
    gpt.config.dropout = 0.5
    rooms.save_model(gpt, encoding, folders["sft"] / "model.pt")
    (line,) = train_ppo(folders, iterations=1, lr=0.0)
    assert line["objective/kl"] == 0 and line["policy/approxkl"] < 1e-10


# 3
@mistake("model.py", "mask = position < length[:, None]", "mask = position <= length[:, None]")
@mistake("model.py", "prompt_len[:, None] + torch.arange(R, device", "prompt_len[:, None] + 1 + torch.arange(R, device")
def test_the_window_is_every_response_token_from_the_first_to_eos_and_no_pad(nets):
    batch = rollout(nets, ppo.Config(response_len=16))
    for row, start, end, logp in zip(batch["tokens"], batch["prompt_len"], batch["length"], batch["logp"]):
        whole = nets[0](row[None, :end]).double().log_softmax(-1)[0]  # the chain rule, on the row alone
        expected = [whole[t - 1, row[t]].item() for t in range(int(start), int(end))]
        assert logp[: len(expected)].tolist() == pytest.approx(expected, abs=1e-5)
        assert not logp[len(expected) :].any()


# 4
@mistake("data/rows.py", "return Row(start + ids + end * ended, len(start))", "return Row(start + ids, len(start))")
@mistake(
    "model.py",
    "length += ~done\n            done |= torch.isin(token, ends)",
    "done |= torch.isin(token, ends)\n            length += ~done",
)
def test_eos_is_learned_in_stage_1_and_is_the_last_token_of_a_response_that_ended(gpt, encoding):
    row = data.encode_row(encoding, gpt.config.eos, "ask me", " yes")
    logp = gpt(torch.tensor([row.tokens])).log_softmax(-1)[0]
    ids = encoding.encode_ordinary("ask me") + encoding.encode_ordinary(" yes") + [gpt.config.eos]
    expected = -sum(logp[t - 1, ids[t]].item() for t in range(row.prompt_len, len(ids)))
    assert sft.next_token_loss(gpt, [row], CPU).item() == pytest.approx(expected, abs=1e-4)
    batch = ppo.rollout(make_gpt(), PROMPTS * 20, ppo.Config(response_len=40), torch.Generator().manual_seed(0))
    assert 20 < batch["ended"].sum() < 120
    for row, start, end, ended in zip(*(batch[name].tolist() for name in ("tokens", "prompt_len", "length", "ended"))):
        assert 60 not in row[start : end - 1] and (row[end - 1] == 60) == ended == (
            end - start < 40 or row[end - 1] == 60
        )


# 5
@mistake(
    "model.py",
    "row, real = mask.nonzero()[:, 0], position[mask]",
    "mask = mask & (tokens.gather(1, position) != self.config.eos)\n        row, real = mask.nonzero()[:, 0], position[mask]",
)
@mistake(
    "model.py",
    "pick(hidden, torch.arange(len(tokens)), length - 1)",
    "pick(hidden, torch.arange(len(tokens)), (tokens != self.config.eos).sum(1) - 1)",
)
def test_a_pad_may_be_eos_and_eos_is_not_a_pad(nets):
    policy, _, value, _ = nets
    tokens = torch.tensor([[60, 5, 6, 60, 60, 60], [7, 8, 9, 60, 11, 60]])  # EOS opens, stands inside, ends and pads
    prompt_len, length = torch.tensor([1, 4]), torch.tensor([4, 6])
    logp, scores = policy.logprobs(tokens, prompt_len, length), value.scores(tokens, length)
    for b in range(2):
        n, whole = int(length[b]), policy(tokens[b : b + 1, : length[b]]).log_softmax(-1)[0]
        expected = [whole[t - 1, tokens[b, t]].item() for t in range(int(prompt_len[b]), n)]
        assert logp[b, : len(expected)].tolist() == pytest.approx(expected, abs=1e-5)
        at_eos = value.scalar(value.trunk.hidden(tokens[b : b + 1, :n])[0, -1])
        assert scores[b].item() == pytest.approx(at_eos.item(), abs=1e-5)


# 6
@mistake("fast.py", "is_causal=mask is None, enable_gqa=grouped", "is_causal=False, enable_gqa=grouped")
@mistake("fast.py", "-math.inf, dtype=q.dtype, device=q.device).triu(1)", "0.0, dtype=q.dtype, device=q.device)")
@pytest.mark.parametrize("short", [0, 128])  # attention by the fused kernel, and by plain products
def test_a_row_is_the_same_alone_and_beside_longer_rows(nets, short, monkeypatch):
    monkeypatch.setattr("fast.SHORT", short)
    policy, _, value, _ = nets
    batch = rollout(nets, ppo.Config(response_len=12))
    tokens, prompt_len, length = batch["tokens"], batch["prompt_len"], batch["length"]
    tokens[torch.arange(tokens.shape[1]) >= length[:, None]] = 17  # pads may be anything
    logp, values = policy.logprobs(tokens, prompt_len, length), value.values(tokens, prompt_len, length)
    scores = value.scores(tokens, length)
    for b in range(len(tokens)):
        n, r = int(length[b]), int(length[b] - prompt_len[b])
        alone = tokens[b : b + 1, :n], prompt_len[b : b + 1], length[b : b + 1]
        torch.testing.assert_close(logp[b, :r], policy.logprobs(*alone)[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(values[b, :r], value.values(*alone)[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(scores[b], value.scores(alone[0], alone[2])[0], rtol=0, atol=1e-5)


# 7
@mistake("model.py", "position=(start + t)[:, None]", "position=torch.full_like(start, P + t)[:, None]")
@mistake("model.py", ".masked_fill(in_gap[:, None, None], -math.inf)", "")
def test_a_ragged_batch_is_decoded_as_each_prompt_is_alone(nets):
    policy = nets[0]
    tokens, prompt_len, length = policy.generate(PROMPTS, 20, temperature=0)
    for b, prompt in enumerate(PROMPTS):
        row = list(prompt)
        while len(row) < len(prompt) + 20:  # no cache, no batch, no padding
            row.append(int(policy(torch.tensor([row]))[0, -1].argmax()))
            if row[-1] == policy.config.eos:
                break
        assert tokens[b, : length[b]].tolist() == row and prompt_len[b] == len(prompt)


# 8
@mistake(
    "ppo.py",
    "policy.logprobs_and_entropy(*sequences, cfg.temperature)",
    "policy.logprobs_and_entropy(*sequences)",
)
@mistake("ppo.py", "ref.logprobs(*sequences, cfg.temperature)", "ref.logprobs(*sequences)")
@mistake(
    "ppo.py",
    "policy.logprobs(*sequences, cfg.temperature)  # (b, r)",
    "policy.logprobs(*sequences)  # (b, r)",
)
@mistake("ppo.py", "how = cfg.response_len, cfg.temperature, rng", "how = cfg.response_len, 1.0, rng")
def test_the_temperature_is_in_the_sampling_in_the_ratio_and_in_the_reference(nets):
    cfg = ppo.Config(response_len=1, minibatch_size=10_000, epochs=1, temperature=0.5)
    batch = rollout(nets, cfg, [[1, 2, 3]] * 10_000)
    expected = (nets[0](torch.tensor([[1, 2, 3]]))[0, -1].double() / 0.5).log_softmax(-1)
    for name in ("logp", "ref_logp"):
        torch.testing.assert_close(batch[name][:, 0].double(), expected[batch["tokens"][:, 3]], rtol=0, atol=1e-5)
    top = int(expected.argmax())
    p = expected[top].exp().item()
    assert abs((batch["tokens"][:, 3] == top).double().mean() - p) < 5 * math.sqrt(p * (1 - p) / 10_000)
    metrics = update(nets, batch | ppo.estimate(batch, 0.1, cfg), cfg)
    assert metrics["policy/approxkl"] < 1e-10


# 9
@mistake("common/nets.py", '"generator": rng}', '"generator": rng, "top_k": 20}')
def test_responses_are_drawn_from_the_whole_softmax_that_scores_them(nets):
    n = 10_000
    batch = rollout(nets, ppo.Config(response_len=1), [[1, 2, 3]] * n)
    p = nets[0](torch.tensor([[1, 2, 3]]))[0, -1].double().softmax(-1).detach()
    counts = batch["tokens"][:, 3].bincount(minlength=61)
    statistic = float(((counts - p * n) ** 2 / (p * n)).sum())
    assert p.min() * n > 5 and statistic < 60 + 5 * math.sqrt(2 * 60)  # chi-square with 60 degrees of freedom, 5 sigma


# 10
@mistake(
    "model.py",
    "self.trunk.hidden(tokens[:, :-1])  # (B, T − 1, C)\n        values = self.scalar(pick(hidden, torch.arange(len(tokens))[:, None], position - 1))",
    "self.trunk.hidden(tokens)\n        values = self.scalar(pick(hidden, torch.arange(len(tokens))[:, None], position))",
)
@mistake("ppo.py", "cfg.gamma * next_value - values[:, r]", "cfg.gamma * values[:, r] - values[:, r]")
def test_a_value_is_that_of_the_state_before_its_token(nets):
    cfg = ppo.Config(response_len=16, lam=0.0, unended_cap=math.inf)
    batch = rollout(nets, cfg)
    got = ppo.estimate(batch, 0.0, cfg)
    for b, (start, end) in enumerate(zip(batch["prompt_len"].tolist(), batch["length"].tolist())):
        before = [
            nets[2].scalar(nets[2].trunk.hidden(batch["tokens"][b : b + 1, :t]))[0, -1] for t in range(start, end)
        ]
        targets = before[1:] + [batch["score"][b]]  # with λ = 0 a return is the next value, and the score at the end
        assert batch["values"][b, : end - start].tolist() == pytest.approx([v.item() for v in before], abs=1e-5)
        assert got["returns"][b, : end - start].tolist() == pytest.approx([v.item() for v in targets], abs=1e-5)


# 11
@mistake(
    "common/dist.py",
    "total((x * mask).sum()) / total(mask.sum())",
    "total(x.sum()) / total(torch.tensor(mask.numel()))",
)
@mistake("ppo.py", "whiten(advantages, mask),", "whiten(whiten(advantages, mask) + values, mask),")
def test_whitened_advantages_have_mean_0_and_variance_1_over_real_tokens_and_keep_their_order():
    for seed in range(5):
        batch = ragged(np.random.default_rng(seed))
        got, mask = ppo.estimate(batch, 0.3, ppo.Config()), batch["mask"]
        white, plain = got["advantages"][mask], (got["returns"] - batch["values"])[mask]
        assert (
            abs(white.mean()) < 1e-9 and abs(white.var(correction=0) - 1) < 1e-6 and not got["advantages"][~mask].any()
        )
        torch.testing.assert_close(white, (plain - plain.mean()) / plain.std(correction=0), rtol=1e-6, atol=1e-6)


# 12
@mistake("ppo.py", "returns = (advantages + values) * mask", "returns = (whiten(advantages, mask) + values) * mask")
def test_returns_are_the_rewards_still_to_come_not_made_from_whitened_advantages():
    batch = ragged(np.random.default_rng(0))
    got = ppo.estimate(batch, 0.3, ppo.Config(gamma=1.0, lam=1.0))
    for rewards, returns, mask in zip(got["rewards"], got["returns"], batch["mask"]):
        n = int(mask.sum())
        assert returns[:n].tolist() == pytest.approx([rewards[t:n].sum().item() for t in range(n)], abs=1e-9)


# 13
@mistake("ppo.py", 'adapt(kl_coef, metrics["objective/kl"]', 'adapt(kl_coef, metrics["policy/approxkl"]')
def test_adaptive_beta_follows_the_kl_to_the_reference_not_the_updates_own(folders):
    options = {"iterations": 8, "lr": 0.02, "value_warmup": 0, "kl_target": 0.5, "kl_coef": 0.3}
    lines = train_ppo(folders, **options)
    beta = 0.3
    for line in lines:
        assert line["kl_coef"] == pytest.approx(beta, rel=1e-6)
        error = min(max(line["objective/kl"] / 0.5 - 1, -0.2), 0.2)  # Ziegler et al. 2019, section 2.2
        beta *= 1 + 0.25 * error
    betas = [line["kl_coef"] for line in lines]
    assert min(betas) < betas[0] and betas[-1] > min(betas)  # it went both ways


# 14
@mistake(
    "common/measure.py",
    'kl = ((batch["logp"] - batch["ref_logp"]) * mask).sum(1)  # (B,) nats',
    'kl = ((batch["logp"] - batch["ref_logp"]) * mask).sum(1) / mask.sum(1)',
)
@mistake("ppo.py", '- batch["ref_logp"])  # (B, R)', '- batch["ref_logp"]) / mask.sum(1, keepdim=True)  # (B, R)')
def test_a_responses_kl_is_the_sum_over_its_tokens_and_all_of_it_is_charged(nets):
    policy, ref, value, scorer = nets
    policy = make_gpt(seed=5)
    batch = rollout((policy, ref, value, scorer), ppo.Config(response_len=16))
    got = ppo.estimate(batch, 0.3, ppo.Config(unended_cap=math.inf))
    total = 0.0
    for b, (start, end) in enumerate(zip(batch["prompt_len"].tolist(), batch["length"].tolist())):
        row = batch["tokens"][b : b + 1, :end]
        mine, theirs = (net(row).log_softmax(-1)[0, range(start - 1, end - 1), row[0, start:]] for net in (policy, ref))
        kl = (mine.sum() - theirs.sum()).item()
        assert got["rewards"][b].sum().item() == pytest.approx(batch["score"][b].item() - 0.3 * kl, abs=1e-3)
        total += kl
    metrics = measure.rollout_metrics(batch | got, [], 0.3)
    assert metrics["objective/kl"] == pytest.approx(total / len(PROMPTS), abs=1e-3)


# 15
@mistake(
    "ppo.py",
    "loss = ((pg_losses + vf_losses) * mask).sum() / n_tokens",
    "loss = (pg_losses * mask).sum() / mask.sum() + (vf_losses * mask).sum() / n_tokens",
)
@mistake(
    "ppo.py",
    "loss = ((pg_losses + vf_losses) * mask).sum() / n_tokens",
    "loss = (pg_losses * mask).sum() / n_tokens + (vf_losses * mask).sum() / mask.sum()",
)
@mistake("reward.py", "pairwise_loss(margin, part) / len(batch)", "pairwise_loss(margin, part) / len(part)")
@mistake(
    "sft.py",
    "next_token_loss(model, part, device) / n_targets",
    "next_token_loss(model, part, device) / count_targets(part)",
)
def test_how_a_batch_is_split_does_not_change_its_step(nets, folders):
    cfg = ppo.Config(response_len=16, minibatch_size=3, epochs=1, max_grad_norm=0.0)
    batch = estimated(nets, cfg)
    steps = []
    for cfg.micro_batch_size in (0, 1, 2):
        copied = copy.deepcopy(nets)
        update(copied, batch, cfg, lr=0.1)
        steps.append(torch.cat([flat(copied[i]) - flat(nets[i]) for i in (0, 2)]))
    for step in steps[1:]:
        assert (step - steps[0]).norm() < 1e-5 * steps[0].norm()
    for script, config, kind in ((sft, sft.Config, "pairs"), (reward, reward.Config, "comparisons")):
        norms = []
        for size in (0, 3):
            options = (
                f"--data {folders['tmp']}/{kind}.jsonl --init {folders['sft']} --out {folders['tmp']}/{kind}{size}"
            )
            options += f" --micro_batch_size {size} --batch_size 8" + (
                " --response_len 2 --n_prompts 16" if script is reward else " --epochs 0.1"
            )
            script.train(cli.parse(config, options.split()))
            norms.append(runs.read_metrics(folders["tmp"] / f"{kind}{size}")[0]["grad_norm"])
        assert norms[1] == pytest.approx(norms[0], rel=1e-5)


# 16
@mistake(
    "ppo.py",
    "0.5 * torch.maximum((values - returns).square(), (clipped - returns).square())",
    "0.5 * (clipped - returns).square()",
)
def test_a_value_clipped_on_the_wrong_side_still_gets_a_gradient():
    values = torch.tensor([1.0], requires_grad=True)  # moved away from its return, by more than the clip range
    ppo.value_loss(values, torch.tensor([0.0]), torch.tensor([-1.0]), 0.2).sum().backward()
    assert values.grad.item() == 2.0


# 17
@mistake(
    "ppo.py",
    "                loss.backward()\n",
    '                torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.max_grad_norm)\n                cfg = Config(**vars(cfg) | {"max_grad_norm": 0.0})\n                loss.backward()\n',
)
@mistake(
    "common/nets.py",
    'nn.utils.clip_grad_norm_(model.parameters(), max_norm or float("inf"))',
    "nn.utils.get_total_norm([p.grad for p in model.parameters()])",
)
def test_gradients_are_clipped_after_backward_each_net_by_itself(nets):
    cfg = ppo.Config(response_len=16, minibatch_size=6, epochs=1, max_grad_norm=0.01)
    batch = estimated(nets, cfg)
    before = [flat(nets[i]) for i in (0, 2)]
    update(nets, batch, cfg, lr=1.0)
    for net, start in zip((nets[0], nets[2]), before):
        assert (flat(net) - start).norm().item() == pytest.approx(0.01, rel=1e-2)


# 18
@mistake(
    "ppo.py",
    'ref, ref_encoding = nets.load_gpt(cfg.ref or cfg.init, device, "--ref", trunks)',
    "ref, ref_encoding = policy, encoding",
)
@mistake("ppo.py", 'value, _ = nets.load_scalar(names[0], device, "--reward", trunks)\n', "value = rewards[0]\n")
@mistake(
    "ppo.py",
    'value, _ = nets.load_scalar(names[0], device, "--reward", trunks)\n',
    "value = rewards[0]\n",
    right2="frozen = [ref, *(each for each in rewards if isinstance(each, ScalarModel))]",
    wrong2="frozen = [ref]",
)
def test_frozen_copy_and_reward_model_end_bit_identical_to_how_they_began(folders, monkeypatch):
    kept, freeze = [], rooms.freeze
    monkeypatch.setattr(rooms, "freeze", lambda m, a: kept.append((freeze(m, a), copy.deepcopy(m.state_dict()))) or m)
    train_ppo(folders, lr=0.01)
    assert len(kept) == 2
    for net, before in kept:
        assert all(torch.equal(before[name], x) for name, x in net.state_dict().items())
    started, ended = rooms.load_gpt(folders["sft"])[0], rooms.load_gpt(folders["tmp"] / "ppo")[0]
    assert not torch.equal(flat(started), flat(ended))
    learned = torch.load(folders["tmp"] / "ppo" / "state.pt", weights_only=True)["value"]
    assert not torch.equal(learned["head.weight"], rooms.load_scalar(folders["reward"])[0].head.weight)


# 19
@mistake(
    "ppo.py",
    'reward.scores(part["tokens"], part["length"])',
    "reward.scores(*data.pad([data.encode_row(encoding, eos, row['prompt'], row['response'], end) for row, end in zip(measure.as_rows(part, encoding, eos), part['ended'].tolist())])[::2])",
)
def test_the_tokens_that_are_scored_are_those_that_were_sampled(gpt, encoding):
    scorer = ScalarModel(copy.deepcopy(gpt)).eval()
    nets, cfg = (gpt, gpt, scorer, scorer), ppo.Config(response_len=16)
    batch = ppo.rollout(gpt, [encoding.encode_ordinary("ask me")] * 32, cfg, torch.Generator().manual_seed(0))
    batch |= ppo.read(batch, *nets[:3], ppo.scorer(scorer, encoding, encoding.eot_token, cfg), cfg)
    rows = measure.as_rows(batch, encoding, encoding.eot_token)
    again = [encoding.encode_ordinary(row["response"]) for row in rows]
    ends = batch["length"] - batch["ended"].long()  # without EOS
    sampled = [row[s:e].tolist() for row, s, e in zip(batch["tokens"], batch["prompt_len"], ends)]
    assert sum(a != b for a, b in zip(again, sampled)) > 16  # text would not give these tokens back
    for row, end, score in zip(batch["tokens"], batch["length"], batch["score"]):
        alone = scorer.scalar(scorer.trunk.hidden(row[None, :end])[0, -1])
        assert score.item() == pytest.approx(alone.item(), abs=1e-5)


# 20
@mistake("data/batches.py", "if not kept or n_long > len(items) / 10:", "if False:")
@mistake(
    "data/rows.py",
    "found = read_prompts(path, encoding)",
    "found = [p._replace(ids=p.ids[:room]) for p in read_prompts(path, encoding)]",
)
def test_prompts_that_do_not_fit_are_counted_and_never_cut(folders):
    long = write(folders["tmp"] / "long.jsonl", [{"prompt": "ask me. " * n} for n in [1, 2] * 10 + [50, 60] * 2])
    with pytest.raises(InputError, match="4 of 24 prompts .* are longer than 40 tokens"):
        train_ppo(folders, data=long)


# 21
@mistake("common/dist.py", "return items[RANK::WORLD]", "return items[: len(items) // WORLD]")
@mistake("ppo.py", 'generator("rollout", cfg.seed, step, dist.RANK)', 'generator("rollout", cfg.seed, step)')
def test_every_process_answers_prompts_of_its_own_with_chance_of_its_own(folders):
    tmp = folders["tmp"]
    code = f"import json, os\ndef seen(prompt, response):\n    with open('{tmp}/rank' + os.environ['RANK'], 'a') as file:\n        file.write(json.dumps([prompt, response]) + '\\n')\n    return 0\n"
    (tmp / "mine.py").write_text(code)
    options = ["--init", folders["sft"], "--reward", folders["reward"], "--judge", f"{tmp}/mine.py:seen"]
    options += ["--iterations", 1, "--batch_size", 16, "--minibatch_size", 16, "--response_len", 8, "--eval_prompts", 1]
    for kind, rows in (("many", data.read_jsonl(tmp / "prompts.jsonl", {})), ("one", [{"prompt": "ask me."}] * 32)):
        given = ["--data", write(tmp / f"{kind}.jsonl", rows), "--eval_data", tmp / "prompts.jsonl"]
        done = run("ppo.py", *given, *options, "--out", tmp / kind, processes=2)
        assert done.returncode == 0, done.stderr
        first, second = ([json.loads(x) for x in (tmp / f"rank{r}").read_text().splitlines()][:8] for r in (0, 1))
        assert len({prompt for prompt, _ in first + second}) == (16 if kind == "many" else 1)
        assert first != second
        for rank in (0, 1):
            (tmp / f"rank{rank}").unlink()


# 22
@mistake(
    "ppo.py",
    '"policy_optimizer": policy_optimizer, "value_optimizer": value_optimizer}',
    '"policy_optimizer": policy_optimizer}',
)
@mistake("ppo.py", 'run.state["kl_coef"] if run.state else cfg.kl_coef', "cfg.kl_coef")
@mistake(
    "ppo.py",
    "data.shuffled(prompts, cfg.batch_size, cfg.seed, lengths=None, step=step)",
    "data.shuffled(prompts, cfg.batch_size, cfg.seed, lengths=None, step=step - run.step)",
)
def test_a_run_that_was_stopped_and_resumed_is_the_run_that_was_not(folders, monkeypatch):
    options = {"iterations": 4, "save_every": 2, "kl_target": 0.5, "lr": 0.01}
    whole = train_ppo(folders, **options, out=folders["tmp"] / "whole")
    save = runs.Run.save

    def save_then_die(self, *args, **parts):
        save(self, *args, **parts)
        raise KeyboardInterrupt

    monkeypatch.setattr(runs.Run, "save", save_then_die)
    with pytest.raises(KeyboardInterrupt):
        train_ppo(folders, **options)
    monkeypatch.setattr(runs.Run, "save", save)
    with open(folders["tmp"] / "ppo" / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "objective/kl": 99}\n{"step": 3, "obj')  # a third step that was never saved
    resumed = train_ppo(folders, **options, resume=True)
    timeless = [
        [{k: v for k, v in line.items() if "time/" not in k and k != "tokens_per_s"} for line in lines]
        for lines in (whole, resumed)
    ]
    assert timeless[0] == timeless[1] and len(resumed) == 4
    ended = [flat(rooms.load_gpt(folders["tmp"] / name)[0]) for name in ("whole", "ppo")]
    assert torch.equal(*ended)


# 23
@mistake("model.py", "std=1 / math.sqrt(trunk.config.n_embd + 1)", "std=1 / (trunk.config.n_embd + 1)")
def test_the_scalar_head_starts_with_std_one_over_root_of_width_plus_one():
    torch.manual_seed(0)
    head = ScalarModel(GPT(GPTConfig(vocab_size=10, block_size=4, n_layer=1, n_head=1, n_embd=1023))).head
    assert abs(head.weight.std().item() * 32 - 1) < 0.1 and head.bias.item() == 0


# 24
@mistake(
    "model.py",
    "pick(hidden, torch.arange(len(tokens)), length - 1)",
    "pick(hidden, torch.arange(len(tokens)), length * 0 + tokens.shape[1] - 1)",
)
def test_the_score_is_read_at_the_last_real_token(nets):
    scorer = nets[3]
    rows = [data.Row([1, 2, 3], 1), data.Row([4, 5, 6, 7, 8, 9, 10, 60], 2)]
    tokens, _, length = data.pad(rows)
    for row, score in zip(rows, scorer.scores(tokens, length)):
        at_end = scorer.scalar(scorer.trunk.hidden(torch.tensor([row.tokens]))[0, -1])
        assert score.item() == pytest.approx(at_end.item(), abs=1e-5)


# 25
@mistake(
    "sft.py",
    "return -model.logprobs(*data.pad(rows, device)).sum()",
    "tokens, prompt_len, length = data.pad(rows, device)\n    return -model.logprobs(tokens, torch.ones_like(prompt_len), length).sum()",
)
def test_the_fine_tuning_loss_leaves_the_prompt_out(gpt, encoding):
    rows = [
        data.encode_row(encoding, gpt.config.eos, prompt, " yes") for prompt in ("ask me", "tell me a tale of a fox")
    ]
    expected = 0.0
    for row in rows:
        logp = gpt(torch.tensor([row.tokens])).log_softmax(-1)[0]
        expected -= sum(logp[t - 1, row.tokens[t]].item() for t in range(row.prompt_len, len(row.tokens)))
    assert sft.next_token_loss(gpt, rows, CPU).item() == pytest.approx(expected, abs=1e-4)
    assert sft.count_targets(rows) == sum(len(encoding.encode_ordinary(" yes")) + 1 for _ in rows)


# 26
@mistake(
    "ppo.py",
    'rewards = -kl_coef * (batch["logp"] - batch["ref_logp"])',
    'rewards = -kl_coef * (batch["ref_logp"] - batch["logp"])',
)
def test_drift_from_the_frozen_copy_is_charged_and_never_paid():
    policy, ref = make_gpt(seed=5), rooms.freeze(make_gpt(), OFF)
    cfg = ppo.Config(response_len=16, unended_cap=math.inf)
    batch = ppo.rollout(policy, PROMPTS * 50, cfg, torch.Generator().manual_seed(0))
    batch |= ppo.read(batch, policy, ref, ScalarModel(make_gpt()), lambda part: torch.zeros(len(part["tokens"])), cfg)
    rewards = ppo.estimate(batch, 0.3, cfg)["rewards"].sum(1)  # of each response: the charge alone
    assert rewards.mean() < -3 * rewards.std() / len(rewards) ** 0.5
    more = (batch["logp"] - batch["ref_logp"]).sum(1) > 0  # said more by the policy than by the copy
    assert more.any() and (rewards[more] < 0).all() and (rewards[~more] >= 0).all()


# 27
@mistake(
    "ppo.py",
    "torch.maximum(-advantages * ratio, -advantages * clipped_ratio)",
    "torch.minimum(-advantages * ratio, -advantages * clipped_ratio)",
)
@mistake("ppo.py", "torch.maximum(-advantages * ratio, -advantages * clipped_ratio)", "-advantages * clipped_ratio")
@pytest.mark.parametrize(
    "advantage, ratio, learns", [(1, 1.5, False), (1, 0.5, True), (-1, 1.5, True), (-1, 0.5, False)]
)
def test_the_clip_stops_what_went_far_enough_and_never_what_went_the_wrong_way(advantage, ratio, learns):
    logp = torch.tensor([math.log(ratio)], requires_grad=True)
    losses, _ = ppo.policy_loss(logp, torch.zeros(1), torch.tensor([float(advantage)]), 0.2)
    losses.sum().backward()
    assert logp.grad.item() == pytest.approx(-advantage * ratio if learns else 0.0)


# 28
@mistake(
    "model.py", "mask = position < length[:, None]", "mask = position < (length - 1).maximum(prompt_len + 1)[:, None]"
)
@mistake("ppo.py", "last = mask.sum(1, keepdim=True) - 1", "last = (mask.sum(1, keepdim=True) - 2).clamp(min=0)")
def test_the_end_token_gets_the_score_and_a_gradient_so_that_stopping_is_learned(nets):
    cfg = ppo.Config(response_len=16, unended_cap=math.inf)
    batch = rollout(nets, cfg, PROMPTS * 10)
    got = ppo.estimate(batch, 0.0, cfg)
    rows = [b for b in range(60) if batch["ended"][b]]
    assert rows
    logp = nets[0].logprobs(batch["tokens"], batch["prompt_len"], batch["length"]).requires_grad_()
    logp.retain_grad()
    (ppo.policy_loss(logp, batch["logp"], got["advantages"], 0.2)[0] * batch["mask"]).sum().backward()
    for b in rows:
        column = int(batch["length"][b] - batch["prompt_len"][b]) - 1  # of EOS
        assert batch["tokens"][b, batch["length"][b] - 1] == 60
        assert got["rewards"][b, column].item() == pytest.approx(batch["score"][b].item(), abs=1e-5)
        assert logp.grad[b, column] != 0


# 29
@mistake(
    "ppo.py",
    'rewards = -kl_coef * (batch["logp"] - batch["ref_logp"])',
    'rewards = 0 * kl_coef * (batch["logp"] - batch["ref_logp"])',
    right2="loss = ((pg_losses + vf_losses) * mask).sum() / n_tokens",
    wrong2='loss = ((pg_losses + vf_losses + 0.3 * (logp - part["ref_logp"])) * mask).sum() / n_tokens',
)
def test_the_kl_charge_moves_the_policy_down_the_gradient_of_the_kl():
    """Against the exact KL of one-token responses, all listed. As a loss term log π − log π₀ has a gradient of mean 0."""
    policy, ref = make_gpt(seed=5), rooms.freeze(make_gpt(), OFF)
    cfg = ppo.Config(response_len=1, minibatch_size=10_000, epochs=1, max_grad_norm=0.0, unended_cap=math.inf)
    value = ScalarModel(make_gpt())
    batch = ppo.rollout(policy, [[1, 2, 3]] * 10_000, cfg, torch.Generator().manual_seed(0))
    batch |= ppo.read(batch, policy, ref, value, lambda part: torch.zeros(len(part["tokens"])), cfg)
    batch |= ppo.estimate(batch, 0.3, cfg)
    prompt = torch.tensor([[1, 2, 3]])
    logp, ref_logp = (net(prompt)[0, -1].log_softmax(-1) for net in (policy, ref))
    (logp.exp() * (logp - ref_logp)).sum().backward()
    exact = torch.cat([p.grad.flatten() for p in policy.parameters()])
    policy.zero_grad()
    before = flat(policy)
    update((policy, ref, value, None), batch, cfg, lr=1.0)
    assert torch.cosine_similarity(before - flat(policy), exact, dim=0) > 0.95


# 30
@mistake("common/judges.py", "if not abs(number) < 3e38:", "if False:")
@mistake("common/runs.py", "if not math.isfinite(x):", "if False:")
def test_a_score_that_is_no_number_ends_the_run_and_is_never_learned_from(folders):
    tmp = folders["tmp"]
    (tmp / "mine.py").write_text(
        "n = 0\ndef score(prompt, response):\n    global n\n    n += 1\n    return float('nan') if n == 21 else 0.0\n"
    )
    with pytest.raises(InputError, match="mine.py:score: returned nan for .*; return a finite number"):
        train_ppo(folders, reward=f"{tmp}/mine.py:score", save_every=1, value_warmup=0)
    assert len(runs.read_metrics(tmp / "ppo")) == 2  # the third batch holds it
    reward_model, encoding = rooms.load_scalar(folders["reward"])
    with torch.no_grad():
        reward_model.trunk.wte.weight[encoding.encode_ordinary("ask")[0]] = 3e38  # only some prompts have it
    rooms.save_model(reward_model, encoding, folders["reward"] / "model.pt")
    with pytest.raises(InputError, match="objective/.* is (nan|inf|-inf), so the run stops"):
        train_ppo(folders, out=tmp / "other", save_every=1, value_warmup=0)
    assert not (tmp / "other" / "model.pt").exists()
    for name in ("sft", "ppo"):
        assert flat(rooms.load_gpt(tmp / name)[0]).isfinite().all()


# 31
@mistake("common/folders.py", 'if now != state["inputs"].get(name, now):', "if False:")
@pytest.mark.parametrize("changed", ["sft", "reward"])
def test_a_run_does_not_go_on_against_another_reference_or_reward_model(folders, gpt, changed):
    train_ppo(folders)
    model, encoding = rooms.load(folders[changed])
    with torch.no_grad():
        next(model.parameters()).add_(0.1)
    rooms.save_model(model, encoding, folders[changed] / "model.pt")
    with pytest.raises(InputError, match=f"--{'init' if changed == 'sft' else 'reward'} .* has changed"):
        train_ppo(folders, resume=True)


# 32
@mistake("data/rows.py", "if answers[winner].text == answers[loser].text:", "if False:")
def test_no_response_is_compared_with_an_equal_one_and_the_reader_says_how_many_were(tmp_path, encoding):
    said: list[str] = []
    ranked = [{"prompt": "a", "ranked": ["yes", "yes", "no"]}, {"prompt": "b", "ranked": ["no", "no"]}]
    groups = data.comparisons(write(tmp_path / "r.jsonl", ranked), encoding, 0, said.append)
    assert [group.pairs for group in groups] == [[(0, 1), (0, 1)]]  # both of "yes" before "no"
    assert len(groups[0].rows) == 2 and "2 left out (pairs of equal texts)" in said.pop()
    pairs = [{"prompt": "a", "chosen": "yes", "rejected": "yes"}, {"prompt": "a", "chosen": "yes", "rejected": "no"}]
    (group,) = data.comparisons(write(tmp_path / "p.jsonl", pairs), encoding, 0, said.append)
    assert group.pairs == [(0, 1)] and len(group.certainty) == 1 and "1 left out (pairs" in said.pop()
    with pytest.raises(InputError, match="1 left out .pairs of equal texts.; nothing is left to compare"):
        data.comparisons(write(tmp_path / "q.jsonl", pairs[:1]), encoding, 0)


# 33
@mistake("ppo.py", 'measured(policy, held_out, "after", cfg.seed)', 'measured(policy, held_out, "before", cfg.seed)')
@mistake("common/measure.py", 'return f"{mean:.3f} [{error:.3f}, {high[0]:.3f}]"', 'return f"{mean:.3f}"')
def test_a_policy_wins_half_of_its_games_against_itself_by_draws_of_its_own(folders, capsys):
    tmp = folders["tmp"]
    (tmp / "mine.py").write_text("def length(prompt, response):\n    return len(response)\n")
    options = {"judge": f"{tmp}/mine.py:length", "eval_prompts": 100, "eval_data": tmp / "prompts.jsonl"}
    train_ppo(folders, iterations=1, lr=0.0, **options)  # the policy ends as it was
    found = re.search(r"win rate against the reference +(\S+) \[(\S+), (\S+)\]", capsys.readouterr().out)
    assert found
    mean, low, high = map(float, found.groups())
    assert 0.15 < high - low < 0.2 and abs(mean - 0.5) < high - low
    answers = json.loads((tmp / "ppo" / "report.json").read_text())["answers"]
    assert sum(each["before"]["text"] != each["after"]["text"] for each in answers) > 90


# 34
@mistake("ppo.py", "alone = min(cfg.value_warmup, cfg.iterations // 4)", "alone = 0")
def test_the_policy_stands_still_until_the_value_net_has_learned(folders):
    lines = train_ppo(folders, iterations=8, value_warmup=2, lr=0.01, value_lr=0.01)
    assert [line["objective/kl"] == 0 for line in lines] == [True] * 3 + [False] * 5
    assert all(line["loss/value_avg"] > 0 and line["value/grad_norm"] > 0 for line in lines)
    assert [line["lr"] > 0 for line in lines] == [abs(line["policy/ratio"] - 1) > 1e-6 for line in lines]
    assert [line["lr"] > 0 for line in lines] == [False] * 2 + [True] * 6


# 35
@mistake("ppo.py", "if cfg.unended_cap is None else cfg.unended_cap", "if not cfg.unended_cap else cfg.unended_cap")
@mistake("common/judges.py", "    if not abs(number) < 3e38:", "    if not given or not abs(number) < 3e38:")
@mistake("data/rows.py", 'p = row.get("p_chosen", math.nan)', 'p = row.get("p_chosen") or math.nan')
def test_a_number_of_0_is_a_number_and_is_not_taken_for_a_missing_one(tmp_path, encoding):
    batch = {"score": torch.tensor([2.0, -2.0, 2.0]), "ended": torch.tensor([False, False, True])}
    assert ppo.final_scores(batch, ppo.Config(unended_cap=0.0)).tolist() == [0.0, -2.0, 2.0]
    (tmp_path / "mine.py").write_text("def score(prompt, response):\n    return float(len(response))\n")
    rows = [{"prompt": "a", "response": text} for text in ("", "no")]
    try:
        found = judges.load_function(f"{tmp_path}/mine.py:score")(rows)
    except InputError as error:
        found = str(error)
    assert found == [0.0, 2.0]
    row = {"prompt": "a", "chosen": "yes", "rejected": "no", "p_chosen": 0.0}
    assert data.comparisons(write(tmp_path / "p.jsonl", [row]), encoding, 0)[0].certainty == [1.0]


# 36
@mistake("ppo.py", 'value_loss(values, part["values"]', 'value_loss(values.detach(), part["values"]')
@mistake(
    "model.py",
    "pick(hidden, torch.arange(len(tokens))[:, None], position - 1))",
    "pick(hidden.detach(), torch.arange(len(tokens))[:, None], position - 1))",
)
def test_the_whole_value_net_moves_down_the_gradient_of_its_squared_error(nets):
    cfg = ppo.Config(response_len=16, minibatch_size=6, epochs=1, max_grad_norm=0.0, cliprange_value=math.inf)
    batch = estimated(nets, cfg)
    value = copy.deepcopy(nets[2])
    errors = []
    for row, start, end, returns in zip(*(batch[name] for name in ("tokens", "prompt_len", "length", "returns"))):
        said = value.scalar(value.trunk.hidden(row[None, : end - 1])[0, start - 1 :])  # row by row, without padding
        errors.append(said - returns[: end - start])
    (0.5 * torch.cat(errors).square().mean()).backward()
    before = flat(nets[2])
    update(nets, batch, cfg, lr=1e-2)
    expected = torch.cat([p.grad.flatten() for p in value.parameters()])
    torch.testing.assert_close(
        (before - flat(nets[2])) / 1e-2, expected, rtol=1e-3, atol=2e-4 * expected.abs().max().item()
    )


# 37
@mistake(
    "ppo.py",
    'dist.total(batch["mask"][rows.to(batch["mask"].device)].sum())',
    'batch["mask"][rows.to(batch["mask"].device)].sum() * dist.WORLD',
)
@mistake(
    "common/dist.py", "total((x * mask).sum()) / total(mask.sum())", "total((x * mask).sum() / mask.sum()) / WORLD"
)
def test_two_processes_with_unlike_many_tokens_take_the_step_of_one(nets, monkeypatch):
    """The processes are threads here, and what they sum meets at a barrier."""
    cfg = ppo.Config(response_len=16, minibatch_size=6, epochs=1, max_grad_norm=0.0)
    batch = rollout(nets, cfg)
    short = batch["mask"].sum(1).argsort()
    halves, copies = [ppo.select(batch, rows) for rows in (short[:3], short[3:])], [copy.deepcopy(nets) for _ in "01"]
    update(nets, batch | ppo.estimate(batch, 0.1, cfg), cfg, lr=0.1)
    meet, given = threading.Barrier(2), {}

    def total(x):
        given[threading.get_ident()] = x
        meet.wait()
        found = sum(given.values())
        meet.wait()
        return found

    def sum_gradients(net):
        for p in net.parameters():
            p.grad = total(p.grad)

    def step(half, own):
        update(own, half | ppo.estimate(half, 0.1, cfg), cfg, lr=0.1)

    for name, x in (("WORLD", 2), ("total", total), ("sum_gradients", sum_gradients)):
        monkeypatch.setattr(dist, name, x)
    with ThreadPoolExecutor(2) as pool:
        assert len(list(pool.map(step, halves, copies))) == 2
    for i in (0, 2):
        for own in copies:
            torch.testing.assert_close(flat(own[i]), flat(nets[i]), rtol=0, atol=1e-5)


# 38
@mistake(
    "ppo.py",
    'dist.total(batch["mask"][rows.to(batch["mask"].device)].sum())',
    '(batch["length"] - batch["prompt_len"])[rows].sum()',
)
def test_an_answer_that_is_masked_out_weighs_nothing_in_the_mean_either(nets):
    cfg = ppo.Config(response_len=16, minibatch_size=6, epochs=1, max_grad_norm=0.0)
    batch = estimated(nets, cfg)
    steps = []
    for out in ("masked", "absent"):
        own, mine = copy.deepcopy(nets), dict(batch)
        if out == "masked":
            mine["mask"] = batch["mask"] & (torch.arange(6) > 0)[:, None]
        else:
            mine = ppo.select(batch, torch.arange(1, 6))
        update(own, mine, cfg, lr=0.1)
        steps.append(torch.cat([flat(own[i]) - flat(nets[i]) for i in (0, 2)]))
    assert (steps[0] - steps[1]).norm() < 1e-4 * steps[1].norm()


# 39
@mistake(
    "experiments/forks/distil.diff",
    '+    rewards = -kl_coef * (batch["logp"] - batch["ref_logp"]) * mask',
    '+    rewards = -kl_coef * batch["ref_logp"].exp() * (batch["ref_logp"] - batch["logp"]) * mask',
)
def test_distillation_is_rewarded_by_the_students_kl_to_the_teacher_at_the_students_samples(tmp_path):
    """−r has the mean KL(π ‖ π_teacher) of the next token. A weight of the teacher's makes it the mean of nothing."""
    (tmp_path / "distil.py").write_text(patched((ROOT / "ppo.py").read_text(), "distil"))
    fork, student, teacher, n = judges.import_file(tmp_path / "distil.py", 0), make_gpt(seed=5), make_gpt(), 2_000
    cfg = fork.Config(response_len=1)
    batch = fork.rollout(student, [[1, 2, 3]] * n, cfg, torch.Generator().manual_seed(0))
    batch |= fork.read(batch, student, teacher, ScalarModel(teacher), lambda part: torch.zeros(n), cfg)
    charged = -fork.estimate(batch, cfg.kl_coef, cfg)["rewards"][:, 0]
    logp, teachers = (net(torch.tensor([[1, 2, 3]]))[0, -1].double().log_softmax(-1) for net in (student, teacher))
    kl = (logp.exp() * (logp - teachers)).sum().item()
    assert abs(charged.mean().item() - kl) < 5 * charged.std().item() / n**0.5


# 40
@mistake(
    "common/lora.py",
    'place.startswith("h.") and place.endswith(LAYERS)',
    'place.startswith("h.") and place.endswith(LAYERS) and module.in_features == module.out_features',
)
@mistake(
    "common/lora.py",
    "return super().forward(x) + F.linear(low, self.B)",
    "return super().forward(x) + F.linear(low, self.B) * torch.is_grad_enabled()",
)
def test_every_layer_of_a_block_is_adapted_and_what_is_scored_is_sampled(folders):
    net = rooms.load_gpt(folders["sft"], CPU, "", lora.Trunks(4, OFF))[0]
    C = net.config.n_embd
    shapes = [(C, 3 * C), (C, C), (C, 4 * C), (4 * C, C)]  # in and out of attention and MLP
    assert sum(p.numel() for p in net.parameters()) == net.config.n_layer * sum(4 * (a + b) for a, b in shapes)
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(std=0.2)
    prompts = [[1, 2, 3], [4, 5]]
    with torch.no_grad():
        tokens, prompt_len, length = net.generate(prompts, 12, temperature=0)
    for row, start, end in zip(tokens, prompt_len, length):
        scored = net(row[None, : end - 1])[0]  # with gradients, as the update scores
        assert scored[start - 1 :].argmax(-1).tolist() == row[start:end].tolist()


# 41
@mistake(
    "data/batches.py", "each < 2**63 / 10 for each in ordered", "each < ordered[len(ordered) // 10] for each in ordered"
)
@mistake(
    "data/batches.py",
    "if each >= ordered[n]]",
    "if each > ordered[min(n, most) - 1]]",
)
def test_no_option_and_no_further_row_moves_a_prompt_between_training_and_evaluation(tmp_path, encoding):
    rows = [{"prompt": f"ask me {i}", "completion": " yes"} for i in range(400)]
    path, sides = tmp_path / "p.jsonl", []
    for n, most in ((400, 512), (400, 5), (150, 512)):
        write(path, rows[:n])
        trained, held_out = data.prompts_and_held_out(str(path), "", encoding, 40, most)
        sides.append([{encoding.decode(prompt.ids) for prompt in side} for side in (trained, held_out)])
    tuned = data.hold_out(data.completions(path, encoding, encoding.eot_token), encoding)[1]
    sides.append([{encoding.decode(row.tokens[: row.prompt_len]) for row in tuned}, set()])
    assert len(sides[0][1]) > 20 and len(sides[1][1]) == 5
    assert not any(trained & held_out for trained, _ in sides for _, held_out in sides)


# 42
@mistake(
    "data/rows.py",
    "return Row(start + ids + end * ended, len(start))",
    "return Row(start + ids + [eos] * ended, len(start))",
)
@mistake("common/compare.py", "ended, row[first:end]))", "ended, row[first : end - ended]))")
def test_a_reward_model_reads_the_end_token_that_was_sampled(tmp_path, encoding):
    n = encoding.n_vocab - 1
    special = {"<e>": n, "<f>": n + 1}
    both = tiktoken.Encoding("2", pat_str=data.SPLIT, mergeable_ranks=encoding._mergeable_ranks, special_tokens=special)
    model = make_gpt(vocab_size=n + 2, eos=n, stops=(n + 1,))
    prompts = [both.encode_ordinary(f"ask {i}") for i in range(40)]
    sampled = compare.sample_responses(model, both, prompts, 4, 40, 1.0, seed=0)
    rows = [{"prompt": f"ask {i}"} | preference(four) for i, four in enumerate(sampled)]
    groups = data.comparisons(write(tmp_path / "r.jsonl", rows), both, n)
    learned = [row.tokens[-1] for group in groups for row in group.rows]
    ended = [answer.ids[-1] for four in sampled for answer in four]
    assert learned.count(n + 1) == ended.count(n + 1) > 9 and learned.count(n) == ended.count(n) > 9


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_right_run_is_never_called_impossible_and_wrong_ones_are(folders, dtype, monkeypatch, capsys):
    """A ratio of other rows; another reference; sampling and scoring that differ: 4 answers, so −20 / 4 nats by hand."""
    options = {"iterations": 4, "epochs": 2, "lr": 0.01, "dtype": dtype}
    train_ppo(folders, **options)
    assert "impossible" not in capsys.readouterr().out
    read, wrong = ppo.read, options | {"out": folders["tmp"] / "wrong", "iterations": 1, "lr": 0.0}
    monkeypatch.setattr(ppo, "read", lambda *given: (found := read(*given)) | {"logp": found["logp"].roll(1, 0)})
    train_ppo(folders, **wrong)
    assert "step 1: impossible: the ratio is not 1" in capsys.readouterr().out
    monkeypatch.setattr(ppo, "read", lambda *given: (found := read(*given)) | {"ref_logp": found["ref_logp"] / 2})
    train_ppo(folders, **wrong)
    assert "step 1: impossible: the KL is not 0" in capsys.readouterr().out
    line = {"objective/kl": -4.99, "response_len": 8, "policy/approxkl": 0.3, "lr": 0.1}
    cfg = ppo.Config(batch_size=4, dtype=dtype)
    assert not about.impossible(line, cfg, False)
    assert "the KL is below 0" in about.impossible(line | {"objective/kl": -5.2}, cfg, False)


def test_what_a_mistake_changes_stands_in_its_file_once():
    for test, file, changes in MISTAKES:
        assert all((ROOT / file).read_text().count(right) == 1 for right in changes), (test, file)
    assert sorted(map(id, forms().values())) == sorted(map(id, MISTAKES))  # each has a number and a letter


@pytest.mark.slow
@pytest.mark.parametrize("test, file, changes", MISTAKES, ids=[f"{m[0]}-{i}" for i, m in enumerate(MISTAKES)])
def test_the_mistake_is_caught(tmp_path, test, file, changes):
    plant(tmp_path / "copy", file, changes)
    words = ["-q", "-o", "addopts=", "-p", "no:cacheprovider", f"tests/test_mistakes.py::{test}"]
    script = tmp_path / "copy" / "check.py"
    plain = "os.environ['PYTEST_DISABLE_PLUGIN_AUTOLOAD'] = '1'"  # plugins take seconds to load
    script.write_text(f"import os, sys\n{plain}\nimport pytest\nsys.exit(pytest.main({words}))\n")
    done = run(script, cwd=script.parent)
    assert done.returncode == 1 and re.search(r"\b\d+ failed", done.stdout), (
        f"{test} passes with its mistake made\n{done.stdout}"
    )
    assert "AssertionError" in done.stdout or "DID NOT RAISE" in done.stdout, f"{test} only crashes\n{done.stdout}"
