"""Rows of token ids: read them from files, pad them, shuffle them into batches, and hold some out."""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tiktoken import Encoding
from torch import Tensor

from data.chat import Messages, check, reply, split_dialogue
from data.files import TEXT, InputError, documents, first_row, has_rows, is_verdict, iterate_jsonl, replacing, sources
from data.label import Answer, are_texts
from data.rng import shuffler
from data.tokenizer import encode_prompt, encode_text

Prompt = str | Messages
Prompts = list[list[int]]
Say = Callable[[str], None]
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
    encoding: Encoding, eos: int, prompt: Prompt, response: str, ended: bool = True, ids: list | None = None
) -> Row:
    """Encode prompt and response apart, as generation does. Sampled `ids` are used if they decode to `response`.

    An end token behind the response stays: a model may have several. Without one a complete response gets `eos`.
    """
    start, end = encode_prompt(encoding, prompt) or [eos], [eos]
    try:
        if ids[-1:] and ids[-1] in encoding._special_tokens.values() and encoding.decode(ids[:-1]) == response:
            ids, end = ids[:-1], ids[-1:]
        sampled = encoding.decode(ids) == response
    except (KeyError, OverflowError, TypeError):  # no ids, or those of another vocabulary
        sampled = False
    if not sampled:
        ids = encode_text(encoding, response)
    return Row(start + ids + end * ended, len(start))


def completions(path: str | Path, encoding: Encoding, eos: int) -> list[Row]:
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
        if isinstance(prompt, list):
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
    """Return a conversation before its last message, and what the assistant says there."""
    *before, last = check(messages, where)
    if last["role"] != "assistant":
        raise InputError(f"{where}: the last message is not the assistant's; fix the row")
    return before, last["content"]


def comparisons(path: str | Path, encoding: Encoding, eos: int, say: Say = lambda text: None) -> list[Group]:
    """Return a group for each row with "ranked", and for consecutive pair rows of one prompt, which share its rows.

    No answer is compared with an equal one. `say` is told what the file was taken for, and how much was left out.
    """
    groups: list[Group] = []
    previous = None
    kinds, omitted = Counter(), Counter()
    dropped = Counter({"pairs of equal texts": 0, "ties and skips": 0})
    for number, row in enumerate(iterate_jsonl(path, {}), 1):
        if is_verdict(row):
            dropped["ties and skips"] += 1
            continue
        where = f"{path}: row {number}"
        kind, texts = prompt_and_texts(row, encoding, where)
        kinds[kind] += 1
        if isinstance(texts, str):
            omitted[texts] += 1
            continue
        row |= texts
        answers, certainty = answers_of(row, where)
        key = number if "ranked" in row else row["prompt"]  # a ranked list has a group of its own
        if key != previous:
            groups.append(Group([], [], [], str(row.get("subset", row.get("source", "")))))
            places: dict[tuple[str, bool], int] = {}  # (text, ended) → its row in the group
        previous, group = key, groups[-1]
        for answer in answers:
            if answer[:2] not in places:
                places[answer[:2]] = len(group.rows)
                group.rows.append(encode_row(encoding, eos, row["prompt"], *answer))
        compared = list(itertools.combinations(answers, 2))  # (winner, loser)
        pairs = [(places[w[:2]], places[l[:2]]) for w, l in compared if w.text != l.text]
        dropped["pairs of equal texts"] += len(compared) - len(pairs)
        group.pairs.extend(pairs)
        group.certainty.extend([certainty] * len(pairs))
    reasons = "".join(f", {n:,} left out ({reason})" for reason, n in omitted.most_common())
    say(f"{path}: {' and '.join(kinds)}, {kinds.total():,} rows{reasons}")
    for what, n in dropped.items():
        if n:
            say(f"{path}: {n:,} {what} were left out")
    groups = [group for group in groups if group.pairs]
    if not groups:
        raise InputError(f"{path}: all pairs are of equal texts, or ties; give some preferences")
    return groups


def prompt_and_texts(row: dict, encoding: Encoding, where: str) -> tuple[str, dict | str]:
    """Return the kind of a row, and its prompt and its answers as texts, or why it is left out."""
    if isinstance(row.get("chosen"), list):
        return "conversational preferences", of_conversations(row, encoding, where)
    if "prompt" not in row and are_texts([row.get("chosen"), row.get("rejected")]):
        return "dialogues as in HH", split_dialogue(row, chatml=False)
    if not isinstance(row.get("prompt"), TEXT):
        raise InputError(f'{where}: no column "prompt"; {COMPARISON}; fix the row')
    return "ranked lists" if "ranked" in row else "preferences", {"prompt": read_prompt(row["prompt"], where)}


def of_conversations(row: dict, encoding: Encoding, where: str) -> dict | str:
    """Return the prompt and the last answers of two conversations, which may lack or repeat the row's own prompt."""
    before, chosen = split_last(row["chosen"], where)
    same_before, rejected = split_last(row.get("rejected"), where)
    prompt = row.get("prompt", [])
    if isinstance(prompt, str):  # beside whole conversations the prompt is only said again
        prompt = [] if before else [{"role": "user", "content": prompt}]
    prompt = (check(prompt, where) if prompt else []) + before
    if before != same_before:
        return "part before the last answer"
    if not prompt:
        raise InputError(f'{where}: no "prompt", and the conversations hold none; fix the row')
    if not chosen.strip() or not rejected.strip():
        return "empty"
    return {"prompt": prompt, "chosen": reply(encoding, chosen), "rejected": reply(encoding, rejected)}


def answers_of(row: dict, where: str) -> tuple[list[Answer], float]:
    """Return the answers of a row, best first, and how certain their order is, or nan."""
    if "ranked" not in row:  # a pair is a ranked list of two
        for end, absent in (("", None), ("_ended", True), ("_ids", None)):
            row = row | {f"ranked{end}": [row.get(f"{name}{end}", absent) for name in ("chosen", "rejected")]}
    texts = row["ranked"]
    if not are_texts(texts) or len(texts) < 2:
        raise InputError(f"{where}: {COMPARISON}; fix the row")
    ended, ids = row.get("ranked_ended", [True] * len(texts)), row.get("ranked_ids")
    if not isinstance(ended, list) or [type(each) for each in ended] != [bool] * len(texts):
        raise InputError(f'{where}: a column "…_ended" must be true or false for each text; fix the row')
    if not isinstance(ids, list) or len(ids) != len(texts):
        ids = [None] * len(texts)
    p = row.get("p_chosen", math.nan)
    if type(p) not in (int, float) or p < 0 or p > 1:
        raise InputError(f'{where}: "p_chosen" is not a probability from 0 to 1; fix the row')
    return [Answer(*answer) for answer in zip(texts, ended, ids)], max(p, 1 - p)


def prompts(path: str | Path, encoding: Encoding) -> Prompts:
    return [encode_prompt(encoding, prompt) for prompt in prompt_texts(path)]


def prompt_texts(path: str | Path) -> list[Prompt]:
    """The prompts of a file: texts, or conversations, from which a last answer of the assistant is left out."""
    found = []
    column = prompt_column(path)
    for number, row in enumerate(iterate_jsonl(path, {column: TEXT}), 1):
        where = f"{path}: row {number}"
        prompt = read_prompt(row[column], where)
        if isinstance(prompt, list) and prompt[-1]["role"] == "assistant":
            prompt = prompt[:-1]
        if prompt == []:
            raise InputError(f"{where}: a conversation without a question; remove the row")
        found.append(prompt)
    return found


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


def hold_out(items: list[Row] | list[Group], one_in: int = 20) -> tuple[list, list]:
    """Return (held out, rest). One prompt in `one_in`, at most 512, is held out together with all its items."""
    rows = [item if isinstance(item, Row) else item.rows[0] for item in items]
    prompts = [tuple(row.tokens[: row.prompt_len]) for row in rows]
    known = len(set(prompts))
    if known < one_in:
        raise InputError(f"{known} different prompts are too few for a held-out set; give at least {one_in}")
    return _split(items, prompts, min(512, known // one_in))


def hold_out_prompts(prompts: Prompts, most: int) -> tuple[Prompts, Prompts]:
    """Return (held out, rest): a tenth, at most `most`. A prompt that comes twice is held out once, or stays twice."""
    known = list(map(tuple, prompts))
    held_out, rest = _split(prompts, known, min(most, math.ceil(len(set(known)) / 10)))
    return [list(prompt) for prompt in dict.fromkeys(map(tuple, held_out))], rest


def _split(items: list, prompts: list[tuple[int, ...]], n: int) -> tuple[list, list]:
    """Return the items of n random prompts, and the others. No option changes the key: all runs hold out the same."""
    known = list(dict.fromkeys(prompts))
    chosen = {known[i] for i in shuffler("hold out").permutation(len(known))[:n]}
    held_out = [item for item, prompt in zip(items, prompts) if prompt in chosen]
    return held_out, [item for item, prompt in zip(items, prompts) if prompt not in chosen]


def prompts_and_held_out(
    path: str, eval_path: str, encoding: Encoding, room: int, most: int, say: Say = print
) -> tuple[Prompts, Prompts]:
    """Prompts of at most `room` ids to train on, and up to `most` to evaluate on: of `eval_path`, or some of `path`."""

    def load(path: str) -> Prompts:
        found = prompts(path, encoding)
        what = f"prompts of {path} (with --response_len)"
        return keep_short(found, [max(1, len(p)) for p in found], room, what, say)

    if eval_path:
        return load(path), load(eval_path)[:most]
    held_out, rest = hold_out_prompts(load(path), most)
    return rest, held_out


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
