"""fast.py: every function equals model.py's plain line of the same name."""

import copy
import os
import shutil

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fast
import model
import ppo
from common import cli
from model import ScalarModel, sample
from tests.conftest import FAMILIES, make_gpt
from tests.contenders import PLAIN, plain_model

PROMPTS = [[5], [7, 8, 9, 10, 11, 12], [3, 4, 5]]
PLAINLY = plain_model()  # model.py without the line that imports fast.py
BF16 = torch.autocast("cpu", torch.bfloat16)
FLOAT32 = torch.autocast("cpu", enabled=False)
PRECISIONS = [pytest.param(FLOAT32, 1e-5, id="float32"), pytest.param(BF16, 2e-2, id="bfloat16")]


def near(mine, other, tolerance: float) -> None:
    """Of each tensor's norm."""
    assert mine.dtype == other.dtype and mine.shape == other.shape
    assert (mine.double() - other.double()).norm() <= tolerance * other.double().norm() + tolerance


def both(name: str, inputs: list, arguments: tuple, autocast: torch.autocast, tolerance: float) -> None:
    """fast's and model.py's function of a name give near numbers, and near gradients of them."""
    found = []
    for function in (getattr(fast, name), getattr(PLAINLY, name)):
        with autocast:
            out = function(*inputs, *arguments)
        out = [x for x in (out if isinstance(out, tuple) else (out,)) if x is not None]
        upstream = [torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).to(x.dtype) for x in out]
        found.append([*out, *torch.autograd.grad(out, [x for x in inputs if x is not None], upstream)])
    for mine, other in zip(*found, strict=True):
        near(mine, other, tolerance)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).requires_grad_()


def test_every_plain_line_is_here_and_the_model_takes_this_one():
    assert {name for name in PLAIN if getattr(model, name) is getattr(fast, name)} == set(PLAIN)
    assert all(getattr(PLAINLY, name) is not getattr(fast, name) for name in PLAIN)


@pytest.mark.parametrize("autocast, tolerance", PRECISIONS)
@pytest.mark.parametrize("heads, kv_heads, T", [(4, 4, 47), (4, 2, 20), (6, 1, 150), (4, 2, 1)])
def test_attention_is_the_plain_one(heads, kv_heads, T, autocast, tolerance):
    inputs = [normal(3, n, T, 8) for n in (heads, kv_heads, kv_heads)]
    both("attend", inputs, (None,), autocast, tolerance)


@pytest.mark.parametrize("S", [20, 150])
def test_attention_behind_a_mask_is_the_plain_one(S):
    mask = torch.zeros(3, 1, 1, S)
    mask[1, ..., 2:9] = -torch.inf
    both("attend", [normal(3, 4, 1, 8), normal(3, 2, S, 8), normal(3, 2, S, 8)], (mask,), FLOAT32, 1e-5)
    for attend in (fast.attend, PLAINLY.attend):
        q = torch.zeros(2, 4, 99, 8)
        dropped = attend(q, q, q + 1, None, 0.5)[:, :, 50:]
        assert abs(dropped.mean() - 1) < 0.05 and dropped.std() > 0.05


@pytest.mark.parametrize("autocast, tolerance", PRECISIONS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("I, O", [(1100, 1000), (16, 12)])  # 2**20 weights go through oneDNN
def test_products_are_the_plain_ones(I, O, bias, autocast, tolerance):
    inputs = [normal(3, 5, I), normal(O, I), normal(O) if bias else None]
    both("linear_float32", inputs, (), autocast, 1e-5)
    weights = [x.detach() for x in inputs[1:] if x is not None]
    found = []
    for kind in (fast.Linear, PLAINLY.Linear):
        layer = kind(I, O, bias=bias)
        for mine, given in zip(layer.parameters(), weights, strict=True):
            mine.data.copy_(given)
        with autocast:
            y = layer(inputs[0])
        found.append([y, *torch.autograd.grad(y.float().square().sum(), [inputs[0], *layer.parameters()])])
    for mine, other in zip(*found, strict=True):
        near(mine, other, tolerance)
    with torch.no_grad(), autocast:  # as in decoding, also for one token
        packed = [None if x is None else fast.pack(x) for x in inputs[1:]]
        plain = [None if x is None else PLAINLY.pack(x) for x in inputs[1:]]
        for rows in (inputs[0], inputs[0][:, :1]):
            near(fast.linear(rows, *packed), torch.nn.functional.linear(rows, *plain), tolerance)


@pytest.mark.parametrize("autocast, tolerance", PRECISIONS)
@pytest.mark.parametrize("kept, entropy", [(0, False), (2, False), (100, False), (4, True)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_and_entropies_are_the_plain_ones(
    temperature, kept, entropy, autocast, tolerance, monkeypatch
):
    monkeypatch.setattr("fast.CHUNK", 61 * 100)  # 100 rows a chunk: eight chunks
    monkeypatch.setattr("fast.KEPT", kept)
    target = torch.randint(0, 61, (752,), generator=torch.Generator().manual_seed(1))
    inputs, arguments = [normal(752, 16), normal(61, 16)], (target, temperature, entropy)
    both("token_logprobs", inputs, arguments, autocast, tolerance)
    with torch.no_grad(), autocast:
        logp, _ = fast.token_logprobs(*inputs, *arguments)
        assert torch.equal(logp, fast.token_logprobs(*inputs, target, temperature)[0])  # or no ratio would be 1


@pytest.mark.parametrize("vocab_size", [2, 61, 4096, 4097, 4352, 50_257])
def test_drawing_finds_the_token_of_the_plain_line(vocab_size):
    """But where the number falls on the edge between two tokens."""
    generator = torch.Generator().manual_seed(0)
    n = 50 if vocab_size > 1000 else 2000
    probs = (torch.randn(n, vocab_size, generator=generator) * 3).softmax(-1)
    uniform = torch.rand(n, dtype=torch.float64, generator=generator)
    uniform[:2] = torch.tensor([0.0, 1 - 2**-53])
    cdf = probs.double().cumsum(-1)
    plain, drawn = PLAINLY.draw(probs, uniform), fast.draw(probs, uniform)
    for row in (drawn != plain).nonzero()[:, 0].tolist():
        edge = cdf[row, min(drawn[row], plain[row])] / cdf[row, -1]
        assert abs(drawn[row] - plain[row]) == 1 and abs(edge - uniform[row]) < 1e-6


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("how", [{"temperature": 0}, {"top_k": 9, "top_p": 0.9}])
def test_a_whole_model_of_plain_lines_is_this_one(family, how):
    fast_one = make_gpt(**FAMILIES[family])
    plain_one = PLAINLY.GPT(PLAINLY.GPTConfig(**vars(fast_one.config))).eval()
    plain_one.load_state_dict(fast_one.state_dict())
    found = []
    for net in (fast_one, plain_one):
        sampled = net.generate(PROMPTS, 20, generator=torch.Generator().manual_seed(1), **how)
        logp = net.logprobs(*sampled)
        found.append([*sampled, logp, *torch.autograd.grad(logp.sum(), list(net.parameters()))])
    assert all(map(torch.equal, found[0][:3], found[1][:3]))
    for mine, other in zip(*found, strict=True):
        near(mine, other, 1e-4)


def test_no_logits_are_kept_where_no_gradient_is_wanted(monkeypatch):
    asked = []
    monkeypatch.setattr(fast.ChosenLogprobs, "apply", lambda *given: asked.append(given[-1]))
    net = make_gpt()
    hidden = torch.zeros(3, 32)
    fast.token_logprobs(hidden, net.wte.weight, torch.zeros(3).long())
    with torch.no_grad():
        fast.token_logprobs(hidden, net.wte.weight, torch.zeros(3).long())
    fast.token_logprobs(hidden, net.requires_grad_(False).wte.weight, torch.zeros(3).long())
    assert asked == [fast.KEPT, 0, 0]


def test_log_probabilities_refuse_a_second_derivative():
    hidden, weight = (torch.randn(n, 3, dtype=torch.float64).requires_grad_() for n in (2, 5))
    logp, _ = fast.token_logprobs(hidden, weight, torch.tensor([1, 2]))
    refuses_a_second_derivative(logp.sum(), hidden)


def refuses_a_second_derivative(y, x):
    (gradient,) = torch.autograd.grad(y.square(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("training", [True, False])
def test_generation_takes_no_gradient_and_leaves_the_mode_of_the_model_as_it_was(training):
    net = make_gpt(dropout=0.5).train(training)
    greedy = [net.generate(PROMPTS, 9, temperature=0)[0] for _ in range(2)]
    assert torch.equal(*greedy)  # without dropout
    assert net.training == training and not greedy[0].is_inference()


@pytest.mark.skipif(not fast.ONEDNN, reason="this build of torch has no oneDNN")
def test_large_products_refuse_a_second_derivative():
    x, weight = torch.randn(2, 1024, requires_grad=True), torch.randn(1024, 1024, requires_grad=True)
    refuses_a_second_derivative(fast.linear(x, weight).sum(), x)


def test_under_autocast_log_probabilities_and_scores_are_rounded_no_more_than_their_factors():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 64, generator=generator).mul(4).bfloat16() for n in (50, 61))
    logits, target = hidden.double() @ weight.double().T, torch.arange(50)
    assert logits.abs().max() > 256  # where neighbours in bfloat16 are 2 apart
    scorer = ScalarModel(make_gpt(n_embd=64))
    with torch.autocast("cpu", torch.bfloat16):
        (logp, _), scores = fast.token_logprobs(hidden, weight, target), scorer.scalar(hidden)
    exact = logits.log_softmax(-1)[target, target]
    torch.testing.assert_close(logp.double(), exact, rtol=1e-6, atol=1e-3)
    exact = (hidden.double() @ scorer.head.weight.double().T)[:, 0]
    torch.testing.assert_close(scores.double(), exact, rtol=1e-5, atol=1e-5)


def test_log_probabilities_pass_gradcheck_in_float64(monkeypatch):
    monkeypatch.setattr("fast.CHUNK", 11 * 2)  # two rows a chunk
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 3, dtype=torch.float64, generator=generator).requires_grad_() for n in (13, 11))
    target = torch.randint(0, 11, (13,), generator=generator)
    for kept in (2, 100):  # the other chunks are computed again
        monkeypatch.setattr("fast.KEPT", kept)
        assert torch.autograd.gradcheck(lambda h, w: fast.token_logprobs(h, w, target, 0.7)[0], (hidden, weight))


def test_under_autocast_generation_rounds_each_weight_once_and_keeps_none():
    net = make_gpt()
    casts = []

    class Count(TorchDispatchMode):
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
                drawn.append(net.generate(PROMPTS, 9, generator=torch.Generator().manual_seed(0))[0])
            with torch.no_grad():
                net.h[0].mlp.c_fc.weight.mul_(-1)
    weights = [p.data_ptr() for name, p in net.named_parameters() if p.dim() == 2 and "wpe" not in name]
    assert [casts.count(weight) for weight in weights] == [2] * len(weights)  # once in each of two generations
    assert not torch.equal(*drawn)  # the second saw the weight that had changed


@pytest.mark.skipif(not fast.ONEDNN, reason="this build of torch has no oneDNN")
def test_matrices_repacked_for_generation_give_the_greedy_tokens_of_float64_and_see_every_update(monkeypatch):
    net = make_gpt(vocab_size=2**15, n_inner=2**15)  # 2**20 weights each
    drawn, repacked, pack = [], [], fast.pack
    note = lambda weight: repacked.append(fast.for_onednn(weight)) or pack(weight)  # noqa: E731
    monkeypatch.setattr("fast.pack", note)
    monkeypatch.setattr("model.pack", note)
    for _ in range(2):
        tokens, prompt_len, length = net.generate(PROMPTS, 9, temperature=0)
        logits = copy.deepcopy(net).double()(tokens)
        for row, start, end in zip(range(3), prompt_len.tolist(), length.tolist()):
            assert torch.equal(tokens[row, start:end], logits[row, start - 1 : end - 1].argmax(-1))
        drawn.append(tokens)
        assert all(layer.packed is None for layer in net.modules() if isinstance(layer, fast.Linear))
        with torch.no_grad():
            net.wte.weight.mul_(-1)
            net.h[0].mlp.c_fc.weight.mul_(-1)
    assert sum(repacked) == 2 * (1 + 2 * len(net.h))  # of each generation: the output layer, both of every MLP
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


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("shape", [{"n_inner": 2**15}, FAMILIES["llama"]])  # 2**20 weights go through oneDNN
def test_compiled_blocks_compute_what_plain_ones_do(shape):
    plain, compiled = make_gpt(**shape), make_gpt(**shape)
    fast.compile_blocks(compiled)
    for prompts, n in ((PROMPTS, 9), (PROMPTS[:2], 20)):
        where = plain.generate(prompts, n)
        found = []
        for net in (plain, compiled):
            logp = net.logprobs(*where)
            found.append([logp, *torch.autograd.grad(logp.square().sum(), list(net.parameters()))])
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

    monkeypatch.setattr(cli, "keep_memory", lambda: None)
    with Seen():
        cli.setup(ppo.Config(device="cpu"))
    assert {name: sizes.get(name) for name in ("exp", "log", "tanh")} == {"exp": 1, "log": 1, "tanh": 1}
