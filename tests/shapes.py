"""The shapes of nets that are measured and computed."""

from dataclasses import replace

from model import GPTConfig

LLAMA = dict(swiglu=True, rms_norm=True, bias=False, qkv_bias=False, rope_theta=5e5)
SHAPES: dict[str, dict] = {
    "small": dict(vocab_size=1024, n_layer=4, n_head=4, n_embd=128),
    "wide": dict(vocab_size=50257, n_layer=4, n_head=4, n_embd=128),
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768),
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600),
    "llama-small": dict(vocab_size=1024, n_layer=4, n_head=4, n_kv_head=2, n_embd=128, n_inner=320) | LLAMA,
    # Llama 3.2 and 3.1 (Llama team 2024)
    "llama-1b": dict(vocab_size=128256, n_layer=16, n_head=32, n_kv_head=8, n_embd=2048, n_inner=8192) | LLAMA,
    "llama-3b": dict(vocab_size=128256, n_layer=28, n_head=24, n_kv_head=8, n_embd=3072, n_inner=8192) | LLAMA,
    "llama-8b": dict(vocab_size=128256, n_layer=32, n_head=32, n_kv_head=8, n_embd=4096, n_inner=14336, tied=False)
    | LLAMA,
}
SHAPES["llama-1b-cut"] = SHAPES["llama-1b"] | {"n_layer": 2}  # its widths, to check kernels with


def config_of(name: str, block_size: int = 1024) -> GPTConfig:
    """The config of a name in SHAPES, or of GPT-2's kind with V, layers, heads and C: 1024x4x4x128."""
    if name in SHAPES:
        config = GPTConfig(block_size=block_size, **SHAPES[name])
    else:
        vocab_size, n_layer, n_head, n_embd = map(int, name.split("x"))
        config = GPTConfig(vocab_size, block_size, n_layer, n_head, n_embd)
    return replace(config, eos=config.vocab_size - 1)
