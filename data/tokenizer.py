"""The tokenizer is always a tiktoken.Encoding: GPT-2's, or a byte-level BPE that this file learns."""

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable
from contextlib import suppress

import regex  # tiktoken's own dependency
import tiktoken

from data import chat
from data.chat import Messages, pattern, plain_tokens, template_of, with_plain_tokens, with_template
from data.files import InputError

SPLIT = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""  # GPT-2's words
EOS_TEXT = "<|endoftext|>"
PIECE = 2**17  # characters that are encoded at once


def learn_bpe(texts: Iterable[str], vocab_size: int, limit: int = 50_000_000) -> tiktoken.Encoding:
    """Learn byte-level BPE (Sennrich et al. 2016; Radford et al. 2019, section 2.2) from the first `limit` characters.

    Ids 0…255 are the bytes. The merges follow, as long as a pair occurs twice; EOS is last.
    """
    if vocab_size < 257:
        raise InputError(f"--vocab_size {vocab_size}: 256 bytes and EOS need as many tokens; give 257 or more")
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(regex.findall(SPLIT, text[:limit]))
        limit -= len(text)
        if limit <= 0:
            break
    words = [(list(word.encode("utf-8", "replace")), count) for word, count in counts.items()]
    pairs: Counter[tuple[int, int]] = Counter()
    words_with: defaultdict[tuple[int, int], set[int]] = defaultdict(set)
    for i, (ids, count) in enumerate(words):
        for pair in zip(ids, ids[1:]):
            pairs[pair] += count
            words_with[pair].add(i)
    heap = [(-count, pair) for pair, count in pairs.items()]  # the most frequent pair first; the lowest ids break ties
    heapq.heapify(heap)
    tokens = [bytes([i]) for i in range(256)]
    while len(tokens) < vocab_size - 1 and heap:
        count, pair = heapq.heappop(heap)
        if -count != pairs[pair]:  # the count of this entry is out of date
            continue
        if -count < 2:
            break
        new = len(tokens)
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
        changed = set()
        for i in words_with.pop(pair):
            ids, count = words[i]
            merged = ids[:1]
            for token in ids[1:]:
                if (merged[-1], token) == pair:
                    merged[-1] = new
                else:
                    merged.append(token)
            words[i] = (merged, count)
            for old in zip(ids, ids[1:]):
                pairs[old] -= count
            for fresh in zip(merged, merged[1:]):
                pairs[fresh] += count
                words_with[fresh].add(i)
            changed.update(zip(ids, ids[1:]), zip(merged, merged[1:]))
        for each in changed:
            if pairs[each] > 0:
                heapq.heappush(heap, (-pairs[each], each))
    ranks = {token: i for i, token in enumerate(tokens)}
    return tiktoken.Encoding("bpe", pat_str=SPLIT, mergeable_ranks=ranks, special_tokens={EOS_TEXT: len(ranks)})


def gpt2_encoding() -> tiktoken.Encoding:
    """Return GPT-2's vocabulary of 50,257 tokens. tiktoken downloads it once; raises InputError if that fails."""
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:
        raise InputError(f"--vocab_size 0: GPT-2's vocabulary does not download ({error}); go online once") from error


def encoding_state(encoding: tiktoken.Encoding) -> dict:
    """Return the encoding as a plain dict for a checkpoint. Bytes are written as Latin-1 text."""
    return {
        "name": encoding.name,
        "pattern": encoding._pat_str,
        "ranks": {token.decode("latin-1"): rank for token, rank in encoding._mergeable_ranks.items()},
        "special": dict(encoding._special_tokens),
        "plain": sorted(plain_tokens(encoding)),
        "chat": template_of(encoding),
    }


def encoding_from_state(state: dict) -> tiktoken.Encoding:
    """Return the encoding that `encoding_state` described."""
    ranks = {token.encode("latin-1"): rank for token, rank in state["ranks"].items()}
    how = {"pat_str": state["pattern"], "mergeable_ranks": ranks, "special_tokens": state["special"]}
    encoding = tiktoken.Encoding(state["name"], **how)
    return with_template(with_plain_tokens(encoding, state.get("plain", ())), state.get("chat", {}))


def encode_prompt(encoding: tiktoken.Encoding, prompt: str | Messages, variables: dict | None = None) -> list[int]:
    """Encode a prompt: a text with special tokens, or a conversation, where only the template writes these.

    `variables` are the template's, such as "tools". Raises InputError if the template leaves out a part of a message.
    """
    if isinstance(prompt, str):
        spans = [match.span() for match in pattern(frozenset(encoding._special_tokens)).finditer(prompt)]
        return _encode_parts(encoding, prompt, spans)
    text, spans = chat.render_with_spans(encoding, prompt, variables)
    chat.refuse_what_is_left_out(encoding, text, prompt, variables)
    return _encode_parts(encoding, text, spans)


def encode_answer(
    encoding: tiktoken.Encoding, eos: int, before: Messages, answer: dict, variables: dict | None = None
) -> tuple[list[int], list[int]]:
    """Encode the message `answer` behind the prompt `before`: its ids with the end of the turn, and what follows.

    They are what the rendering of the whole has behind the rendering of the prompt, encoded apart from the prompt as
    sampling does. Where the template ends the turn with no token that ends a generation, `eos` takes its place.
    """
    template = template_of(encoding)
    ends = {name: i for name, i in encoding._special_tokens.items() if i in template.get("ends", [eos])}
    prompt = chat.render(encoding, before, variables)
    text, spans = chat.render_with_spans(encoding, [*before, answer], variables, prompt=False)
    found = [(first, last, ends[text[first:last]]) for first, last in spans if text[first:last] in ends]
    if not text.startswith(prompt):
        end = found[-1][2] if found else eos
        return encode_text(encoding, chat.continuation(prompt, answer)) + [end], []
    chat.refuse_what_is_left_out(encoding, text, [*before, answer], variables, prompt=False)
    start = len(prompt)
    for first, last, end in found:
        if first >= start:
            ids = _encode_parts(encoding, text, spans, start, first) + [end]
            return ids, _encode_parts(encoding, text, spans, last)
    stop = len(text.rstrip()) if template else len(text)
    if spans and spans[-1][1] == stop:
        stop = spans[-1][0]  # what ends the turn here ends no generation
    return _encode_parts(encoding, text, spans, start, max(start, stop)) + [eos], []


def turn_suffix(encoding: tiktoken.Encoding, eos: int) -> tuple[int, ...]:
    """Return what the chat template writes behind the end of an answer, such as a line break; () without a template.

    A published reward model of conversations is read there.
    """
    for said in ("yes", "<think>\nwell\n</think>\n\nyes") if template_of(encoding) else ():
        with suppress(InputError):  # the template wants a thought
            answer = {"role": "assistant", "content": said}
            return tuple(encode_answer(encoding, eos, [{"role": "user", "content": "hello"}], answer)[1])
    return ()


def _encode_parts(
    encoding: tiktoken.Encoding, text: str, spans: list[tuple[int, int]], start: int = 0, stop: int | None = None
) -> list[int]:
    """Encode text[start:stop]. The parts at `spans` are special tokens, and all between them is ordinary text."""
    ids: list[int] = []
    stop = len(text) if stop is None else stop
    for first, last in spans:
        if start <= first and last <= stop:
            ids += encode_text(encoding, text[start:first]) + [encoding._special_tokens[text[first:last]]]
            start = last
    return ids + encode_text(encoding, text[start:stop])


def encode_text(encoding: tiktoken.Encoding, text: str) -> list[int]:
    """Encode a completion or a document, where a special token's text is ordinary: no quotation teaches that token."""
    plain = plain_tokens(encoding)
    ids: list[int] = []
    for part in pattern(plain).split(text) if plain else [text]:
        ids += [encoding._special_tokens[part]] if part in plain else _ordinary(encoding, part)
    return ids


def _ordinary(encoding: tiktoken.Encoding, text: str) -> list[int]:
    """Encode in pieces, because tiktoken panics on a run of a million blanks. No word holds a single blank inside."""
    ids: list[int] = []
    start = 0
    while len(text) - start > PIECE:
        last = regex.search(r"(?r)(?<=\w) (?=\w)", text, pos=start + 1, endpos=start + PIECE)
        end = last.start() if last else start + PIECE
        ids += encoding.encode_ordinary(text[start:end])
        start = end
    return ids + encoding.encode_ordinary(text[start:])


def token_text(token: int, encoding: tiktoken.Encoding) -> str | list[int] | dict[str, str]:
    """Return a token for JSON: its text, its bytes if they are only a part of a character, or {"special": its name}."""
    raw = encoding.decode_single_token_bytes(token)
    if token in encoding._special_tokens.values():
        return {"special": raw.decode("utf-8", "replace")}
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return list(raw)
