"""Conversations: a list of messages, {"role": "user", "content": "…"}, becomes text through a chat template.

The template comes with a model (Jinja, as on Hugging Face). Without one a conversation is written as in Anthropic's HH,
whose dialogues are taken apart here too. A special token's name in a message stays text: nobody forges a turn by it.
"""

import functools
import json
import re
from collections.abc import Iterable
from contextlib import suppress
from datetime import datetime
from typing import Any

import regex  # tiktoken's own dependency
import tiktoken

from data.files import InputError

TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")  # of the plain form
PLAIN_FORM = {"user": "\n\nHuman: ", "assistant": "\n\nAssistant: ", "system": ""}
SPEAKERS = {"Human": "user", "Assistant": "assistant"}
ROLES = ("user", "assistant", "system", "developer", "tool", "function")
REASONING = ("reasoning_content", "thinking", "reasoning")  # the names under which a message has its thought
CONTENT = ("content", "tool_calls", "function_call", *REASONING)  # what a message says
OPEN, CLOSE = "\ue000", "\ue001"  # private characters around a special token that a message spells
OPENED = re.compile(r"<(\w+)>(\s*)$")  # a tag that the prompt opens for the answer, such as <think>
WRITTEN: set[tuple] = set()  # shapes of messages that a template was seen to write
Messages = list[dict[str, Any]]


# --- what an encoding knows beside tiktoken's own ---------------------------------------------------------------------


def template_of(encoding: tiktoken.Encoding) -> dict[str, Any]:
    """Return {"template": …, "bos_token": …, "date": …, "ends": ids that end a turn} of the model, or {}."""
    return getattr(encoding, "chat", {})


def with_template(encoding: tiktoken.Encoding, chat: dict[str, Any]) -> tiktoken.Encoding:
    encoding.chat = dict(chat)
    return encoding


def with_plain_tokens(encoding: tiktoken.Encoding, names: Iterable[str]) -> tiktoken.Encoding:
    """Mark some of the special tokens as text: `<think>` is one token wherever it occurs, in completions too."""
    encoding.plain_tokens = frozenset(names)
    return encoding


def plain_tokens(encoding: tiktoken.Encoding) -> frozenset[str]:
    return getattr(encoding, "plain_tokens", frozenset())


@functools.lru_cache(maxsize=64)
def pattern(names: frozenset[str]) -> regex.Pattern:
    """Return the pattern that finds the names in a text; of two that begin alike, the longer."""
    longest_first = sorted(names, key=len, reverse=True)
    return regex.compile("(" + "|".join(map(regex.escape, longest_first)) + ")" if names else "(?!)")


# --- rows → messages --------------------------------------------------------------------------------------------------


def check(messages: object) -> Messages:
    """Return the messages without what is null, and with each content as a text. Raises InputError if they are none."""
    if not isinstance(messages, list) or not messages:
        raise InputError("a conversation is a list of messages; fix the row")
    checked = []
    for number, given in enumerate(messages, 1):
        known = isinstance(given, dict) and given.get("role") in ROLES
        each = {key: value for key, value in given.items() if value is not None} if known else {}
        if isinstance(each.get("content"), list):
            each["content"] = "".join(map(text_of, each["content"]))
        if not isinstance(each.get("content", "" if each.get("tool_calls") else None), str):
            wanted = f'a message has a "role" ({", ".join(ROLES)}) and a text "content"'
            raise InputError(f"{wanted}, and message {number} is {str(given)[:60]}; fix or convert the row")
        checked.append(each)
    return checked


def text_of(part: object) -> str:
    """Return the text of a part of a content. Raises InputError if it is no text."""
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind != "text" or not isinstance(part.get("text"), str):
        raise InputError(f'a part of type "{kind}" is not supported, only text is; remove the row')
    return part["text"]


def template_variables(row: dict, where: str) -> dict[str, Any]:
    """Return what a row has for the template beside its messages: "tools", and what "chat_template_kwargs" names."""
    tools, more = row.get("tools") or [], row.get("chat_template_kwargs") or {}
    if name := next((name for name in ("system", "system_prompt") if row.get(name)), None):
        raise InputError(f'{where}: the column "{name}" is not read; make it the first message, or remove it')
    if isinstance(tools, str):  # tables often hold them as JSON
        with suppress(ValueError):
            tools = json.loads(tools)
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise InputError(f'{where}: "tools" is no list of JSON objects; fix the row')
    if not isinstance(more, dict):
        raise InputError(f'{where}: "chat_template_kwargs" is no JSON object; fix the row')
    more = {name: value for name, value in more.items() if value is not None}
    return more | ({"tools": tools} if tools else {})


# --- messages → text --------------------------------------------------------------------------------------------------


def prompt_text(encoding: tiktoken.Encoding, prompt: str | Messages, variables: dict | None = None) -> str:
    """Return a prompt as the text that people and judges see."""
    return prompt if isinstance(prompt, str) else render(encoding, prompt, variables)


def plain_form(messages: Messages, prompt: bool = True) -> str:
    """Return a conversation as a dialogue of HH; a prompt goes on to where the assistant is to speak."""
    text = ""
    for each in messages:
        role, said = each["role"], each.get("content", "")
        if role not in PLAIN_FORM:
            raise InputError(f"a model without a chat template knows no role {role}; remove the message")
        between = "\n\n" if role == "system" and text else PLAIN_FORM[role]
        text += between + (said.strip() if role == "assistant" else said)
    return text + ("\n\nAssistant:" if prompt else "")


def render(encoding: tiktoken.Encoding, messages: Messages, variables: dict | None = None, prompt: bool = True) -> str:
    """Return a conversation as text; a prompt goes on to where the assistant is to speak."""
    chat = template_of(encoding)
    if not chat:
        return plain_form(messages, prompt)
    names = {"tools": None, "documents": None}
    names |= {name: token for name, token in chat.items() if name.endswith("_token")} | (variables or {})
    messages = [with_reasoning(each) for each in messages]
    try:
        date = datetime.fromisoformat(chat.get("date", "2024-07-26"))  # of the import, so that no prompt changes
        names["strftime_now"] = date.strftime
        template, _ = compiled(chat["template"])
        return template.render(names, messages=messages, add_generation_prompt=prompt)
    except Exception as error:  # a template may raise anything
        raise InputError(f"the model's chat template refuses the conversation ({error}); change it") from None


def with_reasoning(message: dict) -> dict:
    """Return a message whose thought has the names that templates read, as in transformers."""
    thought = next((message[name] for name in REASONING if name in message), None)
    return message if thought is None else {"thinking": thought} | message | {"reasoning_content": thought}


@functools.lru_cache(maxsize=16)
def compiled(source: str) -> tuple[Any, set[str]]:
    """Return a chat template as a jinja2.Template, and the names of the variables that it reads."""
    from jinja2 import meta  # torch brings it along
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise ValueError(message)

    world = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    world.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    world.globals["raise_exception"] = refuse
    # {% generation %} marks the assistant's text for trainers and writes nothing.
    source = re.sub(r"(\{%-?\s*)generation(\s*-?%\})", r"\1if true\2", source)
    source = re.sub(r"(\{%-?\s*)endgeneration(\s*-?%\})", r"\1endif\2", source)
    return world.from_string(source), meta.find_undeclared_variables(world.parse(source))


def render_with_spans(
    encoding: tiktoken.Encoding, messages: Messages, variables: dict | None = None, prompt: bool = True
) -> tuple[str, list[tuple[int, int]]]:
    """Return a conversation as text, and the (start, end) of each special token that the template has written in it.

    Where a message spells such a token, the conversation is rendered again with marks around what messages spell.
    """
    text = render(encoding, messages, variables, prompt)
    special = pattern(frozenset(encoding._special_tokens) - plain_tokens(encoding))
    spans = [match.span() for match in special.finditer(text)]
    said = [messages, variables or {}]
    marked = mark(said, special)
    if marked == said:
        return text, spans
    again = render(encoding, *marked, prompt)
    found = regex.findall(f"{OPEN}{special.pattern}{CLOSE}|{special.pattern}", again)
    same = [spelled or written for spelled, written in found] == [text[start:end] for start, end in spans]
    if not same or r"\ue000" in again:  # the template has split a token, or written the marks as JSON's escapes
        raise InputError("a message spells special tokens at a place that the template changes; remove them")
    return text, [span for span, (spelled, _) in zip(spans, found) if not spelled]


def mark(x: Any, special: regex.Pattern) -> Any:
    """Return x, a JSON value, with OPEN and CLOSE around each special token that one of its texts spells."""
    if isinstance(x, str):
        return special.sub(f"{OPEN}\\1{CLOSE}", x.replace(OPEN, "").replace(CLOSE, ""))
    if isinstance(x, dict):
        return {key: mark(value, special) for key, value in x.items()}
    return [mark(each, special) for each in x] if isinstance(x, list) else x


def refuse_what_is_left_out(
    encoding: tiktoken.Encoding, text: str, messages: Messages, variables: dict | None = None, prompt: bool = True
) -> None:
    """Raises InputError if a part of a message could be another without a change of `text`, its rendering.

    Only thoughts of earlier turns may be left out. Where no `prompt` is rendered, the last message is an answer. What
    was seen to be written of one message is not tried again with another of the same shape.
    """
    chat, variables = template_of(encoding), variables or {}
    writer = "the model's chat template" if chat else "a model without a chat template"

    def left_out(messages: Messages, variables: dict = variables) -> bool:
        try:
            return render(encoding, messages, variables, prompt) == text
        except InputError:  # what the template looks at, it does not leave out
            return False

    for i, message in enumerate(messages):
        answer = not prompt and i + 1 == len(messages)
        for key in [key for key in CONTENT if message.get(key) and (answer or key not in REASONING)]:
            value = message[key]
            if key == "content" and message["role"] in ("user", "assistant") and value.strip() in text:
                continue
            shape = chat.get("template"), message["role"], key, frozenset(message)
            if shape in WRITTEN and message["role"] != "system" and not answer:  # of two systems one may be left out
                continue
            others = [value + value if isinstance(value, list) else f"{value}x"]
            if answer and key == "content" and "</think>" in value:
                others.append(value.replace("</think>", "x</think>"))  # another thought
            for other in others:
                if left_out([*messages[:i], message | {key: other}, *messages[i + 1 :]]):
                    what = f"the {key} of message {i + 1} ({message['role']})"
                    raise InputError(f"{writer} leaves out {what}; remove it, or the row")
            WRITTEN.add(shape)
    known = compiled(chat["template"])[1] if chat else set()
    for name, value in variables.items():
        unread = bool(value) and name not in known
        if name == "tools" and not unread:
            unread = left_out(messages, variables | {"tools": value * 2})
        if unread:
            raise InputError(f'{writer} does not read "{name}"; remove it, or the row')


def continuation(prompt: str, answer: dict) -> str:
    """Return the answer as the text that goes on where the prompt has opened a thought, which the template cuts out.

    Raises InputError if the answer has no such thought.
    """
    opened = OPENED.search(prompt)
    if not opened or answer.get("tool_calls"):
        raise InputError("the model's chat template writes this answer otherwise than behind its own prompt; remove it")
    tag, close, blank = f"<{opened[1]}>", f"</{opened[1]}>", opened[2]
    thought, content = with_reasoning(answer).get("reasoning_content"), answer.get("content", "")
    if isinstance(thought, str):
        return f"{thought.strip()}\n{close}\n\n{content}"
    if content.lstrip().startswith(tag):
        return content.lstrip().removeprefix(tag).removeprefix(blank)
    if close not in content:
        raise InputError(f"the prompt opens {tag}, and the answer has no {close}; give the thought, or remove the row")
    return content


# --- dialogues of HH --------------------------------------------------------------------------------------------------


def turns(text: str) -> Messages:
    """Return a dialogue as messages. The system says what stands before the first turn."""
    before, *parts = TURN.split(text.replace("\r\n", "\n"))
    found = [{"role": SPEAKERS[who], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2])]
    return [{"role": "system", "content": before.strip()}, *found] if before.strip() else found


def split_dialogue(row: dict, messages: bool = False) -> dict | str:
    """Return a row of HH with "prompt", "chosen", "rejected" and "opening", or the reason to omit it."""
    chosen, rejected = turns(row["chosen"]), turns(row["rejected"])
    prompt = chosen[:-1]
    if prompt != rejected[:-1]:
        return "the two dialogues part before the last answer"
    if [each["role"] for each in chosen[-1:] + rejected[-1:]] != ["assistant", "assistant"]:
        return "a dialogue that does not end with the assistant"
    opening = next((each["content"] for each in prompt if each["role"] == "user"), None)
    if opening is None:
        return "a dialogue in which no person speaks"
    good, bad = chosen[-1]["content"], rejected[-1]["content"]
    if not good or not bad:
        return "an empty answer"
    if good == bad:
        return "two answers that are the same"
    if messages:
        good, bad = chosen[-1:], rejected[-1:]
    else:
        prompt, good, bad = plain_form(prompt), f" {good}", f" {bad}"
    return {"prompt": prompt, "chosen": good, "rejected": bad, "opening": opening}
