"""The forks in experiments/forks apply, run, and compute what their papers say."""

import copy
import functools
import importlib.util
import itertools
import json
import math
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import data
from common import agreement, cli, nets, runs
from experiments import letters
from experiments.forks import FORKS, HERE, dpo, patched
from model import GPT, ScalarModel
from tests.conftest import ROOT, flat, make_gpt, ragged, write

CPU, OFF = torch.device("cpu"), torch.autocast("cpu", enabled=False)
DIFFS = sorted(path.stem for path in HERE.glob("*.diff"))
SOURCE = (ROOT / "ppo.py").read_text()
STACKS = sorted({tuple(diffs) for diffs, _, _ in FORKS.values() if diffs})  # each fork's diffs, in turn
groups = st.tuples(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(2, 5), st.integers(1, 6))


@functools.cache
def fork(*names: str):
    """ppo.py with diffs applied, as a module of its own."""
    folder = Path(tempfile.mkdtemp())
    path = folder / f"{'_and_'.join(names)}.py"
    path.write_text(patched(SOURCE, *names))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # where dataclass and parse look for it
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def no_page(monkeypatch):
    monkeypatch.setattr(runs, "write_page", lambda folder: None)


def parsed(config: type, options: dict):
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    return cli.parse(config, [word for word in words if word])


def train(stage, folders, **options):
    """A fork on the tiny folders; the rows of its metrics.jsonl."""
    given = {"data": folders["tmp"] / "prompts.jsonl", "init": folders["sft"], "reward": folders["reward"]}
    given |= {"iterations": 2, "batch_size": 8, "minibatch_size": 4, "response_len": 8, "eval_prompts": 4}
    given |= {"out": folders["tmp"] / "fork", "lr": 0.01, "device": "cpu", "epochs": 2} | options
    stage.train(parsed(stage.Config, given))
    return runs.read_metrics(given["out"])


def stopped_after(step: int, monkeypatch):
    """A run saves after this step alone, and then it is stopped."""

    def save_then_die(self, *args, save=runs.Run.save, **parts):
        save(self, *args, **parts)
        raise KeyboardInterrupt

    monkeypatch.setattr(runs.Run, "due", lambda self, now, every: now + 1 == step)
    monkeypatch.setattr(runs.Run, "save", save_then_die)


# --- the diffs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DIFFS)
def test_a_diff_changes_at_most_20_lines_and_that_which_takes_the_value_net_out_40(name):
    text = (HERE / f"{name}.diff").read_text()
    lines = text[text.index("--- a/ppo.py\n") :].splitlines()[2:]
    changed = [line for line in lines if line[0] in "+-"]
    assert 0 < len(changed) <= (40 if name == "grpo" else 20)


def test_every_diff_is_of_a_fork():
    assert {name for diffs in STACKS for name in diffs} == set(DIFFS)


@pytest.mark.parametrize("command", ["patch -p1 -F0", "git apply"])
@pytest.mark.parametrize("names", STACKS, ids="+".join)
def test_a_forks_diffs_one_behind_the_other_apply_by_hand_as_they_do_here(tmp_path, names, command):
    if not shutil.which(command.split()[0]):
        pytest.skip(f"needs {command.split()[0]}")
    shutil.copy(ROOT / "ppo.py", tmp_path)
    text = "".join((HERE / f"{name}.diff").read_text() for name in names)
    done = subprocess.run(command.split(), cwd=tmp_path, input=text, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "ppo.py").read_text() == patched(SOURCE, *names)


def test_a_diff_that_does_not_apply_is_refused_in_one_sentence(tmp_path):
    for diffs, why in (
        (["grpo", "grpo"], "grpo.diff: does not apply to ppo.py (patch failed"),
        (["rloo"], "rloo.diff: does not apply to ppo.py (patch failed"),  # without grpo.diff
        ([tmp_path / "none.diff"], "none.diff: does not apply to ppo.py (can't open patch"),
        ([ROOT / "LICENSE"], "LICENSE: does not apply to ppo.py (No valid patches"),
    ):
        with pytest.raises(data.InputError) as error:
            patched(SOURCE, *diffs)
        assert why in str(error.value)


def test_the_options_of_a_fork_are_options_of_its_ppo():
    for name, (diffs, _, options) in FORKS.items():
        stage = dpo if name == "DPO" else fork(*diffs)
        cli.parse(stage.Config, [*map(str, options), "--kl_coef", "0.1", "--lr", "1e-4", "--resume"])


@pytest.mark.slow
@pytest.mark.parametrize("names", STACKS, ids="+".join)
def test_a_fork_trains_and_leaves_no_name_undefined(folders, encoding, names, monkeypatch):
    stage, asked = fork(*names), []
    rollout = stage.rollout
    monkeypatch.setattr(stage, "rollout", lambda policy, ids, *rest: asked.append(ids) or rollout(policy, ids, *rest))
    if "rule" in names:
        monkeypatch.setattr(stage, "rule", lambda prompt, response: len(response) / 10)  # these prompts ask for no tale
    more = {}
    if "distil" in names:
        more["ref"] = folders["tmp"] / "teacher"
        more["ref"].mkdir()
        teacher = make_gpt(seed=5, n_layer=3, n_embd=48, vocab_size=encoding.n_vocab, eos=encoding.eot_token)
        nets.save_model(teacher, encoding, more["ref"] / "model.pt")
    lines = train(stage, folders, unended_cap="inf", **more)
    assert [line["step"] for line in lines] == [0, 1] and lines[-1]["policy/grad_norm"] > 0
    state = torch.load(folders["tmp"] / "fork" / "state.pt", weights_only=True)
    grouped = "grpo" in names
    if grouped:
        for ids in asked[:2]:  # each prompt 4 times in a row; the rest are of the closing table
            assert len(ids) == 8 and all(ids[i] == ids[i // 4 * 4] for i in range(8)) and ids[0] != ids[4]
    assert ("value" in state) == ("value_optimizer" in state) == (not grouped)
    assert not grouped or not any("value" in name or "vf" in name for name in lines[-1].keys() - {"value_lr"})
    answers = json.loads((folders["tmp"] / "fork" / "rollout.json").read_text())["answers"]
    assert all(("values" in each) == (not grouped) for each in answers)
    assert "rule" not in names or all(each["score"] == pytest.approx(len(each["response"]) / 10) for each in answers)


def test_groups_ask_every_prompt_before_one_again_and_the_policy_learns_from_the_first(folders, monkeypatch):
    stage, asked, rollout = fork("grpo"), [], fork("grpo").rollout
    monkeypatch.setattr(stage, "rollout", lambda policy, ids, *rest: asked.append(ids) or rollout(policy, ids, *rest))
    rows = data.read_jsonl(folders["tmp"] / "prompts.jsonl", {})
    few = {"data": write(folders["tmp"] / "8.jsonl", rows[:8])}
    few |= {"eval_data": write(folders["tmp"] / "4.jsonl", rows[8:12])}
    lines = train(stage, folders, **few, iterations=4, value_warmup=2)
    assert len({tuple(ids) for batch in asked[:4] for ids in batch}) == 8  # 2 prompts of 8 answers an iteration
    assert [line["episode"] for line in lines] == [8, 16, 24, 32] and all(line["lr"] > 0 for line in lines)


@pytest.mark.parametrize("options", [{"group": 1}, {"group": 3}, {"group": 16}])
def test_a_batch_that_groups_do_not_divide_is_refused(folders, options):
    with pytest.raises(data.InputError, match=f"--group {options['group']}: give 2 or more, and whole groups of"):
        train(fork("grpo"), folders, **options)


def test_a_fork_without_value_net_goes_on_where_it_was_stopped(folders):
    stage = fork("grpo")
    whole = train(stage, folders, out=folders["tmp"] / "whole")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stopped_after(1, patch)
        train(stage, folders)
    resumed = train(stage, folders, resume="")
    assert not (folders["tmp"] / "fork.1").exists()
    assert [line["objective/scores"] for line in resumed] == [line["objective/scores"] for line in whole]
    assert torch.equal(*(flat(nets.load_gpt(folders["tmp"] / name)[0]) for name in ("whole", "fork")))


# --- advantages of a group --------------------------------------------------------------------------------------------


def grouped(shape) -> tuple[dict[str, torch.Tensor], np.ndarray, int]:
    """A random batch of P prompts with K answers each; R (P, K), what each answer got at β = 0.3 and a cap of −1."""
    seed, P, K, columns = shape
    batch = ragged(np.random.default_rng(seed), P * K, columns)
    total = np.zeros(P * K)
    for b in range(P * K):
        score = float(batch["score"][b])
        total[b] = score if batch["ended"][b] else min(score, -1.0)
        for t in range(int(batch["mask"][b].sum())):
            total[b] -= 0.3 * float(batch["logp"][b, t] - batch["ref_logp"][b, t])
    return batch, total.reshape(P, K), K


def same_for_every_token(got, expected, mask):
    """Advantages (B, R) are `expected` (P, K) at each token of the answer, and 0 after it."""
    whole = np.where(mask.numpy(), expected.reshape(-1, 1), 0.0)
    np.testing.assert_allclose(got["advantages"].numpy(), whole, rtol=1e-6, atol=1e-6)


@settings(deadline=None, max_examples=50)
@given(groups)
def test_rloo_advantages_are_the_papers_leave_one_out(shape):
    """Ahmadian et al. 2024: R(y_i) − 1 / (K − 1) Σ_{j ≠ i} R(y_j)."""
    batch, total, K = grouped(shape)
    expected = np.zeros_like(total)
    for p, i in np.ndindex(*total.shape):
        expected[p, i] = total[p, i] - sum(total[p, j] for j in range(K) if j != i) / (K - 1)
    stage = fork("grpo", "rloo")
    same_for_every_token(stage.estimate(batch, 0.3, stage.Config(group=K)), expected, batch["mask"])


@settings(deadline=None, max_examples=50)
@given(groups)
def test_grpo_advantages_are_in_standard_deviations_from_the_groups_mean(shape):
    """Shao et al. 2024, section 4.1.2; the deviation is that of n − 1, plus 1e-4, as in TRL."""
    batch, total, K = grouped(shape)
    expected = np.zeros_like(total)
    for p, i in np.ndindex(*total.shape):
        mean = sum(total[p]) / K
        deviation = math.sqrt(sum((x - mean) ** 2 for x in total[p]) / (K - 1))
        expected[p, i] = (total[p, i] - mean) / (deviation + 1e-4)
    stage = fork("grpo")
    same_for_every_token(stage.estimate(batch, 0.3, stage.Config(group=K)), expected, batch["mask"])


def test_dr_grpo_divides_neither_by_the_groups_deviation_nor_by_the_answers_length():
    """Liu et al. 2025, section 3.2, in float64: the gradient of −1 / (N L) Σ_i Σ_t (R_i − mean of R) log π(y_t), at a
    ratio of 1; N answers of at most L tokens."""
    stage = fork("grpo", "dr_grpo")
    cfg = stage.Config(response_len=9, minibatch_size=8, micro_batch_size=3, max_grad_norm=0.0, unended_cap=math.inf)
    policy, score = make_gpt(), torch.randn(8, generator=torch.Generator().manual_seed(1))
    batch = stage.rollout(policy, [[1, 2]] * 4 + [[3]] * 4, cfg, torch.Generator().manual_seed(0))
    batch["length"] = batch["prompt_len"] + torch.tensor([9, 1, 4, 2, 7, 3, 5, 8])
    batch |= stage.read(batch, policy, policy, None, lambda part: score, cfg)
    batch |= stage.estimate(batch, 0.3, cfg)  # the reference is the policy, so the KL is 0
    exact, loss = copy.deepcopy(policy).double(), 0.0
    exact.zero_grad()
    for i in range(8):
        group = score[i // 4 * 4 : i // 4 * 4 + 4].double()
        tokens, start, end = (batch[name][i] for name in ("tokens", "prompt_len", "length"))
        logp = exact(tokens[None, :end])[0].log_softmax(-1)
        for t in range(start, end):
            loss = loss - (score[i] - group.mean()) * logp[t - 1, tokens[t]] / (8 * 9)
    loss.backward()
    before = flat(policy)
    stage.update(policy, None, torch.optim.SGD(policy.parameters(), lr=1.0), None, batch, 1.0, 0.0, cfg, OFF, seed=0)
    gradient = torch.cat([p.grad.flatten() for p in exact.parameters()])
    assert (before - flat(policy) - gradient).norm() < 1e-4 * gradient.norm()


def test_grpo_with_the_kl_in_the_loss_has_advantages_from_the_scores_alone():
    batch = ragged(np.random.default_rng(0), 8) | {"ended": torch.ones(8, dtype=torch.bool)}
    stage = fork("grpo", "kl_in_loss")
    got = stage.estimate(batch, 0.3, stage.Config())
    score = batch["score"].numpy().reshape(2, 4)
    expected = (score - score.mean(1, keepdims=True)) / (score.std(1, ddof=1, keepdims=True) + 1e-4)
    same_for_every_token(got, expected, batch["mask"])


# --- losses -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "advantage, ratio, learns",
    [(1, 1.27, True), (1, 1.29, False), (1, 0.5, True), (-1, 0.81, True), (-1, 0.79, False), (-1, 1.5, True)],
)
def test_clip_higher_stops_a_gain_at_its_own_bound_and_a_loss_at_the_old_one(advantage, ratio, learns):
    """Yu et al. 2025, section 3.1, with ε 0.2 and 0.28; through `update`, so that the option is seen to arrive."""
    stage = fork("clip_higher")
    cfg = stage.Config(response_len=8, epochs=1, minibatch_size=6, max_grad_norm=0.0)
    policy = make_gpt()
    value = ScalarModel(policy)
    batch = stage.rollout(policy, [[1], [2, 3], [4, 5, 6]] * 2, cfg, torch.Generator().manual_seed(0))
    batch |= stage.read(batch, policy, policy, value, lambda part: torch.zeros(len(part["tokens"])), cfg)
    batch["logp"] = (batch["logp"] - math.log(ratio)) * batch["mask"]
    batch |= {"advantages": float(advantage) * batch["mask"], "returns": batch["values"]}
    optimizers = (torch.optim.SGD(net.parameters(), lr=0.0) for net in (policy, value))
    found = stage.update(policy, value, *optimizers, batch, 0.0, 0.0, cfg, OFF, seed=0)
    assert (found["policy/grad_norm"] > 0) == learns and (found["policy/clipfrac_avg"] == 0) == learns
    bounded = min(max(ratio, 0.8), 1.28)
    assert found["loss/policy_avg"] == pytest.approx(-min(advantage * ratio, advantage * bounded), abs=1e-4)


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_k2_in_the_loss_has_the_gradient_of_the_kl_and_k3_that_of_the_kl_the_other_way_round(estimator):
    """Answers of one token, each listed once and weighted by its probability, so the mean is exact. The gradient of k2
    is that of KL(π ‖ π₀), of k3 that of KL(π₀ ‖ π). The β is the iteration's, which may have moved, not the first."""
    stage, n = fork("grpo", "kl_in_loss", *(["k2"] if estimator == "k2" else [])), 60
    policy, ref = make_gpt(seed=5, vocab_size=n), nets.freeze(make_gpt(vocab_size=n), OFF)
    cfg = stage.Config(response_len=1, minibatch_size=n, max_grad_norm=0.0, kl_coef=9.0, unended_cap=math.inf)
    batch = stage.rollout(policy, [[1, 2, 3]] * n, cfg, torch.Generator().manual_seed(0))
    batch["tokens"][:, 3] = torch.arange(n)
    batch |= stage.read(batch, policy, ref, None, lambda part: torch.zeros(len(part["tokens"])), cfg)
    batch |= stage.estimate(batch, 0.3, cfg)
    assert not batch["rewards"].any() and not batch["advantages"].any()  # so the loss is the KL alone
    logp, ref_logp = (net(torch.tensor([[1, 2, 3]]))[0, -1].log_softmax(-1) for net in (policy, ref))
    batch["kl_coef"] *= n * logp.detach().exp()
    gradients = []
    for kl in ((logp.exp() * (logp - ref_logp)).sum(), (ref_logp.exp() * (ref_logp - logp)).sum()):
        parts = torch.autograd.grad(0.3 * kl, list(policy.parameters()), retain_graph=True)
        gradients.append(torch.cat([g.flatten() for g in parts]))
    mine, other = gradients if estimator == "k2" else reversed(gradients)
    before, optimizer = flat(policy), torch.optim.SGD(policy.parameters(), lr=1.0)
    found = stage.update(policy, None, optimizer, None, batch, 1.0, 0.0, cfg, OFF, seed=0)
    step, log_r = before - flat(policy), (ref_logp - logp).double()
    number = log_r.square() / 2 if estimator == "k2" else log_r.exp() - 1 - log_r  # Schulman 2020
    assert found["loss/policy_avg"] == 0 and found["loss/kl_avg"] == pytest.approx(number.mean().item(), rel=1e-4)
    assert (step - mine).norm() < 1e-3 * mine.norm()
    assert (step - other).norm() > 0.2 * other.norm()


# --- rewards ----------------------------------------------------------------------------------------------------------


def test_the_length_penalty_is_dapos_soft_overlong_punishment():
    """Yu et al. 2025, section 3.4, with L_max = 10 and L_cache = 4, after the cap; with L_cache = 10 it is plain."""
    stage = fork("length_penalty")
    lengths = [1, 6, 7, 9, 10]
    batch = {"mask": torch.arange(10) < torch.tensor(lengths)[:, None], "score": torch.full((5,), 0.5)}
    batch["ended"] = torch.tensor([True, True, True, True, False])
    by_hand = [0.5, 0.5, 0.5 - 1 / 4, 0.5 - 3 / 4, -1.0 - 1]
    found = stage.final_scores(batch, stage.Config(response_len=10, overlong=4))
    assert found.tolist() == pytest.approx(by_hand)
    plain = stage.final_scores(batch, stage.Config(response_len=10, overlong=10, unended_cap=math.inf))
    assert plain.tolist() == pytest.approx([0.5 - n / 10 for n in lengths])


def test_per_token_rewards_are_the_differences_of_the_reward_models_scores_of_prefixes():
    """Ng et al. 1999, in float64: each prefix is scored as a text of its own. At γ = 1 the rewards of an answer add up
    to its final score less the prompt's; the cap holds for the last one."""
    stage, policy = fork("per_token"), make_gpt(seed=5)
    reward = ScalarModel(make_gpt())
    for gamma in (1.0, 0.9):
        cfg = stage.Config(response_len=6, minibatch_size=3, gamma=gamma)
        batch = stage.rollout(policy, [[1], [2, 3], [4, 5, 6]] * 2, cfg, torch.Generator().manual_seed(0))
        batch["length"] = batch["prompt_len"] + torch.tensor([6, 1, 3, 2, 6, 5])
        batch["ended"] = torch.tensor([True, False] * 3)
        score = stage.scorer(reward, None, 60, cfg)
        batch |= stage.read(batch, policy, policy, reward, score, cfg)
        rewards = stage.estimate(batch, 0.3, cfg)["rewards"]  # the reference is the policy: no KL
        exact = copy.deepcopy(reward).double()
        for i, (start, end) in enumerate(zip(batch["prompt_len"].tolist(), batch["length"].tolist())):
            prefixes = [batch["tokens"][i : i + 1, :n] for n in range(start, end + 1)]
            phi = [exact.scores(each, torch.tensor([each.shape[1]])).item() for each in prefixes]
            phi[-1] = phi[-1] if batch["ended"][i] else min(phi[-1], -1.0)
            last = end - start - 1
            by_hand = [(1 if t == last else gamma) * phi[t + 1] - phi[t] for t in range(end - start)]
            assert rewards[i, : end - start].tolist() == pytest.approx(by_hand, abs=1e-5)
            assert gamma != 1 or rewards[i].sum().item() == pytest.approx(phi[-1] - phi[0], abs=1e-5)


def test_distillation_rewards_each_token_by_the_teachers_log_probability_less_its_own():
    """In float64. At γ = 0 the return is the token's own reward, and the score counts for nothing. Over all tokens that
    may come first the mean reward is −KL(π ‖ π_teacher)."""
    stage, student, teacher = fork("distil"), make_gpt(seed=5), make_gpt(n_layer=3, n_embd=48)
    cfg, n = stage.Config(response_len=4), 61
    assert (cfg.kl_coef, cfg.gamma) == (1, 0)
    batch = stage.rollout(student, [[1, 2]] * n, cfg, torch.Generator().manual_seed(0))
    batch["tokens"][:, 2], batch["length"] = torch.arange(n), torch.randint(3, 7, (n,))  # every first token once
    batch["length"][0] = batch["tokens"].shape[1]
    value = ScalarModel(student)
    torch.nn.init.zeros_(value.head.weight)
    batch |= stage.read(batch, student, teacher, value, lambda part: torch.full((n,), 7.0), cfg)
    found = stage.estimate(batch, cfg.kl_coef, cfg)
    exact, kl = [], 0.0
    for net in (student, teacher):
        exact.append(copy.deepcopy(net).double()(batch["tokens"]).log_softmax(-1))
    for i in range(n):
        for t in range(2, int(batch["length"][i])):
            logp, teachers = (x[i, t - 1, batch["tokens"][i, t]].item() for x in exact)
            assert found["rewards"][i, t - 2].item() == pytest.approx(teachers - logp, abs=1e-5)
        kl -= exact[0][i, 1, i].exp().item() * found["rewards"][i, 0].item()
    assert kl == pytest.approx((exact[0][0, 1].exp() * (exact[0][0, 1] - exact[1][0, 1])).sum().item(), abs=1e-5)
    assert not (found["rewards"] * ~batch["mask"]).any()
    assert found["returns"].tolist() == found["rewards"].tolist()


@pytest.mark.parametrize("name", ["per_token", "distil"])
def test_a_value_net_that_is_to_predict_no_score_starts_at_0(folders, name):
    stage = fork(name)
    cfg = stage.Config(init=str(folders["sft"]), ref="", reward=str(folders["reward"]), device="cpu", block_size=48)
    _, _, value, _, _ = stage.build(cfg, CPU, OFF)
    assert not value.values(torch.tensor([[1, 2, 3]]), torch.tensor([1]), torch.tensor([3])).any()


def test_the_rule_gives_a_quarter_for_each_thing_that_it_asks_for():
    stage = fork("rule")
    prompt = "Tell me about a shy owl who lost a red key near the lake."
    story = " Once a shy owl lived near the lake. The owl dropped a red key by the lake. It went home alone."
    assert stage.rule(prompt, story) == 0.75
    assert stage.rule(prompt, story.replace("It went home alone.", "The owl smiled and went home.")) == 1
    assert stage.rule(prompt, story.replace("owl", "cat").replace("key", "cake")) == 0.25
    assert stage.rule(prompt, "") == 0


# --- DPO --------------------------------------------------------------------------------------------------------------


def some_groups(encoding, eos) -> list[data.Group]:
    """Two prompts, of 3 answers in a ranked list (3 pairs) and of 2, one of them without its end."""
    texts = [("ask me", [" yes", " no", " a fox"]), ("tell me a tale", [" of a fox.", " no"])]
    found = []
    for prompt, answers in texts:
        rows = [data.encode_row(encoding, eos, prompt, text, ended=text != " no") for text in answers]
        pairs = list(itertools.combinations(range(len(rows)), 2))
        found.append(data.Group(rows, pairs, [math.nan] * len(pairs)))
    return found


def test_dpo_loss_and_gradient_equal_the_papers_equation_in_float64(encoding):
    """Rafailov et al. 2023, equation 7, one token at a time; the pairs of a prompt count as one prompt."""
    shape = {"vocab_size": encoding.n_vocab, "eos": encoding.eot_token}
    policy, ref = make_gpt(seed=5, **shape), make_gpt(**shape)
    some = some_groups(encoding, encoding.eot_token)
    rewards = 0.3 * dpo.log_ratios(policy, ref, some, CPU)
    mine = dpo.pairwise_loss(agreement.margins(some, rewards), some)
    mine.backward()

    exact, frozen = copy.deepcopy(policy).double(), copy.deepcopy(ref).double()
    exact.zero_grad()

    def log_probability(net: GPT, row: data.Row) -> torch.Tensor:
        logp = net(torch.tensor([row.tokens])).log_softmax(-1)[0]
        return sum(logp[t - 1, row.tokens[t]] for t in range(row.prompt_len, len(row.tokens)))

    expected = 0.0
    for group in some:
        h = [log_probability(exact, row) - log_probability(frozen, row).detach() for row in group.rows]
        for winner, loser in group.pairs:
            expected = expected - torch.log(torch.sigmoid(0.3 * h[winner] - 0.3 * h[loser])) / len(group.pairs)
    expected.backward()
    assert mine.item() == pytest.approx(expected.item(), rel=1e-5)
    a, b = (torch.cat([p.grad.flatten().double() for p in net.parameters()]) for net in (policy, exact))
    assert (a - b).norm() < 1e-4 * b.norm()


def train_dpo(folders, n=24, **options):
    """DPO on `n` tiny comparisons, four to a step; the rows of its metrics.jsonl."""
    rows = data.read_jsonl(folders["tmp"] / "comparisons.jsonl", {})[:n]
    given = {"data": write(folders["tmp"] / "some.jsonl", rows), "init": folders["sft"], "out": folders["tmp"] / "dpo"}
    given |= {"lr": 1e-3, "device": "cpu"} | options
    dpo.train(parsed(dpo.Config, given))
    return runs.read_metrics(given["out"])


def test_dpo_starts_at_log_2_and_learns_which_answer_won(folders):
    before = flat(nets.load_gpt(folders["sft"])[0])
    lines = train_dpo(folders, n=80)
    assert lines[0]["loss/train"] == pytest.approx(math.log(2), abs=1e-7) and lines[0]["rewards/margins"] == 0
    assert lines[-1]["loss/train"] < 0.3 and lines[-1]["rewards/accuracies"] == 1  # " yes." wins each of these pairs
    assert torch.equal(before, flat(nets.load_gpt(folders["sft"])[0]))


@pytest.mark.slow
def test_dpo_takes_the_same_step_by_micro_batches_of_any_size(folders):
    found = []
    for size in (0, 1, 3):
        lines = train_dpo(folders, micro_batch_size=size, out=folders["tmp"] / f"dpo-{size}")
        found.append([line["loss/train"] for line in lines])
    assert found[1] == pytest.approx(found[0], rel=1e-3) and found[2] == pytest.approx(found[0], rel=1e-3)


def test_dpo_stopped_and_resumed_is_the_run_that_was_not(folders):
    train_dpo(folders, out=folders["tmp"] / "whole")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stopped_after(3, patch)
        train_dpo(folders)
    assert len(runs.read_metrics(folders["tmp"] / "dpo")) == 3
    train_dpo(folders, resume="")
    assert not (folders["tmp"] / "dpo.1").exists()
    assert torch.equal(*(flat(nets.load_gpt(folders["tmp"] / name)[0]) for name in ("whole", "dpo")))


def test_dpo_without_a_kl_term_is_refused_in_a_sentence():
    with pytest.raises(data.InputError, match="--kl_coef 0.0: give a number from 0.01"):
        parsed(dpo.Config, {"kl_coef": 0.0})


def dpo_in_the_world_of_letters(folder: Path, beta: float, n: int = 100_000) -> dict[str, float]:
    """Where DPO ends after 400 steps on all of `n` comparisons: the letters have one prompt, so they are one group."""
    start = letters.log_probabilities(letters.world(folder))
    given = {
        "data": letters.compared(start, n, folder / "pairs.jsonl"),
        "init": folder / "start",
        "out": folder / "dpo",
    }
    dpo.train(parsed(dpo.Config, given | {"kl_coef": beta, "epochs": 400, "lr": 3e-3, "device": "cpu"}))
    reached = letters.log_probabilities(folder / "dpo")
    best, most = letters.optimum(start, beta)
    before = letters.objective(start, start, beta)
    return {
        "share": (letters.objective(reached, start, beta) - before) / (most - before),  # of the way from J(π₀) to J*
        "TV(π₀, π*)": letters.distance(start, best),
        "TV(DPO, π*)": letters.distance(reached, best),
        "KL": float(np.exp(reached) @ (reached - start)),
    }


@pytest.mark.slow
@pytest.mark.parametrize("beta, share, near", [(0.6, 0.95, 0.1), (0.3, 0.85, 0.4)])
def test_dpo_on_enough_comparisons_ends_at_the_exact_optimum_of_kl_regularised_reward(tmp_path, beta, share, near):
    """Its loss has seen no score and no answer of its own. 95% of the way from J(π₀) to J*.

    At β = 0.3 a quarter of π* is on answers that π₀ gives less than once in 1,000, and few comparisons show those.
    """
    found = dpo_in_the_world_of_letters(tmp_path, beta)
    assert share <= found["share"] <= 1 and found["TV(DPO, π*)"] < near
