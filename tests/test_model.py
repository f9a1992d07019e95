"""model.py: the architecture against an independent one, the window, the cache, the sampler."""

import math

import numpy as np
import pytest
import torch

from model import GPT, GPTConfig, ScalarModel, response_window, sample
from tests.conftest import make_gpt

PROMPTS = [[5], [7, 8, 9, 10, 11, 12], [3, 4, 5]]


def test_logits_loss_and_gradients_agree_with_transformers_gpt2():
    transformers = pytest.importorskip("transformers")
    ours = make_gpt()
    shape = dict(n_positions=48, n_layer=2, n_head=2, n_embd=32, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=61, **shape))
    ours_by_name = dict(ours.named_parameters())
    flat = [n for n in ours_by_name if ".c_" in n and n.endswith("weight")]  # transformers keeps these transposed
    with torch.no_grad():
        for name, parameter in theirs.transformer.named_parameters():
            mine = ours_by_name[name]
            parameter.copy_(mine.T if name in flat else mine)
    tokens = torch.randint(0, 61, (3, 17), generator=torch.Generator().manual_seed(1))
    their_out = theirs(tokens, labels=tokens)
    torch.testing.assert_close(ours(tokens), their_out.logits, rtol=1e-4, atol=1e-5)
    one, full = torch.ones(3, dtype=torch.long), torch.full((3,), 17)
    loss = -ours.logprobs(tokens, one, full).sum() / (3 * 16)
    assert abs(loss.item() - their_out.loss.item()) < 1e-5
    loss.backward()
    their_out.loss.backward()
    for name, parameter in theirs.transformer.named_parameters():
        mine, other = ours_by_name[name].grad, parameter.grad.T if name in flat else parameter.grad
        # the key bias has an exactly zero gradient, so the scale is that of the tensor as a whole
        assert (mine - other).norm() <= 1e-4 * other.norm(), name


def test_initialisation_is_gpt2s():
    model = GPT(GPTConfig(vocab_size=400, block_size=64, n_layer=8, n_head=4, n_embd=128))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif parameter.dim() == 2:
            expected = 0.02 / math.sqrt(16) if name.endswith("c_proj.weight") else 0.02
            assert abs(parameter.std().item() / expected - 1) < 0.05, name


def test_scalar_head_starts_with_std_one_over_root_of_width_plus_one():
    torch.manual_seed(0)
    head = ScalarModel(GPT(GPTConfig(vocab_size=10, block_size=4, n_layer=1, n_head=1, n_embd=4095))).head
    assert abs(head.weight.std().item() * 64 - 1) < 0.05 and head.bias.item() == 0


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


def test_chunked_logprobs_give_the_gradients_of_one_softmax():
    model = make_gpt(vocab_size=30_011)  # 559 rows a chunk
    tokens = torch.randint(0, 30_011, (16, 48), generator=torch.Generator().manual_seed(1))
    prompt_len, length = torch.ones(16, dtype=torch.long), torch.full((16,), 48)
    logp = model.logprobs(tokens, prompt_len, length)
    whole = model(tokens[:, :-1]).log_softmax(-1).gather(2, tokens[:, 1:, None])[:, :, 0]
    torch.testing.assert_close(logp, whole, rtol=1e-5, atol=1e-5)
    parameters = list(model.parameters())
    for mine, other in zip(torch.autograd.grad(logp.sum(), parameters), torch.autograd.grad(whole.sum(), parameters)):
        assert (mine - other).norm() <= 1e-4 * other.norm() + 1e-5


def test_cached_and_uncached_generation_give_the_same_greedy_tokens():
    model = make_gpt()
    tokens, prompt_len, length = model.generate(PROMPTS, 20, temperature=0)
    for b, prompt in enumerate(PROMPTS):
        row = list(prompt)
        while len(row) < len(prompt) + 20:
            row.append(int(model(torch.tensor([row]))[0, -1].argmax()))
            if row[-1] == model.config.eos:
                break
        assert tokens[b, : length[b]].tolist() == row and prompt_len[b] == len(prompt)


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
    with pytest.raises(ValueError, match="do not fit the context of 48"):
        make_gpt().generate([[1] * 40], 9)


def test_a_row_is_the_same_alone_and_beside_longer_rows():
    model = make_gpt()
    scalar = ScalarModel(model)
    tokens, prompt_len, length = model.generate(PROMPTS, 12, generator=torch.Generator().manual_seed(5))
    tokens[torch.arange(tokens.shape[1]) >= length[:, None]] = 17  # pads may be anything
    logp, values = model.logprobs(tokens, prompt_len, length), scalar.values(tokens, prompt_len, length)
    scores = scalar.scores(tokens, length)
    for b in range(3):
        n, r = int(length[b]), int(length[b] - prompt_len[b])
        alone = tokens[b : b + 1, :n], prompt_len[b : b + 1], length[b : b + 1]
        torch.testing.assert_close(logp[b, :r], model.logprobs(*alone)[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(values[b, :r], scalar.values(*alone)[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(scores[b], scalar.scores(alone[0], alone[2])[0], rtol=0, atol=1e-5)


def test_the_sampler_is_exact_to_1e_6_over_a_large_vocabulary():
    logits = torch.randn(1, 50_257, generator=torch.Generator().manual_seed(0)) * 3
    exact = logits.double().softmax(-1)[0]
    # a uniform number draws token i when it falls in i's interval of the CDF: probe both ends of the commonest ones
    edges = exact.cumsum(0)
    for i in exact.topk(200).indices.tolist():
        low, high = edges[i] - exact[i], edges[i]
        inside = torch.stack([low + 1e-6, high - 1e-6])
        assert (high - low) < 3e-6 or sample(logits.expand(2, -1), inside).tolist() == [i, i]


def test_samples_follow_the_softmax_at_the_temperature_by_chi_square():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5])
    for temperature in (0.5, 1.0, 2.0):
        n = 200_000
        uniform = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        counts = sample(logits.expand(n, -1), uniform, temperature).bincount(minlength=5)
        expected = n * (logits.double() / temperature).softmax(0)
        assert ((counts - expected) ** 2 / expected).sum() < 23.5  # 1e-4 quantile at 4 degrees of freedom


def test_top_k_and_top_p_keep_exactly_their_set():
    logits = torch.tensor([0.05, 0.4, 0.25, 0.2, 0.1]).log()
    uniform = torch.linspace(0, 0.9999, 5000, dtype=torch.float64)
    drawn = lambda **kw: set(sample(logits.expand(5000, -1), uniform, **kw).tolist())  # noqa: E731
    assert drawn(top_k=2) == {1, 2} and drawn(top_k=5) == {0, 1, 2, 3, 4}
    assert drawn(top_p=0) == {1}
    assert drawn(top_p=0.6) == {1, 2} and drawn(top_p=0.7) == {1, 2, 3} and drawn(top_p=0.0001) == {1}
    assert drawn(top_p=0.9, top_k=1) == {1}
    tied = torch.zeros(5000, 4)
    assert len(set(sample(tied, uniform, top_k=2).tolist())) == 2
