"""What comes in: files are read and checked here, turned into token ids, and batched.

    text to pretrain on   .txt (one document), or JSONL with "text" (a document a line)
    fine-tuning           JSONL "prompt", "completion"
    comparisons           JSONL "prompt", "chosen", "rejected"; or "prompt", "ranked" (a list, best first)
    prompts               JSONL "prompt"

A text is complete and gets EOS, unless the row says otherwise: "completion_ended", "chosen_ended", "rejected_ended"
(true or false) or "ranked_ended" (a list) mark a sample that the length limit cut. Further columns are ignored.
Nothing is stripped: the space between a prompt and its completion is part of one of the two. Special tokens count as
such in prompts alone.
"""

import base64
import gzip
import hashlib
import heapq
import http.client
import json
import os
import re
import sys
import time
import urllib.error
import urllib.request
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import regex  # tiktoken's own dependency
import tiktoken
import torch
from torch import Tensor

SPLIT = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""  # GPT-2's words
EOS_TEXT = "<|endoftext|>"
HUB = "https://huggingface.co"


class InputError(Exception):
    """Bad input. The message is one sentence that names the file, line or option and says what to do."""


# --- files --------------------------------------------------------------------------------------------------------


def _lines(path: str | Path) -> Iterator[tuple[int, str]]:
    try:
        with gzip.open(path) if Path(path).suffix == ".gz" else open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}; give a file that can be read") from None
    except (EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read as gzip ({error}); fetch it again") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}:{number}: not UTF-8; save the file as UTF-8") from None


def download(url: str, target: Path, checksum: str | None, tries: int = 3) -> None:
    """Fetch `url` into `target` with progress; `checksum` is "sha256:…" or "md5:…", None for what the server says.

    Raises InputError where it cannot be had whole; nothing is left at `target` then.
    """
    temporary = target.with_name(f"{target.name}.{os.getpid()}.part")
    kind, _, expected = (checksum or "md5:").partition(":")
    for attempt in range(tries):
        digest, done = hashlib.new(kind), 0
        try:
            with urllib.request.urlopen(url, timeout=60) as response, open(temporary, "wb") as file:
                size = int(response.headers.get("Content-Length") or 0)
                if checksum is None and (named := response.headers.get("Content-MD5")):
                    expected = base64.b64decode(named).hex()
                while chunk := response.read(2**20):
                    file.write(chunk)
                    digest.update(chunk)
                    done += len(chunk)
                    if sys.stderr.isatty():
                        print(f"\r{target.name}: {done / 1e6:.0f} of {size / 1e6:.0f} MB ", end="", file=sys.stderr)
            if size and done < size:
                problem = f"only {done:,} of {size:,} bytes came"
            elif expected and digest.hexdigest() != expected:
                problem = f"{done:,} bytes came with the wrong checksum"
            else:
                temporary.replace(target)
                return
        except (OSError, http.client.HTTPException) as error:
            problem = f"could not be downloaded ({error})"
            if isinstance(error, urllib.error.HTTPError) and error.code < 500:
                break
        finally:
            temporary.unlink(missing_ok=True)
        time.sleep(attempt < tries - 1)
    raise InputError(f"{url}: {problem}; try again later, or fetch it by other means")


def download_from_hub(repository: str, file: str, target: Path) -> None:
    """Fetch a file of a Hugging Face repository into `target`.

    The sha256 of a large one is in its Git LFS pointer, which the hub itself serves; the content comes from elsewhere.
    """
    url = f"{HUB}/{repository}/raw/main/{file}"
    pointer = target.with_name(f"{target.name}.{os.getpid()}.pointer")
    try:
        download(url, pointer, None)
        oid = re.search(r"^oid (sha256:[0-9a-f]{64})$", pointer.read_text(errors="replace"), re.MULTILINE)
    finally:
        pointer.unlink(missing_ok=True)
    if not oid and target.suffix != ".json":
        raise InputError(f"{url}: names no sha256; try again later, or fetch it by other means")
    download(f"{HUB}/{repository}/resolve/main/{file}", target, oid and oid[1])


def iterate_jsonl(path: str | Path, columns: dict[str, type], verdicts: bool = False) -> Iterator[dict]:
    """The rows of a JSONL file, each checked to have `columns` of the given types. Raises InputError with the line.

    Rows with a "verdict", the ties and skips of a label file, are left out unless `verdicts` asks for them.
    """
    empty = True
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}:{number}: not JSON ({error}); mend or remove the line") from None
        if not isinstance(row, dict):
            raise InputError(f"{path}:{number}: not a JSON object; each line must be {{…}}")
        if "verdict" in row and not verdicts:
            continue
        for column, kind in columns.items():
            if column not in row:
                raise InputError(f'{path}:{number}: no column "{column}"; a row needs {", ".join(columns)}')
            if not isinstance(row[column], kind):
                name = {str: "text", list: "list", dict: "JSON object"}.get(kind, "number")
                raise InputError(f'{path}:{number}: "{column}" is not a {name}; mend the line')
        empty = False
        yield row
    if empty:
        raise InputError(f"{path}: no rows; give a file with at least one")


def read_jsonl(path: str | Path, columns: dict[str, type], verdicts: bool = False) -> list[dict]:
    return list(iterate_jsonl(path, columns, verdicts))


def write_jsonl(path: str | Path, rows: Iterable[dict]) -> int:
    """Write JSONL under a temporary name and rename it into place. Returns the number of rows."""
    temporary, n = Path(f"{path}.{os.getpid()}.tmp"), 0
    temporary.parent.mkdir(parents=True, exist_ok=True)
    with open(temporary, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")
            n += 1
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    return n


def first_row(path: str | Path) -> dict:
    """The first row of a JSONL file, which tells what kind of data it is."""
    return next(iterate_jsonl(path, {}))


def suffix(path: str | Path) -> str:
    """.txt, .jsonl or another: what a file is, gzipped or not."""
    return Path(str(path).removesuffix(".gz")).suffix


def documents(path: str | Path) -> Iterator[str]:
    """The texts of a file, one at a time: a .txt is one document, handed over in pieces of whole lines."""
    if suffix(path) not in (".txt", ".jsonl"):
        raise InputError(f"{path}: neither .txt nor .jsonl; rename it to what it is")
    if suffix(path) == ".jsonl":
        columns = ["text"] if "text" in first_row(path) else ["prompt", "completion"]
        for row in iterate_jsonl(path, dict.fromkeys(columns, str)):
            yield "".join(row[column] for column in columns)
        return
    piece: list[str] = []
    size = 0
    for _, line in _lines(path):
        piece.append(line)
        size += len(line)
        if size > 2**20:
            yield "".join(piece)
            piece, size = [], 0
    if piece:
        yield "".join(piece)


# --- the tokenizer: always a tiktoken.Encoding ----------------------------------------------------------------------


def learn_bpe(texts: Iterable[str], vocab_size: int, limit: int = 50_000_000) -> tiktoken.Encoding:
    """Byte-level BPE (Sennrich et al. 2016; Radford et al. 2019, section 2.2) from the first `limit` characters.

    Ids 0…255 are the bytes, then come the merges in the order learned, then EOS. The vocabulary is smaller than
    `vocab_size` where no pair is left that occurs twice.
    """
    if vocab_size < 257:
        raise InputError(
            f"--vocab_size {vocab_size}: a byte-level vocabulary needs 256 bytes and EOS; give 257 or more"
        )
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(regex.findall(SPLIT, text[:limit]))
        limit -= len(text)
        if limit <= 0:
            break
    words = [(list(word.encode("utf-8", "replace")), count) for word, count in counts.items()]
    pairs: Counter[tuple[int, int]] = Counter()
    where: defaultdict[tuple[int, int], set[int]] = defaultdict(set)
    for i, (ids, count) in enumerate(words):
        for pair in zip(ids, ids[1:]):
            pairs[pair] += count
            where[pair].add(i)
    heap = [(-count, pair) for pair, count in pairs.items()]  # commonest first; equals by id, so that it is repeatable
    heapq.heapify(heap)
    tokens = [bytes([i]) for i in range(256)]
    while len(tokens) < vocab_size - 1 and heap:
        count, pair = heapq.heappop(heap)
        if -count != pairs[pair]:  # an old entry
            continue
        if -count < 2:
            break
        new = len(tokens)
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
        changed = set()
        for i in where.pop(pair):
            ids, count = words[i]
            merged, j = [], 0
            while j < len(ids):
                if j + 1 < len(ids) and (ids[j], ids[j + 1]) == pair:
                    merged.append(new)
                    j += 2
                else:
                    merged.append(ids[j])
                    j += 1
            for old in zip(ids, ids[1:]):
                pairs[old] -= count
                changed.add(old)
            for fresh in zip(merged, merged[1:]):
                pairs[fresh] += count
                where[fresh].add(i)
                changed.add(fresh)
            words[i] = (merged, count)
        for each in changed:
            if pairs[each] > 0:
                heapq.heappush(heap, (-pairs[each], each))
    ranks = {token: i for i, token in enumerate(tokens)}
    return tiktoken.Encoding("bpe", pat_str=SPLIT, mergeable_ranks=ranks, special_tokens={EOS_TEXT: len(ranks)})


def gpt2_encoding() -> tiktoken.Encoding:
    """GPT-2's vocabulary of 50,257, which tiktoken downloads once. Raises InputError where it cannot."""
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:
        raise InputError(
            f"--vocab_size 0: tiktoken could not download GPT-2's vocabulary ({error}); go online once"
        ) from error


def encoding_state(encoding: tiktoken.Encoding) -> dict:
    """The encoding as a plain dict, bytes written as Latin-1 text, for a checkpoint."""
    ranks = {token.decode("latin-1"): rank for token, rank in encoding._mergeable_ranks.items()}
    return {
        "name": encoding.name,
        "pattern": encoding._pat_str,
        "ranks": ranks,
        "special": dict(encoding._special_tokens),
    }


def encoding_from_state(state: dict) -> tiktoken.Encoding:
    ranks = {token.encode("latin-1"): rank for token, rank in state["ranks"].items()}
    return tiktoken.Encoding(
        state["name"], pat_str=state["pattern"], mergeable_ranks=ranks, special_tokens=state["special"]
    )


# --- rows of token ids ----------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """A prompt and its response as one list of ids; EOS is part of the response where the text was complete."""

    tokens: list[int]
    prompt_len: int


class Group(NamedTuple):
    """The responses to one prompt that were compared, and which beat which: pairs of (winner, loser) indices."""

    rows: list[Row]
    pairs: list[tuple[int, int]]
    certainty: list[float]  # the probability, where the labels were simulated, of the likelier outcome; else nan


def encode_prompt(encoding: tiktoken.Encoding, prompt: str) -> list[int]:
    """Special tokens that stand in a prompt, as the turns of a chat template do, are what they say.

    In completions and documents they are ordinary text, so that no model learns to write them from being quoted.
    """
    return encoding.encode(prompt, allowed_special="all")


def encode_row(encoding: tiktoken.Encoding, eos: int, prompt: str, response: str, ended: bool = True) -> Row:
    """Prompt and response are encoded each by itself, as they will be when the response is sampled."""
    start = encode_prompt(encoding, prompt) or [eos]
    return Row(start + encoding.encode_ordinary(response) + [eos] * ended, len(start))


def _ended(path: str | Path, number: int, row: dict, column: str) -> bool:
    ended = row.get(f"{column}_ended", True)
    if not isinstance(ended, bool):
        raise InputError(f'{path}: row {number}: "{column}_ended" is neither true nor false; mend the row')
    return ended


def completions(path: str | Path, encoding: tiktoken.Encoding, eos: int) -> list[Row]:
    return [
        encode_row(encoding, eos, row["prompt"], row["completion"], _ended(path, number, row, "completion"))
        for number, row in enumerate(iterate_jsonl(path, {"prompt": str, "completion": str}), 1)
    ]


def comparisons(path: str | Path, encoding: tiktoken.Encoding, eos: int) -> list[Group]:
    """Rows with "ranked" become a group each; neighbouring pair rows of one prompt share a group and its responses."""
    kind = {"ranked": list} if "ranked" in first_row(path) else {"chosen": str, "rejected": str}
    groups: list[Group] = []
    index: dict[tuple[str, bool], int] = {}
    previous = None
    for number, row in enumerate(iterate_jsonl(path, {"prompt": str} | kind), 1):
        if "ranked" in kind:
            texts, ends = row["ranked"], row.get("ranked_ended", [True] * len(row["ranked"]))
            if len(texts) < 2 or not all(isinstance(text, str) for text in texts):
                raise InputError(f'{path}: row {number}: "ranked" must be two or more texts, best first; mend the row')
            if not isinstance(ends, list) or len(ends) != len(texts) or not all(isinstance(e, bool) for e in ends):
                raise InputError(
                    f'{path}: row {number}: "ranked_ended" must be true or false for each text; mend the row'
                )
        else:
            texts, ends = [row[c] for c in kind], [_ended(path, number, row, c) for c in kind]
        if "ranked" in kind or row["prompt"] != previous:
            groups.append(Group([], [], []))
            index, previous = {}, row["prompt"]
        group, places = groups[-1], []
        for response in zip(texts, ends):
            if response not in index:
                index[response] = len(group.rows)
                group.rows.append(encode_row(encoding, eos, row["prompt"], *response))
            places.append(index[response])
        pairs = [(w, l) for i, w in enumerate(places) for l in places[i + 1 :]]
        group.pairs.extend(pairs)
        group.certainty.extend([max(p, 1 - p) if (p := row.get("p_chosen")) is not None else float("nan")] * len(pairs))
    return groups


def prompts(path: str | Path, encoding: tiktoken.Encoding) -> list[list[int]]:
    return [encode_prompt(encoding, row["prompt"]) for row in iterate_jsonl(path, {"prompt": str})]


def fit(items: list, lengths: list[int], room: int, drop_long: bool, what: str) -> list:
    """The items whose length is at most `room`. Raises InputError where some are not and `drop_long` is off."""
    kept = [item for item, length in zip(items, lengths) if length <= room]
    dropped = len(items) - len(kept)
    if dropped and not drop_long:
        raise InputError(
            f"{dropped:,} of {len(items):,} {what} exceed the {room} tokens of room; --drop_long leaves them out"
        )
    if not kept:
        raise InputError(f"none of {len(items):,} {what} fits the {room} tokens there is room for; give shorter ones")
    return kept


def pad(rows: list[Row], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Rows to tokens (B, T) on `device`, prompt_len (B,), length (B,) on the CPU. Pads are zeros, known by `length`."""
    T = max(len(row.tokens) for row in rows)
    tokens = torch.tensor([row.tokens + [0] * (T - len(row.tokens)) for row in rows])
    prompt_len, length = torch.tensor([row.prompt_len for row in rows]), torch.tensor([len(row.tokens) for row in rows])
    pin = torch.device(device).type == "cuda"  # then the CPU need not wait for the copy
    return (tokens.pin_memory() if pin else tokens).to(device, non_blocking=pin), prompt_len, length


# --- batches: which rows a step gets depends on seed and step alone, so a resume needs no state of it ---------------


def shuffled(items: list, batch_size: int, seed: int, lengths: list[int] | None, step: int) -> list:
    """The items of batch number `step`: every epoch in a new order, what does not fill a batch left out of it.

    With `lengths`, batches hold items of like length, so that little padding is computed: within every stretch of 16
    batches items are sorted by length and cut into batches, whose order is then shuffled. Where there are fewer than
    `batch_size` items, a batch is all of them.
    """
    batch_size = min(batch_size, len(items))
    per_epoch = len(items) // batch_size
    epoch, place = divmod(step, per_epoch)
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(items))[: per_epoch * batch_size]
    if lengths is not None:
        size, stretch = np.asarray(lengths), 16 * batch_size
        stretches = [order[start : start + stretch] for start in range(0, len(order), stretch)]
        order = np.concatenate([part[np.argsort(size[part], kind="stable")] for part in stretches])
        place = rng.permutation(per_epoch)[place]
    return [items[i] for i in order[place * batch_size : (place + 1) * batch_size]]


def micro_batches(rows: list[Row], size: int) -> Iterator[list[Row]]:
    """The rows in parts of at most `size`, like lengths together, so that each part pads to its own longest only."""
    rows = sorted(rows, key=lambda row: len(row.tokens))
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def hold_out(items: list[Row] | list[Group], share: int = 20) -> tuple[list, list]:
    """(held out, the rest): those of every `share`-th prompt, of 512 prompts at most. No prompt is on both sides."""

    def prompt(item: Row | Group) -> tuple[int, ...]:
        row = item if isinstance(item, Row) else item.rows[0]
        return tuple(row.tokens[: row.prompt_len])

    known = list(dict.fromkeys(map(prompt, items)))
    chosen = np.random.default_rng(0).permutation(len(known))[: min(512, len(known) // share)]
    out = {known[i] for i in chosen}
    held, rest = [item for item in items if prompt(item) in out], [item for item in items if prompt(item) not in out]
    if not held:
        raise InputError(f"{len(known)} different prompts are too few to hold some out; give at least {share}")
    return held, rest


def token_stream(path: str | Path, encoding: tiktoken.Encoding, eos: int, target: str | Path) -> np.memmap:
    """All documents of `path`, each with EOS behind it, as one memory-mapped array of ids, kept in `target`."""
    dtype = np.uint16 if encoding.n_vocab <= 2**16 else np.uint32
    target = Path(target)
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
        whole = suffix(path) != ".jsonl"  # one document, in pieces
        with open(temporary, "wb") as out:
            for text in documents(path):
                np.array(encoding.encode_ordinary(text) + [eos] * (not whole), dtype=dtype).tofile(out)
            if whole:
                np.array([eos], dtype=dtype).tofile(out)
        temporary.replace(target)
    return np.memmap(target, dtype=dtype, mode="r")


def windows(stream: np.ndarray, width: int, starts: Iterable[int]) -> list[Row]:
    """Stretches of `width` ids as rows whose first id stands as the prompt."""
    return [Row(stream[start : start + width].tolist(), 1) for start in starts]


def random_windows(stream: np.ndarray, width: int, batch_size: int, seed: int, step: int) -> list[Row]:
    """Batch number `step` of stretches of the stream that start anywhere."""
    return windows(stream, width, np.random.default_rng([seed, step]).integers(0, len(stream) - width, batch_size))
