"""The arithmetic of model.py, faster. To learn how RLHF works you need not open this file; all works without it.

Every docstring opens with the plain line that the function equals; tests/test_fast.py holds the two together. Each
part names the row of tests/README.md ("How fast") that it earns. No other file knows of oneDNN and its packed matrices,
chunks of logits and their derivative, a draw in two levels, or memory that glibc keeps.
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
from torch.autograd.function import once_differentiable

CHUNK = 2**23  # logits that exist at a time on a CPU: 32 MiB
GPU_CHUNK = 2**27  # 512 MiB: a GPU wants products of many rows
KEPT, GPU_KEPT = 16, 4  # chunks of logits that the backward need not compute again
SHORT = 128  # a CPU attends to up to this many keys by plain products
ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")  # private operators:
REORDERS = ONEDNN and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")  # another torch may lack one, or both


# --- products: training and generation with GPT-2 124M, generation with 50,257 tokens ---------------------------------


class Linear(nn.Linear):
    """`nn.Linear`. While the model generates, `packed` holds weight and bias in the form that is multiplied fastest."""

    packed: tuple[Tensor, Tensor | None] | None = None

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, *(self.packed or (self.weight, self.bias)))


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
    """`F.linear(x, weight, bias)`: x (…, I), W (O, I), b (O,) or None → (…, O)."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple:
        x, weight = ctx.saved_tensors
        flat = grad.flatten(0, -2)  # (N, O)
        d_bias = flat.sum(0) if ctx.needs_input_grad[2] else None
        d_weight = flat.T @ x.flatten(0, -2) if ctx.needs_input_grad[1] else None  # MKL is faster here than oneDNN
        return grad @ weight, d_weight, d_bias


def pack(weight: Tensor) -> Tensor:
    """`rounded(weight)`. A large matrix comes in the order that oneDNN reads fastest."""
    if REORDERS and for_onednn(weight):
        return torch.ops.mkldnn._reorder_linear_weight(weight.detach())
    return rounded(weight)


def rounded(x: Tensor) -> Tensor:
    """`x`, under autocast in the dtype of its products."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def linear_float32(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear(x.float(), weight.float(), bias.float())`, also under autocast; float64 stays float64."""
    both_bfloat16 = x.dtype == weight.dtype == torch.bfloat16
    learns = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)  # this product has no derivative
    if x.is_cuda and both_bfloat16 and bias is None and not learns and sums_in_float32(x.device):
        return torch.mm(x, weight.T, out_dtype=torch.float32)
    dtype = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        return linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


@functools.cache
def sums_in_float32(device: torch.device) -> bool:
    """Whether this torch and this GPU give the product of two bfloat16 matrices in float32: torch before 2.8 cannot."""
    x = torch.ones(16, 16, dtype=torch.bfloat16, device=device)
    try:
        torch.mm(x, x, out_dtype=torch.float32)
    except (RuntimeError, TypeError):
        return False
    return True


# --- attention: all rows on a GPU (a fused kernel); training with long rows on a CPU ----------------------------------


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float = 0.0) -> Tensor:
    """`F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=mask is None, enable_gqa=True)`.

    q (B, H, T, D), k and v (B, K, S, D) → (B, H, T, D). Short rows on a CPU, and one query on every device, are
    attended to by two plain products.
    """
    B, H, T, D = q.shape
    few = T == 1 or (q.device.type == "cpu" and k.shape[2] <= SHORT)
    if dropout or not few:
        if q.is_cuda and q.dtype == torch.float32:  # CUDA has no fused kernel for grouped heads in float32
            k, v = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (k, v))
        grouped = k.shape[1] < H
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=mask is None, enable_gqa=grouped)
    q = (q * D**-0.5).reshape(B * k.shape[1], -1, D)  # (B K, H / K · T, D)
    scores = q.bmm(k.flatten(0, 1).transpose(1, 2))  # (B K, H / K · T, S)
    if mask is None and T > 1:
        mask = torch.full((T, T), -math.inf, dtype=q.dtype, device=q.device).triu(1)
    if mask is not None:
        scores = (scores.view(B, H, T, -1) + mask).view_as(scores)
    return scores.softmax(-1).bmm(v.flatten(0, 1)).view(B, H, T, D)


# --- log-probabilities: training and PPO with 50,257 tokens -----------------------------------------------------------


def token_logprobs(
    hidden: Tensor, weight: Tensor, target: Tensor, temperature: float = 1.0, with_entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """`logp = F.log_softmax(hidden @ weight.T / temperature, -1)`, of which `logp.gather(1, target[:, None])[:, 0]`,
    and if asked `-(logp.exp() * logp).sum(-1)`, both in float32.

    hidden (N, C), W (V, C), target (N,) → (N,), (N,) in nats. Logits exist for one chunk of rows at a time, except
    where the gradient of an entropy is wanted.
    """
    hidden, weight = rounded(hidden), rounded(weight)
    wanted = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    if not with_entropy:
        kept = KEPT if weight.device.type == "cpu" else GPU_KEPT
        return ChosenLogprobs.apply(hidden, weight, target, temperature, kept if wanted else 0), None
    if wanted:
        logp = (linear_float32(hidden, weight) / temperature).log_softmax(-1)
        return logp.gather(1, target[:, None])[:, 0], -(logp.exp() * logp).sum(-1)
    rows = chunk_rows(weight)
    chunks = zip(hidden.split(rows), target.split(rows))
    found = [chunk_softmax(h, weight, y, temperature, with_entropy=True)[:2] for h, y in chunks]
    return tuple(map(torch.cat, zip(*found)))


def chunk_rows(weight: Tensor) -> int:
    """How many rows of logits (V,) exist at a time."""
    return max(1, (CHUNK if weight.device.type == "cpu" else GPU_CHUNK) // len(weight))


class ChosenLogprobs(torch.autograd.Function):
    """With p = softmax, the gradient of a chosen log-probability with respect to the logits is onehot − p.

    The backward computes the logits again, all but the last few chunks, which are kept.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, target: Tensor, temperature: float, n_kept: int) -> Tensor:
        ctx.save_for_backward(hidden, weight, target)
        ctx.temperature, ctx.rows, ctx.kept = temperature, chunk_rows(weight), []
        chunks = list(zip(hidden.split(ctx.rows), target.split(ctx.rows)))
        chosen = []
        for i, (h, y) in enumerate(chunks):
            logp, _, exp, total = chunk_softmax(h, weight, y, temperature)
            chosen.append(logp)
            if i >= len(chunks) - n_kept:
                ctx.kept.append((exp, total))
        return torch.cat(chosen)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple:
        hidden, weight, target = ctx.saved_tensors
        g = (grad / ctx.temperature)[:, None]  # (N, 1) float32
        d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=grad.dtype)  # (N, C), (V, C)
        for h, y, gi, d in reversed(list(zip(*(x.split(ctx.rows) for x in (hidden, target, g, d_hidden))))):
            exp, total = ctx.kept.pop() if ctx.kept else chunk_softmax(h, weight, y, ctx.temperature)[2:]
            p = exp.scatter_add_(1, y[:, None], -total).to(h.dtype)  # (n, V): softmax − onehot, times total
            gi = (gi / total).to(h.dtype)  # (n, 1)
            d.copy_(-gi * (p @ weight))  # d is a view into d_hidden
            if h.dtype == d_weight.dtype:
                d_weight.addmm_(p.T, gi * h, alpha=-1)
            else:
                d_weight -= p.T @ (gi * h)
            del exp, total, p  # before the next chunk takes its memory
        return d_hidden, d_weight.to(weight.dtype), None, None, None


def chunk_softmax(
    hidden: Tensor, weight: Tensor, target: Tensor, temperature: float, with_entropy: bool = False
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """The chosen log-probabilities (n,), if asked the entropies (n,), exp(logits − max) (n, V) and its sums (n, 1)."""
    logits = linear_float32(hidden, weight)
    if temperature != 1:
        logits /= temperature
    logits -= logits.amax(-1, keepdim=True)  # in place, like exp_: new memory costs more than arithmetic
    chosen = logits.gather(1, target[:, None])
    exp = logits.exp() if with_entropy else logits.exp_()
    total = exp.sum(-1, keepdim=True)
    log_total = total.log()
    entropy = (log_total - logits.mul_(exp).sum(-1, keepdim=True) / total)[:, 0] if with_entropy else None
    return (chosen - log_total)[:, 0], entropy, exp, total


# --- generation with 50,257 tokens ------------------------------------------------------------------------------------


def draw(probs: Tensor, uniform: Tensor) -> Tensor:
    """`torch.searchsorted(probs.cumsum(-1), uniform[:, None] * probs.sum(-1, keepdim=True), right=True)[:, 0]`.

    probs (B, V), uniform (B,) in float64 in [0, 1) → token ids (B,). Sums are in float64: in float32 they are off by up
    to 4e-4 in total variation over 50,257 tokens. A large vocabulary is searched in two levels. Probabilities that are
    nan give an arbitrary token; the run then stops, because its log-probability is nan.
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


def decoding(generate: Callable) -> Callable:
    """`torch.no_grad()(generate)`, with the model in eval mode meanwhile, the weights of its linear layers packed."""

    @functools.wraps(generate)
    def decorated(model: nn.Module, *args, **options) -> tuple[Tensor, ...]:
        was_training = model.training
        layers = [layer for layer in model.h.modules() if isinstance(layer, Linear)]
        compiled = any(block._compiled_call_impl for block in model.h)
        eager = torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()
        try:
            with torch.inference_mode(), eager:  # a compiled block would be compiled anew for every token
                for layer in layers:
                    layer.packed = pack(layer.weight), None if layer.bias is None else pack(layer.bias)
                result = generate(model.eval(), *args, **options)
        finally:
            for layer in layers:
                layer.packed = None
            model.train(was_training)
        return tuple(x.clone() for x in result)  # ordinary tensors again

    return decorated


# --- compiled blocks: not measured on a GPU yet -----------------------------------------------------------------------


def compile_blocks(*models: nn.Module) -> None:
    """Changes no number but by rounding. torch.compile fuses the blocks of each GPT, for all but generation."""
    for model in models:
        for block in model.h:
            block.compile(dynamic=True, recompile_limit=64)  # all blocks of all models share one code


# --- the process ------------------------------------------------------------------------------------------------------


def keep_memory() -> None:
    """Changes no number. glibc keeps freed memory: new pages cost more than the arithmetic on them."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        for option, setting in ((-4, 0), (-1, -1)):  # M_MMAP_MAX: no mapping of its own; M_TRIM_THRESHOLD: never
            mallopt(option, setting)


def settle_math() -> None:
    """Keeps a seed's bits: MKL picks its code in the first call of exp, of log …, where two threads must not race."""
    for function in (torch.exp, torch.log, torch.tanh, torch.erf, torch.sin, torch.cos):
        function(torch.ones(1))  # one number: one thread
