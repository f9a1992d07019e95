"""model.py: the architecture against an independent one, the window, the cache, the sampler."""

import copy
import math

import numpy as np
import pytest
import torch

from model import (
    GPT,
    GPTConfig,
    ScalarModel,
    response_window,
)
from tests.conftest import FAMILIES, make_gpt

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


def test_an_empty_prompt_starts_with_eos():
    model = make_gpt()
    tokens, prompt_len, _ = model.generate([[]], 3)
    assert prompt_len.tolist() == [1] and tokens[0, 0] == model.config.eos


def test_generation_that_does_not_fit_the_context_is_refused():
    model = make_gpt().train()
    with pytest.raises(ValueError, match="do not fit the context of 48"):
        model.generate([[1] * 40], 9)
    assert model.training


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("longest", [4, 200])  # attention by plain products, and by the fused kernel
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
