"""Rows of token ids: what they are; padded, shuffled into batches, some held out; and the windows of a text."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tiktoken import Encoding
from torch import Tensor

from data.files import InputError, documents, has_rows, replacing, sources
from data.rng import seed_of, shuffler
from data.tokenizer import encode_text

Say = Callable[[str], None]


class Row(NamedTuple):
    """A prompt and its response as one list of ids; a complete response includes EOS."""

    tokens: list[int]
    prompt_len: int


class Prompt(NamedTuple):
    """A prompt as ids, and all columns of its row as they were read, for a reward or a judge that wants them."""

    ids: list[int]
    columns: dict


class Group(NamedTuple):
    """The compared responses to one prompt. A pair (winner, loser) holds two indices into `rows`."""

    rows: list[Row]
    pairs: list[tuple[int, int]]
    certainty: list[float]  # for each pair: the likelier outcome's probability if a judge simulated it, else nan
    source: str = ""  # where the comparison is from, if the row says: its "subset" or "source"


def keep_short(items: list, lengths: list[int], room: int, what: str, say: Say = print) -> list:
    """Return the items of at most `room` tokens, and `say` how many others there are: InputError if above a tenth."""
    kept = [item for item, length in zip(items, lengths) if length <= room]
    n_long = len(items) - len(kept)
    if not kept or n_long > len(items) / 10:
        raise InputError(f"{n_long:,} of {len(items):,} {what} are longer than {room} tokens; shorten or remove them")
    if n_long:
        say(f"{n_long:,} of {len(items):,} {what} are longer than {room} tokens and are left out")
    return kept


def pad(rows: list[Row], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens (B, T) on `device`, and prompt_len (B,) and length (B,) on the CPU. The padding id is 0."""
    T = max(len(row.tokens) for row in rows)
    tokens = torch.tensor([row.tokens + [0] * (T - len(row.tokens)) for row in rows])
    prompt_len, length = torch.tensor([row.prompt_len for row in rows]), torch.tensor([len(row.tokens) for row in rows])
    return tokens.to(device), prompt_len, length


def shuffled(items: list, batch_size: int, seed: int, lengths: list[int] | None, step: int) -> list:
    """Return batch number `step`, or all items if they are fewer. Each epoch has a new order and whole batches only.

    With `lengths`, a batch holds items of similar length, which reduces padding: each 16 batches are sorted together.
    """
    batch_size = min(batch_size, len(items))
    per_epoch = len(items) // batch_size
    epoch, place = divmod(step, per_epoch)
    rng = shuffler("batches", seed, epoch)
    order = rng.permutation(len(items))[: per_epoch * batch_size]
    if lengths is not None:
        lengths = np.asarray(lengths)
        blocks = np.split(order, range(16 * batch_size, len(order), 16 * batch_size))
        order = np.concatenate([block[np.argsort(lengths[block], kind="stable")] for block in blocks])
        place = rng.permutation(per_epoch)[place]
    return [items[i] for i in order[place * batch_size : (place + 1) * batch_size]]


def micro_batches(rows: list[Row], size: int) -> Iterator[list[Row]]:
    """Yield the rows in parts of at most `size`. Rows of similar length share a part, which reduces padding."""
    rows = sorted(rows, key=lambda row: len(row.tokens))
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def hold_out(items: list, encoding: Encoding, most: int = 512, say: Say = print) -> tuple[list, list]:
    """Return (evaluated, trained on) of rows, groups or prompts. Those of one prompt stay together.

    A hash of the prompt's text decides, so that no file or option moves a prompt, and all stages agree. A tenth of all
    texts is held out, and of a file's prompts at least one. The `most` with the lowest hashes are evaluated; the others
    that are held out are left out, and `say` hears how many. Raises InputError where nothing is left to train on.
    """
    hashes = [prompt_hash(item, encoding) for item in items]
    ordered = sorted(set(hashes))
    n = max(1, sum(each < 2**63 / 10 for each in ordered))
    if n == len(ordered):
        raise InputError(f"--data: {n} different prompts are too few to hold some out and train on others; give more")
    if n > most:
        say(f"{n:,} prompts are held out: {most:,} are evaluated, the other {n - most:,} are left out")
    evaluated = [item for item, each in zip(items, hashes) if each <= ordered[min(n, most) - 1]]
    return evaluated, [item for item, each in zip(items, hashes) if each >= ordered[n]]


def prompt_hash(item: Row | Group | Prompt, encoding: Encoding) -> int:
    """Return 63 bits that a hash makes of the prompt's text alone."""
    row = item.rows[0] if isinstance(item, Group) else item
    ids = row.ids if isinstance(row, Prompt) else row.tokens[: row.prompt_len]
    empty = len(ids) == 1 and ids[0] in encoding._special_tokens.values()  # what an empty prompt starts from
    return seed_of("hold out", "" if empty else encoding.decode(ids))


def token_stream(path: str | Path, encoding: Encoding, eos: int, target: str | Path) -> np.memmap:
    """Encode all documents of `path`, with EOS after each, into the file `target`; return it as a memory map."""
    dtype = np.uint16 if encoding.n_vocab <= 2**16 else np.uint32
    if not Path(target).exists():
        each, last = ([eos], []) if has_rows(path) else ([], [eos])  # a .txt is one document, in pieces
        with replacing(target, "wb") as file:
            for source in sources(path):
                for text in documents(source):
                    np.array(encode_text(encoding, text) + each, dtype=dtype).tofile(file)
                np.array(last, dtype=dtype).tofile(file)
    return np.memmap(target, dtype=dtype, mode="r")


def windows(stream: np.ndarray, width: int, starts: Iterable[int]) -> list[Row]:
    """Return one row of `width` ids for each start. The first id is the prompt."""
    return [Row(stream[start : start + width].tolist(), 1) for start in starts]


def random_windows(stream: np.ndarray, width: int, batch_size: int, seed: int, step: int) -> list[Row]:
    """Return batch number `step`: rows of `width` ids that start at random positions in the stream."""
    starts = shuffler("windows", seed, step).integers(0, len(stream) - width, batch_size, endpoint=True)
    return windows(stream, width, starts)
