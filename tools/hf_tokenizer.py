"""Read and write Hugging Face's tokenizer.json: a byte-level BPE as a tiktoken.Encoding."""

import json
from pathlib import Path

import regex  # tiktoken's own dependency
import tiktoken

from data.files import InputError, read_json
from data.tokenizer import SPLIT, check_tokens, plain_tokens, with_plain_tokens

# A byte-level vocabulary writes a printable byte as itself, and any other byte as the next character from U+0100 on.
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = [b for b in range(256) if b not in _PRINTABLE]
CHARACTER = {b: chr(b) for b in _PRINTABLE} | {b: chr(256 + i) for i, b in enumerate(_OTHERS)}
BYTE = {character: byte for byte, character in CHARACTER.items()}


def read_tokenizer(path: Path) -> tiktoken.Encoding:
    """Read a byte-level BPE from a tokenizer.json. Its added tokens become special tokens. Those that
    the file does not call special are read in every text, others only in prompts.

    tiktoken merges in the order of the ids, so the file must list its merges in that order. Byte-level vocabularies
    do. Raises InputError with the name of a tokenizer, pre-tokenizer or added token that tiktoken cannot express.
    """
    if not path.exists():
        raise InputError(f"{path}: is not there; save a fast tokenizer in this folder")
    spec = read_json(path)
    spec["model"].setdefault("type", "BPE" if "merges" in spec["model"] else "unnamed")  # GPT-2's file names no type
    model, added = spec["model"], {token["content"]: token for token in spec.get("added_tokens", [])}
    vocab = {token: i for token, i in model["vocab"].items() if token not in added} if model["type"] == "BPE" else {}
    if not vocab or model.get("byte_fallback") or not BYTE.keys() >= set("".join(vocab)):
        raise InputError(f"{path}: a tokenizer of type {model['type']} is not supported unless it is a byte-level BPE")
    for field in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "unk_token"):
        if model.get(field):
            raise InputError(f"{path}: {field} {model[field]!r} of the BPE is not supported, only none is")
    ranks = {bytes(BYTE[character] for character in token): i for token, i in vocab.items()}
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    order = [vocab.get(a + b, -1) for a, b in merges]
    if -1 in order or order != sorted(order):
        raise InputError(f"{path}: a vocabulary whose ids are not in the order of its merges is not supported")
    unmerged = [token for token, i in vocab.items() if len(token) > 1 and i not in set(order)]
    if unmerged and not model.get("ignore_merges"):  # tiktoken encodes a word as its token without any merge
        raise InputError(f"{path}: the token {unmerged[0]} that no merge makes is not supported without ignore_merges")
    if (normalizer := (spec.get("normalizer") or {}).get("type")) not in (None, "NFC"):
        raise InputError(f"{path}: normalizer {normalizer} is not supported; remove it, or give another tokenizer")
    for name, token in added.items():
        if token.get("lstrip") or token.get("rstrip") or token.get("single_word"):
            raise InputError(f"{path}: added token {name} with lstrip, rstrip or single_word is not supported")
    pattern = split_pattern(spec["pre_tokenizer"], lacking(ranks, path), path)
    if normalizer:
        print(f"{path}: normalizer NFC is ignored; transformers gives other tokens for a text that is not in NFC")
    if '"SpecialToken"' in json.dumps(spec.get("post_processor")):
        print(f"{path}: transformers adds tokens to every text, this project does not; write them into your prompts")
    special = {name: token["id"] for name, token in added.items()}
    try:
        check_tokens(ranks, special)
    except ValueError as error:
        raise InputError(f"{path}: {error}; save the tokenizer again") from None
    plain = [name for name, token in added.items() if not token.get("special", True)]
    encoding = tiktoken.Encoding("bpe", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    return with_plain_tokens(encoding, plain)


def lacking(ranks: dict[bytes, int], path: Path) -> list[tuple[str, str]]:
    """Return ranges (first, last) of characters without bytes in a vocabulary: control ones, unassigned planes."""
    ranges = []
    for byte in (b for b in range(256) if bytes([b]) not in ranks):
        if byte < 128 and not regex.match(r"[\s\p{L}\p{N}]", chr(byte)):
            ranges.append((chr(byte), chr(byte)))
        elif 0xF1 <= byte <= 0xF3:  # the first byte of the characters of four planes
            ranges.append((chr((byte & 7) << 18), chr((byte & 7) << 18 | 0x3FFFF)))
        elif byte not in (0xC0, 0xC1, *range(0xF5, 256)):  # these bytes occur in no UTF-8 text
            raise InputError(f"{path}: a vocabulary without byte {byte:#x} is not supported")
    return ranges


def split_pattern(pre_tokenizer: dict | None, lacks: list[tuple[str, str]], path: Path) -> str:
    """Return the pattern whose matches are the words for BPE. No word holds a character of `lacks`.

    It supports GPT-2's own pattern, GPT-2's pattern after a step that separates every digit, and a Split by any
    pattern. tiktoken drops characters that the vocabulary lacks. transformers does too, and joins the text around them.
    """
    steps = pre_tokenizer or {"type": "none"}
    *prefix, last = steps["pretokenizers"] if steps["type"] == "Sequence" else [steps]
    split = {"behavior": "Isolated", "invert": False} | (prefix[0] if prefix else {})
    if last["type"] == "ByteLevel" and not last["add_prefix_space"]:
        if last.get("use_regex", True) and prefix in ([], [{"type": "Digits", "individual_digits": True}]):
            pattern = SPLIT
            if prefix:
                pattern = pattern.replace(r" ?\p{N}+", r"\p{N}").replace(r"|\s+(?!\S)", r"|\s+(?=\p{N})|\s+(?!\S)")
            unknown = "".join(f"{regex.escape(a)}-{regex.escape(z)}" for a, z in lacks)
            return pattern.replace(r"[^\s\p{L}\p{N}]", rf"[^\s\p{{L}}\p{{N}}{unknown}]")
        if split["type"] == "Split" and split["behavior"] == "Isolated" and not split["invert"] and len(prefix) == 1:
            pattern = split["pattern"].get("Regex", "")
            if pattern and not last.get("use_regex", True) and not any(regex.search(pattern, a) for a, _ in lacks):
                return pattern
    raise InputError(
        f"{path}: pre-tokenizer {' + '.join(step['type'] for step in [*prefix, last])}, with its options, is not "
        "supported; ByteLevel, Digits + ByteLevel and Split + ByteLevel are"
    )


def merges_of(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Return the merges of a vocabulary. The earlier merges reduce a token to two parts, which are its own merge.

    A token that keeps more parts has no merge. It matches only a whole word, here and in tokenizers with ignore_merges.
    """
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            best = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], rank))
            if ranks.get(parts[best] + parts[best + 1], rank) >= rank:
                break
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
    return merges


def tokenizer_json(encoding: tiktoken.Encoding) -> dict:
    """Return a tokenizer.json for an encoding; the inverse of `read_tokenizer`."""
    ranks = encoding._mergeable_ranks
    text = lambda token: "".join(CHARACTER[b] for b in token)  # noqa: E731
    flags = dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized"], False)
    plain = plain_tokens(encoding)
    special = sorted(encoding._special_tokens.items(), key=lambda item: item[1])
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": encoding._pat_str}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": i, "content": name, "special": name not in plain} | flags for name, i in special],
        "normalizer": None, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
        "post_processor": None, "decoder": level | {"use_regex": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
            "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False, "ignore_merges": True,
            "vocab": {text(token): i for token, i in ranks.items()} | encoding._special_tokens,
            "merges": [[text(a), text(b)] for a, b in merges_of(ranks)],
        },
    }  # fmt: skip


def read_template(folder: Path) -> dict[str, str]:
    """Return the chat template of a folder and the names of its special tokens for `data.chat`, or {}."""
    config = read_json(path) if (path := folder / "tokenizer_config.json").exists() else {}
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = next((each.get("template") for each in template if each.get("name") == "default"), None)
    if (path := folder / "chat_template.jinja").exists():
        template = path.read_text(encoding="utf-8")
    if not isinstance(template, str):
        return {}
    found = {"template": template}
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        token = config.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            found[name] = token
    return found


def eos_ids(folder: Path, encoding: tiktoken.Encoding) -> tuple[int, tuple[int, ...]]:
    """Return the id of EOS, and the other ids that end a generation.

    EOS is eos_token in tokenizer_config.json, else the first eos_token_id of generation_config.json or config.json.
    The others are the rest of these lists.
    """
    name, ids = None, []
    if (path := folder / "tokenizer_config.json").exists():
        name = read_json(path).get("eos_token")
        name = name.get("content") if isinstance(name, dict) else name
    for file in ("generation_config.json", "config.json"):
        if (folder / file).exists() and (found := read_json(folder / file).get("eos_token_id")) is not None:
            ids += found if isinstance(found, list) else [found]
    if name in encoding._special_tokens:
        ids = [encoding._special_tokens[name], *ids]
    if not ids:
        raise InputError(
            f"{folder}: neither tokenizer_config.json nor config.json names an EOS token; add eos_token_id"
        )
    for i in ids:
        if i not in encoding._special_tokens.values():
            raise InputError(f"{folder}: eos_token_id {i} is no special token of tokenizer.json; fix one of the two")
    return ids[0], tuple(dict.fromkeys(i for i in ids if i != ids[0]))


def fill_gaps(encoding: tiktoken.Encoding, vocab_size: int, folder: Path) -> tiktoken.Encoding:
    """Add a special token for each id that has an embedding row in the model but no name in the tokenizer."""
    used = set(encoding._mergeable_ranks.values()) | set(encoding._special_tokens.values())
    if max(used) >= vocab_size:
        raise InputError(f"{folder}: the tokenizer has ids up to {max(used)}, but the model has only {vocab_size} rows")
    names = {f"<|unused_{i}|>": i for i in range(vocab_size) if i not in used}
    filled = tiktoken.Encoding(
        encoding.name, pat_str=encoding._pat_str, mergeable_ranks=encoding._mergeable_ranks,
        special_tokens=encoding._special_tokens | names,
    )  # fmt: skip
    return with_plain_tokens(filled, plain_tokens(encoding))
