"""Convert checkpoints of other projects to ours and back.

    python -m tools.hf FOLDER out/NAME       a Hugging Face folder → a run folder that every stage's --init takes
    python -m tools.hf gpt2 out/gpt2         by the name that it has on the hub, such as openai-community/gpt2-medium
    python -m tools.hf ckpt.pt out/NAME      nanoGPT's checkpoint with GPT-2's vocabulary → a run folder
    python -m tools.hf out/ppo FOLDER        a run folder → a Hugging Face folder for AutoModel and AutoTokenizer
    python -m tools.hf out/ppo FOLDER --adapter      of a run with --lora the adapters alone, for peft's PeftModel

A model is a GPT-2, Llama 3 to 3.3, SmolLM 2 or 3, Qwen 2 or 3, or a Mistral without sliding windows: a language model,
or a classifier with one label (a reward model), with a byte-level BPE. Weights become float32.
"""

import importlib.util
import json
import os
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import torch
from tiktoken import Encoding
from torch import Tensor
from torch.nn import functional

from common import cli, lora, nets
from data.chat import template_of, with_template
from data.files import InputError, cannot_write, read_object
from data.tokenizer import gpt2_encoding, plain_tokens, turn_suffix
from model import GPT, GPTConfig, ScalarModel
from tools.get.download import from_hub
from tools.hf_tokenizer import eos_ids, fill_gaps, read_about, read_template, read_tokenizer, require, tokenizer_json

PAD = re.compile("pad|unused|reserved", re.IGNORECASE)  # names of tokens that no text holds
UNEXPECTED = (LookupError, TypeError, ValueError, AttributeError, RuntimeError, ZeroDivisionError)  # of damaged files
# The class of a language model and of a reward model.
CLASSES = {"gpt2": ("GPT2LMHeadModel", "GPT2ForSequenceClassification")} | {
    name.lower(): (f"{name}ForCausalLM", f"{name}ForSequenceClassification")
    for name in ("Llama", "Mistral", "Qwen2", "Qwen3", "SmolLM3")
}
# What model.py computes. If config.json has one of these keys, it needs one of these values; if it lacks the key, the
# first of them has to be what transformers takes then.
LLAMA = {"hidden_act": ["silu"], "attention_bias": [False], "mlp_bias": [False], "use_sliding_window": [False]}
REQUIRED = dict.fromkeys(CLASSES, LLAMA) | {
    "gpt2": {
        "activation_function": ["gelu_new", "gelu_pytorch_tanh"], "scale_attn_weights": [True],
        "scale_attn_by_inverse_layer_idx": [False], "add_cross_attention": [False],
    },
    "qwen2": LLAMA | {"attention_bias": [True, False]},  # it has the bias, and does not read this
}  # fmt: skip
# The names of our numbers in config.json.
GPT2_FIELDS = {name: name for name in ("vocab_size", "n_layer", "n_head", "n_embd", "n_inner")}
GPT2_FIELDS |= {"block_size": "n_positions", "norm_eps": "layer_norm_epsilon", "tied": "tie_word_embeddings"}
LLAMA_FIELDS = {
    "vocab_size": "vocab_size", "block_size": "max_position_embeddings", "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads", "n_kv_head": "num_key_value_heads", "n_embd": "hidden_size",
    "n_inner": "intermediate_size", "norm_eps": "rms_norm_eps", "tied": "tie_word_embeddings", "head_dim": "head_dim",
}  # fmt: skip
# What these mean, and rope_theta, if config.json lacks them. GPT-2's numbers are the defaults of GPTConfig.
DEFAULTS = {
    "gpt2": (),
    "llama": (32000, 2048, 32, 32, None, 4096, 11008, 1e-6, False, None, 1e4),
    "mistral": (32000, 131072, 32, 32, 8, 4096, 14336, 1e-6, False, None, 1e4),
    "qwen2": (151936, 32768, 32, 32, 32, 4096, 22016, 1e-6, False, None, 1e4),
    "qwen3": (151936, 32768, 32, 32, 32, 4096, 22016, 1e-6, False, 128, 1e4),
    "smollm3": (128256, 32768, 36, 16, 4, 2048, 11008, 1e-6, True, None, 2e6),
}
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
ROPE_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
# Llama's layers that make each of ours, in the order in which their rows stand in it. GPT-2's have our names.
LLAMA_LAYERS = {
    "wte": ["embed_tokens"], "ln_f": ["norm"], "ln_1": ["input_layernorm"], "ln_2": ["post_attention_layernorm"],
    "attn.c_attn": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], "attn.c_proj": ["self_attn.o_proj"],
    "attn.q_norm": ["self_attn.q_norm"], "attn.k_norm": ["self_attn.k_norm"],
    "mlp.c_fc": ["mlp.gate_proj", "mlp.up_proj"], "mlp.c_proj": ["mlp.down_proj"],
}  # fmt: skip


def their_names(ours: str, config: GPTConfig) -> list[str]:
    """Return the names of their tensors that make our tensor. The head of a reward model is called `score`."""
    if ours in ("head.weight", "lm_head.weight"):
        return ["score.weight" if ours == "head.weight" else ours]
    if not config.rope_theta:
        return [f"transformer.{ours}"]
    layer, name, kind = re.fullmatch(r"(?:h\.(\d+)\.)?(.+)\.(weight|bias)", ours).groups()
    place = f"model.layers.{layer}" if layer else "model"
    return [f"{place}.{each}.{kind}" for each in LLAMA_LAYERS[name]]


def turned(ours: str, x: Tensor, config: GPTConfig) -> Tensor:
    """Return x, transposed if it is of a linear layer of GPT-2, which stores them as (in, out)."""
    return x.T if ours.startswith("h.") and x.dim() == 2 and not config.rope_theta else x


def split_rows(x: Tensor, n: int, config: GPTConfig) -> tuple[Tensor, ...]:
    """Return the rows of our tensor that each of their `n` tensors has."""
    n_q, n_kv = (heads * config.head_dim for heads in (config.n_head, config.n_kv_head))
    return x.split({1: [len(x)], 2: [len(x) // 2] * 2, 3: [n_q, n_kv, n_kv]}[n])


def our_config(c: dict, path: Path) -> tuple[GPTConfig, bool]:
    """Return our config for the content of a config.json, and whether it is a reward model's. `eos` stays 0."""
    if how := c.get("quantization_config") or c.get("compression_config"):
        raise InputError(f"{path}: quantized weights ({how.get('quant_method', how)}); fetch the model unquantized")
    kind = c.get("model_type")
    require(path, "model_type", kind, [*CLASSES])
    architecture = (c.get("architectures") or CLASSES[kind])[0]
    require(path, "architecture", architecture, CLASSES[kind])
    if kind == "mistral":
        require(path, "sliding_window", c.get("sliding_window", 4096), [None])
    c = dict(zip((*LLAMA_FIELDS.values(), "rope_theta"), DEFAULTS[kind])) | c
    derived = {"num_key_value_heads": 0, "head_dim": 0, "num_labels": 2}  # what null, or no key, means
    c = derived | {name: value for name, value in c.items() if value is not None}
    for name, allowed in REQUIRED[kind].items():
        require(path, name, c.get(name, allowed[0]), allowed)
    for each in c.get("layer_types", []):
        require(path, "layer_types", each, ["full_attention"])
    scalar = architecture == CLASSES[kind][1]
    if scalar:
        require(path, "num_labels", len(c["id2label"]) if "id2label" in c else c["num_labels"], [1])
    if kind == "gpt2":
        return GPTConfig(eos=0, **{ours: c[theirs] for ours, theirs in GPT2_FIELDS.items() if theirs in c}), scalar
    numbers = {ours: c[theirs] for ours, theirs in LLAMA_FIELDS.items()}
    rope = c.get("rope_scaling") or c.get("rope_parameters", {})
    rope = {"original_max_position_embeddings": numbers["block_size"], "rope_theta": c["rope_theta"]} | rope
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    require(path, "rope_type", rope_type, ["default", "llama3"])
    layers, every = range(numbers["n_layer"]), c.get("no_rope_layer_interval", 4)
    uses_rope = c.get("no_rope_layers") or [(i + 1) % every for i in layers]  # SmolLM 3's, by layer
    return GPTConfig(
        **numbers, eos=0, swiglu=True, bias=False, qkv_bias=kind == "qwen2", rms_norm=True, qk_norm=kind == "qwen3",
        rope_theta=float(rope["rope_theta"]),
        no_rope=tuple(i for i in layers if not uses_rope[i]) if kind == "smollm3" else (),
        rope_llama3=tuple(float(rope[name]) for name in ROPE_LLAMA3) if rope_type == "llama3" else (),
    ), scalar  # fmt: skip


def config_json(config: GPTConfig, scalar: bool) -> dict:
    """Return the content of a config.json; the inverse of `our_config`.

    Raises InputError if a field of the config has no place in their format, such as the activation of a fork.
    """
    marks = {"smollm3": config.no_rope, "qwen3": config.qk_norm, "qwen2": config.qkv_bias, "llama": True}
    kind = next(kind for kind, has in marks.items() if has) if config.rope_theta else "gpt2"
    shape = replace(config, dropout=0.0, eos=0, stops=(), bos=(), suffix=())  # the architecture alone
    c = {
        "architectures": [CLASSES[kind][scalar]], "model_type": kind, "dtype": "float32",
        "bos_token_id": (*config.bos, config.eos)[0], "eos_token_id": [*config.ends] if config.stops else config.eos,
    }  # fmt: skip
    fields = GPT2_FIELDS if kind == "gpt2" else LLAMA_FIELDS
    c |= {theirs: getattr(shape, ours) for ours, theirs in fields.items()}
    if scalar:
        c |= {"id2label": {"0": "score"}, "label2id": {"score": 0}}
    if kind == "gpt2":
        dropouts = dict.fromkeys(["resid_pdrop", "embd_pdrop", "attn_pdrop"], config.dropout)
        c |= dropouts | {"activation_function": "gelu_new"}
    else:
        rope = {"rope_type": "llama3" if config.rope_llama3 else "default", "rope_theta": config.rope_theta}
        rope |= dict(zip(ROPE_LLAMA3, config.rope_llama3))
        rope |= {name: int(rope[name]) for name in ROPE_LLAMA3[3:] if name in rope}
        c |= {"hidden_act": "silu", "rope_theta": config.rope_theta, "rope_parameters": rope}
    if kind == "smollm3":
        c |= {"no_rope_layers": [int(i not in config.no_rope) for i in range(config.n_layer)], "pad_token_id": None}
    again, _ = our_config(c, Path("config.json"))
    for name, value in vars(shape).items():
        if value != getattr(again, name):
            raise InputError(f"{name} {value!r} has no place in {kind}'s config.json; nothing was written")
    return c


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Read all tensors of model.safetensors or, if it is missing, pytorch_model.bin, in one file or in shards."""
    from safetensors.torch import load_file

    paths = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    found: dict[str, Tensor] = {}
    for path in paths or [folder / "model.safetensors"]:
        try:
            found |= torch.load(path, "cpu", weights_only=True) if path.suffix == ".bin" else load_file(path)
        except Exception as error:  # both raise many kinds of errors
            raise InputError(f"{path}: cannot be read ({type(error).__name__}: {error}); fetch it again") from None
    return found


def read_model(folder: Path) -> tuple[GPT | ScalarModel, Encoding]:
    """Read a Hugging Face folder. Returns our model in float32 and its tokenizer."""
    try:
        c, about = read_object(folder / "config.json"), read_about(folder)
        encoding = read_tokenizer(folder / "tokenizer.json")
        config, scalar = our_config(c, folder / "config.json")
        eos, *stops = eos_ids(folder, about, encoding)
        bos = [i for i in [c.get("bos_token_id")] if isinstance(i, int) and i != eos]
        config = replace(config, eos=eos, stops=tuple(stops), bos=tuple(bos))
        chat = read_template(folder, about)
        encoding = with_template(encoding, chat | {"ends": [*config.ends]} if chat else {})
        model = load(replace(config, suffix=turn_suffix(encoding, eos)), scalar, read_tensors(folder), str(folder))
        encoding = fill_gaps(encoding, config.vocab_size, folder)  # once the weights have so many rows
        if scalar:
            model.bias.fill_(c.get("score_bias", 0.0))
        if scalar and c.get("pad_token_id") in config.ends:
            print(f"{folder}: its pad ends texts too; transformers reads a score before that token, this project at it")
        return model, encoding
    except UNEXPECTED as error:
        raise InputError(f"{folder}: not as expected ({type(error).__name__}: {error}); fetch it again") from None


def read_nanogpt(path: Path) -> tuple[GPT, Encoding]:
    """Read a ckpt.pt of nanoGPT. Biases that it lacks are zeros here. Its exact GELU becomes GPT-2's approximation."""
    saved = nets.read_checkpoint(path, "give a ckpt.pt of nanoGPT")
    try:
        args = saved["model_args"]
        if args["vocab_size"] not in (50257, 50304):  # as it is, and padded
            raise InputError(f"a vocabulary of {args['vocab_size']} tokens is not GPT-2's; only GPT-2's is supported")
        found = {name.removeprefix("_orig_mod."): x for name, x in saved["model"].items()}
        layers = [name for name in found if re.search(r"\.(ln_\w+|c_\w+)\.weight$", name)]
        if not args.get("bias", True):
            found |= {name.replace(".weight", ".bias"): torch.zeros(len(found[name])) for name in layers}
        found |= {name: found[name].T for name in layers if found[name].dim() == 2}  # as on Hugging Face
        encoding = fill_gaps(gpt2_encoding(), args["vocab_size"], path)
        print(f"{path}: each exact GELU of nanoGPT becomes GPT-2's, which is at most 0.0005 off")
        shape = {name: args[name] for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd")}
        return load(GPTConfig(eos=encoding.eot_token, **shape), False, found, "its model"), encoding
    except (*UNEXPECTED, InputError) as error:
        what = f"{error}" if isinstance(error, InputError) else f"not as expected ({type(error).__name__}: {error})"
        raise InputError(f"{path}, a checkpoint of nanoGPT: {what}") from None


def load(config: GPTConfig, scalar: bool, found: dict[str, Tensor], source: str) -> GPT | ScalarModel:
    """Build a model from their tensors. Raises InputError if one is missing or unknown, RuntimeError if misshapen."""
    if config.n_layer > len(found):  # before a million layers are made
        raise InputError(f"{source}: {len(found)} tensors are too few for {config.n_layer} layers; fetch it again")
    with torch.device("meta"):
        model = GPT(replace(config, tied=config.tied or scalar))
    names = {ours: their_names(ours, config) for ours in [*model.state_dict(), *["head.weight"] * scalar]}
    base = re.compile(r"^(transformer|model)\.")  # some checkpoints lack it
    buffers = re.compile(r"\.attn\.(masked_)?bias$|rotary_emb\.inv_freq$")
    found = {base.sub("", name): x for name, x in found.items() if not buffers.search(name)}
    if packed := [name for name, x in found.items() if x.dtype not in FLOATS]:
        kind = str(found[packed[0]].dtype).removeprefix("torch.")
        raise InputError(f"{source}: {packed[0]} is {kind}, as in a quantized model; fetch the model unquantized")
    output = found.pop("lm_head.weight", None) if config.tied else None
    wanted = {base.sub("", name) for theirs in names.values() for name in theirs}
    if wrong := sorted(wanted ^ found.keys()):
        fault = "is missing" if wrong[0] in wanted else "belongs to no supported architecture"
        raise InputError(f"{source}: the tensor {wrong[0]} {fault}; give a complete checkpoint of a supported model")
    state = {}
    for ours, theirs in names.items():
        x = torch.cat([found.pop(base.sub("", name)).float() for name in theirs])
        state[ours] = turned(ours, x, config).contiguous()
    if output is not None and not torch.equal(output.float(), state["wte.weight"]):
        raise InputError(f"{source}: ties lm_head.weight to the embedding but holds another; set tie_word_embeddings")
    if not all(x.isfinite().all() for x in state.values()):
        raise InputError(f"{source}: not all weights are finite; fetch it again")
    head = state.pop("head.weight", None)
    model.load_state_dict(state, assign=True)  # RuntimeError for a wrong shape
    if scalar:
        model = ScalarModel(model)
        model.head.load_state_dict({"weight": head, "bias": torch.zeros(1)})
    return model.eval()


def write_model(model: GPT | ScalarModel, encoding: Encoding, folder: Path) -> None:
    """Write a Hugging Face folder: config.json, model.safetensors, the tokenizer and its chat template."""
    from safetensors.torch import save_file

    scalar, config = isinstance(model, ScalarModel), model.config
    state = {name.removeprefix("trunk."): x.detach().cpu() for name, x in model.state_dict().items()}
    special = {name: i for name, i in encoding._special_tokens.items() if name not in plain_tokens(encoding)}
    pad = max((i for name, i in special.items() if PAD.search(name) and i not in config.ends), default=None)
    if scalar and pad is None:  # transformers reads a score at the last token that is not the pad
        pad, name = encoding.n_vocab, "<|pad|>" if "<|pad|>" not in encoding._special_tokens else "<|pad_2|>"
        rows = max(config.vocab_size, pad + 1)
        state["wte.weight"] = functional.pad(state["wte.weight"], (0, 0, 0, rows - config.vocab_size))
        encoding, config = fill_gaps(encoding, pad + 1, folder, name), replace(config, vocab_size=rows)
    c = config_json(config, scalar)
    if scalar:  # theirs has no constant; GPT-2's last norm can take it, and RMSNorm cannot
        gain, bias, head_bias = (state.pop(name) for name in ("gain", "bias", "head.bias"))
        constant = gain * head_bias + bias
        state["head.weight"] = weight = gain * state["head.weight"]
        if config.rms_norm:
            c["score_bias"] = constant.item()
            print(f"the exported scores are ours minus {c['score_bias']:.4f} (score_bias in config.json)")
        else:
            state["ln_f.bias"] = state["ln_f.bias"] + weight[0] * constant / weight.square().sum()
    result = {}
    for ours, x in state.items():
        theirs = their_names(ours, config)
        for name, part in zip(theirs, split_rows(x, len(theirs), config)):
            result[name] = turned(ours, part, config).clone(memory_format=torch.contiguous_format)
    names, chat = {i: name for name, i in encoding._special_tokens.items()}, template_of(encoding)
    about = {"bos_token": names[config.bos[0]]} if config.bos and config.bos[0] in names else {}
    about |= {name: token for name, token in chat.items() if name.endswith("_token")}
    about |= {"eos_token": names[config.eos], "model_max_length": config.block_size}
    about |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if chat:
        (folder / "chat_template.jinja").write_text(chat["template"], encoding="utf-8")
    if scalar:  # a language model needs none; transformers would not train the pad's embedding
        c["pad_token_id"], about["pad_token"] = pad, names[pad]
    files = {"config": c, "tokenizer": tokenizer_json(encoding), "tokenizer_config": about}
    if not scalar:
        files["generation_config"] = {"eos_token_id": c["eos_token_id"], "do_sample": True, "top_k": 0}
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
    save_file(result, folder / "model.safetensors", metadata={"format": "pt"})


def write_adapter(path: Path, folder: Path) -> None:
    """Write the adapters of a model.pt as a folder of peft, which goes with the base, exported.

    GPT-2's layers of queries, keys and values stay fused. Llama's are apart: each gets the whole A, and its rows of B.
    """
    from safetensors.torch import save_file

    saved, result = nets.read_checkpoint(path), {}
    if "base" not in saved or "head.weight" in saved["model"]:
        raise InputError(f"{path}: holds no adapters of a language model; leave out --adapter")
    config = GPTConfig(**saved["config"])
    for ours, x in saved["model"].items():
        layer, _, kind = ours.rpartition(".")
        theirs = their_names(f"{layer}.weight", config)
        for name, part in zip(theirs, split_rows(x, len(theirs), config) if kind == "B" else [x] * len(theirs)):
            result[f"base_model.model.{name.removesuffix('weight')}lora_{kind}.weight"] = part.clone()
    layers = sorted({name.split(".")[-3] for name in result})
    rank = len(next(x for name, x in result.items() if ".lora_A." in name))
    about = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": lora.ALPHA, "inference_mode": True}
    about |= {"target_modules": layers, "fan_in_fan_out": not config.rope_theta, "base_model_name_or_path": None}
    (folder / "adapter_config.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
    save_file(result, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def read(source: str) -> tuple[GPT | ScalarModel, Encoding]:
    """Read a model of another project: its folder, its ckpt.pt, or its name on the hub."""
    folder = Path(source)
    ckpt = folder if folder.suffix == ".pt" else folder / "ckpt.pt"
    if (folder / "adapter_config.json").exists():
        raise InputError(f"{source}: an adapter; merge it into its model first (peft's merge_and_unload)")
    if (folder / "config.json").exists():
        return read_model(folder)
    if ckpt.exists():
        return read_nanogpt(ckpt)
    if folder.exists() or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", source):
        raise InputError(f"{source}: neither a folder with config.json, model.pt or ckpt.pt nor a name on the hub")
    return read_model(from_hub(source, "*.json", "*.jinja", "model*.safetensors"))


def convert(source: str, target: Path, adapter: bool = False) -> str:
    """Convert `source` to the other format: ours to Hugging Face or back. Returns a summary.

    With `adapter` only the adapters of a run with --lora; else they are merged.
    """
    folder, target = Path(source), Path(target).absolute()
    if not importlib.util.find_spec("safetensors"):
        raise InputError("Hugging Face folders need safetensors: pip install safetensors")
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        if target == Path.cwd() or target.exists() and not (target.is_dir() and not any(target.iterdir())):
            raise InputError(f"{target}: exists already; name a new folder, so that no file is lost")
        temporary.mkdir(parents=True)  # before any work: a folder that cannot be written is found at once
        # model.pt first, for a run folder has a config.json too
        if (folder / "model.pt").exists() or folder.suffix == ".pt" and not folder.name.startswith("ckpt"):
            model, encoding = nets.load(folder)
            if adapter:
                write_adapter(folder if folder.suffix == ".pt" else folder / "model.pt", temporary)
            else:
                write_model(model, encoding, temporary)
        else:
            model, encoding = read(source)
            nets.save_model(model, encoding, temporary / "model.pt")
        temporary.replace(target)  # an empty folder gives way
    except OSError as error:
        raise cannot_write(target, error) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    n = sum(p.numel() for p in model.parameters())
    n = f"the adapters of {n:,}" if adapter else f"{n:,}"
    return f"{source} → {target}: {n} parameters, {model.config.vocab_size:,} tokens of vocabulary"


def main() -> None:
    if {"-h", "--help"} & set(sys.argv):
        print(f"usage: python -m tools.hf FROM TO\n\n{__doc__}")
        return
    names = [word for word in sys.argv[1:] if word != "--adapter"]
    if len(names) != 2:
        raise InputError("give two names, FROM and TO; --help says what they may be")
    print(convert(names[0], Path(names[1]), "--adapter" in sys.argv))


if __name__ == "__main__":
    cli.run_main(main, "tools.hf")
