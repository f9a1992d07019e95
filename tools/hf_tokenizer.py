"""Read and write Hugging Face's tokenizer.json: a byte-level BPE as an Encoding."""

import json
import re
from datetime import date
from pathlib import Path
from typing import Any

import regex  # tiktoken's own dependency
from tiktoken import Encoding

from data.chat import template_of, with_template
from data.files import InputError, read_object
from data.tokenizer import SPLIT, plain_tokens, with_plain_tokens

# A byte-level vocabulary writes a printable byte as itself, and any other byte as the next character from U+0100 on.
_OTHERS = [*range(33), *range(127, 161), 173]
CHARACTER = {b: chr(b) for b in range(256)} | {b: chr(256 + i) for i, b in enumerate(_OTHERS)}
# A character of each general category but surrogates, and a few more that patterns name.
KINDS = "aAǅʰ中1Ⅷ²_-()«»!+$^©' \u2028\u2029\0\u200d\ue000\u0378\u0301\u0903\u20dd\t\r\néЖ한😀𝟗"
THOUGHT = re.compile(r"</?think(ing)?>|\[/?THINK\]")  # an answer that spells one means it, special or not
BYTE = {character: byte for byte, character in CHARACTER.items()}


def require(path: Path, name: str, value: Any, allowed: list | tuple) -> None:
    """Raise InputError unless the value is one of those that this project computes."""
    if value not in allowed:
        supported = ", ".join(map(json.dumps, allowed))
        raise InputError(f"{path}: {name} {json.dumps(value)} is not supported; supported: {supported}")


def read_tokenizer(path: Path) -> Encoding:
    """Read a byte-level BPE from a tokenizer.json. Raises InputError with the name of what tiktoken cannot express.

    Its added tokens become special tokens; those that the file does not call special are read in every text. tiktoken
    merges in the order of the ids, so the file must list its merges in that order.
    """
    spec = read_object(path)
    model, added = spec["model"], {token["content"]: token for token in spec.get("added_tokens", [])}
    require(path, "tokenizer type", model.get("type", "BPE"), ["BPE"])  # GPT-2's file names no type
    for field in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        require(path, field, model.get(field) or None, [None])
    normalizers = steps(spec.get("normalizer"))
    for each in normalizers:
        require(path, "normalizer", each["type"], ["NFC"])
    for token, flag in ((token, flag) for token in added.values() for flag in ("lstrip", "rstrip", "single_word")):
        require(path, f"added token {token['content']} with {flag}", token.get(flag, False), [False])
    vocab = {token: i for token, i in model["vocab"].items() if token not in added}
    for token in added.keys() & model["vocab"].keys():  # tokenizers finds it before any merge, so no merge may need it
        require(path, f"added token {token} with the id", added[token]["id"], [model["vocab"][token]])
        if set(token) <= BYTE.keys() and (len(token) == 1 or not token.isascii()):  # a byte, or the bytes of another
            raise InputError(f"{path}: added token {token} is a word of the vocabulary too, which is not supported")
    if unknown := sorted(set("".join(vocab)) - BYTE.keys()):
        raise InputError(f"{path}: a vocabulary with {unknown[0]} is not supported; supported: byte-level BPE")
    ranks = {bytes(BYTE[character] for character in token): i for token, i in vocab.items()}
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    order = [vocab.get(a + b, -1) for a, b in merges if a + b not in added]
    if -1 in order or order != sorted(order):
        raise InputError(f"{path}: a vocabulary whose ids are not in the order of its merges is not supported")
    unmerged = {i for token, i in vocab.items() if len(token) > 1} - set(order)
    if unmerged and not model.get("ignore_merges"):  # tiktoken encodes a word as its token without any merge
        raise InputError(f"{path}: token {min(unmerged)}, which no merge makes, is not supported without ignore_merges")
    special = {name: token["id"] for name, token in added.items()}
    check_tokens(ranks, special)
    lacks = lacking(ranks, path)
    for field in ("byte_fallback", "unk_token") if lacks else ():  # what becomes of a byte that the vocabulary lacks
        require(path, field, model.get(field) or None, [None])
    pattern = split_pattern(spec["pre_tokenizer"] or {"type": "none"}, lacks, path)
    if normalizers:
        print(f"{path}: normalizer NFC is ignored; transformers gives other tokens for a text that is not in NFC")
    if '"SpecialToken"' in json.dumps(spec.get("post_processor")):
        print(f"{path}: transformers adds tokens to every text, this project does not; write them into your prompts")
    encoding = tried(pattern, ranks, special, lacks, path)
    return with_plain_tokens(encoding, [x for x in added if THOUGHT.fullmatch(x) or not added[x].get("special", True)])


def check_tokens(ranks: dict[bytes, int], special: dict[str, int]) -> None:
    """Raises ValueError if an id is no id, is that of two tokens, or a token is empty. tiktoken would panic."""
    ids = [*ranks.values(), *special.values()]
    if not all(type(i) is int and 0 <= i < 2**31 for i in ids) or len(set(ids)) < len(ids):
        raise ValueError("an id is not a whole number, or is that of two tokens")
    if "" in special or b"" in ranks:
        raise ValueError("a token is empty")


def steps(normalizer: dict | None) -> list[dict]:
    """Return the steps of a normalizer, without those that have options but none that is on."""
    if (normalizer or {}).get("type") == "Sequence":
        return [step for each in normalizer["normalizers"] for step in steps(each)]
    return [normalizer] if normalizer and (len(normalizer) == 1 or any([*normalizer.values()][1:])) else []


def tried(pattern: str, ranks: dict, special: dict, lacks: list, path: Path) -> Encoding:
    """Return the encoding. Raises InputError if tiktoken panics or drops a character, which the pattern leaves out."""
    known = [each for each in KINDS if not any(a <= each <= z for a, z in lacks)]
    try:
        encoding = Encoding("bpe", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
        pairs = [a + b for a in known for b in known]
        lost = [pair for pair in pairs if encoding.decode(encoding.encode_ordinary(pair)) != pair]
    except BaseException as error:  # a panic is no Exception
        raise InputError(f"{path}: tiktoken cannot use the pattern {pattern!r} ({error}); not supported") from None
    if lost:
        raise InputError(f"{path}: the pattern {pattern!r} leaves out a part of {lost[0]!r}; not supported")
    return encoding


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


def split_pattern(pre_tokenizer: dict, lacks: list[tuple[str, str]], path: Path) -> str:
    """Return the pattern whose matches are the words for BPE: GPT-2's, with or without single digits, or any Split's.

    No word holds a character of `lacks`: tiktoken drops these, as transformers does, which joins the text around them.
    """
    *first, last = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    if last["type"] == "ByteLevel" and not last["add_prefix_space"]:
        own_pattern = last.get("use_regex", True)
        if own_pattern and first in ([], [{"type": "Digits", "individual_digits": True}]):
            pattern = SPLIT
            if first:
                pattern = pattern.replace(r" ?\p{N}+", r"\p{N}").replace(r"|\s+(?!\S)", r"|\s+(?=\p{N})|\s+(?!\S)")
            unknown = "".join(f"{regex.escape(a)}-{regex.escape(z)}" for a, z in lacks)
            return pattern.replace(r"[^\s\p{L}\p{N}]", rf"[^\s\p{{L}}\p{{N}}{unknown}]")
        split = first[0] if len(first) == 1 else {"type": "none"}
        how = (split.get("behavior"), split.get("invert"))  # two ways where each character is in a match
        if not own_pattern and how in (("Isolated", False), ("Isolated", True), ("Removed", True)):
            pattern = split["pattern"].get("Regex", "")
            if pattern and not any(regex.search(pattern, a) for a, _ in lacks):
                return pattern
    names = [" ".join(f"{x[key]}" for key in ("type", "behavior", "invert") if key in x) for x in [*first, last]]
    raise InputError(
        f"{path}: pre-tokenizer {' + '.join(names)} is not supported; supported: (Digits or Split Isolated +) ByteLevel"
    )


def merges_of(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Return the merges of a vocabulary. The earlier merges reduce a token to two parts, which are its own merge.

    A token that keeps more parts has no merge. It matches only a whole word, here and in tokenizers with ignore_merges.
    """
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2 and min(found := [ranks.get(a + b, rank) for a, b in zip(parts, parts[1:])]) < rank:
            i = found.index(min(found))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
    return merges


def tokenizer_json(encoding: Encoding) -> dict:
    """Return a tokenizer.json for an encoding; the inverse of `read_tokenizer`."""
    ranks, special, plain = encoding._mergeable_ranks, encoding._special_tokens, plain_tokens(encoding)
    spelled = {token: "".join(CHARACTER[b] for b in token) for token in ranks}
    flags = dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized"], False)
    added = [{"id": special[name], "content": name, "special": name not in plain} | flags for name in special]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": encoding._pat_str}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None,
        "added_tokens": sorted(added, key=lambda token: token["id"]),
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]}, "decoder": level | {"use_regex": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
            "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False, "ignore_merges": True,
            "vocab": {spelled[token]: i for token, i in ranks.items()} | special,
            "merges": [[spelled[a], spelled[b]] for a, b in merges_of(ranks)],
        },
    }  # fmt: skip


def read_about(folder: Path) -> dict:
    """Return tokenizer_config.json, or {} without one. Some write a special token as a dict, here it is its text."""
    about = read_object(path) if (path := folder / "tokenizer_config.json").exists() else {}
    tokens = {name: value["content"] for name, value in about.items() if isinstance(value, dict) and "content" in value}
    return about | tokens


def read_template(folder: Path, about: dict) -> dict[str, str]:
    """Return the chat template of a folder and the names of its special tokens for `data.chat`, or {}."""
    template = about.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = {each["name"]: each["template"] for each in template}
    if (path := folder / "chat_template.jinja").exists():
        template = path.read_text(encoding="utf-8")
    elif isinstance(template, dict):
        if "default" not in template:
            raise InputError(f"{folder}: of the chat templates {', '.join(template)} none is the default; name one so")
        template = template["default"]
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    tokens = {name: about[name] for name in names if isinstance(about.get(name), str)}
    today = date.today().isoformat()  # for a template that asks for it
    return {"template": template, "date": today} | tokens if isinstance(template, str) else {}


def eos_ids(folder: Path, about: dict, encoding: Encoding) -> list[int]:
    """Return the ids that end a generation: eos_token's, if it is named, and then those called eos_token_id."""
    special = encoding._special_tokens
    ids = [special[about["eos_token"]]] if about.get("eos_token") in special else []
    for file in ("generation_config.json", "config.json"):
        found = read_object(folder / file).get("eos_token_id") if (folder / file).exists() else None
        ids += found if isinstance(found, list) else [] if found is None else [found]
    if not ids or not set(ids) <= set(special.values()):
        raise InputError(f"{folder}: eos_token_id {ids} must name special tokens of tokenizer.json; fix one of the two")
    return list(dict.fromkeys(ids))


def fill_gaps(encoding: Encoding, vocab_size: int, folder: Path, name: str = "<|unused_{}|>") -> Encoding:
    """Add a special token for each id that has an embedding row in the model but no name in the tokenizer."""
    ranks, special = encoding._mergeable_ranks, encoding._special_tokens
    used = {*ranks.values(), *special.values()}
    if max(used) >= vocab_size:
        raise InputError(f"{folder}: the tokenizer has ids up to {max(used)}, but the model has only {vocab_size} rows")
    special = special | {name.format(i): i for i in range(vocab_size) if i not in used}
    filled = Encoding(encoding.name, pat_str=encoding._pat_str, mergeable_ranks=ranks, special_tokens=special)
    return with_template(with_plain_tokens(filled, plain_tokens(encoding)), template_of(encoding))
