"""fast.py: every function equals the plain line that its docstring opens with."""

import copy
import os
import shutil

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fast
import ppo
from common import dist as processes
from model import ScalarModel, sample
from tests.conftest import FAMILIES, make_gpt

PROMPTS = [[5], [7, 8, 9, 10, 11, 12], [3, 4, 5]]


def linears(model):
    return [layer for layer in model.modules() if isinstance(layer, fast.Linear)]


@pytest.mark.parametrize("kept", [0, 1, 2, 4, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_chunked_logprobs_and_their_gradients_are_those_of_one_softmax(temperature, kept, monkeypatch):
    monkeypatch.setattr("fast.CHUNK", 61 * 100)  # 100 rows a chunk: eight chunks
    monkeypatch.setattr("fast.KEPT", kept)
    generator = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(n, 16, generator=generator).requires_grad_() for n in (752, 61))
    target = torch.randint(0, 61, (752,), generator=generator)
    logp = fast.chosen_logprobs(hidden, weight, target, temperature)
    assert len(logp.grad_fn.kept) == min(kept, 8)
    whole = torch.log_softmax(hidden @ weight.T / temperature, -1).gather(1, target[:, None])[:, 0]
    torch.testing.assert_close(logp, whole, rtol=1e-5, atol=1e-5)
    upstream = torch.randn(752, generator=generator)
    for mine, other in zip(*(torch.autograd.grad((x * upstream).sum(), (hidden, weight)) for x in (logp, whole))):
        assert (mine - other).norm() <= 1e-5 * other.norm() + 1e-5


@pytest.mark.parametrize("rows, taken", [(400, False), (752, True)])
def test_the_sum_of_log_probabilities_and_its_gradients_are_those_of_one_softmax(rows, taken, monkeypatch):
    monkeypatch.setattr("fast.CHUNK", 61 * 100)  # 100 rows a chunk: four chunks, which are kept, or eight
    generator = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(n, 16, generator=generator).requires_grad_() for n in (rows, 61))
    target = torch.randint(0, 61, (rows,), generator=generator)
    found = fast.summed_logprobs(hidden, weight, target)
    assert (type(found.grad_fn).__name__ == "SummedLogprobsBackward") == taken
    whole = -torch.nn.functional.cross_entropy(hidden @ weight.T, target, reduction="sum")
    torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-3)
    for mine, other in zip(*(torch.autograd.grad(x / -17, (hidden, weight)) for x in (found, whole))):
        assert (mine - other).norm() <= 1e-5 * other.norm()
    with torch.no_grad():
        torch.testing.assert_close(fast.summed_logprobs(hidden, weight, target), whole, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_entropy_is_that_of_the_whole_softmax_and_comes_with_the_same_log_probabilities(temperature, monkeypatch):
    monkeypatch.setattr("fast.CHUNK", 61 * 100)
    generator = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(n, 16, generator=generator) for n in (752, 61))
    target = torch.randint(0, 61, (752,), generator=generator)
    logp, entropy = fast.chosen_logprobs_and_entropy(hidden, weight, target, temperature)
    assert torch.equal(logp, fast.chosen_logprobs(hidden, weight, target, temperature))  # or no ratio would be 1
    whole = torch.distributions.Categorical(logits=hidden.double() @ weight.double().T / temperature).entropy()
    torch.testing.assert_close(entropy.double(), whole, rtol=1e-5, atol=1e-5)


def test_no_logits_are_kept_where_no_gradient_is_wanted(monkeypatch):
    asked = []
    monkeypatch.setattr(fast.ChosenLogprobs, "apply", lambda *given: asked.append(given[-1]))
    model = make_gpt()
    hidden = torch.zeros(3, 32)
    fast.chosen_logprobs(hidden, model.wte.weight, torch.zeros(3).long(), 1.0)
    with torch.no_grad():
        fast.chosen_logprobs(hidden, model.wte.weight, torch.zeros(3).long(), 1.0)
    fast.chosen_logprobs(hidden, model.requires_grad_(False).wte.weight, torch.zeros(3).long(), 1.0)
    assert asked == [fast.KEPT, 0, 0]


def test_log_probabilities_refuse_a_second_derivative(monkeypatch):
    hidden, weight = (torch.randn(n, 3, dtype=torch.float64).requires_grad_() for n in (2, 5))
    logp = fast.chosen_logprobs(hidden, weight, torch.tensor([1, 2]), 1.0)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(logp.sum(), hidden, create_graph=True)
    monkeypatch.setattr("fast.CHUNK", 1)
    monkeypatch.setattr("fast.KEPT", 0)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(fast.summed_logprobs(hidden, weight, torch.tensor([1, 2])), hidden, create_graph=True)


def test_random_numbers_and_the_look_at_all_rows_are_torchs_own():
    numbers = fast.uniform(3, 2, generator=torch.Generator().manual_seed(5), device=torch.device("cpu"))
    assert torch.equal(numbers, torch.rand(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(5)))
    for done in ([True, True], [True, False]):
        assert fast.all_true(torch.tensor(done), t=3) == all(done)


@pytest.mark.parametrize("training", [True, False])
def test_generation_takes_no_gradient_and_leaves_the_mode_of_the_model_as_it_was(training):
    model = make_gpt(dropout=0.5).train(training)
    greedy = [model.generate(PROMPTS, 9, temperature=0)[0] for _ in range(2)]
    assert torch.equal(*greedy)  # without dropout
    assert model.training == training and not greedy[0].is_inference()


def test_picking_and_its_gradient_are_those_of_plain_indexing():
    x = torch.randn(4, 6, 3, requires_grad=True)
    row, column = torch.arange(4)[:, None], torch.tensor([[0, 5], [2, 2], [1, 3], [4, 0]])
    upstream = torch.randn(4, 2, 3)
    for mine, other in zip(
        *((y, torch.autograd.grad(y, x, upstream)[0]) for y in (fast.pick(x, row, column), x[row, column]))
    ):
        assert torch.equal(mine, other)


def test_the_cache_up_to_a_place_is_the_whole_cache_behind_a_mask():
    kv, gap = torch.randn(2, 2, 3, 2, 7, 4), torch.zeros(3, 1, 1, 7)
    gap[1, ..., 2:4] = -torch.inf
    q = torch.randn(3, 2, 1, 4)
    found = []
    for last in (4, torch.tensor([4])):
        some, place, mask = fast.up_to(kv, gap, last)
        assert torch.equal(some[..., place, :], kv[..., 4:5, :])
        found.append(fast.attend(q, *some[0], mask))
    torch.testing.assert_close(*found)
    expected = torch.nn.functional.scaled_dot_product_attention(q, *kv[0][..., :5, :], gap[..., :5])
    torch.testing.assert_close(found[0], expected)


@pytest.mark.parametrize("heads, kv_heads, T", [(4, 4, 47), (4, 2, 20), (6, 1, 9), (4, 2, 1)])
def test_attention_by_plain_products_and_its_gradients_are_the_fused_kernels(heads, kv_heads, T):
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, n, T, 8) for n in (heads, kv_heads, kv_heads, heads)]
    *inputs, upstream = (torch.randn(shape, generator=generator).requires_grad_() for shape in shapes)
    fused = torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)
    for mine, other in zip(
        *([y, *torch.autograd.grad(y, inputs, upstream)] for y in (fast.attend(*inputs, None), fused))
    ):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_large_products_and_their_gradients_are_those_of_float64(bias):
    generator = torch.Generator().manual_seed(0)
    x, weight, b = (torch.randn(*n, generator=generator) for n in ((3, 5, 1100), (1000, 1100), (1000,)))
    upstream = torch.randn(3, 5, 1000, generator=generator)
    found = []
    for dtype in (torch.float32, torch.float64):
        inputs = [each.to(dtype, copy=True).requires_grad_() for each in (x, weight, b)[: 2 + bias]]
        y = fast.linear(*inputs)
        by_onednn = "OneDNN" in type(y.grad_fn).__name__
        assert by_onednn == (fast.ONEDNN and dtype == torch.float32)
        found.append([y.detach(), *torch.autograd.grad((y * upstream.to(dtype)).sum(), inputs)])
    for mine, exact in zip(*found):
        assert (mine - exact).norm() <= 1e-6 * exact.norm()
    exact = found[1][0]
    with torch.no_grad():  # as in decoding, also by a packed matrix and for one token
        for rows, matrix in ((x, weight), (x, fast.pack(weight)), (x[:, :1], fast.pack(weight))):
            expected = exact[:, : rows.shape[1]]
            assert (fast.linear(rows, matrix, b if bias else None) - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.skipif(not fast.ONEDNN, reason="this build of torch has no oneDNN")
def test_large_products_refuse_a_second_derivative():
    x, weight = torch.randn(2, 1024, requires_grad=True), torch.randn(1024, 1024, requires_grad=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(fast.linear(x, weight).sum(), x, create_graph=True)


def test_under_autocast_log_probabilities_and_scores_are_rounded_no_more_than_their_factors():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 64, generator=generator).mul(4).bfloat16() for n in (50, 61))
    logits, target = hidden.double() @ weight.double().T, torch.arange(50)
    assert logits.abs().max() > 256  # where neighbours in bfloat16 are 2 apart
    scorer = ScalarModel(make_gpt(n_embd=64))
    with torch.autocast("cpu", torch.bfloat16):
        logp, scores = fast.chosen_logprobs(hidden, weight, target, 1.0), scorer.scalar(hidden)
    exact = logits.log_softmax(-1)[target, target]
    torch.testing.assert_close(logp.double(), exact, rtol=1e-6, atol=1e-3)
    exact = (hidden.double() @ scorer.head.weight.double().T)[:, 0]
    torch.testing.assert_close(scores.double(), exact, rtol=1e-5, atol=1e-5)


def test_log_probabilities_pass_gradcheck_in_float64(monkeypatch):
    monkeypatch.setattr("fast.CHUNK", 11 * 2)  # two rows a chunk
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 3, dtype=torch.float64, generator=generator).requires_grad_() for n in (13, 11))
    target = torch.randint(0, 11, (13,), generator=generator)
    assert torch.autograd.gradcheck(lambda h, w: fast.chosen_logprobs(h, w, target, 0.7), (hidden, weight))
    assert torch.autograd.gradcheck(lambda h, w: fast.summed_logprobs(h, w, target), (hidden, weight))


def test_under_autocast_generation_rounds_each_weight_once_and_keeps_none():
    model = make_gpt()
    casts = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if (
                function in (torch.ops.aten._to_copy.default, torch.ops.aten.to.dtype)
                and result.dtype == torch.bfloat16
            ):
                casts.append(args[0].data_ptr())
            return result

    drawn = []
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        for _ in range(2):
            with Count():
                drawn.append(model.generate(PROMPTS, 9, generator=torch.Generator().manual_seed(0))[0])
            with torch.no_grad():
                model.h[0].mlp.c_fc.weight.mul_(-1)
    weights = [p.data_ptr() for name, p in model.named_parameters() if p.dim() == 2 and "wpe" not in name]
    assert [casts.count(weight) for weight in weights] == [2] * len(weights)  # once in each of two generations
    assert not torch.equal(*drawn)  # the second saw the weight that had changed


@pytest.mark.skipif(not fast.ONEDNN, reason="this build of torch has no oneDNN")
def test_matrices_repacked_for_generation_give_the_greedy_tokens_of_float64_and_see_every_update(monkeypatch):
    model = make_gpt(vocab_size=2**15, n_inner=2**15)  # 2**20 weights each
    drawn, repacked, pack = [], [], fast.pack
    note = lambda weight, keep: repacked.append(fast.for_onednn(weight)) or pack(weight, keep)  # noqa: E731
    monkeypatch.setattr("fast.pack", note)
    for _ in range(2):
        tokens, prompt_len, length = model.generate(PROMPTS, 9, temperature=0)
        logits = copy.deepcopy(model).double()(tokens)
        for row, start, end in zip(range(3), prompt_len.tolist(), length.tolist()):
            assert torch.equal(tokens[row, start:end], logits[row, start - 1 : end - 1].argmax(-1))
        drawn.append(tokens)
        assert not any("forward" in vars(layer) for layer in linears(model))
        with torch.no_grad():
            model.wte.weight.mul_(-1)
            model.h[0].mlp.c_fc.weight.mul_(-1)
    assert sum(repacked) == 2 * (1 + 2 * len(model.h))  # of each generation: the output layer, both of every MLP
    assert not torch.equal(*drawn)


def test_the_sampler_is_exact_to_1e_6_over_a_large_vocabulary():
    logits = torch.randn(1, 50_257, generator=torch.Generator().manual_seed(0)) * 3
    exact = logits.double().softmax(-1)[0]
    # a uniform number draws token i when it falls in i's interval of the CDF: probe both ends of the commonest ones
    edges = exact.cumsum(0)
    for i in exact.topk(200).indices.tolist():
        low, high = edges[i] - exact[i], edges[i]
        inside = torch.stack([low + 1e-6, high - 1e-6])
        assert (high - low) < 3e-6 or sample(logits.expand(2, -1), inside).tolist() == [i, i]


@pytest.mark.parametrize("vocab_size", [2, 61, 4096, 4097, 4352, 50_257])
def test_drawing_in_two_levels_finds_the_token_of_one_cumulative_sum(vocab_size):
    generator = torch.Generator().manual_seed(0)
    n = 50 if vocab_size > 1000 else 2000
    logits = torch.randn(n, vocab_size, generator=generator) * 3
    uniform = torch.rand(n, dtype=torch.float64, generator=generator)
    uniform[:2] = torch.tensor([0.0, 1 - 2**-53])
    cdf = logits.softmax(-1).double().cumsum(-1)
    plain = torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:], right=True)[:, 0]
    drawn = sample(logits, uniform)
    apart = (drawn != plain).nonzero()[:, 0]  # only where the number falls on the edge between two tokens
    for row in apart.tolist():
        edge = cdf[row, min(drawn[row], plain[row])] / cdf[row, -1]
        assert abs(drawn[row] - plain[row]) == 1 and abs(edge - uniform[row]) < 1e-6


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("how", [{"temperature": 0}, {}, {"top_k": 9, "top_p": 0.9}])
def test_decoding_in_shapes_that_do_not_change_draws_the_same_tokens(family, how):
    model = make_gpt(**FAMILIES[family])
    model.config.eos = int(model(torch.tensor([PROMPTS[1]]))[0, -1].argmax())  # one that is drawn
    for prompts in (PROMPTS, PROMPTS[:1] * 3, [[5]]):
        found = []
        for model.static_decode in (False, True):
            found.append(model.generate(prompts, 20, generator=torch.Generator().manual_seed(1), **how))
        for plain, static in zip(*found):
            assert torch.equal(plain, static)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("shape", [{}, {"n_inner": 2**15}, FAMILIES["llama"]])  # 2**20 weights go through oneDNN
def test_compiled_blocks_compute_what_plain_ones_do(shape):
    plain, compiled = make_gpt(**shape), make_gpt(**shape)
    fast.compile_blocks(compiled)
    for prompts, n in ((PROMPTS, 9), (PROMPTS[:2], 20)):
        where = plain.generate(prompts, n)
        found = []
        for model in (plain, compiled):
            logp = model.logprobs(*where)
            found.append([logp, *torch.autograd.grad(logp.square().sum(), list(model.parameters()))])
        for mine, other in zip(*found):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)
    assert torch.equal(plain.generate(PROMPTS, 9, temperature=0)[0], compiled.generate(PROMPTS, 9, temperature=0)[0])


def test_the_first_calls_of_mkls_functions_are_of_one_number(monkeypatch):
    """Two threads that are both first may get other last bits than the seed gives."""
    sizes = {}

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if isinstance(args[0], torch.Tensor):
                sizes.setdefault(function.overloadpacket.__name__, args[0].numel())
            return function(*args, **(kwargs or {}))

    monkeypatch.setattr(processes, "keep_memory", lambda: None)
    with Seen():
        processes.setup(ppo.Config(device="cpu"))
    assert {name: sizes.get(name) for name in ("exp", "log", "tanh")} == {"exp": 1, "log": 1, "tanh": 1}
