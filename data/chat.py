"""Conversations: a list of messages, {"role": "user", "content": "…"}, becomes token ids through a chat template.

The template comes with a model (Jinja, as on Hugging Face) and is kept with its tokenizer. Without one a conversation
is written as in Anthropic's HH, whose dialogues are taken apart here too. What a user's text spells stays text: it
cannot forge a turn.
"""

import json
import re
from typing import Any

import tiktoken

from data.files import InputError

TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")  # of the plain form
ROLES = {"user": "\n\nHuman: ", "assistant": "\n\nAssistant: ", "system": ""}  # of the plain form
FIRST, LAST = "\ue000", "\ue001"  # around the number of a name that a user has spelled: characters for private use
Messages = list[dict[str, str]]
GENERATION = re.compile(
    r"\{%(-?)\s*(end)?generation\s*(-?)%\}"
)  # marks the assistant's text for trainers, writes nothing


def _if_true(tag: re.Match) -> str:
    return f"{{%{tag[1]} {'endif' if tag[2] else 'if true'} {tag[3]}%}}"


def template_of(encoding: tiktoken.Encoding) -> dict[str, str]:
    """Return {"template": …, "bos_token": …, "eos_token": …} of the model, or {}."""
    return getattr(encoding, "chat", {})


def with_template(encoding: tiktoken.Encoding, chat: dict[str, str]) -> tiktoken.Encoding:
    encoding.chat = dict(chat)
    return encoding


def check(messages: object, where: str) -> Messages:
    """Return the messages as roles and contents. Raises InputError if they are none."""
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{where}: a conversation is a list of messages; fix the row")
    found = []
    for message in messages:
        role, content = (message.get(key) if isinstance(message, dict) else None for key in ("role", "content"))
        if not isinstance(content, str) or role not in ROLES:
            raise InputError(f'{where}: a message has a "role" ({", ".join(ROLES)}) and a text "content"; fix the row')
        found.append({"role": role, "content": content})
    return found


def render(encoding: tiktoken.Encoding, messages: Messages) -> str:
    """Return a conversation as text, up to where the assistant is to speak."""
    chat = template_of(encoding)
    if not chat:
        return "".join(ROLES[each["role"]] + each["content"] for each in messages) + "\n\nAssistant:"
    import jinja2  # torch brings it along
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    world = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    world.filters["tojson"] = lambda x, **options: json.dumps(x, ensure_ascii=False, **options)
    world.globals["raise_exception"] = refuse  # and no clock: a prompt must not change with the date
    names: dict[str, Any] = {key: value for key, value in chat.items() if key != "template"}
    try:
        return world.from_string(GENERATION.sub(_if_true, chat["template"])).render(
            messages=messages, add_generation_prompt=True, **names
        )
    except Exception as error:  # a template may raise anything
        raise InputError(
            f"the model's chat template refuses a conversation ({error}); change the messages, or the template"
        ) from None


def escaped(encoding: tiktoken.Encoding, messages: Messages) -> tuple[Messages, dict[str, str]]:
    """Return the messages with marks in place of the special tokens that they spell, and mark → what it stands for."""
    marks: dict[str, str] = {}
    plain = []
    longest_first = sorted(encoding._special_tokens, key=len, reverse=True)
    for message in messages:
        content = message["content"]
        if FIRST in content or LAST in content:
            raise InputError("a message holds the private characters U+E000 or U+E001; remove them")
        for name in longest_first:
            if name in content:
                mark = f"{FIRST}{len(marks)}{LAST}"
                marks[mark] = name
                content = content.replace(name, mark)
        plain.append(message | {"content": content})
    return plain, marks


def reply(encoding: tiktoken.Encoding, content: str) -> str:
    """Return the assistant's text as a response: the plain form needs the space after its colon."""
    return content if template_of(encoding) else f" {content.strip()}"


def prompt_text(encoding: tiktoken.Encoding, prompt: str | Messages) -> str:
    """Return a prompt as the text that people and judges see."""
    return prompt if isinstance(prompt, str) else render(encoding, prompt)


def turns(text: str) -> list[tuple[str, str]]:
    """Return (Human or Assistant, text) for every turn, without the spaces around the text.

    What stands before the first turn is a turn of the System.
    """
    parts = TURN.split(text.replace("\r\n", "\n"))
    found = [(who, said.strip()) for who, said in zip(parts[1::2], parts[2::2])]
    return [("System", parts[0].strip()), *found] if parts[0].strip() else found


def split_dialogue(row: dict, chatml: bool, messages: bool = False) -> dict | str:
    """Return a row of HH with "prompt", "chosen", "rejected" and "opening", or the reason to omit it."""
    chosen, rejected = turns(row["chosen"]), turns(row["rejected"])
    if chosen[:-1] != rejected[:-1]:
        return "the two dialogues part before the last answer"
    if not chosen or not rejected or (chosen[-1][0], rejected[-1][0]) != ("Assistant", "Assistant"):
        return "a dialogue that does not end with the assistant"
    opening = next((text for who, text in chosen if who == "Human"), None)
    if opening is None:
        return "a dialogue in which no person speaks"
    history, good, bad = chosen[:-1], chosen[-1][1], rejected[-1][1]
    if not good or not bad:
        return "an empty answer"
    if good == bad:
        return "two answers that are the same"
    roles = {"System": "system", "Human": "user", "Assistant": "assistant"}
    if messages:
        prompt = [{"role": roles[who], "content": text} for who, text in history]
        answers = ([{"role": "assistant", "content": text}] for text in (good, bad))
        return {"prompt": prompt, "chosen": next(answers), "rejected": next(answers), "opening": opening}
    if chatml:
        said = [f"<|im_start|>{roles[who]}\n{text}<|im_end|>\n" for who, text in history]
        prompt, space = "".join(said) + "<|im_start|>assistant\n", ""
    else:
        said = [text if who == "System" else f"\n\n{who}: {text}" for who, text in history]
        prompt, space = "".join(said) + "\n\nAssistant:", " "
    return {"prompt": prompt, "chosen": space + good, "rejected": space + bad, "opening": opening}
