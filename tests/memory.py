"""How much memory the stages take, computed from a shape: `python -m tests.bench --what memory` prints it.

Two parts: what the nets take all the time, in bytes per parameter, and what a forward keeps for its backward, in bytes
per token. `test_bench.py` holds the second to what autograd saves in a forward of the real model.
"""

import functools
from dataclasses import replace

import torch

import fast
from model import GPT, Block, GPTConfig, ScalarModel
from tests.shapes import config_of

TRAINED = 16  # bytes per parameter: a weight, its gradient and Adam's two moments, in float32
BATCH, LENGTH = 8, 512  # of the micro-batch in the table
RANK = 16  # of --lora in the tables
CARDS = {"24 GB": (24, 1), "80 GB": (80, 1), "8 × 80 GB": (80, 8)}  # GB of each, and how many
TABLE = ["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "llama-1b", "llama-3b", "llama-8b"]
GIB = 2**30


@functools.cache
def parameters(name: str, scalar: bool = False) -> tuple[int, int]:
    """How many parameters a net has, and how many of them are in linear layers. `scalar`: reward model or value net."""
    config = config_of(name)
    with torch.device("meta"):
        net = GPT(replace(config, n_layer=1))  # blocks are alike
        first, block = counted(ScalarModel(net) if scalar else net), counted(Block(config))
    whole, linear = (x + (config.n_layer - 1) * more for x, more in zip(first, block))
    return whole, linear


def counted(net: torch.nn.Module) -> tuple[int, int]:
    linear = sum(p.numel() for layer in net.modules() if isinstance(layer, fast.Linear) for p in layer.parameters())
    return sum(p.numel() for p in net.parameters()), linear


def nets(name: str, stage: int, bf16: bool) -> int:
    """Bytes of the nets of a stage with gradients and moments. `bf16`: stage 3 stores frozen linear layers in bfloat16.

    Stage 1 trains a GPT. Stage 2 trains a reward model on the weights of a GPT, whose output layer stays. Stage 3
    trains a policy and a value net; the reference and the reward model are frozen.
    """
    (gpt, gpt_linear), (scalar, scalar_linear) = parameters(name), parameters(name, scalar=True)
    if stage == 1:
        return TRAINED * gpt
    if stage == 2:
        return TRAINED * scalar + 4 * max(0, gpt - scalar)
    spared = 2 * (gpt_linear + scalar_linear) if bf16 else 0
    return TRAINED * (gpt + scalar) + 4 * (gpt + scalar) - spared


def adapters(config: GPTConfig, rank: int) -> int:
    """How many parameters the adapters of a net have."""
    with torch.device("meta"):
        layers = [layer for layer in Block(config).modules() if isinstance(layer, fast.Linear)]
    return config.n_layer * rank * sum(layer.in_features + layer.out_features for layer in layers)


def lora_nets(name: str, stage: int, bf16: bool, rank: int = RANK) -> int:
    """Bytes of the nets of a stage with --lora: one trunk, what each net trains, in stage 3 two frozen sets of that.

    With `bf16` the linear layers of the trunk are in bfloat16, the output layer too if it is one.
    """
    config = config_of(name)
    whole, linear = parameters(name)
    trained, head = adapters(config, rank), config.n_embd + 1
    trunk = 4 * whole - (2 * linear if bf16 else 0)
    frozen = 2 * (2 if bf16 else 4) * trained + 4 * head if stage == 3 else 0
    return trunk + TRAINED * (trained * (2 if stage == 3 else 1) + (head if stage > 1 else 0)) + frozen


def block(config: GPTConfig, tokens: int, bf16: bool, rank: int = 0) -> int:
    """Bytes that the forward of a block saves where attention is fused: for GPT-2's and Llama's kind.

    The residual stream is in float32. What products read and make is in the dtype of products, in which under autocast
    the rounded weights are saved as well; with adapters these are stored so, and what lies between A and B is saved.
    """
    size, C = (2 if bf16 else 4), config.n_embd
    Q, K = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
    inner = config.n_inner or 4 * C
    norms = 2 * norm(config, rank)
    attention = C + Q + 2 * K + Q  # the input of c_attn; queries, keys and values; what attention found
    if config.rope_theta:
        attention += Q + K + Q  # queries and keys turned; c_proj reads a copy of what attention found
    mlp = C + (4 * inner if config.swiglu else 2 * inner)
    weights = C * (Q + 2 * K) + Q * C + C * inner * (3 if config.swiglu else 2)
    low = 4 * rank  # of four layers
    rounded = adapters(config, rank) // config.n_layer if rank else weights
    return tokens * (norms + 4 * config.n_head + size * (attention + mlp + low)) + (2 * rounded if bf16 else 0)


def norm(config: GPTConfig, rank: int) -> int:
    """Bytes that a norm saves of a token: its input, and RMSNorm the input with scale 1 too, for its gain."""
    C = config.n_embd
    return 4 * ((C if rank else 2 * C) + 1 if config.rms_norm else C + 2)


def saved(
    config: GPTConfig, batch: int, length: int, bf16: bool, checkpointed: bool, logprobs: bool = True, rank: int = 0
) -> int:
    """Bytes that autograd saves in one forward over `batch` × `length` tokens, each of which is a response token.

    With `logprobs` that of `GPT.logprobs`, else that of `ScalarModel.values`.
    """
    tokens, C = batch * length, config.n_embd
    ends = norm(config, rank) + 40  # the final norm; token ids and four indices
    ends += (2 if bf16 and logprobs else 4) * C  # what the output layer reads, or the scalar head
    kept = 4 * C * tokens if checkpointed else block(config, tokens, bf16, rank)
    head = 2 * config.vocab_size * C if bf16 and logprobs and (config.tied or not rank) else 0
    return config.n_layer * kept + tokens * ends + head


def logits(config: GPTConfig, tokens: int, kind: str) -> int:
    """Bytes of the logits that wait for the backward: the last few chunks of them, in float32."""
    chunk, kept = (fast.CHUNK, fast.KEPT) if kind == "cpu" else (fast.GPU_CHUNK, fast.GPU_KEPT)
    return 4 * config.vocab_size * min(tokens, kept * max(1, chunk // config.vocab_size))


def activations(
    name: str,
    batch: int,
    length: int,
    bf16: bool,
    checkpointed: bool,
    logprobs: bool = True,
    kind: str = "cuda",
    rank: int = 0,
) -> int:
    """Bytes at the peak of a forward and backward: all that is saved, and the logits. Work space comes on top.

    With checkpoints the logits are gone before the first block is computed again. Beside a frozen output layer its
    gradient, which `fast.token_logprobs` makes all the same, is counted here.
    """
    config, tokens = config_of(name), batch * length
    whole = saved(config, batch, length, bf16, checkpointed, logprobs, rank)
    waiting = logits(config, tokens, kind) if logprobs else 0
    waiting += 4 * config.vocab_size * config.n_embd if logprobs and rank else 0
    return whole + (max(waiting, block(config, tokens, bf16, rank)) if checkpointed else waiting)


def stage(
    name: str, stage: int, batch: int, length: int, bf16: bool, checkpointed: bool, kind: str = "cuda", rank: int = 0
) -> float:
    """GiB of a stage: its nets, and the activations of a micro-batch."""
    held = lora_nets(name, stage, bf16, rank) if rank else nets(name, stage, bf16)
    return (held + activations(name, batch, length, bf16, checkpointed, stage != 2, kind, rank)) / GIB


def sharded(name: str, processes: int, batch: int, length: int) -> tuple[float, float, float]:
    """GiB of each process in stage 3 with --shard, bfloat16 and checkpoints: at rest, in the rollout, in the update.

    The rollout gathers the policy, its linear layers in bfloat16. The update gathers what is in no block, and two
    blocks at a time, in float32, and has their gradients whole. The cache of the rollout comes on top.
    """
    rest = nets(name, 3, True) / processes
    count, linear = parameters(name)
    config = config_of(name)
    with torch.device("meta"):
        in_block, _ = counted(Block(config))
    outside = count - config.n_layer * in_block
    rollout = rest + 4 * count - 2 * linear
    update = rest + 2 * 4 * (outside + 2 * in_block) + activations(name, batch, length, True, True)
    return rest / GIB, rollout / GIB, update / GIB


def table() -> str:
    """Memory by shape and stage, in Markdown."""
    lines = [
        "| shape | parameters | stage 1 | stage 2 | stage 3 | stage 3, bfloat16 | stage 3, bfloat16, `--lora 16` |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in TABLE:
        found = [nets(name, 1, False), nets(name, 2, False), nets(name, 3, False), nets(name, 3, True)]
        found.append(lora_nets(name, 3, True))
        cells = [f"{x / GIB:.1f}" for x in found]
        lines.append(f"| {name} | {parameters(name)[0] / 1e6:,.0f}M | {' | '.join(cells)} |")
    lines += [
        "",
        "| shape | float32 | float32, checkpointed | bfloat16 | bfloat16, checkpointed |",
        "|---|---|---|---|---|",
    ]
    for name in TABLE:
        cells = []
        for bf16, checkpointed in ((False, False), (False, True), (True, False), (True, True)):
            pair = [activations(name, BATCH, LENGTH, bf16, checkpointed, logprobs) / GIB for logprobs in (True, False)]
            cells.append(f"{pair[0]:.1f} / {pair[1]:.1f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "| shape | stage 1 | stage 2 | stage 3 | stage 3, checkpointed | and `--lora 16` |"]
    lines += ["|---|---|---|---|---|---|"]
    for name in TABLE:
        cells = [f"{stage(name, n, BATCH, LENGTH, True, False):.1f}" for n in (1, 2, 3)]
        cells += [f"{stage(name, 3, BATCH, LENGTH, True, True, rank=rank):.1f}" for rank in (0, RANK)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "| shape, over 8 processes | at rest | rollout | update |", "|---|---|---|---|"]
    for name in TABLE:
        cells = [f"{x:.1f}" for x in sharded(name, 8, BATCH, LENGTH)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "| GPUs | the largest that fits: all weights | `--lora 16` |", "|---|---|---|"]
    for card, (gb, n) in CARDS.items():
        lines.append(f"| {card} | {largest(gb, n, 0)} | {largest(gb, n, RANK)} |")
    return "\n".join(lines)


def largest(gb: int, processes: int, rank: int) -> str:
    """The largest of TABLE whose checkpointed stage 3 takes at most nine tenths of a GPU. Several share all weights."""

    def size(name: str) -> float:
        if processes > 1 and not rank:
            return max(sharded(name, processes, BATCH, LENGTH))
        return stage(name, 3, BATCH, LENGTH, True, True, rank=rank)

    return max((name for name in TABLE if size(name) * GIB <= 0.9 * gb * 1e9), key=parameters, default="none")
