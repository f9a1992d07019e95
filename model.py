"""The GPT that every stage shares, written out: GPT-2's architecture, and the Llama family's where its config says so.

    GPT           hidden states, logits, log-probabilities of response tokens, generation
    ScalarModel   the same trunk under a scalar head: the reward model and the value net

Sequences are right-padded: tokens (B, T), prompt_len (B,), length (B,). In causal attention no real token looks at the
pads after it, so training and scoring need no padding mask. `length` decides what is padding; no token id does.
Quantities per response token live on the response window (B, R): column r is about the token at position
prompt_len + r, which was predicted at position prompt_len + r − 1. The two lengths of a batch stay on the CPU, so that
no forward waits for a GPU.

Letters in shapes: B batch, T positions, R response positions, V vocabulary, C channels, H heads, K key and value heads,
D channels of a head, L layers. The docstring of each function in fast.py starts with the plain PyTorch that it equals.

    python model.py out/ppo --prompt "Tell me about a shy owl who lost a red key near the lake." --compare out/sft
    python model.py out/ppo --chat
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fast
from fast import Linear  # nn.Linear


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
    bos: tuple[int, ...] = ()  # the id that other software puts before a text; only kept for them

    @property
    def head_size(self) -> int:
        return self.head_dim or self.n_embd // self.n_head

    @property
    def ends(self) -> tuple[int, ...]:
        return (self.eos, *self.stops)


class Cache(NamedTuple):
    """Keys and values of earlier tokens, and the place of the new tokens among them. Only generation has one."""

    kv: Tensor  # (L, 2, B, K, S, D): S places for tokens; within a block (2, B, K, S, D)
    place: slice | Tensor  # the places that the new tokens take
    mask: Tensor | None  # (B, 1, 1, S): 0, or −inf where a row must not look; None: causal
    position: Tensor  # (T,) or (B, T) of the new tokens in their rows


class Attention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.n_kv_head = config.n_kv_head or config.n_head
        self.head_size = config.head_size
        self.dropout = config.dropout
        n_qkv = (self.n_head + 2 * self.n_kv_head) * self.head_size
        self.c_attn = Linear(config.n_embd, n_qkv, bias=config.qkv_bias)
        self.c_proj = Linear(self.n_head * self.head_size, config.n_embd, bias=config.bias)
        self.q_norm = nn.RMSNorm(self.head_size, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(self.head_size, eps=config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, cache: Cache | None) -> Tensor:
        B, T, _ = x.shape
        heads = self.c_attn(x).view(B, T, -1, self.head_size).transpose(1, 2)  # (B, H + 2 K, T, D)
        q, k, v = heads.split([self.n_head, self.n_kv_head, self.n_kv_head], dim=1)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        mask = None
        if cache is not None:
            keys, values = cache.kv  # (B, K, S, D) each
            keys[:, :, cache.place] = k
            values[:, :, cache.place] = v
            k, v, mask = keys, values, cache.mask
        y = fast.attend(q, k, v, mask, self.dropout if self.training else 0.0)  # (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, -1)
        return F.dropout(self.c_proj(y), self.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.dropout = config.dropout
        self.swiglu = config.swiglu
        n_inner = config.n_inner or 4 * config.n_embd
        self.c_fc = Linear(config.n_embd, n_inner * (2 if config.swiglu else 1), bias=config.bias)
        self.c_proj = Linear(n_inner, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_fc(x)  # (B, T, n_inner), or gate and value side by side
        if self.swiglu:
            gate, value = x.chunk(2, dim=-1)
            x = F.silu(gate) * value
        else:
            x = F.gelu(x, approximate="tanh")
        return F.dropout(self.c_proj(x), self.dropout, self.training)


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
    """cos and sin of position · theta^(−2i / D) in float32: (1, T, D/2) of position (T,), (B, 1, T, D/2) of (B, T).

    Llama 3.1 to 3.3 slow the waves that are longer than the context in which they were first trained (Llama team 2024,
    section 3.4.2; the numbers and the blend between are those of their code).
    """
    D = config.head_size
    frequency = config.rope_theta ** (-torch.arange(0, D, 2, device=position.device) / D)  # (D/2,)
    if config.rope_llama3:
        factor, low, high, context = config.rope_llama3
        turns = context * frequency / (2 * math.pi)  # within that context
        fast_part = ((turns - low) / (high - low)).clamp(0, 1)
        frequency = frequency * (fast_part + (1 - fast_part) / factor)
    angle = (position[..., None] * frequency).unsqueeze(-3)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, H, T, D) with channels i and i + D/2 turned by angle i, as the weights on Hugging Face expect."""
    a, b = x.chunk(2, dim=-1)  # (B, H, T, D/2) each
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).type_as(x)


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        if not config.head_dim and config.n_embd % config.n_head:
            raise ValueError(f"n_embd {config.n_embd} is not a multiple of n_head {config.n_head}")
        if config.n_kv_head and config.n_head % config.n_kv_head:
            raise ValueError(f"n_head {config.n_head} is not a multiple of n_kv_head {config.n_kv_head}")
        self.config = config
        self.static_decode = False  # generate in shapes that do not change (see fast.static)
        self.checkpoint_activations = False  # keep the inputs of blocks alone, and compute the rest again
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
        """Final hidden states (B, T, C) of tokens (B, T), at positions 0…T-1 and under causal attention.

        With a `cache` the tokens continue what it holds. Raises ValueError where the context is too short.
        """
        T = tokens.shape[1]
        longest = T if cache is None else cache.kv.shape[4]
        if longest > self.config.block_size:
            raise ValueError(f"{longest} tokens do not fit the context of {self.config.block_size}")
        position = torch.arange(T, device=tokens.device) if cache is None else cache.position
        x = self.wte(tokens)  # (B, T, C)
        rotary = None
        if self.config.rope_theta:
            rotary = rotary_angles(position, self.config)
        else:
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
        """Logits (B, T, V), to experiment with. The stages use `logprobs`, which never makes this tensor."""
        return F.linear(self.hidden(tokens), self.output_weight)

    def logprobs(self, tokens: Tensor, prompt_len: Tensor, length: Tensor, temperature: float = 1.0) -> Tensor:
        """log softmax(logits / temperature) of each response token, in nats: (B, R) float32, 0 outside the response.

        The output layer is applied to real response tokens only, so that not even (B, R, V) ever exists.
        """
        predicting, target, window = self.predictions(tokens, prompt_len, length)
        return window(fast.chosen_logprobs(predicting, self.output_weight, target, temperature))

    def summed_logprobs(self, tokens: Tensor, prompt_len: Tensor, length: Tensor) -> Tensor:
        """`logprobs(...).sum()`, what stage 1 learns from: a number."""
        predicting, target, _ = self.predictions(tokens, prompt_len, length)
        return fast.summed_logprobs(predicting, self.output_weight, target)

    @torch.no_grad()
    def logprobs_and_entropy(
        self, tokens: Tensor, prompt_len: Tensor, length: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """`logprobs`, without gradient, and the entropy in nats of the distribution of each response token: (B, R)."""
        predicting, target, window = self.predictions(tokens, prompt_len, length)
        logp, entropy = fast.chosen_logprobs_and_entropy(predicting, self.output_weight, target, temperature)
        return window(logp), window(entropy)

    def predictions(
        self, tokens: Tensor, prompt_len: Tensor, length: Tensor
    ) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
        """For all N response tokens: the hidden states (N, C) before them, their ids (N,), and a function that puts
        numbers (N,) into the response window (B, R)."""
        position, mask = response_window(prompt_len, length)  # (B, R)
        row, r = mask.nonzero(as_tuple=True)  # (N,) each
        real = position[mask]  # (N,) their positions
        hidden = self.hidden(tokens[:, :-1])  # (B, T - 1, C): what follows the last position is not asked for
        predicting = fast.pick(hidden, row, real - 1)  # (N, C)
        target = fast.pick(tokens, row, real)  # (N,)
        index = fast.to_device(row, tokens.device), fast.to_device(r, tokens.device)
        return predicting, target, lambda x: x.new_zeros(mask.shape).index_put(index, x)

    @fast.decoding
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
        `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 are off. `generator` is a CPU generator on every device: one
        number per row and step, drawn at the start. Raises ValueError if a prompt and `max_new_tokens` are too long.
        """
        eos, device = self.config.eos, self.wte.weight.device
        prompts = [prompt or [eos] for prompt in prompts]
        B, P, N = len(prompts), fast.prompt_width(self, prompts, max_new_tokens), max_new_tokens
        if N < 1:
            raise ValueError(f"max_new_tokens {N}: give at least 1")
        if P + N > self.config.block_size:
            raise ValueError(f"a prompt of {P} and {N} new tokens do not fit the context of {self.config.block_size}")
        prompt_len = torch.tensor([len(p) for p in prompts])  # (B,)
        start = fast.to_device(prompt_len, device)
        tokens = fast.to_device(torch.tensor([p + [eos] * (P + N - len(p)) for p in prompts]), device)
        ends = fast.to_device(torch.tensor(self.config.ends), device)
        new = torch.full((N, B), eos, device=device)  # the responses
        n_new = torch.zeros_like(start)
        done = torch.zeros(B, dtype=torch.bool, device=device)
        uniform = fast.uniform(N, B, generator=generator, device=device)
        output_weight = fast.pack(self.output_weight, self.static_decode)

        # 1 Prefill. Prompts take places 0…P−1 of the cache, new token t takes place P + t. A short prompt leaves a gap.
        shape = (len(self.h), 2, B, self.h[0].attn.n_kv_head, P + N, self.config.head_size)
        kv = torch.zeros(shape, device=device, dtype=fast.compute_dtype(output_weight))
        place = torch.arange(P + N, device=device)
        in_gap = (place >= start[:, None]) & (place < P)  # (B, P + N)
        gap = torch.zeros(B, 1, 1, P + N, device=device, dtype=kv.dtype).masked_fill(in_gap[:, None, None], -math.inf)
        state = start, ends, uniform, new, n_new, done, gap, kv
        (start, ends, uniform, new, n_new, done, gap, kv), take = fast.static(self, (temperature, top_k, top_p), state)
        prompt_cache = Cache(kv[..., :P, :], slice(0, P), mask=None, position=place[:P])
        hidden = self.hidden(tokens[:, :P], prompt_cache)  # (B, P, C)
        hidden = fast.pick(hidden, torch.arange(B), prompt_len - 1)  # (B, C) at the end of each prompt

        def add_token(hidden: Tensor, t: int | Tensor) -> None:
            """Token t of every row, from the hidden states (B, C) before it."""
            # 2 Draw.
            logits = fast.linear_float32(hidden.to(kv.dtype), output_weight)  # (B, V)
            token = sample(logits, uniform[t].view(B), temperature, top_k, top_p)  # (B,)
            # 3 Append: a row that has ended stays as it is.
            new[t] = torch.where(done, eos, token)
            n_new.add_(~done)
            done.logical_or_(torch.isin(token, ends))

        def step(t: int | Tensor) -> None:
            """Read token t − 1 of every row, then add token t."""
            seen, newest, mask = fast.up_to(kv, gap, P + t - 1)
            cache = Cache(seen, newest, mask, position=(start + t - 1)[:, None])
            add_token(self.hidden(new[t - 1].view(B, 1), cache)[:, 0], t)

        add_token(hidden, 0)
        for t in range(1, N):
            # 4 Stop where every row has ended.
            if fast.all_true(done, t):
                break
            take(step, t)

        tokens.scatter_(1, start[:, None] + place[:N], new.T)
        length = prompt_len + n_new.cpu()
        return tokens[:, : int(length.max())], prompt_len, length


class ScalarModel(nn.Module):
    """A GPT's trunk under a scalar head: one number for every position. Reward model and value net are both this.

    `gain` and `bias` normalise the output and are set, not trained (Ziegler et al. 2019, section 2.2).
    """

    def __init__(self, trunk: GPT):
        super().__init__()
        self.trunk = trunk
        trunk.lm_head = None  # an output layer of its own, if the trunk has one, is not needed
        self.head = nn.Linear(trunk.config.n_embd, 1)
        nn.init.normal_(self.head.weight, std=1 / math.sqrt(trunk.config.n_embd + 1))  # Stiennon et al. 2020, C.1
        nn.init.zeros_(self.head.bias)
        self.register_buffer("gain", torch.ones(()))
        self.register_buffer("bias", torch.zeros(()))  # beside the head's own, which is trained

    @property
    def config(self) -> GPTConfig:
        return self.trunk.config

    def scalar(self, hidden: Tensor) -> Tensor:
        """(…, C) → (…) in at least float32."""
        raw = fast.linear_float32(hidden, self.head.weight, self.head.bias).squeeze(-1)
        return self.gain * raw + self.bias

    def scores(self, tokens: Tensor, length: Tensor) -> Tensor:
        """The score (B,) of each whole sequence, read at its last real token."""
        hidden = self.trunk.hidden(tokens)  # (B, T, C)
        return self.scalar(fast.pick(hidden, torch.arange(len(tokens)), length - 1))

    def values(self, tokens: Tensor, prompt_len: Tensor, length: Tensor) -> Tensor:
        """The value (B, R) of the state in which each response token was chosen, 0 outside the response."""
        position, mask = response_window(prompt_len, length)  # (B, R)
        hidden = self.trunk.hidden(tokens[:, :-1])  # (B, T - 1, C)
        values = self.scalar(fast.pick(hidden, torch.arange(len(tokens))[:, None], position - 1))  # (B, R)
        return values * fast.to_device(mask, tokens.device)


def response_window(prompt_len: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    """The response window: position (B, R) of each response token in its row, and mask (B, R), true where there is one.

    R is the longest response. Columns after a response repeat its last position. A position is at least 1, even in a
    row without a response, so that position − 1 can always be looked up.
    """
    R = int((length - prompt_len).max())
    position = prompt_len[:, None] + torch.arange(R, device=length.device)  # (B, R)
    mask = position < length[:, None]
    return position.minimum(length[:, None] - 1).clamp(min=1), mask


def sample(logits: Tensor, uniform: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Draw token ids (B,) from softmax(logits (B, V) / temperature), one uniform number in [0, 1) a row (B,) float64.

    Inverse transform sampling, exact to 1e-6 in total variation. top-k keeps the k likeliest tokens, top-p the fewest
    likeliest whose mass reaches p (Holtzman et al. 2020); both are for this file's own command line, since training
    scores the whole softmax.
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float()
    if temperature != 1:
        logits = logits / temperature
    probs = F.softmax(logits, -1).to(uniform.device)  # (B, V)
    if 0 < top_k < probs.shape[-1] or top_p < 1:
        ordered, index = probs.sort(dim=-1, descending=True, stable=True)
        if top_k:
            ordered[:, top_k:] = 0
            ordered /= ordered.sum(-1, keepdim=True)  # top-p is a share of what top-k has kept
        mass_before = ordered.cumsum(-1, dtype=torch.float64) - ordered
        keep = mass_before < top_p
        keep[:, 0] = True
        probs = torch.zeros_like(probs).scatter(1, index, ordered * keep)
    return fast.draw(probs, uniform).to(logits.device)


if __name__ == "__main__":
    import common  # here, since common imports this file
    from tools import sample as talk

    common.run_main(talk.main)
