"""Conversations: a list of messages, {"role": "user", "content": "…"}, becomes token ids through a chat template.

The template comes with a model (Jinja, as on Hugging Face). Without one a conversation is written as in Anthropic's HH,
whose dialogues are taken apart here too. A special token's name in a message stays text: no user can forge a turn.
"""

import json
import re

import tiktoken

from data.files import InputError

TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")  # of the plain form
ROLES = {"user": "\n\nHuman: ", "assistant": "\n\nAssistant: ", "system": ""}  # of the plain form
SPEAKERS = {"Human": "user", "Assistant": "assistant"}
Messages = list[dict[str, str]]


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
    for each in messages:
        if not (isinstance(each, dict) and isinstance(each.get("content"), str) and each.get("role") in list(ROLES)):
            raise InputError(f'{where}: a message has a "role" ({", ".join(ROLES)}) and a text "content"; fix the row')
    return [{"role": each["role"], "content": each["content"]} for each in messages]


def plain_form(messages: Messages) -> str:
    """Return a conversation as a dialogue of HH, up to where the assistant is to speak."""
    return "".join(ROLES[each["role"]] + each["content"] for each in messages) + "\n\nAssistant:"


def render(encoding: tiktoken.Encoding, messages: Messages) -> str:
    """Return a conversation as text, up to where the assistant is to speak."""
    chat = template_of(encoding)
    if not chat:
        return plain_form(messages)
    from jinja2.sandbox import ImmutableSandboxedEnvironment  # torch brings it along

    def refuse(message: str) -> None:
        raise ValueError(message)

    world = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    world.filters["tojson"] = lambda x, **options: json.dumps(x, ensure_ascii=False, **options)
    world.globals["raise_exception"] = refuse  # and no clock: a prompt must not change with the date
    # {% generation %} marks the assistant's text for trainers and writes nothing.
    template = re.sub(r"(\{%-?\s*)generation(\s*-?%\})", r"\1if true\2", chat["template"])
    template = re.sub(r"(\{%-?\s*)endgeneration(\s*-?%\})", r"\1endif\2", template)
    names = {name: token for name, token in chat.items() if name != "template"}
    try:
        return world.from_string(template).render(messages=messages, add_generation_prompt=True, **names)
    except Exception as error:  # a template may raise anything
        raise InputError(f"the model's chat template refuses a conversation ({error}); change one of them") from None


def escaped(encoding: tiktoken.Encoding, messages: Messages) -> tuple[Messages, dict[str, str]]:
    """Return the messages with a mark, a private character around a number, for each special token; and mark → name."""
    if any(private in each["content"] for each in messages for private in "\ue000\ue001"):
        raise InputError("a message holds the private characters U+E000 or U+E001; remove them")
    marks: dict[str, str] = {}
    for name in sorted(encoding._special_tokens, key=len, reverse=True):  # the longest first
        mark = f"\ue000{len(marks)}\ue001"
        marked = [each | {"content": each["content"].replace(name, mark)} for each in messages]
        if marked != messages:
            marks[mark] = name
            messages = marked
    return messages, marks


def reply(encoding: tiktoken.Encoding, content: str) -> str:
    """Return the assistant's text as a response: the plain form needs the space after its colon."""
    return content if template_of(encoding) else f" {content.strip()}"


def prompt_text(encoding: tiktoken.Encoding, prompt: str | Messages) -> str:
    """Return a prompt as the text that people and judges see."""
    return prompt if isinstance(prompt, str) else render(encoding, prompt)


def turns(text: str) -> Messages:
    """Return a dialogue as messages. The system says what stands before the first turn."""
    before, *parts = TURN.split(text.replace("\r\n", "\n"))
    found = [{"role": SPEAKERS[who], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2])]
    return [{"role": "system", "content": before.strip()}, *found] if before.strip() else found


def split_dialogue(row: dict, chatml: bool, messages: bool = False) -> dict | str:
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
    elif chatml:
        said = [f"<|im_start|>{each['role']}\n{each['content']}<|im_end|>\n" for each in prompt]
        prompt = "".join(said) + "<|im_start|>assistant\n"
    else:
        prompt, good, bad = plain_form(prompt), f" {good}", f" {bad}"
    return {"prompt": prompt, "chosen": good, "rejected": bad, "opening": opening}
