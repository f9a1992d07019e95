"""model.py: the architecture against an independent one, the window, the cache, the sampler."""

import copy
import itertools
import math
import shutil

import numpy as np
import pytest
import torch

import model as plain
from model import GPT, GPTConfig, ScalarModel, response_window
from tests.conftest import FAMILIES, ROOT, make_gpt, run

PROMPTS = [[5], [7, 8, 9, 10, 11, 12], [3, 4, 5]]


def test_initialisation_is_gpt2s():
    model = GPT(GPTConfig(vocab_size=400, block_size=64, n_layer=8, n_head=4, n_embd=128))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif parameter.dim() == 2:
            expected = 0.02 / math.sqrt(16) if name.endswith("c_proj.weight") else 0.02
            assert abs(parameter.std().item() / expected - 1) < 0.05, name


def test_window_holds_exactly_the_response_tokens():
    position, mask = response_window(torch.tensor([1, 3, 2]), torch.tensor([4, 5, 3]))
    assert mask.tolist() == [[True, True, True], [True, True, False], [True, False, False]]
    assert [row[m].tolist() for row, m in zip(position, mask)] == [[1, 2, 3], [3, 4], [2]]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_equal_a_float64_loop_over_tokens(temperature):
    model = make_gpt()
    tokens, prompt_len, length = model.generate(PROMPTS, 9, generator=torch.Generator().manual_seed(3))
    got = model.logprobs(tokens, prompt_len, length, temperature)
    for b in range(len(PROMPTS)):
        for r in range(got.shape[1]):
            at = int(prompt_len[b]) + r
            if at < length[b]:
                logits = model(tokens[b : b + 1, :at])[0, -1].detach().numpy().astype(np.float64) / temperature
                expected = logits[tokens[b, at]] - np.log(np.exp(logits).sum())
                assert abs(got[b, r].item() - expected) < 1e-5
            else:
                assert got[b, r] == 0


def test_generation_stops_at_eos_and_counts_it():
    model = make_gpt()
    with torch.no_grad():
        model.ln_f.weight.zero_()
        model.ln_f.bias.copy_(100 * model.wte.weight[model.config.eos])  # every next token is EOS
    tokens, prompt_len, length = model.generate(PROMPTS, 20)
    assert (length - prompt_len).tolist() == [1, 1, 1] and tokens.shape[1] == 7
    assert all(tokens[b, length[b] - 1] == model.config.eos for b in range(3))


def test_a_scalar_model_shares_the_weights_of_its_gpt_and_changes_nothing_in_it():
    model = make_gpt(**FAMILIES["llama"])  # with an output layer of its own
    tokens, names = torch.tensor([[1, 2, 3]]), list(model.state_dict())
    before, scalar = model(tokens), ScalarModel(model)
    assert torch.equal(model(tokens), before) and list(model.state_dict()) == names
    assert scalar.trunk.wte.weight is model.wte.weight and not any("lm_head" in name for name in scalar.state_dict())


def test_an_empty_prompt_starts_with_eos():
    model = make_gpt()
    tokens, prompt_len, _ = model.generate([[]], 3)
    assert prompt_len.tolist() == [1] and tokens[0, 0] == model.config.eos


def test_generation_that_does_not_fit_the_context_is_refused():
    model = make_gpt().train()
    with pytest.raises(ValueError, match="do not fit the context of 48"):
        model.generate([[1] * 40], 9)
    assert model.training


QUICK = [("gpt2", torch.bfloat16, 4), ("llama", torch.float16, 4), ("llama", torch.bfloat16, 200)]
ALL = itertools.product(FAMILIES, (torch.bfloat16, torch.float16), (4, 200))  # 200: attention by the fused kernel


@pytest.mark.parametrize(
    "family, dtype, longest", QUICK + [pytest.param(*case, marks=pytest.mark.slow) for case in ALL if case not in QUICK]
)
def test_a_ragged_batch_of_a_model_held_in_half_precision_is_sampled_scored_and_valued(family, dtype, longest):
    model = make_gpt(block_size=256, **FAMILIES[family])
    half, judge = copy.deepcopy(model).to(dtype), ScalarModel(copy.deepcopy(model)).to(dtype)
    prompts = [[1], [2] * longest, [3, 4]]
    tokens, prompt_len, length = half.generate(prompts, 20, generator=torch.Generator().manual_seed(0))
    assert [row[:n].tolist() for row, n in zip(tokens, prompt_len)] == prompts
    logp = half.logprobs(tokens, prompt_len, length)
    assert logp.dtype == torch.float32
    assert (logp - model.logprobs(tokens, prompt_len, length)).abs().mean() < 0.1  # float32's, but for rounding
    scores, values = judge.scores(tokens, length), judge.values(tokens, prompt_len, length)
    assert scores.isfinite().all() and values.isfinite().all() and scores.dtype == torch.float32


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_an_entropy_bonus_has_the_gradient_of_the_plain_entropy(temperature):
    model = make_gpt()
    tokens, prompt_len, length = model.generate(PROMPTS, 9, generator=torch.Generator().manual_seed(3))
    logp, entropy = model.logprobs_and_entropy(tokens, prompt_len, length, temperature)
    position, mask = response_window(prompt_len, length)
    logits = model(tokens)[:, :-1].gather(1, (position - 1)[:, :, None].expand(-1, -1, 61))  # (B, R, V)
    whole = (logits / temperature).log_softmax(-1)
    expected = -(whole.exp() * whole).sum(-1) * mask
    torch.testing.assert_close(entropy, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(logp, model.logprobs(tokens, prompt_len, length, temperature), rtol=0, atol=1e-5)
    parameters = list(model.parameters())
    for mine, plainly in zip(*(torch.autograd.grad(x.sum(), parameters) for x in (entropy, expected))):
        assert (mine - plainly).norm() <= 1e-5 * plainly.norm() + 1e-6
    assert torch.autograd.grad(model.logprobs_and_entropy(tokens, prompt_len, length)[1].sum(), model.wte.weight)[
        0
    ].any()


class LoRA(plain.Linear):
    """x Wᵀ + b + x Aᵀ Bᵀ (Hu et al. 2021)."""

    def __init__(self, layer: plain.Linear):
        super().__init__(layer.in_features, layer.out_features)
        self.load_state_dict(layer.state_dict())
        self.A = torch.nn.Parameter(torch.randn(4, layer.in_features))
        self.B = torch.nn.Parameter(torch.randn(layer.out_features, 4))

    def forward(self, x):
        return super().forward(x) + x @ self.A.T @ self.B.T


def test_a_layer_that_a_fork_puts_in_the_place_of_another_is_sampled_from():
    model = make_gpt()
    before, _, _ = model.generate(PROMPTS, 12, temperature=0)
    for block in model.h:
        block.attn.c_attn, block.mlp.c_proj = LoRA(block.attn.c_attn), LoRA(block.mlp.c_proj)
    tokens, _, length = model.generate(PROMPTS, 12, temperature=0)
    assert before.shape != tokens.shape or not torch.equal(before, tokens)
    for prompt, got, end in zip(PROMPTS, tokens.tolist(), length.tolist()):
        row = list(prompt)
        while len(row) < len(prompt) + 12 and (len(row) == len(prompt) or row[-1] != model.config.eos):
            row.append(int(model(torch.tensor([row]))[0, -1].argmax()))  # no cache, nothing packed
        assert got[:end] == row


STAGES = """
import sys

sys.path.insert(0, sys.argv[1])
import torch
import model, ppo, reward, sft
from common import cli, nets, runs

runs.write_page = lambda folder: None
nets.adamw = lambda net, lr, *decay, **options: torch.optim.SGD(net.parameters(), lr=lr)  # a step is the gradient
policy, encoding = nets.load_gpt("sft")
found = {"fast": "fast" in model.draw.__module__}
prompts = [encoding.encode_ordinary(text) for text in ("ask me.", "tell me a tale", "yes")]
sequences = policy.generate(prompts, 12, temperature=0)
found["logprobs"], found["entropy"] = policy.logprobs_and_entropy(*sequences, 0.7)
found["tokens"], found["values"] = sequences[0], nets.load_scalar("reward")[0].values(*sequences)
few = "--batch_size 8 --minibatch_size 8 --response_len 8 --eval_prompts 2 --value_lr 0.1 --iterations 1"
for stage, more in (
    (sft, "--data pairs.jsonl --batch_size 999 --evals 1"),
    (reward, "--data comparisons.jsonl --batch_size 999 --response_len 8"),
    (ppo, f"--data prompts.jsonl --reward reward {few}"),
):
    out = f"{sys.argv[2]}-{stage.__name__}"
    stage.train(cli.parse(stage.Config, f"--init sft --lr 1 --device cpu --out {out} {more}".split()))
    saved = torch.load(f"{out}/state.pt", weights_only=True)
    for name in {"model", "value"} & {*saved}:
        found[f"{stage.__name__} {name}"] = torch.cat([x.flatten() for x in saved[name].values()])
torch.save(found, sys.argv[2])
"""


def test_without_the_line_that_imports_fast_the_plain_lines_give_the_same_numbers(folders):
    """Greedy tokens are equal; log-probabilities, values and the weights after one step of each stage agree to 1e-5."""
    tmp = folders["tmp"]
    shutil.copytree(ROOT, tmp / "copy", ignore=shutil.ignore_patterns(".*", "out", "__pycache__", "experiments"))
    source = (ROOT / "model.py").read_text()
    (line,) = [line for line in source.splitlines(keepends=True) if line.startswith("from fast import")]
    (tmp / "copy" / "model.py").write_text(source.replace(line, ""))
    (tmp / "stages.py").write_text(STAGES)
    found = []
    for name, place in (("fast", ROOT), ("plain", tmp / "copy")):
        done = run(tmp / "stages.py", place, name, cwd=tmp, page=True)  # with `page` nothing is imported before
        assert done.returncode == 0, done.stderr
        found.append(torch.load(tmp / name, weights_only=True))
    fast, without = found
    assert fast.pop("fast") and not without.pop("fast")
    assert torch.equal(fast["tokens"], without["tokens"]) and len(fast) == 8
    for name, x in fast.items():
        torch.testing.assert_close(without[name], x, rtol=0, atol=1e-5, msg=name)
    for name, start in (
        ("sft model", "sft"),
        ("reward model", "reward"),
        ("ppo model", "sft"),
        ("ppo value", "reward"),
    ):
        saved = torch.load(folders[start] / "model.pt", weights_only=True)["model"]
        assert (fast[name] - torch.cat([x.flatten() for x in saved.values()])).norm() > 0.01, name  # each has moved
