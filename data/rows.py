"""Files become rows of token ids: completions to learn, answers to compare, prompts to answer."""

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tiktoken import Encoding

from data.batches import Group, Prompt, Row, Say, hold_out, keep_short, prompt_hash
from data.chat import CONTENT, TURN, Messages, check, split_dialogue, template_of, template_variables
from data.files import TEXT, VERDICTS, InputError, at, first_row, is_verdict, numbered
from data.label import Answer, are_texts, given_answers
from data.tokenizer import encode_answer, encode_prompt, encode_text

PromptText = str | Messages
MESSAGES = re.compile(r"""\s*\[\s*\{\s*["'](role|content|from|value)["']:""")  # messages as text
FLAGS = ("weight", "train", "loss", "trainable")  # of a message: at 0 a trainer does not learn it


def encode_row(
    encoding: Encoding,
    eos: int,
    prompt: PromptText,
    response: str,
    ended: bool = True,
    ids: list | None = None,
    variables: dict | None = None,
) -> Row:
    """Encode prompt and response apart, as generation does. Sampled `ids` are used if they decode to `response`.

    An end token behind the response stays: a model may have several. Without one a complete response gets `eos`.
    """
    prompt = plain(prompt) if isinstance(prompt, str) else prompt
    start, end = encode_prompt(encoding, prompt, variables) or [eos], [eos]
    try:
        if ids[-1:] and ids[-1] in encoding._special_tokens.values() and encoding.decode(ids[:-1]) == response:
            ids, end = ids[:-1], ids[-1:]
        sampled = encoding.decode(ids) == response
    except (KeyError, OverflowError, TypeError):  # no ids, or those of another vocabulary
        sampled = False
    if not sampled:
        ids = encode_text(encoding, plain(response))
    return Row(start + ids + end * ended, len(start))


def plain(text: str) -> str:
    """Return a text as it is. Raises InputError if it is a conversation that a table has turned into text."""
    if MESSAGES.match(text):
        raise InputError("a text holds messages written as text; make them a list")
    return text


def completions(path: str | Path, encoding: Encoding, eos: int) -> list[Row]:
    """A row has "prompt" and "completion", or "messages": then each answer of the assistant is a row to learn."""
    rows: list[Row] = []
    first = first_row(path)
    conversations = "messages" in first and "completion" not in first
    columns = {"messages": list} if conversations else {"prompt": TEXT, "completion": TEXT}
    if not columns.keys() <= first.keys():
        wanted = 'this stage reads "prompt" and "completion", or "messages"'
        raise InputError(f"{path}: its first row has the columns {', '.join(first)}; rename them: {wanted}")
    for where, row in numbered(path, columns):
        with at(where):
            ended, variables = row.get("completion_ended", True), template_variables(row, where)
            if not isinstance(ended, bool):
                raise InputError('"completion_ended" is neither true nor false; fix the row')
            prompt, answer = ([], row["messages"]) if conversations else (row["prompt"], row["completion"])
            if not answer and not ended:
                raise InputError('"completion" is empty and has no end to learn; remove the row')
            if isinstance(prompt, str) and isinstance(answer, str):
                rows.append(encode_row(encoding, eos, prompt, answer, ended))
                continue
            before = [] if conversations else conversation(prompt, "user")
            messages = before + conversation(answer, "assistant")
            first_answer = max(1, len(before))  # what opens a conversation has no prompt
            answers = [i for i in range(first_answer, len(messages)) if is_learned(messages[i])]
            if not answers:
                raise InputError("no message is an answer of the assistant to learn; remove the row")
            for i in answers:
                complete = ended or i + 1 < len(messages)
                said = read_answer(encoding, eos, messages[:i], messages[i], complete, variables)
                rows.append(encode_row(encoding, eos, messages[:i], *said, variables))
    return rows


def conversation(value: str | list, role: str) -> Messages:
    """Return the messages of a column; a text is what `role` says. The assistant's end with an answer."""
    messages = [{"role": role, "content": value}] if isinstance(value, str) else check(value)
    if role == "assistant" and messages[-1]["role"] != role:
        raise InputError("the last message is not the assistant's; fix the row")
    if role == "user" and messages[-1]["role"] == "assistant":
        raise InputError("the prompt ends with the assistant, whose message nobody goes on with; remove that message")
    return messages


def is_learned(message: dict) -> bool:
    """Return whether a message is the assistant's and no flag of another trainer leaves it out."""
    if message["role"] != "assistant":
        return False
    for name in FLAGS:
        if (flag := message.get(name, 1)) not in (0, 1):
            raise InputError(f'a message with "{name}": {flag!r} is not supported, only 0 and 1 are; fix the row')
    return all(message.get(name, 1) for name in FLAGS)


def read_answer(encoding: Encoding, eos: int, before: Messages, message: dict, ended: bool, variables: dict) -> Answer:
    """Return a message of the assistant as the response to the prompt `before`: its text and ids."""
    ids, _ = encode_answer(encoding, eos, before, message, variables)
    return Answer(encoding.decode(ids[:-1]), ended, ids if ended else ids[:-1])


def comparisons(path: str | Path, encoding: Encoding, eos: int, say: Say = lambda text: None) -> list[Group]:
    """Return a group for each row with "ranked", and for consecutive pair rows of one prompt, which share its rows.

    No answer is compared with an equal one. `say` is told what the file was taken for, and how much was left out.
    """
    groups: list[Group] = []
    previous = None
    kinds, omitted = Counter(), Counter()
    for where, row in numbered(path, {}):
        if is_verdict(row):
            omitted["ties and skips"] += 1
            continue
        with at(where):
            if "verdict" in row:
                raise InputError(f'"verdict" is none of {", ".join(VERDICTS)}; fix the row, or rename the column')
            kind, row = of_one_shape(row)
            kinds[kind] += 1
            if isinstance(row, str):
                omitted[row] += 1
                continue
            prompt, variables = row["prompt"], template_variables(row, where)
            answers, pairs, certainty = answers_of(row, encoding, eos, variables)
            key = where if "ranked" in row else (prompt, variables)  # a ranked list has a group of its own
            if key != previous:
                groups.append(Group([], [], [], str(row.get("subset", row.get("source", "")))))
                places: dict[tuple[str, bool], int] = {}  # (text, ended) → its row in the group
            previous, group = key, groups[-1]
            for answer in answers:
                if answer[:2] not in places:
                    places[answer[:2]] = len(group.rows)
                    group.rows.append(encode_row(encoding, eos, prompt, *answer, variables))
        for winner, loser in pairs:
            if answers[winner].text == answers[loser].text:
                omitted["pairs of equal texts"] += 1
                continue
            group.pairs.append((places[answers[winner][:2]], places[answers[loser][:2]]))
            group.certainty.append(certainty)
    reasons = [f"{n:,} left out ({reason})" for reason, n in omitted.most_common()]
    found = ", ".join([f"{' and '.join(kinds)}, {kinds.total():,} rows", *reasons])
    say(f"{path}: {found}")
    groups = [group for group in groups if group.pairs]
    if not groups:
        raise InputError(f"{path}: {found}; nothing is left to compare, so give some preferences")
    return groups


def of_one_shape(row: dict) -> tuple[str, dict | str]:
    """Return the kind of a row, and the row as `answers_of` reads it or why it is left out."""
    row = row | {name: [x] for name, x in row.items() if name in ("chosen", "rejected") and isinstance(x, dict)}
    answers = [row.get("chosen"), row.get("rejected")]
    if any(isinstance(each, list) and each and isinstance(each[0], dict) for each in answers):
        return "conversational preferences", of_conversations(row)
    whole = TURN.search if "prompt" not in row else re.compile(r"\s*Human:").match  # beside a prompt they may repeat it
    if are_texts(answers) and all(map(whole, answers)):
        found = split_dialogue(row)
        return "dialogues as in HH", found if isinstance(found, str) else row | found
    if not isinstance(row.get("prompt"), TEXT):
        raise no_comparison(row)
    prompt = row["prompt"] if isinstance(row["prompt"], str) else conversation(row["prompt"], "user")
    return "ranked lists" if "ranked" in row else "preferences", row | {"prompt": prompt}


def no_comparison(row: dict) -> InputError:
    wanted = 'a comparison has the texts "prompt", "chosen" and "rejected", or "prompt" and a list "ranked"'
    return InputError(f"{wanted}, and this row has {', '.join(row)}; rename its columns, or fix it")


def of_conversations(row: dict) -> dict | str:
    """Return a row with the prompt and the last messages of two conversations, which may lack or repeat its prompt."""
    chosen, rejected = (conversation(row.get(name) or "", "assistant") for name in ("chosen", "rejected"))
    prompt = row.get("prompt") or []
    if isinstance(prompt, str) and any(each["role"] == "user" for each in chosen):
        prompt = []  # the text only says again what the conversation holds
    prompt = conversation(prompt, "user") if prompt else []
    chosen, rejected = joined(prompt, chosen), joined(prompt, rejected)
    before = chosen[:-1]
    if before != rejected[:-1]:
        return "part before the last answer"
    if not before:
        raise InputError('no "prompt", and the conversations hold none; fix the row')
    if any(not each[-1].get("content", "").strip() and not each[-1].get("tool_calls") for each in (chosen, rejected)):
        return "empty"
    return row | {"prompt": before, "chosen": chosen[-1], "rejected": rejected[-1]}


def joined(prompt: Messages, said: Messages) -> Messages:
    """Return the conversation `said` behind the prompt, which it may repeat, whole or from its second message on."""
    before = said[:-1]
    if before[: len(prompt)] == prompt:
        return said
    if before and prompt[-len(before) :] == before:
        return prompt + said[-1:]
    return prompt + said


def answers_of(
    row: dict, encoding: Encoding, eos: int, variables: dict
) -> tuple[list[Answer], list[tuple[int, int]], float]:
    """Return a row's answers, its pairs of them (winner, loser), and how certain these are, or nan."""
    if "ranked" in row:
        answers = answers_in(row, "ranked", encoding, eos, variables)
        pairs = list(itertools.combinations(range(len(answers)), 2))  # best first
    else:
        good, bad = (answers_in(row, column, encoding, eos, variables) for column in ("chosen", "rejected"))
        answers = good + bad
        pairs = list(itertools.product(range(len(good)), range(len(good), len(answers))))
    if not pairs:
        raise no_comparison(row)
    p = row.get("p_chosen", math.nan)
    if type(p) not in (int, float) or p < 0 or p > 1:
        raise InputError('"p_chosen" is not a probability from 0 to 1; fix the row')
    return answers, pairs, max(p, 1 - p)


def answers_in(row: dict, column: str, encoding: Encoding, eos: int, variables: dict) -> list[Answer]:
    """Return the answers of a column, which holds a list of them or one."""
    said, ended, ids = (row.get(f"{column}{end}") for end in ("", "_ended", "_ids"))
    if not isinstance(said, list):
        said, ended, ids = [said], [True if ended is None else ended], [ids]
    ended = [True] * len(said) if ended is None else ended
    if not isinstance(ended, list) or [type(each) for each in ended] != [bool] * len(said):
        raise InputError('a column "…_ended" must be true or false for each text; fix the row')
    if not isinstance(ids, list) or len(ids) != len(said):
        ids = [None] * len(said)
    prompt, answers = row["prompt"], []
    for answer, complete, sampled in zip(said, ended, ids):
        if not isinstance(answer, (str, dict) if isinstance(prompt, list) else str):
            raise no_comparison(row)
        if isinstance(prompt, str) or isinstance(answer, str) and isinstance(sampled, list):
            answers.append(Answer(answer, complete, sampled))
        else:  # a message, which nobody sampled
            (message,) = conversation([answer] if isinstance(answer, dict) else answer, "assistant")
            answers.append(read_answer(encoding, eos, prompt, message, complete, variables))
    return answers


def prompts(path: str | Path, encoding: Encoding) -> list[list[int]]:
    return [prompt.ids for prompt in read_prompts(path, encoding)]


def read_prompts(path: str | Path, encoding: Encoding) -> list[Prompt]:
    found = []
    for where, row in numbered_prompts(path):
        with at(where):
            found.append(Prompt(encode_prompt(encoding, row["prompt"], template_variables(row, where)), row))
    return found


def prompt_texts(path: str | Path) -> list[PromptText]:
    return [row["prompt"] for row in prompt_rows(path)]


def prompt_rows(path: str | Path) -> list[dict]:
    """The rows of a file as they were read, but a conversation loses a last answer of the assistant."""
    return [row for _, row in numbered_prompts(path)]


def numbered_prompts(path: str | Path) -> Iterator[tuple[str, dict]]:
    first = first_row(path)
    column = "messages" if "messages" in first and not isinstance(first.get("prompt"), list) else "prompt"
    for where, row in numbered(path, {column: TEXT}):
        with at(where):
            prompt = asked(row[column], column)
        yield where, row | {"prompt": prompt}


def asked(prompt: str | list, column: str = "messages") -> PromptText:
    """Return a text or a prompt as it is, and "messages" without a last answer of the assistant."""
    if isinstance(prompt, str):
        return plain(prompt)
    messages = check(prompt) if column == "messages" else conversation(prompt, "user")
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages:
        raise InputError("a conversation without a question; remove the row")
    return messages


def answered(path: str | Path, say: Say = lambda text: None) -> Iterator[dict]:
    """Yield each row that holds two or more different answers, with "checkpoint": who gave them, as far as is known.

    Such a row has "responses", "ranked", or "chosen" and "rejected" in each of their shapes; `given_answers` reads what
    is yielded. `say` is told in the end how many rows were left out.
    """
    omitted: Counter[str] = Counter()
    for where, row in numbered(path, {}):
        with at(where):
            if "responses" in row and "prompt" not in row and "messages" in row:
                row["prompt"] = asked(row["messages"])
            _, row = of_one_shape(row)
            if isinstance(row, str):
                omitted[row] += 1
                continue
            for name in ("chosen", "rejected"):
                if isinstance(row.get(name), dict) and row[name].keys().isdisjoint(CONTENT[1:]):
                    row[name] = row[name]["content"]
            texts = [answer.text for answer in given_answers(row)]
            names = ["chosen", "rejected"] if "chosen" in row else [f"response {i}" for i in range(1, len(texts) + 1)]
            names = row.get("models", row.get("checkpoint", names))
            if not are_texts(names) or len(names) != len(texts):
                raise InputError('"models", or "checkpoint", does not name the model of each response; fix the row')
        if len({*texts}) < len(texts):
            omitted["equal texts"] += 1
        else:
            yield row | {"checkpoint": names}
    for reason, n in omitted.most_common():
        say(f"{path}: {n:,} rows left out ({reason})")


def prompts_and_held_out(
    path: str, eval_path: str, encoding: Encoding, room: int, most: int, say: Say = print
) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts of at most `room` ids to train on, and up to `most` to evaluate on: of `eval_path`, or some of `path`."""

    def load(path: str) -> list[Prompt]:
        found = read_prompts(path, encoding)
        if template_of(encoding) and isinstance(found[0].columns["prompt"], str):
            what = "the prompts are texts and stand as they are"
            say(f"{path}: {what}; the chat template writes lists of messages alone")
        what = f"prompts of {path} (with --response_len)"
        return keep_short(found, [max(1, len(p.ids)) for p in found], room, what, say)

    held_out, rest = (load(eval_path), load(path)) if eval_path else hold_out(load(path), encoding, most, say)
    by_hash = {prompt_hash(prompt, encoding): prompt for prompt in held_out}  # each once
    if n := len(by_hash.keys() & {prompt_hash(prompt, encoding) for prompt in rest}):
        say(f"{n:,} prompts of {eval_path} are in {path} too: they are trained on and evaluated")
    last = sorted(by_hash)[:most][-1]
    return rest, [prompt for each, prompt in by_hash.items() if each <= last]
