"""Run a sitting in a terminal."""

import re

from tools.label.sitting import Sitting, question_of

HELP = """t tie, b all are bad, s skip, u change the last answer, u 3 change your third answer, q quit.
Behind a choice: ! if you are very sure, ? if you are not, # and a comment. For example: 1 ! # the other is rude"""
WORDS = {"t": "tie", "b": "bad", "s": "skip"}
SURE = {"": 0, "?": 1, "!": 3}


def ask_in_terminal(sitting: Sitting, annotator: str, instructions: str = "") -> None:
    """Read answers with input(): the positions, best first, or a word of HELP."""
    print(visible(f"{instructions}\n\n{HELP}".strip()))
    changing = None  # the index of an earlier answer
    while (question := sitting.next(annotator)) or changing is not None:
        earlier = sitting.earlier(annotator)
        if changing is not None:
            question = question_of(earlier[changing])
        order, shown = sitting.order(question, annotator), sitting.progress(annotator)
        pace = f", about {shown['seconds_left'] / 60:.0f} min left" if shown["seconds_left"] else ""
        title = f"{shown['done']} done, {shown['left']} to go{pace}"
        if changing is not None:
            title = f"your answer {changing + 1} was: {spelled(sitting.said(earlier[changing]))}"
        print(f"\n{'─' * 72}\n{title}\n\n{visible(question.prompt)}")
        for place, i in enumerate(order, 1):
            answer = question.answers[i]
            print(f"\n[{place}] {visible(answer.text)}{'' if answer.ended else ' …'}")
        best_first = "1 or 2" if len(order) == 2 else "the order, best first (for example 312)"
        said, _, comment = input(f"\nBetter: {best_first}; t, b, s, u, q, or h for help > ").partition("#")
        said = said.strip().lower()
        if said == "q":
            return
        if said == "h":
            print(visible(f"{instructions}\n\n{HELP}".strip()))
            continue
        if back := re.fullmatch(r"u\s*(\d*)", said):
            index = int(back[1] or len(earlier)) - 1
            if 0 <= index < len(earlier):
                changing = index
            else:
                print("there is no such answer")
            continue
        sure = said[-1:] if said[-1:] in SURE else ""
        said = said.removesuffix(sure).strip()
        verdict: str | list[int] = WORDS.get(said) or [int(digit) - 1 for digit in re.findall(r"\d", said)]
        if len(order) == 2 and verdict in ([0], [1]):
            verdict.append(1 - verdict[0])
        try:
            if changing is None:
                sitting.answer(annotator, question.number, verdict, comment.strip(), SURE[sure])
            else:
                sitting.revise(annotator, changing, verdict, comment.strip(), SURE[sure])
            changing = None
        except ValueError as error:
            print(error)
    print("\nThat was the last one. Thank you.")


def spelled(said: str | list[int]) -> str:
    return said if isinstance(said, str) else " > ".join(str(place + 1) for place in said)


def visible(text: str) -> str:
    """Replace the control characters that could move a terminal's cursor."""
    return re.sub(r"[^\n\t\x20-\x7e\xa0-\ud7ff\ue000-\U0010ffff]", "�", text)
