"""Convert checkpoints of other projects to ours and back.

    python -m tools.hf gpt2 out/gpt2         download GPT-2 (gpt2-medium, gpt2-large, gpt2-xl) into a run folder
    python -m tools.hf FOLDER out/NAME       a Hugging Face folder → a run folder that every stage's --init takes
    python -m tools.hf out/ppo FOLDER        a run folder → a Hugging Face folder for AutoModel and AutoTokenizer

The supported models are GPT-2, Llama 3 to 3.3, SmolLM 2, Qwen 2 and 3, Mistral without sliding windows, and SmolLM 3,
as language models or as sequence classifiers with one label (reward models). The supported tokenizers are byte-level
BPE. An error names anything else. Weights become float32. The chat template comes along.
"""

import argparse
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import tiktoken
import torch
from torch import Tensor

import common
from data.chat import template_of, with_template
from data.files import InputError, cannot_write, read_json
from data.tokenizer import gpt2_encoding
from model import GPT, GPTConfig, ScalarModel
from tools.get.download import download_from_hub
from tools.hf_tokenizer import eos_ids, fill_gaps, read_template, read_tokenizer, tokenizer_json

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path(os.path.expanduser("~/.cache"))) / "plainrlhf"
PUBLISHED = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")

# What model.py computes. If config.json has one of these keys, it needs one of these values; if it lacks the key, the
# first of them has to be what transformers takes then.
REQUIRED = {
    "gpt2": {
        "activation_function": ["gelu_new", "gelu_pytorch_tanh"], "scale_attn_weights": [True],
        "scale_attn_by_inverse_layer_idx": [False], "add_cross_attention": [False],
    },
    "llama": {"hidden_act": ["silu"], "attention_bias": [False], "mlp_bias": [False]},
    "mistral": {"hidden_act": ["silu"], "sliding_window": [None]},
    "qwen2": {"hidden_act": ["silu"], "use_sliding_window": [False]},
    "qwen3": {"hidden_act": ["silu"], "use_sliding_window": [False], "attention_bias": [False]},
    "smollm3": {
        "hidden_act": ["silu"], "use_sliding_window": [False], "attention_bias": [False], "mlp_bias": [False],
    },
}  # fmt: skip
NAMES = {"gpt2": "GPT2", "llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
NAMES |= {"smollm3": "SmolLM3"}
CLASSES = {  # the class of a language model and of a reward model
    kind: (f"{name}{'LMHeadModel' if kind == 'gpt2' else 'ForCausalLM'}", f"{name}ForSequenceClassification")
    for kind, name in NAMES.items()
}


def needs(package: str):
    """Import an optional package. Raises InputError with the install command if it is missing."""
    try:
        return __import__(package, fromlist=["_"])
    except ImportError:
        raise InputError(f"Hugging Face folders need {package.split('.')[0]}: pip install safetensors") from None


# --- names: their tensors for each of our tensors ---------------------------------------------------------------------


def tensors(config: GPTConfig, scalar: bool) -> Iterator[tuple[str, list[str], bool]]:
    """Yield (our name, their names, whether theirs are transposed) for every weight. Several are concatenated in order.

    GPT-2 stores its linear layers as (in, out). The head of a reward model is called `score` and has no bias.
    """
    llama = bool(config.rope_theta)
    base, layers = ("model.", "model.layers") if llama else ("transformer.", "transformer.h")
    yield "wte.weight", [f"{base}{'embed_tokens' if llama else 'wte'}.weight"], False
    if not llama:
        yield "wpe.weight", [f"{base}wpe.weight"], False
    names = {
        "ln_1": ["input_layernorm"], "attn.c_attn": [f"self_attn.{x}_proj" for x in "qkv"],
        "attn.c_proj": ["self_attn.o_proj"], "attn.q_norm": ["self_attn.q_norm"], "attn.k_norm": ["self_attn.k_norm"],
        "ln_2": ["post_attention_layernorm"],
        "mlp.c_fc": ["mlp.gate_proj", "mlp.up_proj"], "mlp.c_proj": ["mlp.down_proj"],
    }  # fmt: skip
    for i in range(config.n_layer):
        for ours, theirs in names.items():
            if "k_norm" in ours or "q_norm" in ours:
                if config.qk_norm:
                    yield f"h.{i}.{ours}.weight", [f"{layers}.{i}.{theirs[0]}.weight"], False
                continue
            biased = not config.rms_norm if "ln" in ours else config.qkv_bias if "c_attn" in ours else config.bias
            for kind in ["weight", "bias"] if biased else ["weight"]:
                full = [f"{layers}.{i}.{name}.{kind}" for name in (theirs if llama else [ours])]
                yield f"h.{i}.{ours}.{kind}", full, not llama and "ln" not in ours and kind == "weight"
    for kind in ["weight"] if config.rms_norm else ["weight", "bias"]:
        yield f"ln_f.{kind}", [f"{base}{'norm' if llama else 'ln_f'}.{kind}"], False
    if scalar:
        yield "head.weight", ["score.weight"], False
    elif not config.tied:
        yield "lm_head.weight", ["lm_head.weight"], False


# --- config.json ------------------------------------------------------------------------------------------------------


def read_config(path: Path) -> tuple[GPTConfig, bool]:
    """Return our config for a config.json, and whether the model is a sequence classifier. `eos` stays 0."""
    return our_config(read_json(path), path)


def our_config(c: dict, path: Path) -> tuple[GPTConfig, bool]:
    kind, architecture = c.get("model_type"), (c.get("architectures") or ["an unnamed architecture"])[0]
    if architecture not in CLASSES.get(kind, ()):
        known = ", ".join(name for names in CLASSES.values() for name in names)
        raise InputError(f"{path}: {architecture} ({kind}) is not supported; supported are {known}")
    scalar = architecture == CLASSES[kind][1]
    if kind == "mistral":
        c = {"sliding_window": 4096} | c  # what transformers takes
    for name, allowed in REQUIRED[kind].items():
        if c.get(name, allowed[0]) not in allowed:
            raise InputError(f"{path}: {name} {json.dumps(c[name])} is not supported, only {json.dumps(allowed[0])} is")
    if any(each != "full_attention" for each in c.get("layer_types") or []):
        raise InputError(f"{path}: layer_types other than full_attention are not supported")
    if scalar and (len(c["id2label"]) if "id2label" in c else c.get("num_labels", 2)) != 1:
        raise InputError(f"{path}: a classifier with several labels is not a reward model; give one with one label")
    if kind == "gpt2":
        return GPTConfig(
            c["vocab_size"], c["n_positions"], c["n_layer"], c["n_head"], c["n_embd"], eos=0,
            n_inner=c.get("n_inner") or 0, norm_eps=c["layer_norm_epsilon"], tied=c.get("tie_word_embeddings", True),
        ), scalar  # fmt: skip
    rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
    heads, width, layers = c["num_attention_heads"], c["hidden_size"], c["num_hidden_layers"]
    default = 128 if kind == "qwen3" else width // heads
    head_dim = c.get("head_dim") or default
    return GPTConfig(
        c["vocab_size"], c["max_position_embeddings"], layers, heads, width, eos=0,
        n_kv_head=c.get("num_key_value_heads") or heads, n_inner=c["intermediate_size"], swiglu=True, bias=False,
        qkv_bias=kind == "qwen2", rms_norm=True, norm_eps=c["rms_norm_eps"],
        rope_theta=float(rope.get("rope_theta") or c.get("rope_theta") or 10000.0),
        tied=c.get("tie_word_embeddings", False), head_dim=head_dim if head_dim * heads != width else 0,
        qk_norm=kind == "qwen3", rope_llama3=rope_llama3(rope, path),
        no_rope=layers_without_rope(c, layers) if kind == "smollm3" else (),
    ), scalar  # fmt: skip


ROPE_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def rope_llama3(rope: dict, path: Path) -> tuple[float, ...]:
    form = rope.get("rope_type", rope.get("type", "default"))
    if form not in ("default", "llama3"):
        raise InputError(
            f'{path}: rotary positions of type "{form}" are not supported, only "default" and "llama3" ones are'
        )
    return tuple(float(rope[name]) for name in ROPE_LLAMA3) if form == "llama3" else ()


def layers_without_rope(c: dict, layers: int) -> tuple[int, ...]:
    """Return the layers that SmolLM 3's config names: a 0 for each, or every `no_rope_layer_interval`-th."""
    every = c.get("no_rope_layer_interval", 4)
    uses = c.get("no_rope_layers") or [int((i + 1) % every != 0) for i in range(layers)]
    return tuple(i for i in range(layers) if not uses[i])


def config_json(config: GPTConfig, scalar: bool) -> dict:
    """Return a config.json for our config; the inverse of `read_config`.

    Raises InputError if a field of the config has no place in their format, such as the activation of a fork.
    """
    kind = "llama" if config.rope_theta else "gpt2"
    kind = "qwen2" if config.qkv_bias and kind == "llama" else kind
    kind = "smollm3" if config.no_rope else "qwen3" if config.qk_norm else kind
    stops = list(config.ends) if config.stops else config.eos
    c = {
        "architectures": [CLASSES[kind][scalar]], "model_type": kind, "dtype": "float32",
        "vocab_size": config.vocab_size, "bos_token_id": (*config.bos, config.eos)[0], "eos_token_id": stops,
        "tie_word_embeddings": config.tied,
    }  # fmt: skip
    if scalar:
        c |= {"id2label": {"0": "score"}, "label2id": {"score": 0}}
    if kind == "gpt2":
        c |= {
            "n_positions": config.block_size, "n_layer": config.n_layer, "n_head": config.n_head,
            "n_embd": config.n_embd, "n_inner": config.n_inner or None, "activation_function": "gelu_new",
            "layer_norm_epsilon": config.norm_eps,
            "resid_pdrop": config.dropout, "embd_pdrop": config.dropout, "attn_pdrop": config.dropout,
        }  # fmt: skip
    else:
        rope = {"rope_type": "llama3" if config.rope_llama3 else "default", "rope_theta": config.rope_theta}
        rope |= dict(zip(ROPE_LLAMA3, config.rope_llama3))
        if config.rope_llama3:
            rope[ROPE_LLAMA3[3]] = int(config.rope_llama3[3])
        c |= {
            "max_position_embeddings": config.block_size, "num_hidden_layers": config.n_layer,
            "num_attention_heads": config.n_head, "num_key_value_heads": config.n_kv_head or config.n_head,
            "hidden_size": config.n_embd, "intermediate_size": config.n_inner or 4 * config.n_embd,
            "hidden_act": "silu", "rms_norm_eps": config.norm_eps, "rope_theta": config.rope_theta,
            "rope_parameters": rope, "head_dim": config.head_size,
        }  # fmt: skip
    if kind == "smollm3":
        c["no_rope_layers"] = [int(i not in config.no_rope) for i in range(config.n_layer)]
        c["pad_token_id"] = None
    read, _ = our_config(c, Path("config.json"))
    same = replace(
        config,
        eos=0,
        stops=(),
        bos=(),
        dropout=0.0,
        n_kv_head=read.n_kv_head,
        n_inner=read.n_inner,
        head_dim=read.head_dim,
    )
    for name, value in vars(same).items():
        if value != getattr(read, name):
            raise InputError(f"{name} {value!r} has no place in {kind}'s config.json; nothing was written")
    return c


# --- read -------------------------------------------------------------------------------------------------------------


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Read all tensors of model.safetensors or, if it is missing, pytorch_model.bin, in one file or in shards."""
    whole = [folder / name for name in ("model.safetensors", "pytorch_model.bin")]
    paths = [next((path for path in whole if path.exists()), whole[0])]
    indices = [Path(f"{path}.index.json") for path in whole]
    if not paths[0].exists() and (index := next((path for path in indices if path.exists()), None)):
        paths = [folder / name for name in sorted(set(read_json(index)["weight_map"].values()))]
    found: dict[str, Tensor] = {}
    for path in paths:
        if not path.exists():
            raise InputError(f"{path}: is not there; give a complete Hugging Face folder")
        try:
            if path.suffix == ".bin":
                found |= torch.load(path, map_location="cpu", weights_only=True)
            else:
                found |= needs("safetensors.torch").load_file(path)
        except InputError:
            raise
        except Exception as error:  # both loaders raise many kinds of errors
            raise InputError(f"{path}: cannot be read ({type(error).__name__}: {error}); fetch it again") from None
    return found


def read_model(folder: Path) -> tuple[GPT | ScalarModel, tiktoken.Encoding]:
    """Read a Hugging Face folder. Returns our model in float32 and its tokenizer."""
    try:
        encoding = read_tokenizer(folder / "tokenizer.json")
        config, scalar = read_config(folder / "config.json")
        config.eos, config.stops = eos_ids(folder, encoding)
        bos = read_json(folder / "config.json").get("bos_token_id")
        config.bos = (bos,) if isinstance(bos, int) and bos != config.eos else ()
        model = load(config, scalar, read_tensors(folder), str(folder))
        if scalar:
            model.bias.fill_(read_json(folder / "config.json").get("score_bias", 0.0))
        return model, with_template(fill_gaps(encoding, config.vocab_size, folder), read_template(folder))
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        what = f"{type(error).__name__}: {error}"
        raise InputError(
            f"{folder}: config.json or tokenizer.json is not as expected ({what}); fetch it again"
        ) from None


def load(config: GPTConfig, scalar: bool, found: dict[str, Tensor], source: str) -> GPT | ScalarModel:
    """Build a model from their tensors `found`. Raises InputError if one is missing, unknown or misshapen."""
    found = {re.sub(r"^(transformer|model)\.", "", name): x for name, x in found.items()}
    state = {}
    for ours, theirs, transposed in tensors(config, scalar):
        parts = []
        for name in theirs:
            name = re.sub(r"^(transformer|model)\.", "", name)
            if name not in found:
                raise InputError(f"{source}: has no tensor {name}; give a complete checkpoint")
            part = found.pop(name).float()
            parts.append(part.T if transposed else part)
        state[ours] = torch.cat(parts).contiguous()
    if config.tied and not torch.equal(found.pop("lm_head.weight", state["wte.weight"]).float(), state["wte.weight"]):
        raise InputError(f"{source}: ties lm_head.weight to the embedding but holds another; set tie_word_embeddings")
    buffers = re.compile(r"attn\.(masked_)?bias$|rotary_emb\.inv_freq$")
    if rest := [name for name in found if not buffers.search(name)]:
        raise InputError(f"{source}: holds {rest[0]}, which no supported architecture has; nothing was written")
    with torch.device("meta"):
        model = GPT(replace(config, tied=config.tied or scalar))
    with torch.no_grad():
        shapes = {name: p.shape for name, p in model.named_parameters()} | {"head.weight": (1, config.n_embd)}
        for name, x in state.items():
            if x.shape != shapes[name]:
                raise InputError(
                    f"{source}: {name} is of shape {tuple(x.shape)}, but config.json requires {tuple(shapes[name])}"
                )
        model.load_state_dict({n: x for n, x in state.items() if n != "head.weight"}, assign=True)
        if scalar:
            model = ScalarModel(model)
            model.head.weight.copy_(state["head.weight"])
    return model.eval()


def published(name: str) -> tuple[GPT, tiktoken.Encoding]:
    """Return OpenAI's GPT-2. Downloads Hugging Face's copy once and keeps it in a cache."""
    folder, encoding = CACHE / name, gpt2_encoding()
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "config.json").exists():
        download_from_hub(f"openai-community/{name}", "config.json", folder / "config.json")
    if not (folder / "model.safetensors").exists():
        download_from_hub(f"openai-community/{name}", "model.safetensors", folder / "model.safetensors")
    config, _ = read_config(folder / "config.json")
    config.eos = encoding.eot_token
    return load(config, False, read_tensors(folder), name), encoding


# --- write ------------------------------------------------------------------------------------------------------------


def write_model(model: GPT | ScalarModel, encoding: tiktoken.Encoding, folder: Path) -> None:
    """Write a Hugging Face folder: config.json, model.safetensors, tokenizer.json, tokenizer_config.json.

    A classifier in transformers has no output bias. GPT-2's final norm has a bias, which absorbs our constant. RMSNorm
    has none, so the exported score is ours minus `score_bias` in config.json; this changes no comparison. The
    classifier finds padding by its id, so the pad token must not be EOS: it is another special token, if one exists.
    """
    save_file, scalar, config = needs("safetensors.torch").save_file, isinstance(model, ScalarModel), model.config
    c = config_json(config, scalar)
    state = {name.removeprefix("trunk."): x for name, x in model.state_dict().items()}
    if scalar:
        weight, constant = model.gain * model.head.weight, model.gain * model.head.bias + model.bias
        state["head.weight"] = weight
        if config.rms_norm:
            c["score_bias"] = constant.item()
        else:
            state["ln_f.bias"] = state["ln_f.bias"] + weight[0] * constant / weight.square().sum()
    result = {}
    n_q, n_kv = (heads * config.head_size for heads in (config.n_head, config.n_kv_head or config.n_head))
    for ours, theirs, transposed in tensors(config, scalar):
        x = state[ours]
        sizes = [len(x)] if len(theirs) == 1 else [len(x) // 2] * 2
        if len(theirs) == 3:
            sizes = [n_q, n_kv, n_kv]
        for name, part in zip(theirs, x.split(sizes)):
            result[name] = (part.T if transposed else part).detach().cpu().clone(memory_format=torch.contiguous_format)
    names = {i: name for name, i in encoding._special_tokens.items()}
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config.block_size}
    about |= {"clean_up_tokenization_spaces": False, "eos_token": names[config.eos]}
    if config.bos and config.bos[0] in names:
        about["bos_token"] = names[config.bos[0]]
    pad = next((i for i in sorted(names, reverse=True) if i != config.eos), None)
    if scalar and pad is not None:  # a language model needs none; transformers would not train the pad's embedding
        c["pad_token_id"], about["pad_token"] = pad, names[pad]
    chat = template_of(encoding)
    if chat:
        (folder / "chat_template.jinja").write_text(chat["template"], encoding="utf-8")
    about |= {name: token for name, token in chat.items() if name not in ("template", "eos_token")}
    tokenizer = tokenizer_json(encoding)
    files = {"config": c, "tokenizer": tokenizer, "tokenizer_config": about}
    if not scalar:
        files["generation_config"] = {"eos_token_id": c["eos_token_id"], "do_sample": True, "top_k": 0}
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
    save_file(result, folder / "model.safetensors", metadata={"format": "pt"})
    if scalar and config.rms_norm:
        print(f"the exported scores are ours minus {c['score_bias']:.4f} (score_bias in config.json)")


def convert(source: str, target: Path) -> str:
    """Convert `source` to the other format: ours to Hugging Face or back. Returns a summary."""
    folder, target = Path(source), Path(target).absolute()
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        if target.exists() and not (target.is_dir() and not any(target.iterdir())):
            raise InputError(f"{target}: exists already; name a new folder, so that no file is lost")
        if target == Path.cwd():
            raise InputError(f"{target}: is the current folder; name a new one")
        temporary.mkdir(parents=True)  # before any work: a folder that cannot be written is found at once
        if (folder / "model.pt").exists() or folder.suffix == ".pt":  # first, for a run folder has a config.json too
            model, encoding = common.load(folder)
            write_model(model, encoding, temporary)
        elif source in PUBLISHED and not folder.exists() or (folder / "config.json").exists():
            model, encoding = read_model(folder) if folder.exists() else published(source)
            common.save_model(model, encoding, temporary / "model.pt")
        else:
            raise InputError(
                f"{source}: neither {', '.join(PUBLISHED)} nor a folder with config.json (theirs) or model.pt (ours)"
            )
        if target.exists():
            target.rmdir()
        temporary.rename(target)
    except OSError as error:
        raise cannot_write(target, error) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    n = sum(p.numel() for p in model.parameters())
    return f"{source} → {target}: {n:,} parameters, {model.config.vocab_size:,} tokens of vocabulary"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "source", metavar="FROM", help="gpt2[-medium, -large, -xl], a Hugging Face folder or a run folder"
    )
    parser.add_argument(
        "target", metavar="TO", type=Path, help="the folder to write: a run folder, or a Hugging Face one"
    )
    options = parser.parse_args()
    try:
        print(convert(options.source, options.target))
    except InputError as error:
        print(f"tools.hf: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
