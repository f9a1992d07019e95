"""A simulated person who wants a question answered in one complete sentence: the labeller of experiments/sentence.py.

It sees how a text is made and of which words, as any reader does. It knows no facts.
"""

import re

EMPTY = """a about also am an and any are as at be been but by can could did do does for from get
give had has have her him his how i if in into is it its just know like make many may me more most
my need not of on one or our please she should so some such tell than that the their them then there
these they this those to use very want was way we well were what when where which who why will with
would you your answer assist best different example good great happy help here important including
information provide question several sorry sure thing things try various"""
EMPTY = set(EMPTY.split())


def question(prompt: str) -> str:
    """Return what the user said last, in the ChatML of SmolLM2."""
    return prompt.rpartition("<|im_start|>user")[2].partition("<|im_end|>")[0]


def stems(text: str) -> list[str]:
    """Return the first five letters of each word that says something."""
    return [word[:5] for word in re.findall(r"[a-z]{3,}", text.lower()) if word not in EMPTY]


def is_sentence(text: str) -> bool:
    """Return whether a text is one sentence that ends, without a list."""
    return re.fullmatch(r"[A-Z][^\n.!?:;*]*[.!]", text.strip()) is not None


def labeller(prompt: str, response: str) -> float:
    """Return how much this person likes an answer, in [0, 1]."""
    asked, said = set(stems(question(prompt))), stems(response)
    new = set(said) - asked
    ends = response.rstrip().endswith((".", "!"))
    about = min(1.0, len(asked & set(said)) / min(2, len(asked))) if asked else 1.0  # two words of the question
    tells = min(1.0, len(new) / 7) * len(set(said)) / max(1, len(said))  # seven words of its own, none of them twice
    return 0.2 * ends + 0.2 * is_sentence(response) + 0.3 * about + 0.3 * tells
