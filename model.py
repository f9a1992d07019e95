"""The GPT that every stage shares: GPT-2's architecture, and the Llama family's where GPTConfig says so.

    GPT           hidden states, logits, log-probabilities of response tokens, generation
    ScalarModel   the same trunk under a scalar head: the reward model and the value net

Sequences are right-padded: tokens (B, T), prompt_len (B,), length (B,). Positions from `length` on are padding,
whatever their token id. Attention is causal: no real token sees the padding behind it, so no forward needs a mask.
Quantities per response token live on the response window (B, R): column r is about the token at position
prompt_len + r, which was predicted from position prompt_len + r − 1. prompt_len and length stay on the CPU.

Letters in shapes: B batch, T positions, R response positions, V vocabulary, C channels, H heads, K key and value heads,
D channels of a head, S places of a cache, L layers.
"""

import copy
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Linear
from torch.utils.checkpoint import checkpoint

# --- the arithmetic in plain lines ------------------------------------------------------------------------------------


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float = 0.0) -> Tensor:
    """softmax(q kᵀ / √D) v: q (B, H, T, D), k and v (B, K, S, D) → (B, H, T, D). Without a mask it is causal."""
    T, group = q.shape[2], q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)  # (B, H, S, D)
    if mask is None:
        mask = torch.full((T, T), -math.inf, dtype=q.dtype, device=q.device).triu(1)
    weights = (q @ k.transpose(2, 3) / math.sqrt(q.shape[3]) + mask).softmax(-1)  # (B, H, T, S)
    return F.dropout(weights, dropout) @ v


def rounded(x: Tensor) -> Tensor:
    """x in autocast's dtype, if autocast is on: a frozen copy that is stored in that dtype gives equal numbers."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def linear_float32(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` in at least float32: in bfloat16, log-probabilities would be off by more than PPO's ε."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def token_logprobs(
    hidden: Tensor, weight: Tensor, target: Tensor, temperature: float = 1.0, with_entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """log p of each target (N,), if asked its distribution's entropy (N,) too, in nats: hidden (N, C), W (V, C)."""
    logits = linear_float32(rounded(hidden), rounded(weight)) / temperature  # (N, V)
    logp = logits.log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1) if with_entropy else None
    return logp.gather(1, target[:, None])[:, 0], entropy


def draw(probs: Tensor, uniform: Tensor) -> Tensor:
    """A token id (B,) from each row of probs (B, V), by inverse transform of uniform (B,) in [0, 1), in float64."""
    cdf = probs.cumsum(-1, dtype=torch.float64)
    token = torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:], right=True)[:, 0]
    return token.clamp(max=probs.shape[1] - 1)  # where probs are nan


pack = rounded  # of a weight that many products read
decoding = torch.no_grad()  # what `generate` runs in
# From here on these names mean fast.py's versions: the same numbers, faster. All works without this line.
from fast import Linear, attend, decoding, draw, linear_float32, pack, token_logprobs  # noqa: E402, F811

# --- the model --------------------------------------------------------------------------------------------------------


@dataclass
class GPTConfig:
    vocab_size: int = 50257
    block_size: int = 1024  # longest sequence, in tokens
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0  # stage 1 only; stages 2 and 3 run in eval mode
    eos: int = 50256  # id of the token that ends a text
    # The defaults are GPT-2's choices. The Llama family chooses otherwise:
    n_kv_head: int = 0  # key and value heads, each shared by a group of query heads (Ainslie et al. 2023); 0: n_head
    n_inner: int = 0  # width inside the MLP; 0: 4 n_embd
    swiglu: bool = False  # SiLU-gated MLP (Shazeer 2020) in place of GELU
    bias: bool = True  # in linear layers
    qkv_bias: bool = True  # in the layer that makes queries, keys and values
    rms_norm: bool = False  # RMSNorm (Zhang and Sennrich 2019) in place of LayerNorm
    norm_eps: float = 1e-5
    rope_theta: float = 0.0  # base of rotary positions (Su et al. 2021); 0: learned position embeddings
    tied: bool = True  # the output layer is the token embedding
    head_dim: int = 0  # channels of a head; 0: n_embd / n_head
    qk_norm: bool = False  # RMSNorm of each head's queries and keys (Qwen 3)
    rope_llama3: tuple[float, ...] = ()  # factor, low and high frequency factor, first context (Llama 3.1)
    no_rope: tuple[int, ...] = ()  # layers without rotary positions (SmolLM 3)
    stops: tuple[int, ...] = ()  # ids beside eos that end a generation too
    bos: tuple[int, ...] = ()  # the id that other software puts before a text; kept for the exporter
    suffix: tuple[int, ...] = ()  # what the chat template writes behind the end of a turn; scores are read behind it

    def __post_init__(self) -> None:
        if self.n_embd % self.n_head and not self.head_dim:
            raise ValueError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        self.n_kv_head = self.n_kv_head or self.n_head
        self.n_inner = self.n_inner or 4 * self.n_embd
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head {self.n_head} is not a multiple of n_kv_head {self.n_kv_head}")

    @property
    def ends(self) -> tuple[int, ...]:
        return (self.eos, *self.stops)


class Cache(NamedTuple):
    """Keys and values of earlier tokens, and the place of the new tokens among them. Only generation has one."""

    kv: Tensor  # (L, 2, B, K, S, D); within a block (2, B, K, S, D)
    place: slice  # the places that the new tokens take
    mask: Tensor | None  # (B, 1, 1, S): 0, or −inf where a row must not look; None: causal
    position: Tensor  # (T,) or (B, T) of the new tokens in their rows


class Attention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        H, K, D = config.n_head, config.n_kv_head, config.head_dim
        self.c_attn = Linear(config.n_embd, (H + 2 * K) * D, bias=config.qkv_bias)
        self.c_proj = Linear(H * D, config.n_embd, bias=config.bias)
        self.q_norm = nn.RMSNorm(D, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(D, eps=config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, cache: Cache | None) -> Tensor:
        H, K, D = self.config.n_head, self.config.n_kv_head, self.config.head_dim
        heads = self.c_attn(x).unflatten(-1, (-1, D)).transpose(1, 2)  # (B, H + 2 K, T, D)
        q, k, v = heads.split([H, K, K], dim=1)
        q, k = self.q_norm(q).type_as(v), self.k_norm(k).type_as(v)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        mask = None
        if cache is not None:
            keys, values = cache.kv.unbind(0)  # (B, K, S, D) each
            keys[:, :, cache.place] = k
            values[:, :, cache.place] = v
            k, v, mask = keys, values, cache.mask
        dropout = self.config.dropout if self.training else 0.0
        y = attend(q, k, v, mask, dropout)  # (B, H, T, D)
        return F.dropout(self.c_proj(y.transpose(1, 2).flatten(2)), dropout)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.c_fc = Linear(config.n_embd, config.n_inner * (2 if config.swiglu else 1), bias=config.bias)
        self.c_proj = Linear(config.n_inner, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_fc(x)  # (B, T, n_inner), or gate and value side by side
        if self.config.swiglu:
            gate, value = x.chunk(2, dim=-1)
            x = F.silu(gate) * value
        else:
            x = F.gelu(x, approximate="tanh")
        return F.dropout(self.c_proj(x), self.config.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = norm(config)
        self.attn = Attention(config)
        self.ln_2 = norm(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, cache: Cache | None) -> Tensor:
        x = x + self.attn(self.ln_1(x), rotary, cache)
        return x + self.mlp(self.ln_2(x))


def norm(config: GPTConfig) -> nn.Module:
    kind = nn.RMSNorm if config.rms_norm else nn.LayerNorm
    return kind(config.n_embd, eps=config.norm_eps)


def rotary_angles(position: Tensor, config: GPTConfig) -> tuple[Tensor, Tensor]:
    """cos and sin of position · theta^(−2i / D) in float32: (1, T, D/2) of position (T,), (B, 1, T, D/2) of (B, T)."""
    D = config.head_dim
    frequency = config.rope_theta ** (-torch.arange(0, D, 2, device=position.device) / D)  # (D/2,)
    if config.rope_llama3:  # slow the waves longer than the context of the first training (Llama team 2024, 3.4.2)
        factor, low, high, context = config.rope_llama3
        turns = context * frequency / (2 * math.pi)  # within that context
        kept = ((turns - low) / (high - low)).clamp(0, 1)  # 1: a short wave, left as it is
        frequency = frequency * (kept + (1 - kept) / factor)
    angle = (position[..., None] * frequency).unsqueeze(-3)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, H, T, D) with channels i and i + D/2 turned by angle i, as the weights on Hugging Face expect."""
    a, b = x.chunk(2, dim=-1)  # (B, H, T, D/2) each
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).type_as(x)


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.checkpoint_activations = False  # compute each block again in the backward, to save memory
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        if not config.rope_theta:
            self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = norm(config)
        if not config.tied:
            self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        for name, parameter in self.named_parameters():  # Radford et al. 2019, section 2.3
            if name.endswith("c_proj.weight"):  # smaller, so that the sum of all residuals does not grow with depth
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layer))
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    @property
    def output_weight(self) -> Tensor:
        return self.wte.weight if self.config.tied else self.lm_head.weight  # (V, C)

    def hidden(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """Final hidden states (B, T, C) of tokens (B, T). With a `cache` the tokens continue what it holds."""
        T = tokens.shape[1]
        if T > self.config.block_size:
            raise ValueError(f"{T} tokens do not fit the context of {self.config.block_size}")
        position = torch.arange(T, device=tokens.device) if cache is None else cache.position
        x = self.wte(tokens)  # (B, T, C)
        rotary = rotary_angles(position, self.config) if self.config.rope_theta else None
        if rotary is None:
            x = x + self.wpe(position)
        x = F.dropout(x, self.config.dropout, self.training)
        for i, block in enumerate(self.h):
            layer_cache = None if cache is None else cache._replace(kv=cache.kv[i])
            angles = None if i in self.config.no_rope else rotary
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(block, x, angles, layer_cache, use_reentrant=False)
            else:
                x = block(x, angles, layer_cache)
        return self.ln_f(x)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, T, V), to experiment with. The stages use `logprobs`, which makes logits for responses only."""
        return F.linear(self.hidden(tokens), self.output_weight)

    def logprobs(self, tokens: Tensor, prompt_len: Tensor, length: Tensor, temperature: float = 1.0) -> Tensor:
        """log softmax(logits / temperature) of each response token, in nats: (B, R) float32, 0 outside the response."""
        return self.read_response(tokens, prompt_len, length, temperature)[0]

    def logprobs_and_entropy(
        self, tokens: Tensor, prompt_len: Tensor, length: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, ...]:
        """`logprobs`, and the entropy in nats of the distribution that each response token was drawn from: (B, R)."""
        return self.read_response(tokens, prompt_len, length, temperature, with_entropy=True)

    def read_response(
        self, tokens: Tensor, prompt_len: Tensor, length: Tensor, temperature: float, with_entropy: bool = False
    ) -> tuple[Tensor, ...]:
        """Log-probabilities, and if asked entropies, in the response window. (B, R, V) never exists: logits are made of
        the hidden states before the N real response tokens alone."""
        position, mask = response_window(prompt_len, length)  # (B, R)
        row, real = mask.nonzero()[:, 0], position[mask]  # (N,) each
        hidden = self.hidden(tokens[:, :-1])  # (B, T − 1, C): nothing is predicted from the last position
        before, target = pick(hidden, row, real - 1), pick(tokens, row, real)  # (N, C), (N,)
        found = token_logprobs(before, self.output_weight, target, temperature, with_entropy)
        mask = mask.to(tokens.device)
        return tuple(x.new_zeros(mask.shape).masked_scatter(mask, x) for x in found if x is not None)

    @decoding
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

        Returns tokens (B, T) right-padded, and on the CPU prompt_len (B,), length (B,). A response that ended has EOS,
        or one of config.stops, as its last token; one that was cut has not. An empty prompt gets EOS at first.
        `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 are off. `generator` is a CPU generator on every device: each
        row takes the next `max_new_tokens` numbers of it, so to split the rows changes no answer. Raises ValueError if
        a prompt and `max_new_tokens` are too long.
        """
        config, device = self.config, self.wte.weight.device
        prompts = [prompt or [config.eos] for prompt in prompts]
        B, P, N = len(prompts), max(map(len, prompts)), max_new_tokens
        if N < 1 or P + N > config.block_size:
            raise ValueError(f"{P} tokens and {N} new ones (at least 1) do not fit the context of {config.block_size}")
        uniform = torch.rand(B, N, dtype=torch.float64, generator=generator).T  # a row's numbers follow each other
        if device.type != "mps":  # which has no float64
            uniform = uniform.to(device)
        look = 1 if device.type == "cpu" else 16  # asking an accelerator whether all rows have ended makes Python wait

        prompt_len = torch.tensor([len(p) for p in prompts])  # (B,)
        tokens = torch.tensor([p + [config.eos] * (P + N - len(p)) for p in prompts], device=device)  # (B, P + N)
        row, start = torch.arange(B, device=device), prompt_len.to(device)
        length, done = start.clone(), torch.zeros(B, dtype=torch.bool, device=device)
        ends = torch.tensor(config.ends, device=device)
        weight = pack(self.output_weight)

        # 1 Prefill. Prompts take places 0…P−1 of the cache, new token t takes P + t. A short prompt leaves a gap.
        shape = (config.n_layer, 2, B, config.n_kv_head, P + N, config.head_dim)
        kv = torch.zeros(shape, device=device, dtype=weight.dtype)
        place = torch.arange(P + N, device=device)
        in_gap = (place >= start[:, None]) & (place < P)  # (B, P + N)
        mask = torch.zeros(B, 1, 1, P + N, device=device, dtype=kv.dtype).masked_fill(in_gap[:, None, None], -math.inf)
        cache = Cache(kv[..., :P, :], slice(0, P), mask=None, position=place[:P])
        hidden = pick(self.hidden(tokens[:, :P], cache), torch.arange(B), prompt_len - 1)  # (B, C)

        for t in range(N):
            # 2 Draw a token for every row. A row that has ended gets EOS and does not grow.
            logits = linear_float32(hidden.to(kv.dtype), weight)  # (B, V)
            token = sample(logits, uniform[t], temperature, top_k, top_p)  # (B,)
            tokens[row, start + t] = torch.where(done, config.eos, token)
            length += ~done
            done |= torch.isin(token, ends)
            # 3 Stop where every row has ended.
            if t + 1 == N or (t % look == 0 and bool(done.all())):
                break
            # 4 Read the new token.
            seen = P + t + 1
            cache = Cache(kv[..., :seen, :], slice(P + t, seen), mask[..., :seen], position=(start + t)[:, None])
            hidden = self.hidden(tokens[row, start + t][:, None], cache)[:, 0]  # (B, C)

        length = length.cpu()
        return tokens[:, : int(length.max())], prompt_len, length


class ScalarModel(nn.Module):
    """A GPT's trunk under a scalar head: one number for every position. Reward model and value net are both this.

    `gain` and `bias` normalise the output and are set, not trained (Ziegler et al. 2019, section 2.2).
    """

    def __init__(self, trunk: GPT):
        super().__init__()
        self.trunk, self.config = copy.copy(trunk), trunk.config  # the weights are shared
        self.trunk._modules = trunk._modules | {"lm_head": None}  # it needs no output layer; `trunk` keeps its own
        self.head = nn.Linear(trunk.config.n_embd, 1)
        nn.init.normal_(self.head.weight, std=1 / math.sqrt(trunk.config.n_embd + 1))  # Stiennon et al. 2020, C.1
        nn.init.zeros_(self.head.bias)
        self.register_buffer("gain", torch.ones(()))
        self.register_buffer("bias", torch.zeros(()))  # beside the head's own, which is trained

    def scalar(self, hidden: Tensor) -> Tensor:
        """(…, C) → (…) in at least float32."""
        raw = linear_float32(hidden, self.head.weight, self.head.bias).squeeze(-1)
        return self.gain * raw + self.bias

    def scores(self, tokens: Tensor, length: Tensor) -> Tensor:
        """The score (B,) of each whole sequence, at its last real token, or after it and `suffix` if it ends a turn."""
        if self.config.suffix:
            last = pick(tokens, torch.arange(len(tokens)), length - 1)
            ended = torch.isin(last, torch.tensor(self.config.ends, device=last.device)).to(length.device)
            for token in self.config.suffix:  # it takes the place of padding
                tokens = F.pad(tokens, (0, 1)).scatter(1, length[:, None].to(tokens.device), token)
                length = length + ended
        hidden = self.trunk.hidden(tokens)  # (B, T, C)
        return self.scalar(pick(hidden, torch.arange(len(tokens)), length - 1))

    def values(self, tokens: Tensor, prompt_len: Tensor, length: Tensor) -> Tensor:
        """The value (B, R) of the state in which each response token was chosen, 0 outside the response."""
        position, mask = response_window(prompt_len, length)  # (B, R)
        hidden = self.trunk.hidden(tokens[:, :-1])  # (B, T − 1, C)
        values = self.scalar(pick(hidden, torch.arange(len(tokens))[:, None], position - 1))  # (B, R)
        return values * mask.to(tokens.device)


def response_window(prompt_len: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    """The response window: position (B, R) of each response token in its row, and mask (B, R), true where there is one.

    R is the longest response. Columns after a response repeat its last position. A position is at least 1, even in a
    row without a response, so that position − 1 can always be looked up.
    """
    R = int((length - prompt_len).max())
    position = prompt_len[:, None] + torch.arange(R, device=length.device)  # (B, R)
    mask = position < length[:, None]
    return position.minimum(length[:, None] - 1).clamp(min=1), mask


def pick(x: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """`x[row, column]` of x (B, T, …). The two become one index, whose backward is faster."""
    index = row * x.shape[1] + column
    picked = x.flatten(0, 1).index_select(0, index.flatten().to(x.device))
    return picked.view(*index.shape, *x.shape[2:])


def sample(logits: Tensor, uniform: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Draw token ids (B,) from softmax(logits (B, V) / temperature), one uniform number in [0, 1) per row (B,) float64.

    Exact to 1e-6 in total variation. top-k keeps the k likeliest tokens, top-p the fewest likeliest whose mass reaches
    p (Holtzman et al. 2020). Rollouts use neither, since training scores the whole softmax.
    """
    if temperature == 0:
        return logits.argmax(-1)
    if temperature != 1:  # to divide would copy the logits
        logits = logits / temperature
    probs = F.softmax(logits.float(), -1).to(uniform.device)  # (B, V)
    if top_k or top_p < 1:
        ordered, index = probs.sort(dim=-1, descending=True, stable=True)
        if top_k:
            ordered[:, top_k:] = 0
            ordered /= ordered.sum(-1, keepdim=True)  # top-p is a share of what top-k has kept
        mass_before = ordered.cumsum(-1, dtype=torch.float64) - ordered
        keep = mass_before < top_p
        keep[:, 0] = True
        probs = torch.zeros_like(probs).scatter(1, index, ordered * keep)
    return draw(probs, uniform).to(logits.device)
