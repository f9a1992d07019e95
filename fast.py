"""The arithmetic of model.py, faster. To learn how RLHF works you need not open this file.

Every docstring opens with the plain line that the function equals; tests/test_fast.py holds the two together. No other
file knows of oneDNN and its packed matrices, attention by plain products, chunks of logits and their derivative, a draw
in two levels, decoding as a CUDA graph, pinned copies, memory that glibc keeps, or compiled blocks.
"""

import contextlib
import ctypes
import functools
import math
import sys
from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary, WeakTensorKeyDictionary

CHUNK = 2**23  # logits that exist at a time on a CPU: glibc still takes 32 MiB from memory that it has
GPU_CHUNK = 2**27  # 512 MiB, for a GPU wants products of many rows
KEPT = 4  # chunks of logits that the backward need not compute again
SHORT = 128  # a CPU attends to up to this many keys by plain products
ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")  # private operators:
REORDERS = ONEDNN and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")  # another torch may lack one, or both
ROUNDED = WeakTensorKeyDictionary()  # weight → (dtype, device) → what `pack` has rounded it to
DECODES = WeakIdKeyDictionary()  # model → key → the tensors of a decode, and the graph of its step once there is one


# --- products ---------------------------------------------------------------------------------------------------------


class Linear(nn.Linear):
    """`nn.Linear`. While the model generates, `decoding` puts a product with packed matrices in place of `forward`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear(x, weight, bias)`. On a CPU oneDNN, not MKL, multiplies by large matrices."""
    if not for_onednn(weight) or x.dtype != torch.float32:
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled():
        return OneDNNLinear.apply(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def for_onednn(weight: Tensor) -> bool:
    if not ONEDNN or weight.device.type != "cpu" or weight.dtype != torch.float32:
        return False
    plain = torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling()
    return weight.numel() >= 2**20 and not plain


class OneDNNLinear(torch.autograd.Function):
    """`F.linear(x, weight, bias)`: x (…, I), W (O, I), b (O,) or None → (…, O). There is no second derivative."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        refuse_second_derivative("fast.linear", "F.linear")
        x, weight = ctx.saved_tensors
        flat = grad.flatten(0, -2)  # (N, O)
        d_bias = flat.sum(0) if ctx.needs_input_grad[2] else None
        return grad @ weight, flat.T @ x.flatten(0, -2), d_bias  # MKL is faster here than oneDNN


def refuse_second_derivative(mine: str, plain: str) -> None:
    """Raises RuntimeError inside a backward of create_graph=True, where gradients are on."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"{mine} has no second derivative; use {plain} in its place")


def pack(weight: Tensor, keep: bool = False) -> Tensor:
    """`weight`, under autocast in its dtype; a large matrix in the order that oneDNN reads fastest for a few rows.

    With `keep` it is rounded into the same memory every time, because a graph reads it there.
    """
    plain = weight.detach()
    if REORDERS and for_onednn(weight):
        return torch.ops.mkldnn._reorder_linear_weight(plain)
    rounded = plain.to(compute_dtype(weight))
    if not keep or rounded is plain:
        return rounded
    return ROUNDED.setdefault(weight, {}).setdefault((rounded.dtype, rounded.device), rounded).copy_(rounded)


def compute_dtype(x: Tensor) -> torch.dtype:
    """`x.dtype`, or under autocast the dtype that products are computed in."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def linear_float32(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear(x.float(), weight.float(), bias.float())`, also under autocast; float64 stays float64.

    Rounded to bfloat16, whose steps are 0.5 from 64 to 128, log-probabilities would be off by more than PPO's ε, and
    scores that are close would be equal.
    """
    both_bfloat16 = x.dtype == weight.dtype == torch.bfloat16
    if x.is_cuda and both_bfloat16 and bias is None and sums_in_float32(x.device):
        return torch.mm(x, weight.T, out_dtype=torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        return linear(at_least_float32(x), at_least_float32(weight), None if bias is None else at_least_float32(bias))


@functools.cache
def sums_in_float32(device: torch.device) -> bool:
    """Whether this torch and this GPU give the product of two bfloat16 matrices in float32: torch before 2.8 cannot."""
    x = torch.ones(16, 16, dtype=torch.bfloat16, device=device)
    try:
        torch.mm(x, x, out_dtype=torch.float32)
    except (RuntimeError, TypeError):
        return False
    return True


def at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


# --- attention --------------------------------------------------------------------------------------------------------


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float = 0.0) -> Tensor:
    """`F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=T > 1, enable_gqa=True)`.

    q (B, H, T, D), k and v (B, K, t, D) → (B, H, T, D). One query a row (T = 1) may have a mask (B, 1, 1, t) of 0 and
    −inf. Short rows on a CPU, and one query on every device, are attended to by two plain products.
    """
    B, H, T, D = q.shape
    short = q.device.type == "cpu" and k.shape[2] <= SHORT
    if dropout or not (short or T == 1):
        grouped = k.shape[1] < H
        if grouped and q.device.type == "cuda" and q.dtype == torch.float32:  # for which CUDA has no fused kernel
            k, v = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (k, v))
            grouped = False
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=T > 1, enable_gqa=grouped)
    q = (q * D**-0.5).reshape(B * k.shape[1], -1, D)  # (B K, H / K · T, D)
    scores = q.bmm(k.flatten(0, 1).transpose(1, 2))  # (B K, H / K · T, t)
    if T > 1:
        mask = torch.full((T, T), -math.inf, dtype=q.dtype, device=q.device).triu(1)
    if mask is not None:
        scores = (scores.view(B, H, T, -1) + mask).view_as(scores)
    return scores.softmax(-1).bmm(v.flatten(0, 1)).view(B, H, T, D)


# --- log-probabilities ------------------------------------------------------------------------------------------------


def chunk_rows(weight: Tensor) -> int:
    """How many rows of logits (V,) exist at a time."""
    return max(1, (CHUNK if weight.device.type == "cpu" else GPU_CHUNK) // len(weight))


def chosen_logprobs(hidden: Tensor, weight: Tensor, target: Tensor, temperature: float) -> Tensor:
    """`F.log_softmax(hidden @ weight.T / temperature, -1).gather(1, target[:, None])[:, 0]` in float32.

    hidden (N, C), W (V, C), target (N,) → (N,) in nats. Logits exist for one chunk of rows at a time. The backward
    computes them again, all but the last few chunks, which are kept where a gradient is wanted. There is no second
    derivative.
    """
    dtype = compute_dtype(hidden)
    wanted = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return ChosenLogprobs.apply(hidden.to(dtype), weight.to(dtype), target, temperature, KEPT if wanted else 0)


@torch.no_grad()
def chosen_logprobs_and_entropy(
    hidden: Tensor, weight: Tensor, target: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """`chosen_logprobs`, and `torch.distributions.Categorical(logits=hidden @ weight.T / temperature).entropy()`."""
    dtype = compute_dtype(hidden)
    weight, rows = weight.to(dtype), chunk_rows(weight)
    logp, entropy = [], []
    for h, y in zip(hidden.to(dtype).split(rows), target.split(rows)):
        logits = shifted_logits(h, weight, temperature)
        exp = logits.exp()
        total = exp.sum(-1)
        logp.append(logits.gather(1, y[:, None])[:, 0] - total.log())
        entropy.append(total.log() - exp.mul_(logits).sum(-1) / total)
    return torch.cat(logp), torch.cat(entropy)


class ChosenLogprobs(torch.autograd.Function):
    """With p = softmax, the gradient of a chosen log-probability with respect to the logits is onehot − p."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, target: Tensor, temperature: float, n_kept: int) -> Tensor:
        ctx.save_for_backward(hidden, weight, target)
        ctx.temperature, ctx.rows, ctx.kept = temperature, chunk_rows(weight), []
        chunks = list(zip(hidden.split(ctx.rows), target.split(ctx.rows)))
        chosen = []
        for i, (h, y) in enumerate(chunks):
            logp, exp, total = chunk_softmax(h, weight, y, temperature)
            chosen.append(logp)
            if i >= len(chunks) - n_kept:
                ctx.kept.append((exp, total))
        return torch.cat(chosen)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        refuse_second_derivative("fast.chosen_logprobs", "F.log_softmax")
        hidden, weight, target = ctx.saved_tensors
        g = (grad / ctx.temperature)[:, None]  # (N, 1) float32
        d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=grad.dtype)  # (N, C), (V, C)
        for h, y, gi, d in reversed(list(zip(*(x.split(ctx.rows) for x in (hidden, target, g, d_hidden))))):
            exp, total = ctx.kept.pop() if ctx.kept else chunk_softmax(h, weight, y, ctx.temperature)[1:]
            add_gradients(exp, total, gi / total, h, weight, y, d, d_weight)
            del exp, total  # before the next chunk takes its memory
        return d_hidden, d_weight.to(weight.dtype), None, None, None


def summed_logprobs(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """`chosen_logprobs(hidden, weight, target, 1.0).sum()`: a number, what stage 1 learns from.

    The gradient of each log-probability is one and the same number, so where there are many chunks of logits, both
    gradients are taken in the forward but for that number, and no chunk is kept or computed twice.
    """
    wanted = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    if not wanted or len(hidden) <= KEPT * chunk_rows(weight):
        return chosen_logprobs(hidden, weight, target, 1.0).sum()
    dtype = compute_dtype(hidden)
    return SummedLogprobs.apply(hidden.to(dtype), weight.to(dtype), target)


class SummedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        rows, found = chunk_rows(weight), []
        d_hidden = torch.empty_like(hidden)  # (N, C)
        d_weight = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))  # (V, C)
        for h, y, d in zip(*(x.split(rows) for x in (hidden, target, d_hidden))):
            logp, exp, total = chunk_softmax(h, weight, y, 1.0)
            found.append(logp.sum())
            add_gradients(exp, total, 1 / total, h, weight, y, d, d_weight)
        ctx.gradients = d_hidden, d_weight
        return torch.stack(found).sum()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        refuse_second_derivative("fast.summed_logprobs", "F.log_softmax")
        d_hidden, d_weight = ctx.gradients
        return (d_hidden * grad).to(d_hidden.dtype), (d_weight * grad).to(d_hidden.dtype), None


def add_gradients(
    exp: Tensor, total: Tensor, g: Tensor, h: Tensor, weight: Tensor, target: Tensor, d_h: Tensor, d_weight: Tensor
) -> None:
    """Write the gradient of h (n, C) into d_h, and add that of W (V, C) to d_weight.

    exp / total is the chunk's softmax, and g (n, 1) each row's upstream gradient, divided by its total.
    """
    p = exp.scatter_add_(1, target[:, None], -total).to(h.dtype)  # (n, V): softmax − onehot, times total
    g = g.to(h.dtype)  # (n, 1)
    d_h.copy_(-g * (p @ weight))
    if h.dtype == d_weight.dtype:
        d_weight.addmm_(p.T, g * h, alpha=-1)
    else:
        d_weight -= p.T @ (g * h)


def chunk_softmax(hidden: Tensor, weight: Tensor, target: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """The chosen log-probabilities (n,), and the softmax as exp(logits − max) (n, V) and its sums (n, 1)."""
    logits = shifted_logits(hidden, weight, temperature)
    chosen = logits.gather(1, target[:, None])
    total = logits.exp_().sum(-1, keepdim=True)
    return (chosen - total.log())[:, 0], logits, total


def shifted_logits(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """hidden @ weight.T / temperature, less each row's largest: (n, V)."""
    logits = linear_float32(hidden, weight)
    if temperature != 1:
        logits /= temperature
    logits -= logits.amax(-1, keepdim=True)  # in place, like exp_: new memory costs more than arithmetic
    return logits


# --- drawing and decoding ---------------------------------------------------------------------------------------------


def draw(probs: Tensor, uniform: Tensor) -> Tensor:
    """`torch.searchsorted(probs.cumsum(-1), uniform[:, None] * probs.sum(-1, keepdim=True), right=True)[:, 0]`.

    probs (B, V), uniform (B,) in float64 in [0, 1) → token ids (B,). Sums are in float64: in float32 they are off by up
    to 4e-4 in total variation over 50,257 tokens. A large vocabulary is searched in two levels. Probabilities that are
    nan give some token: what is read of it is nan too, and stops the run.
    """
    V, width, u = probs.shape[-1], 256, uniform[:, None].clamp(max=1 - 2**-52)  # (B, 1)
    if V <= 16 * width:
        cdf = probs.cumsum(-1, dtype=torch.float64)
        return torch.searchsorted(cdf, u * cdf[:, -1:], right=True)[:, 0].clamp(max=V - 1)
    # First: which stretch of 256 tokens.
    whole = V // width * width
    mass = probs[:, :whole].unflatten(1, (-1, width)).sum(-1)  # (B, V / 256)
    mass = torch.cat([mass, probs[:, whole:].sum(-1, keepdim=True)], 1).double()
    cdf = mass.cumsum(-1)
    u = u * cdf[:, -1:]
    stretch = torch.searchsorted(cdf, u, right=True).clamp(max=cdf.shape[1] - 1)
    # Then: which token of it.
    left = mass.gather(1, stretch) - cdf.gather(1, stretch) + u  # of u, within the stretch
    token = stretch * width + torch.arange(width, device=u.device)  # (B, 256)
    inside = (probs.gather(1, token.clamp(max=V - 1)) * (token < V)).cumsum(-1, dtype=torch.float64)
    share = (left / mass.gather(1, stretch)).clamp(0, 1 - 2**-52)  # rounding must not leave the stretch
    place = torch.searchsorted(inside, share * inside[:, -1:], right=True)
    return (stretch * width + place)[:, 0].clamp(max=V - 1)


def packed_product(layer: Linear, keep: bool) -> Callable[[Tensor], Tensor]:
    """`layer.forward`, x (…, I) → (…, O), with weight and bias packed once for a whole generation."""
    weight, *bias = [pack(x, keep) for x in layer.parameters()]
    product = linear if for_onednn(weight) else F.linear
    return functools.partial(product, weight=weight, bias=bias[0] if bias else None)


def decoding(generate: Callable) -> Callable:
    """`torch.no_grad()(generate)`, with the model in eval mode meanwhile, the weights of its linear layers packed."""

    @functools.wraps(generate)
    def decorated(model: nn.Module, *args, **options) -> tuple[Tensor, ...]:
        was_training = model.training
        layers = [layer for layer in model.h.modules() if isinstance(layer, Linear)]
        eager = torch.compiler.set_stance("force_eager") if hasattr(model, "compiled") else contextlib.nullcontext()
        try:
            with torch.inference_mode(), eager:  # a compiled block would be compiled anew for every token
                for layer in layers:
                    layer.forward = packed_product(layer, model.static_decode)
                result = generate(model.eval(), *args, **options)
        finally:
            for layer in layers:
                layer.__dict__.pop("forward", None)
            model.train(was_training)
        return tuple(x.clone() for x in result)  # ordinary tensors again

    return decorated


def uniform(*size: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """`torch.rand(size, dtype=torch.float64)`, from a CPU generator, on a device that has float64."""
    numbers = torch.rand(size, dtype=torch.float64, generator=generator)
    return to_device(numbers, device) if device.type == "cuda" else numbers


def up_to(kv: Tensor, gap: Tensor, place: int | Tensor) -> tuple[Tensor, slice | Tensor, Tensor]:
    """`kv[..., : place + 1, :], place, gap[..., : place + 1]`: the cache up to a place, that place, and its mask.

    A graph cannot know the value of a tensor. Then these are the whole cache, and a mask that hides what comes later.
    """
    if isinstance(place, int):
        return kv[..., : place + 1, :], slice(place, place + 1), gap[..., : place + 1]
    later = torch.arange(gap.shape[-1], device=gap.device) > place
    return kv, place, gap.masked_fill(later, -math.inf)


def static(model: nn.Module, constants: tuple, tensors: tuple[Tensor, ...]) -> tuple[list[Tensor], Callable]:
    """`tensors, lambda step, t: step(t)`: what a step of the decode reads and writes, and what takes steps 1, 2, 3 …

    In static decoding t is a tensor, and on CUDA the second step becomes a graph. A later call puts its tensors into
    the memory that a graph of these shapes, constants and weights already reads: to capture one costs many steps.
    """
    if not model.static_decode:
        return tensors, lambda step, t: step(t)
    weights = [x.data_ptr() for p in model.parameters() for x in (p, *ROUNDED.get(p, {}).values())]
    key = str((model.config, constants, weights, [(x.shape, x.dtype) for x in tensors]))
    fresh = (*tensors, torch.ones(1, dtype=torch.long, device=tensors[0].device))
    decodes = DECODES.setdefault(model, {})
    kept, graphs = decodes.pop(key, (fresh, []))
    decodes[key] = kept, graphs  # the newest stands last
    if len(decodes) > 4:  # each holds keys and values
        del decodes[next(iter(decodes))]
    for old, new in zip(kept, fresh):
        old.copy_(new)
    *tensors, time = kept

    def take(step: Callable[[Tensor], None], t: int) -> None:
        if time.is_cuda and t > 1 and not graphs:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step(time)
                time.add_(1)
            graphs.append(graph)
        if graphs:
            return graphs[0].replay()
        step(time)
        time.add_(1)

    return tensors, take


def prompt_width(model: nn.Module, prompts: list[list[int]], n_new: int) -> int:
    """`max(map(len, prompts))`. Static decoding rounds it up, so that a graph serves prompts of other lengths too."""
    longest, room = max(map(len, prompts)), model.config.block_size - n_new
    return max(longest, min(-(-longest // 32) * 32, room)) if model.static_decode else longest


def all_true(x: Tensor, t: int) -> bool:
    """`x.all()`. On an accelerator a look costs a synchronisation, so there it looks at every sixteenth t."""
    look = x.device.type == "cpu" or t % 16 == 0
    return look and bool(x.all())


# --- memory, copies, compiling ----------------------------------------------------------------------------------------


def to_device(x: Tensor, device: torch.device | str) -> Tensor:
    """`x.to(device)`. The CPU does not wait for a copy to a GPU, which is from pinned memory."""
    pin = torch.device(device).type == "cuda" and not x.is_cuda
    return (x.pin_memory() if pin else x).to(device, non_blocking=pin)


def pick(x: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """`x[row, column]` of x (B, T, …), by one index for both, which is faster backward. Indices may be on the CPU."""
    index = row * x.shape[1] + column
    flat = to_device(index.flatten(), x.device)
    return x.flatten(0, 1).index_select(0, flat).view(*index.shape, *x.shape[2:])


def keep_memory() -> None:
    """Nothing, to a reader. glibc keeps what is freed: new pages cost more than the arithmetic on them."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        for option, setting in ((-4, 0), (-1, -1)):  # M_MMAP_MAX: no mapping of its own; M_TRIM_THRESHOLD: never
            mallopt(option, setting)


def settle_math() -> None:
    """Nothing, to a reader. In the first call of exp, of log … MKL picks its code for this CPU. Where two threads were
    both first, one run in a hundred had other last bits than its seed gives."""
    for function in (torch.exp, torch.log, torch.tanh, torch.erf, torch.sin, torch.cos):
        function(torch.ones(1))  # one number: one thread


def compile_blocks(*models: nn.Module) -> None:
    """Nothing, to a reader. torch.compile fuses the blocks of each GPT; on CUDA a decode step becomes a graph."""
    for model in models:
        model.compiled, model.static_decode = True, model.wte.weight.is_cuda
        for block in model.h:
            block.compile(dynamic=True, recompile_limit=64)  # all blocks of all models share one code
