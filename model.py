"""The GPT that every stage shares, written out: GPT-2's architecture, and the Llama family's where its config says so.

    GPT           trunk and output layer: hidden states, logits, log-probabilities of chosen tokens, generation
    ScalarModel   the same trunk under a scalar head: the reward model and the value net

Layout. Sequences are right-padded: tokens (B, T), prompt_len (B,), length (B,). No training or scoring forward needs
a padding mask, since under causal attention no real token ever looks back at a pad; what is a pad is decided by
`length`, never by a token's id. Quantities per response token live on the response window (B, R): column r speaks of
the token at position prompt_len + r, which was predicted at position prompt_len + r - 1. The two lengths stay on the
CPU, so that no forward or backward waits for an accelerator to tell how large a tensor is.

Left out on purpose: left padding, attention masks in training, beam search.

    python model.py out/ppo --prompt "Tell me about a shy owl who lost a lantern near the lake." --compare out/sft
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
CHUNK = 2**23  # logits that exist at a time; at 32 MiB glibc still takes them from memory that it has
SHORT = 128  # keys up to which a CPU attends by plain products: in two thirds of the fused kernel's time
KEPT = 4  # chunks of them that the backward need not make again
Rotary = tuple[Tensor, Tensor] | None  # cos and sin, where positions are rotary
Columns = slice | Tensor | None  # of the cache, where new keys and values go


@dataclass
class GPTConfig:
    vocab_size: int = 50257
    block_size: int = 1024  # longest sequence, in tokens
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0  # stage 1 only; stages 2 and 3 run in eval mode
    eos: int = 50256  # id of the token that ends a text
    # The defaults are GPT-2's choices. What the Llama family does otherwise:
    n_kv_head: int = 0  # key and value heads, each shared by a group of query heads (Ainslie et al. 2023); 0: n_head
    n_inner: int = 0  # width inside the MLP; 0: 4 n_embd
    swiglu: bool = False  # SiLU-gated MLP (Shazeer 2020) in place of GELU
    bias: bool = True  # in linear layers
    qkv_bias: bool = True  # in the one that makes queries, keys and values
    rms_norm: bool = False  # RMSNorm (Zhang and Sennrich 2019) in place of LayerNorm
    norm_eps: float = 1e-5
    rope_theta: float = 0.0  # base of rotary positions (Su et al. 2021); 0: learned position embeddings
    tied: bool = True  # the output layer is the token embedding


class Linear(nn.Linear):
    packed: Tensor | None = None  # the weight in oneDNN's own order, while `generate` runs

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight if self.packed is None else self.packed, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear; where a CPU multiplies by a large matrix, by oneDNN, which takes up to half of MKL's time for it."""
    if not for_onednn(weight) or x.dtype != torch.float32:
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled():
        return OneDNNLinear.apply(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def for_onednn(weight: Tensor) -> bool:
    large = weight.numel() >= 2**20 and weight.device.type == "cpu" and weight.dtype == torch.float32
    return ONEDNN and large and not torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling()


def pack(weight: Tensor) -> Tensor:
    """A copy of a large matrix (O, I) in the order that oneDNN multiplies by: a few rows then take half the time."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach())


class OneDNNLinear(torch.autograd.Function):
    """x Wᵀ + b: x (…, I), W (O, I), b (O,) or None → (…, O). `_linear_pointwise` has no derivative of its own."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        x, weight = ctx.saved_tensors
        flat = grad.flatten(0, -2)  # (N, O)
        d_bias = flat.sum(0) if ctx.needs_input_grad[2] else None
        # Plain products: backward, MKL takes three quarters of oneDNN's time (third generation EPYC).
        return grad @ weight, flat.T @ x.flatten(0, -2), d_bias


class Attention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head or config.n_head
        self.head_size, self.dropout = config.n_embd // config.n_head, config.dropout
        n_qkv = (self.n_head + 2 * self.n_kv_head) * self.head_size
        self.c_attn = Linear(config.n_embd, n_qkv, bias=config.qkv_bias)
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor, rotary: Rotary, cache: Tensor | None, to: Columns, mask: Tensor | None) -> Tensor:
        B, T, C = x.shape
        heads = self.c_attn(x).view(B, T, -1, self.head_size).transpose(1, 2)  # (B, H + 2 K, T, D)
        if rotary is not None:
            heads = torch.cat([rotate(heads[:, : -self.n_kv_head], *rotary), heads[:, -self.n_kv_head :]], dim=1)
        q, k, v = heads.split([self.n_head, self.n_kv_head, self.n_kv_head], dim=1)
        if cache is not None:
            cache[:, :, :, to] = heads[:, self.n_head :].unflatten(1, (2, -1)).transpose(0, 1)  # (2, B, K, T, D)
            k, v = cache  # (B, K, t, D)
        p, grouped = self.dropout if self.training else 0.0, self.n_kv_head < self.n_head
        if (x.device.type == "cpu" and k.shape[2] <= SHORT and not p) or (cache is not None and T == 1):
            y = attend(q, k, v, mask)  # (B, H, T, D)
        else:
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True, enable_gqa=grouped)
        return F.dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, C)), p)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q kᵀ / √D + mask) v by two plain products: q (B, H, T, D), k and v (B, K, t, D) → (B, H, T, D).

    One query a row (T = 1) sees all that `mask` (B, 1, t) lets it; several see what is not after them.
    """
    B, H, T, D = q.shape
    q = (q * D**-0.5).reshape(B * k.shape[1], -1, D)  # (B K, H / K · T, D)
    score = q.bmm(k.flatten(0, 1).transpose(1, 2))  # (B K, H / K · T, t)
    if T > 1:
        mask = torch.full((1, T, T), -math.inf, dtype=q.dtype, device=q.device).triu(1)
    if mask is not None:
        score = (score.view(B, H, T, -1) + mask[:, None]).view_as(score)
    return score.softmax(-1).bmm(v.flatten(0, 1)).view(B, H, T, D)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.dropout, self.swiglu = config.dropout, config.swiglu
        n_inner = config.n_inner or 4 * config.n_embd
        self.c_fc = Linear(config.n_embd, n_inner * (2 if config.swiglu else 1), bias=config.bias)
        self.c_proj = Linear(n_inner, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_fc(x)  # (B, T, 4 C), or gate and value side by side
        if self.swiglu:
            gate, value = x.chunk(2, dim=-1)
            x = F.silu(gate) * value
        else:
            x = gelu(x)
        return F.dropout(self.c_proj(x), self.dropout, self.training)


def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh form, as GPT-2 has it; on a CPU by a sigmoid, which takes half the time of tanh."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or torch.compiler.is_compiling():
        return F.gelu(x, approximate="tanh")
    return SigmoidGELU.apply(x) if x.requires_grad else x * SigmoidGELU.gate(x)


class SigmoidGELU(torch.autograd.Function):
    """x σ(2u) = x (1 + tanh u) / 2 with u = √(2/π) (x + 0.044715 x³) (Hendrycks and Gimpel 2016)."""

    A, B = math.sqrt(8 / math.pi), math.sqrt(8 / math.pi) * 0.044715  # 2u = A x + B x³

    @staticmethod
    def gate(x: Tensor) -> Tensor:
        return x.square().mul_(SigmoidGELU.B).add_(SigmoidGELU.A).mul_(x).sigmoid_()

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        s = SigmoidGELU.gate(x)
        ctx.save_for_backward(x, s)
        return x * s

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        x, s = ctx.saved_tensors
        slope = x.square().mul_(3 * SigmoidGELU.B).add_(SigmoidGELU.A).mul_(x)  # x · d(2u)/dx
        return slope.addcmul_(slope, s, value=-1).add_(1).mul_(s).mul_(grad)  # s + x s (1 − s) d(2u)/dx


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1, self.attn = norm(config), Attention(config)
        self.ln_2, self.mlp = norm(config), MLP(config)

    def forward(self, x: Tensor, rotary: Rotary, cache: Tensor | None, to: Columns, mask: Tensor | None) -> Tensor:
        x = x + self.attn(self.ln_1(x), rotary, cache, to, mask)
        return x + self.mlp(self.ln_2(x))


def norm(config: GPTConfig) -> nn.Module:
    return (nn.RMSNorm if config.rms_norm else nn.LayerNorm)(config.n_embd, eps=config.norm_eps)


def rotary_angles(position: Tensor, head_size: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of position · theta^(−2i / D) in float32: (1, T, D/2) of position (T,), (B, 1, 1, D/2) of (B, 1)."""
    frequency = theta ** (-torch.arange(0, head_size, 2, device=position.device) / head_size)  # (D/2,)
    angle = (position[..., None] * frequency).unsqueeze(-3)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, H, T, D) with channels i and i + D/2 turned by angle i: the half-split convention of published weights."""
    a, b = x.chunk(2, dim=-1)  # (B, H, T, D/2) each
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).type_as(x)


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f"n_embd {config.n_embd} is not a multiple of n_head {config.n_head}")
        if config.n_kv_head and config.n_head % config.n_kv_head:
            raise ValueError(f"n_head {config.n_head} is not a multiple of n_kv_head {config.n_kv_head}")
        self.config = config
        self.static_decode = False  # generate in shapes that do not change; on CUDA, as a graph of one step
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        if not config.rope_theta:
            self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = norm(config)
        if not config.tied:
            self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        for name, parameter in self.named_parameters():  # Radford et al. 2019, section 2.3
            if name.endswith("c_proj.weight"):  # two residual additions a layer: keep their sum's variance at 1
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layer))
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def hidden(
        self,
        tokens: Tensor,
        position: Tensor | None = None,
        cache: Tensor | None = None,
        to: Columns = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Final hidden states (B, T, C) of tokens (B, T).

        `position`, `cache` (L, 2, B, K, t, D), `to` (its columns for what is new) and `mask` are for the cached decode
        in `generate` alone: everything else sits at positions 0…T-1 and attends causally. Raises ValueError where T, or
        t, exceeds the context.
        """
        T = tokens.shape[1]
        t = T if cache is None else cache.shape[4]
        if t > self.config.block_size:
            raise ValueError(f"{t} tokens do not fit the context of {self.config.block_size}")
        if position is None:
            position = torch.arange(T, device=tokens.device)
        x, rotary, config = self.wte(tokens), None, self.config  # (B, T, C)
        if config.rope_theta:
            rotary = rotary_angles(position, config.n_embd // config.n_head, config.rope_theta)
        else:
            x = x + self.wpe(position)
        x = F.dropout(x, config.dropout, self.training)
        for i, block in enumerate(self.h):
            if cache is None:
                x = block(x, rotary, None, None, None)
            else:  # never by torch.compile: `to` changes with every token
                x = block.forward(x, rotary, cache[i], to, mask)
        return self.ln_f(x)

    def linears(self) -> list[Linear]:
        return [module for module in self.h.modules() if isinstance(module, Linear)]

    @property
    def output_weight(self) -> Tensor:
        return self.wte.weight if self.config.tied else self.lm_head.weight  # (V, C)

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits (…, V) at hidden states (…, C)."""
        return F.linear(hidden, self.output_weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, T, V). For a look at the whole; the stages use `logprobs`, which never makes this tensor."""
        return self.logits(self.hidden(tokens))

    def logprobs(self, tokens: Tensor, prompt_len: Tensor, length: Tensor, temperature: float = 1.0) -> Tensor:
        """log softmax(logits / temperature) of each response token, in nats: (B, R) float32, 0 outside the response.

        The output layer is applied to real response tokens only, in chunks, so that neither (B, T, V) nor (B, R, V)
        ever exists.
        """
        position, mask = response_window(prompt_len, length)  # (B, R)
        row, column = mask.nonzero(as_tuple=True)  # (N,) each: where in the window a response token is
        device, T, at = tokens.device, tokens.shape[1], position[mask]  # and where in its row (N,)
        hidden = self.hidden(tokens[:, :-1]).flatten(0, 1)  # (B (T - 1), C): the last token predicts nothing
        before = hidden.index_select(0, to_device((T - 1) * row + at - 1, device))  # (N, C): where each was predicted
        target = tokens.flatten().index_select(0, to_device(T * row + at, device))  # (N,)
        weight = self.output_weight
        if torch.is_autocast_enabled(before.device.type):
            dtype = torch.get_autocast_dtype(before.device.type)
            before, weight = before.to(dtype), weight.to(dtype)
        chosen = ChosenLogprobs.apply(before, weight, target, temperature)  # (N,)
        place = to_device(mask.shape[1] * row + column, device)
        return chosen.new_zeros(mask.numel()).index_copy(0, place, chosen).view(mask.shape)

    def generate(
        self,
        prompts: list[list[int]],
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sample a response to each of a ragged batch of prompts; stop when every row has produced EOS.

        Returns tokens (B, T) right-padded, and on the CPU prompt_len (B,), length (B,). A response that ended has EOS
        as its last token; one that `max_new_tokens` cut has not. An empty prompt gets EOS as its first token.
        `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 are off. `generator` is a CPU generator on every device: it
        draws one number a row and step, in advance. Raises ValueError where the longest prompt and `max_new_tokens`
        exceed the context.
        """
        was_training, kind = self.training, self.wte.weight.device.type
        rounds = torch.is_autocast_enabled(kind)
        try:
            # Inference mode is a quarter faster than no_grad, but under autocast rounds all weights for every token.
            with (
                torch.no_grad() if rounds else torch.inference_mode(),
                torch.autocast(kind, torch.get_autocast_dtype(kind), rounds, cache_enabled=True),
            ):
                sampled = self.eval()._decode(prompts, max_new_tokens, temperature, top_k, top_p, generator)
        finally:
            torch.clear_autocast_cache()  # the weights may change before they are needed again
            for layer in self.linears():
                layer.packed = None
            self.train(was_training)
        tokens, prompt_len, length = (x.clone() for x in sampled)  # ordinary tensors again
        return tokens, prompt_len, length

    def _decode(
        self,
        prompts: list[list[int]],
        max_new_tokens: int,
        temperature: float,
        top_k: int,
        top_p: float,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        config, device = self.config, self.wte.weight.device
        prompts = [p or [config.eos] for p in prompts]
        B, P, N = len(prompts), max(map(len, prompts)), max_new_tokens
        if P + N > config.block_size:
            raise ValueError(f"a prompt of {P} and {N} new tokens do not fit the context of {config.block_size}")
        prompt_len = torch.tensor([len(p) for p in prompts], device=device)  # (B,)
        tokens = torch.tensor([p + [config.eos] * (P + N - len(p)) for p in prompts], device=device)  # (B, P + N)
        uniform = torch.rand(N, B, dtype=torch.float64, generator=generator)
        if device.type == "cuda":
            uniform = uniform.to(device)

        # The cache holds prompts in columns 0…P-1 and step t of every row in column P + t; `gap` hides what a short
        # prompt leaves empty between the two.
        n_kv_head, head_size = config.n_kv_head or config.n_head, config.n_embd // config.n_head
        dtype = (
            torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else self.wte.weight.dtype
        )
        for layer in self.linears():
            layer.packed = pack(layer.weight) if for_onednn(layer.weight) else None
        weight = self.output_weight.to(dtype)
        weight = pack(weight) if for_onednn(weight) else weight
        allocate = torch.zeros if self.static_decode else torch.empty  # 0 · what lies in empty memory may be nan
        cache = allocate(config.n_layer, 2, B, n_kv_head, P + N, head_size, device=device, dtype=dtype)
        column = torch.arange(P + N, device=device)
        gap = torch.zeros(B, 1, P + N, device=device)
        gap.masked_fill_(((column >= prompt_len[:, None]) & (column < P))[:, None], -math.inf)
        even = min(map(len, prompts)) == P
        hidden = self.hidden(tokens[:, :P], cache=cache[..., :P, :], to=slice(0, P))  # (B, P, C)
        hidden = gather_positions(hidden, prompt_len[:, None] - 1)  # (B, 1, C)
        new = torch.full((N, B), config.eos, device=device)
        n_new = torch.zeros_like(prompt_len)
        done = torch.zeros(B, dtype=torch.bool, device=device)

        def draw(t: int | Tensor) -> Tensor:
            logits = output_logits(hidden[:, 0].to(dtype), weight)  # (B, V)
            token = sample(logits, uniform[t].view(B), temperature, top_k, top_p)  # (B,)
            new[t] = torch.where(done, config.eos, token)
            n_new.add_(~done)
            done.logical_or_(token == config.eos)
            return token

        def static_step() -> None:
            """Draw and read a token of every row, in shapes and at addresses that no step changes: a CUDA graph's."""
            token, mask = draw(time), gap.masked_fill(column > P + time, -math.inf)  # (B,), (B, 1, P + N)
            hidden.copy_(self.hidden(token[:, None], (prompt_len + time)[:, None], cache, P + time, mask))
            time.add_(1)

        time, step = torch.zeros(1, dtype=torch.long, device=device), static_step
        for t in range(N):
            if self.static_decode:
                step()
                if t == 0 and N > 1 and device.type == "cuda":
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph):
                        static_step()
                    step = graph.replay
            else:
                token = draw(t)
            look = device.type == "cpu" or t % 16 == 15  # on an accelerator a look costs a synchronisation
            if t == N - 1 or (look and done.all()):
                break
            if not self.static_decode:
                mask = None if even else gap[..., : P + t + 1]  # (B, 1, P + t + 1)
                so_far, to = cache[..., : P + t + 1, :], slice(P + t, P + t + 1)
                hidden = self.hidden(token[:, None], (prompt_len + t)[:, None], so_far, to, mask)  # (B, 1, C)
        tokens.scatter_(1, prompt_len[:, None] + torch.arange(N, device=device), new.T)
        prompt_len, length = prompt_len.cpu(), (prompt_len + n_new).cpu()
        return tokens[:, : int(length.max())], prompt_len, length


class ChosenLogprobs(torch.autograd.Function):
    """log softmax(hidden Wᵀ / temperature)[target]: hidden (N, C), W (V, C), target (N,) → (N,) float32, in nats.

    Logits exist for one chunk of rows at a time. The backward makes them again, all but the last few, which are kept;
    with p their softmax, the gradient of a chosen log-probability with respect to the logits is onehot − p.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, target: Tensor, temperature: float) -> Tensor:
        ctx.temperature, ctx.rows = temperature, max(1, CHUNK // len(weight))
        chosen, kept = [], []
        for h, y in zip(hidden.split(ctx.rows), target.split(ctx.rows)):
            kept = kept[2 - 2 * KEPT :] if any(ctx.needs_input_grad) else []
            logp, *softmax = chunk_softmax(h, weight, y, temperature)
            chosen.append(logp)
            kept += softmax
        ctx.save_for_backward(hidden, weight, target)
        ctx.kept = kept
        return torch.cat(chosen)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        hidden, weight, target = ctx.saved_tensors
        g = (grad / ctx.temperature)[:, None]  # (N, 1) float32
        d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=grad.dtype)  # (N, C), (V, C)
        for h, y, gi, d in reversed(list(zip(*(x.split(ctx.rows) for x in (hidden, target, g, d_hidden))))):
            total, p = (
                (ctx.kept.pop(), ctx.kept.pop()) if ctx.kept else chunk_softmax(h, weight, y, ctx.temperature)[:0:-1]
            )
            p = p.scatter_add_(1, y[:, None], -total).to(h.dtype)  # (n, V): softmax − onehot, times total
            gi = (gi / total).to(h.dtype)  # (n, 1)
            d.copy_(-gi * (p @ weight))
            if h.dtype == grad.dtype:
                d_weight.addmm_(p.T, gi * h, alpha=-1)
            else:
                d_weight -= p.T @ (gi * h)
            del p, total
        return d_hidden, d_weight.to(weight.dtype), None, None


def chunk_softmax(hidden: Tensor, weight: Tensor, target: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """The chosen log-probabilities (n,), and the softmax as exp(logits − max) (n, V) and its sums (n, 1)."""
    logits = output_logits(hidden, weight)
    if temperature != 1:
        logits /= temperature
    # In place, like exp_: at 50,257 tokens new memory costs more than arithmetic.
    logits -= logits.amax(-1, keepdim=True)
    chosen = logits.gather(1, target[:, None])
    total = logits.exp_().sum(-1, keepdim=True)
    return (chosen - total.log())[:, 0], logits, total


def output_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden (n, C) Wᵀ of W (V, C): (n, V) in at least float32, also from factors in bfloat16.

    Rounded to bfloat16, whose steps are 0.5 from 64 to 128, log-probabilities would be off by more than PPO's ε.
    """
    if hidden.is_cuda and hidden.dtype == torch.bfloat16:
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):
        return linear(at_least_float32(hidden), at_least_float32(weight))


class ScalarModel(nn.Module):
    """A GPT's trunk under a scalar head: one number for every position. Reward model and value net are both this.

    `gain` and `bias` normalise the output and are set, not trained (Ziegler et al. 2019, section 2.2).
    """

    def __init__(self, trunk: GPT):
        super().__init__()
        self.trunk = trunk
        trunk.lm_head = None  # an untied output layer is not needed here
        self.head = nn.Linear(trunk.config.n_embd, 1)
        nn.init.normal_(self.head.weight, std=1 / math.sqrt(trunk.config.n_embd + 1))  # Stiennon et al. 2020, C.1
        nn.init.zeros_(self.head.bias)
        self.register_buffer("gain", torch.ones(()))
        self.register_buffer("bias", torch.zeros(()))

    @property
    def config(self) -> GPTConfig:
        return self.trunk.config

    def scalar(self, hidden: Tensor) -> Tensor:
        """(…, C) → (…) in at least float32: rounded to bfloat16, scores that are close would be equal."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.gain * self.head(at_least_float32(hidden)).squeeze(-1) + self.bias

    def scores(self, tokens: Tensor, length: Tensor) -> Tensor:
        """The score (B,) of each whole sequence, read at its last real token."""
        return self.scalar(gather_positions(self.trunk.hidden(tokens), length[:, None] - 1))[:, 0]

    def values(self, tokens: Tensor, prompt_len: Tensor, length: Tensor) -> Tensor:
        """The value (B, R) of the state in which each response token was chosen, 0 outside the response."""
        position, mask = response_window(prompt_len, length)  # (B, R)
        values = self.scalar(gather_positions(self.trunk.hidden(tokens[:, :-1]), position - 1))
        return values * to_device(mask, tokens.device)


def response_window(prompt_len: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    """The response window: position (B, R) of each response token in its row, and mask (B, R), true where there is one.

    R is the longest response. Places outside a response point at its last token, so that a gather stays in range.
    """
    R = int((length - prompt_len).max())
    position = prompt_len[:, None] + torch.arange(R, device=length.device)  # (B, R)
    mask = position < length[:, None]
    return position.minimum(length[:, None] - 1).clamp(min=1), mask


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """x there; the CPU does not wait for the copy to a GPU, which is from pinned memory."""
    pin = device.type == "cuda" and not x.is_cuda
    return (x.pin_memory() if pin else x).to(device, non_blocking=pin)


def at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def gather_positions(x: Tensor, position: Tensor) -> Tensor:
    """x (B, T, …) at position (B, R) → (B, R, …)."""
    flat = position + x.shape[1] * torch.arange(len(x), device=position.device)[:, None]  # (B, R)
    flat = to_device(flat.flatten(), x.device)
    return x.flatten(0, 1).index_select(0, flat).view(*position.shape, *x.shape[2:])  # faster than gather, and back


def sample(logits: Tensor, uniform: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Draw token ids (B,) from softmax(logits (B, V) / temperature), one uniform number in [0, 1) a row (B,) float64.

    Inverse transform sampling. The cumulative sum is in float64: in float32 it is off by up to 4e-4 in total variation
    over 50,257 tokens. top-k keeps the k likeliest tokens, top-p the fewest likeliest whose mass reaches p (Holtzman
    et al. 2020); both are for `model.py`'s own sampler, since training scores the whole softmax.
    """
    if temperature == 0:
        return logits.argmax(-1)
    probs = F.softmax(logits.float() if temperature == 1 else logits.float() / temperature, -1).to(
        uniform.device
    )  # (B, V)
    if 0 < top_k < probs.shape[-1] or top_p < 1:
        ordered, index = probs.sort(dim=-1, descending=True, stable=True)
        keep = ordered.cumsum(-1, dtype=torch.float64) - ordered < top_p  # the mass before this token
        keep[:, 0] = True
        if top_k:
            keep[:, top_k:] = False
        probs = torch.zeros_like(probs).scatter(1, index, ordered * keep)
    V, width, u = probs.shape[-1], 256, uniform[:, None].clamp(max=1 - 2**-52)  # (B, 1)
    if V <= 16 * width:
        cdf = probs.cumsum(-1, dtype=torch.float64)
        return torch.searchsorted(cdf, u * cdf[:, -1:], right=True)[:, 0].to(logits.device)
    # In two levels: which stretch of the vocabulary, then which token of it.
    whole = V // width * width
    mass = probs[:, :whole].unflatten(1, (-1, width)).sum(-1)  # (B, V / 256)
    mass = torch.cat([mass, probs[:, whole:].sum(-1, keepdim=True)], 1).double()
    cdf = mass.cumsum(-1)
    u = u * cdf[:, -1:]
    stretch = torch.searchsorted(cdf, u, right=True)
    left = mass.gather(1, stretch) - cdf.gather(1, stretch) + u  # of u, within the stretch
    token = stretch * width + torch.arange(width, device=u.device)  # (B, 256)
    inside = (probs.gather(1, token.clamp(max=V - 1)) * (token < V)).cumsum(-1, dtype=torch.float64)
    share = (left / mass.gather(1, stretch)).clamp(0, 1 - 2**-52)  # rounding must not leave the stretch
    place = torch.searchsorted(inside, share * inside[:, -1:], right=True)
    return (stretch * width + place)[:, 0].to(logits.device)


@dataclass
class Config:
    prompt: str = ""  # the text to continue
    compare: str = ""  # a second run folder, answering beside the first
    samples: int = 4  # answers from each model
    response_len: int = 128  # longest answer, in tokens
    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # keep the k likeliest tokens; 0 keeps all
    top_p: float = 1.0  # keep the fewest likeliest tokens with this mass; 1 keeps all
    seed: int = 0  # of the sampler
    device: str = "auto"  # auto, cpu, cuda or mps


def main() -> None:
    import common
    from data import encode_prompt

    cfg, folder = common.parse(Config, positional="DIR")
    device = common.pick_device(cfg.device)
    for name in filter(None, [folder, cfg.compare]):
        model, encoding = common.load_gpt(name, device)
        prompt = encode_prompt(encoding, cfg.prompt)
        room = model.config.block_size - max(1, len(prompt))
        if room < 1:
            raise common.InputError(
                f"--prompt: {len(prompt)} tokens leave no room in {name}'s context of {model.config.block_size}"
            )
        tokens, prompt_len, length = model.generate(
            [prompt] * cfg.samples, min(cfg.response_len, room), temperature=cfg.temperature, top_k=cfg.top_k,
            top_p=cfg.top_p, generator=torch.Generator().manual_seed(cfg.seed),
        )  # fmt: skip
        print(f"\n{name}")
        for row, start, end in zip(tokens.tolist(), prompt_len.tolist(), length.tolist()):
            ended = row[end - 1] == model.config.eos
            print(f"  ·{encoding.decode(row[start : end - ended])}{'' if ended else ' …'}")


if __name__ == "__main__":
    import common

    common.run_main(main)
