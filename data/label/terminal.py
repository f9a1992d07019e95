"""Run a sitting in a terminal."""

import re

from data.label.sitting import Sitting


def ask_in_terminal(sitting: Sitting, annotator: str) -> None:
    """Read answers with input(): the positions, best first; t for a tie, s to skip, u to undo, q to stop."""
    while question := sitting.next(annotator):
        order, shown = sitting.order(question, annotator), sitting.progress(annotator)
        pace = f", about {shown['seconds_left'] / 60:.0f} min left" if shown["seconds_left"] else ""
        print(f"\n{'─' * 72}\n{shown['done']} done, {shown['left']} to go{pace}\n\n{visible(question.prompt)}")
        for place, i in enumerate(order, 1):
            answer = question.answers[i]
            print(f"\n[{place}] {visible(answer.text)}{'' if answer.ended else ' …'}")
        best_first = "1 or 2" if len(order) == 2 else "the order, best first (for example 312)"
        said = input(f"\nBetter: {best_first}; t tie, s skip, u undo, q quit > ").strip().lower()
        if said == "q":
            return
        if said == "u":
            print("the last answer was removed" if sitting.undo(annotator) else "there is no answer to remove")
            continue
        verdict: str | list[int] = {"t": "tie", "s": "skip"}.get(said, said)
        if verdict == said:
            verdict = [int(digit) - 1 for digit in re.findall(r"\d", said)]
            if len(order) == 2 and verdict in ([0], [1]):
                verdict.append(1 - verdict[0])
        try:
            sitting.answer(annotator, question.number, verdict)
        except ValueError as error:
            print(error)
    print("\nThat was the last one. Thank you.")


def visible(text: str) -> str:
    """Replace the control characters that could move a terminal's cursor."""
    return re.sub(r"[^\n\t\x20-\x7e\xa0-\ud7ff\ue000-\U0010ffff]", "�", text)
