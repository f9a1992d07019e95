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
from data.files import TEXT, InputError, documents, first_row, has_rows, is_verdict, numbered, replacing, sources
from data.label import Answer, are_texts
from data.rng import seed_of, shuffler
from data.tokenizer import encode_prompt, encode_text

PromptText = str | Messages
Say = Callable[[str], None]
COMPARISON = 'a comparison has the texts "prompt", "chosen" and "rejected", or "prompt" and a list "ranked"'


class Row(NamedTuple):
    """A prompt and its response as one list of ids; a complete response includes EOS."""

    tokens: list[int]
    prompt_len: int


class Prompt(NamedTuple):
    """A prompt as ids, and the other columns of its row as they were read, for a reward or a judge that wants them."""

    ids: list[int]
    columns: dict


class Group(NamedTuple):
    """The compared responses to one prompt. A pair (winner, loser) holds two indices into `rows`."""

    rows: list[Row]
    pairs: list[tuple[int, int]]
    certainty: list[float]  # for each pair: the likelier outcome's probability if a judge simulated it, else nan
    source: str = ""  # where the comparison is from, if the row says: its "subset" or "source"


def encode_row(
    encoding: Encoding, eos: int, prompt: PromptText, response: str, ended: bool = True, ids: list | None = None
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
    for where, row in numbered(path, columns):
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


def read_prompt(value: str | list, where: str) -> PromptText:
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
    for where, row in numbered(path, {}):
        if is_verdict(row):
            dropped["ties and skips"] += 1
            continue
        kind, texts = prompt_and_texts(row, encoding, where)
        kinds[kind] += 1
        if isinstance(texts, str):
            omitted[texts] += 1
            continue
        row |= texts
        answers, certainty = answers_of(row, where)
        key = where if "ranked" in row else row["prompt"]  # a ranked list has a group of its own
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


def prompts(path: str | Path, encoding: Encoding) -> list[list[int]]:
    return [prompt.ids for prompt in prompts_with_columns(path, encoding)]


def prompts_with_columns(path: str | Path, encoding: Encoding) -> list[Prompt]:
    found = []
    for where, row in _prompt_rows(path):
        try:
            ids = encode_prompt(encoding, row.pop("prompt"))
        except InputError as error:  # of the chat template
            raise InputError(f"{where}: {error}") from None
        found.append(Prompt(ids, row))
    return found


def prompt_texts(path: str | Path) -> list[PromptText]:
    """The prompts of a file: texts, or conversations, from which a last answer of the assistant is left out."""
    return [row["prompt"] for row in prompt_rows(path)]


def prompt_rows(path: str | Path) -> list[dict]:
    """The rows of a file: "prompt" as `prompt_texts` gives it, and all other columns as they were read."""
    return [row for _, row in _prompt_rows(path)]


def _prompt_rows(path: str | Path) -> Iterator[tuple[str, dict]]:
    column = prompt_column(path)
    for where, row in numbered(path, {column: TEXT}):
        prompt = read_prompt(row[column], where)
        if isinstance(prompt, list) and prompt[-1]["role"] == "assistant":
            prompt = prompt[:-1]
        if prompt == []:
            raise InputError(f"{where}: a conversation without a question; remove the row")
        yield where, row | {"prompt": prompt}


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


def hold_out(items: list, encoding: Encoding, most: int = 512) -> tuple[list, list]:
    """Return (evaluated, trained on) of rows, groups or prompts. Those of one prompt stay together.

    A hash of the prompt's text decides, so that no file or option moves a prompt, and all stages agree. A tenth of all
    texts is held out, and of a file's prompts at least one. The `most` with the lowest hashes are evaluated; the others
    that are held out are left out. Raises InputError where nothing is left to train on.
    """
    hashes = [prompt_hash(item, encoding) for item in items]
    ordered = sorted(set(hashes))
    n = max(1, sum(each < 2**63 / 10 for each in ordered))
    if n == len(ordered):
        what = f"{n} different prompts are too few to hold some out and train on others"
        raise InputError(f"--data: {what}; give more")
    evaluated = [item for item, each in zip(items, hashes) if each <= ordered[min(n, most) - 1]]
    return evaluated, [item for item, each in zip(items, hashes) if each >= ordered[n]]


def prompt_hash(item: Row | Group | Prompt, encoding: Encoding) -> int:
    """Return 63 bits that a hash makes of the prompt's text alone."""
    row = item.rows[0] if isinstance(item, Group) else item
    ids = row.ids if isinstance(row, Prompt) else row.tokens[: row.prompt_len]
    empty = len(ids) == 1 and ids[0] in encoding._special_tokens.values()  # what an empty prompt starts from
    return seed_of("hold out", "" if empty else encoding.decode(ids))


def prompts_and_held_out(
    path: str, eval_path: str, encoding: Encoding, room: int, most: int, say: Say = print
) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts of at most `room` ids to train on, and up to `most` to evaluate on: of `eval_path`, or some of `path`.

    A prompt is evaluated once, even if it comes twice.
    """

    def load(path: str) -> list[Prompt]:
        found = prompts_with_columns(path, encoding)
        what = f"prompts of {path} (with --response_len)"
        return keep_short(found, [max(1, len(p.ids)) for p in found], room, what, say)

    held_out, rest = (load(eval_path), load(path)) if eval_path else hold_out(load(path), encoding, most)
    by_hash = {prompt_hash(prompt, encoding): prompt for prompt in held_out}
    if n := len(by_hash.keys() & {prompt_hash(prompt, encoding) for prompt in rest}):
        say(f"{n:,} prompts of {eval_path} are in {path} too: they are trained on and evaluated")
    last = sorted(by_hash)[:most][-1]
    return rest, [prompt for each, prompt in by_hash.items() if each <= last]


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
