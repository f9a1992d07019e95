"""Run a sitting in a terminal."""

import re

from tools.label.sitting import Sitting, question_of

HELP = """t tie, b all are bad, s skip, u change the last answer, u 3 change your third answer, q quit.
Behind a choice: ! if you are very sure, ? if you are not, # and a comment. For example: 1 ! # the other is rude"""
WORDS = {"t": "tie", "b": "bad", "s": "skip"}
SURE = {"": 0, "?": 1, "!": 3}


def ask_in_terminal(sitting: Sitting, annotator: str, instructions: str = "") -> None:
    """Read answers with input(): the positions, best first, or a word of HELP."""
    guide = visible(f"{instructions}\n\n{HELP}".strip())
    print(guide)
    index = None  # of the earlier answer that is being changed
    while (question := sitting.next(annotator)) or index is not None:
        earlier, shown = sitting.earlier(annotator), sitting.progress(annotator)
        pace = f", about {shown['seconds_left'] / 60:.0f} min left" if shown["seconds_left"] else ""
        title = f"{shown['done']} done, {shown['left']} to go{pace}"
        if index is not None:
            question, said = question_of(earlier[index]), sitting.said(earlier[index])
            said = said if isinstance(said, str) else " > ".join(str(place + 1) for place in said)
            title = f"your answer {index + 1} was: {said}"
        print(f"\n{'─' * 72}\n{title}\n\n{visible(question.prompt)}")
        for place, i in enumerate(sitting.order(question, annotator), 1):
            print(f"\n[{place}] {visible(question.answers[i].text)}{'' if question.answers[i].ended else ' …'}")
        choice = "1 or 2" if len(question.answers) == 2 else "the order, best first (for example 312)"
        typed, _, comment = input(f"\nBetter: {choice}; t, b, s, u, q, or h for help > ").partition("#")
        typed, comment = typed.strip().lower(), comment.strip()
        if typed == "q":
            return
        if typed == "h":
            print(guide)
        elif back := re.fullmatch(r"u\s*(\d*)", typed):
            wanted = int(back[1] or len(earlier)) - 1
            if 0 <= wanted < len(earlier):
                index = wanted
            else:
                print("there is no such answer")
        else:
            word = typed.rstrip("?!").strip()
            verdict = WORDS.get(word) or [int(digit) - 1 for digit in re.findall(r"\d", word)]
            if len(question.answers) == 2 and verdict in ([0], [1]):
                verdict.append(1 - verdict[0])
            try:
                sure = SURE.get(typed[len(word) :].strip(), 0)
                if index is None:
                    sitting.answer(annotator, question.number, verdict, comment, sure)
                else:
                    sitting.revise(annotator, index, verdict, comment, sure)
                index = None
            except ValueError as error:
                print(error)
    print("\nThat was the last one. Thank you.")


def visible(text: str) -> str:
    """Replace the control characters that could move a terminal's cursor."""
    return re.sub(r"[^\n\t\x20-\x7e\xa0-\ud7ff\ue000-\U0010ffff]", "�", text)
