"""Rows of token ids: read them from files, pad them, shuffle them into batches, and hold some out."""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken
import torch
from torch import Tensor

from data.chat import Messages, check, reply, split_dialogue
from data.files import TEXT, InputError, documents, first_row, has_rows, is_verdict, iterate_jsonl, replacing
from data.label import are_texts
from data.rng import shuffler
from data.tokenizer import encode_prompt, encode_text

Prompt = str | Messages
COMPARISON = 'a comparison has the texts "prompt", "chosen" and "rejected", or "prompt" and a list "ranked"'


class Row(NamedTuple):
    """A prompt and its response as one list of ids; a complete response includes EOS."""

    tokens: list[int]
    prompt_len: int


class Group(NamedTuple):
    """The compared responses to one prompt. A pair (winner, loser) holds two indices into `rows`."""

    rows: list[Row]
    pairs: list[tuple[int, int]]
    certainty: list[float]  # for each pair: the likelier outcome's probability if a judge simulated it, else nan
    source: str = ""  # where the comparison is from, if the row says: its "subset" or "source"


def encode_row(
    encoding: tiktoken.Encoding, eos: int, prompt: Prompt, response: str, ended: bool = True, ids: list | None = None
) -> Row:
    """Encode prompt and response separately, because generation also continues the ids of the prompt.

    `ids` are the tokens that a model sampled. They are used if they decode to `response`.
    """
    start = encode_prompt(encoding, prompt) or [eos]
    if not _decodes_to(encoding, ids, response):
        ids = encode_text(encoding, response)
    return Row(start + ids + [eos] * ended, len(start))


def _decodes_to(encoding: tiktoken.Encoding, ids: object, text: str) -> bool:
    try:
        return encoding.decode(ids) == text
    except (KeyError, OverflowError, TypeError):  # ids of another vocabulary, or no ids
        return False


def completions(path: str | Path, encoding: tiktoken.Encoding, eos: int) -> list[Row]:
    """A row has "prompt" and "completion", or "messages", of which the last is the assistant's and is learned."""
    rows = []
    column = prompt_column(path)
    columns = {"messages": list} if column == "messages" else {"prompt": TEXT, "completion": TEXT}
    for number, row in enumerate(iterate_jsonl(path, columns), 1):
        where = f"{path}: row {number}"
        if column == "messages":
            prompt, answer = split_last(row["messages"], where)
        else:
            prompt, answer = read_prompt(row["prompt"], where), row["completion"]
        if isinstance(answer, list):
            _, answer = split_last(answer, where)
        if not isinstance(prompt, str):
            answer = reply(encoding, answer)
        ended = row.get("completion_ended", True)
        if not isinstance(ended, bool):
            raise InputError(f'{where}: "completion_ended" is neither true nor false; fix the row')
        if not answer and not ended:
            raise InputError(f'{where}: "completion" is empty and has no end to learn; remove the row')
        rows.append(encode_row(encoding, eos, prompt, answer, ended))
    return rows


def prompt_column(path: str | Path) -> str:
    row = first_row(path)
    return "messages" if "messages" in row and "prompt" not in row else "prompt"


def read_prompt(value: str | list, where: str) -> Prompt:
    return value if isinstance(value, str) else check(value, where)


def split_last(messages: object, where: str) -> tuple[Messages, str]:
    """Return a conversation before its last message, and what the assistant says there. Raises InputError."""
    *before, last = check(messages, where)
    if last["role"] != "assistant":
        raise InputError(f"{where}: the last message is not the assistant's; fix the row")
    return before, last["content"]


def comparisons(
    path: str | Path, encoding: tiktoken.Encoding, eos: int, say: Callable[[str], None] = lambda text: None
) -> list[Group]:
    """A row with "ranked" becomes one group. Consecutive pair rows of one prompt share a group and its rows.

    "chosen" and "rejected" are texts, or conversations that end with the assistant and may begin with the prompt.
    No response is compared with an equal one, and ties and skips of people are left out. `say` is told how many, and
    what the file was taken for.
    """
    groups: list[Group] = []
    places: dict[tuple[str, bool], int] = {}  # (text, ended) → its row in the group
    previous, equal, undecided = None, 0, 0
    kinds: Counter[str] = Counter()
    omitted: Counter[str] = Counter()
    for number, row in enumerate(iterate_jsonl(path, {}), 1):
        where = f"{path}: row {number}"
        if is_verdict(row):
            undecided += 1
            continue
        kind, row = with_texts(row, encoding, where)
        kinds[kind] += 1
        if isinstance(row, str):
            omitted[row] += 1
            continue
        texts, ended, ids, certainty = read_responses(row, where)
        if "ranked" in row or row["prompt"] != previous:
            groups.append(Group([], [], [], str(row.get("subset", row.get("source", "")))))
            places = {}
        previous = None if "ranked" in row else row["prompt"]
        group, index = groups[-1], []
        for text, end, sampled in zip(texts, ended, ids):
            if (text, end) not in places:
                places[text, end] = len(group.rows)
                group.rows.append(encode_row(encoding, eos, row["prompt"], text, end, sampled))
            index.append(places[text, end])
        compared = list(itertools.combinations(range(len(texts)), 2))  # (winner, loser)
        pairs = [(index[w], index[l]) for w, l in compared if texts[w] != texts[l]]
        equal += len(compared) - len(pairs)
        group.pairs.extend(pairs)
        group.certainty.extend([certainty] * len(pairs))
    reasons = "".join(f", {n:,} left out ({reason})" for reason, n in omitted.most_common())
    say(f"{path}: {' and '.join(kinds)}, {kinds.total():,} rows{reasons}")
    for n, what in ((equal, "pairs of equal texts"), (undecided, "ties and skips")):
        if n:
            say(f"{path}: {n:,} {what} were left out")
    groups = [group for group in groups if group.pairs]
    if not groups:
        raise InputError(f"{path}: all pairs are of equal texts, or ties; give some preferences")
    return groups


def with_texts(row: dict, encoding: tiktoken.Encoding, where: str) -> tuple[str, dict | str]:
    """Return the kind of a row, and the row with its prompt and its answers as texts, or why it is left out."""
    if isinstance(row.get("chosen"), list):
        kind = "conversational preferences"
        before, chosen = split_last(row["chosen"], where)
        same_before, rejected = split_last(row.get("rejected"), where)
        prompt = row.get("prompt", [])
        if isinstance(prompt, str):  # beside whole conversations the prompt is only said again
            prompt = [] if before else [{"role": "user", "content": prompt}]
        prompt = (check(prompt, where) if prompt else []) + before
        if before != same_before:
            return kind, "part before the last answer"
        if not prompt:
            raise InputError(f'{where}: no "prompt", and the conversations hold none; fix the row')
        if not chosen.strip() or not rejected.strip():
            return kind, "empty"
        return kind, row | {"prompt": prompt, "chosen": reply(encoding, chosen), "rejected": reply(encoding, rejected)}
    if "prompt" not in row and are_texts([row.get("chosen"), row.get("rejected")]):
        pair = split_dialogue(row, chatml=False)
        return "dialogues as in HH", pair if isinstance(pair, str) else row | pair
    if not isinstance(row.get("prompt"), TEXT):
        raise InputError(f'{where}: no column "prompt"; {COMPARISON}; fix the row')
    return "ranked lists" if "ranked" in row else "preferences", row | {"prompt": read_prompt(row["prompt"], where)}


def read_responses(row: dict, where: str) -> tuple[list[str], list[bool], list, float]:
    """Return texts, best first; whether each ended; its sampled ids or None; and the certainty of the order or nan."""
    pair = ("chosen", "rejected")
    texts = row.get("ranked", [row.get(name) for name in pair])
    if not are_texts(texts) or len(texts) < 2:
        raise InputError(f"{where}: {COMPARISON}; fix the row")
    if "ranked" in row:
        ended, ids = row.get("ranked_ended", [True] * len(texts)), row.get("ranked_ids")
    else:
        ended, ids = [row.get(f"{name}_ended", True) for name in pair], [row.get(f"{name}_ids") for name in pair]
    if not isinstance(ended, list) or len(ended) != len(texts) or not all(isinstance(each, bool) for each in ended):
        raise InputError(f'{where}: a column "…_ended" must be true or false for each text; fix the row')
    if not isinstance(ids, list) or len(ids) != len(texts):
        ids = [None] * len(texts)
    p = row.get("p_chosen", math.nan)
    if isinstance(p, bool) or not isinstance(p, (int, float)) or p < 0 or p > 1:
        raise InputError(f'{where}: "p_chosen" is not a probability from 0 to 1; fix the row')
    return texts, ended, ids, max(p, 1 - p)


def prompts(path: str | Path, encoding: tiktoken.Encoding) -> list[list[int]]:
    return [encode_prompt(encoding, prompt) for prompt in prompt_texts(path)]


def prompt_texts(path: str | Path) -> list[Prompt]:
    """The prompts of a file: texts, or conversations, from which a last answer of the assistant is left out."""
    found = []
    column = prompt_column(path)
    for number, row in enumerate(iterate_jsonl(path, {column: TEXT}), 1):
        prompt = read_prompt(row[column], f"{path}: row {number}")
        if not isinstance(prompt, str) and prompt[-1]["role"] == "assistant":
            prompt = prompt[:-1]
        if prompt == []:
            raise InputError(f"{path}: row {number}: a conversation without a question; remove the row")
        found.append(prompt)
    return found


def keep_short(items: list, lengths: list[int], room: int, what: str, say: Callable[[str], None] = print) -> list:
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


# --- batches: only the seed and the step choose the rows, so a resumed run needs no saved state ----------------------


def shuffled(items: list, batch_size: int, seed: int, lengths: list[int] | None, step: int) -> list:
    """Return the items of batch number `step`. Every epoch has a new order and drops an incomplete last batch.

    With `lengths`, a batch holds items of similar length, which reduces padding. The function sorts each block of 16
    batches by length, cuts it into batches, and then shuffles the order of all batches. If there are fewer than
    `batch_size` items, every batch holds all of them.
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


def hold_out(items: list[Row] | list[Group], one_in: int = 20) -> tuple[list, list]:
    """Return (held out, rest). One prompt in `one_in`, at most 512, is held out together with all its items."""

    def prompt(item: Row | Group) -> tuple[int, ...]:
        row = item if isinstance(item, Row) else item.rows[0]
        return tuple(row.tokens[: row.prompt_len])

    known = list(dict.fromkeys(map(prompt, items)))
    chosen = _choose(known, min(512, len(known) // one_in))
    if not chosen:
        raise InputError(f"{len(known)} different prompts are too few for a held-out set; give at least {one_in}")
    return [x for x in items if prompt(x) in chosen], [x for x in items if prompt(x) not in chosen]


def hold_out_prompts(prompts: list[list[int]], most: int) -> tuple[list[list[int]], list[list[int]]]:
    """Return (held out, rest): a tenth, at most `most`. A prompt that comes twice is on one side only."""
    known = list(dict.fromkeys(map(tuple, prompts)))
    chosen = _choose(known, min(most, math.ceil(len(known) / 10)))
    return [list(p) for p in known if p in chosen], [p for p in prompts if tuple(p) not in chosen]


def _choose(prompts: list[tuple[int, ...]], n: int) -> set[tuple[int, ...]]:
    """Return n of the prompts at random, by a key that no option changes: every run holds out the same prompts."""
    return {prompts[i] for i in shuffler("hold out").permutation(len(prompts))[:n]}


def prompts_and_held_out(
    path: str, eval_path: str, encoding: tiktoken.Encoding, room: int, most: int, say: Callable[[str], None] = print
) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts of at most `room` ids to train on, and up to `most` to evaluate on: of `eval_path`, or some of `path`."""

    def load(path: str) -> list[list[int]]:
        found = prompts(path, encoding)
        what = f"prompts of {path} (with --response_len)"
        return keep_short(found, [max(1, len(p)) for p in found], room, what, say)

    if eval_path:
        return load(path), load(eval_path)[:most]
    held_out, rest = hold_out_prompts(load(path), most)
    return rest, held_out


def token_stream(path: str | Path, encoding: tiktoken.Encoding, eos: int, target: str | Path) -> np.memmap:
    """Encode all documents of `path`, with EOS after each, into the file `target`; return it as a memory map."""
    dtype = np.uint16 if encoding.n_vocab <= 2**16 else np.uint32
    if not Path(target).exists():
        one_document = not has_rows(path)  # which comes in pieces
        with replacing(target, "wb") as file:
            for text in documents(path):
                ids = encode_text(encoding, text)
                np.array(ids if one_document else ids + [eos], dtype=dtype).tofile(file)
            if one_document:
                np.array([eos], dtype=dtype).tofile(file)
    return np.memmap(target, dtype=dtype, mode="r")


def windows(stream: np.ndarray, width: int, starts: Iterable[int]) -> list[Row]:
    """Return one row of `width` ids for each start. The first id is the prompt."""
    return [Row(stream[start : start + width].tolist(), 1) for start in starts]


def random_windows(stream: np.ndarray, width: int, batch_size: int, seed: int, step: int) -> list[Row]:
    """Return batch number `step`: rows of `width` ids that start at random positions in the stream."""
    starts = shuffler("windows", seed, step).integers(0, len(stream) - width, batch_size, endpoint=True)
    return windows(stream, width, starts)
