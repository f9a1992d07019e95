"""Summarise a label file."""

import math
import statistics
from collections import Counter

from data.files import is_verdict
from tools.label.agreement import agreement

SURE = {3: "very sure", 2: "fairly sure", 1: "not sure"}


def report(rows: list[dict]) -> str:
    """Report counts by annotator, position bias, wins by checkpoint, and agreement on questions that people share."""
    preferred = [row for row in rows if not is_verdict(row)]
    lines = ["annotator             preferences   ties  all bad  skips   median seconds"]
    for who in sorted({row["annotator"] for row in rows}):
        mine = [row for row in rows if row["annotator"] == who]
        kinds = Counter(row["verdict"] if is_verdict(row) else "preferred" for row in mine)
        pace = statistics.median(row["seconds"] for row in mine)
        counts = f"{kinds['preferred']:>12} {kinds['tie']:>6} {kinds['bad']:>8} {kinds['skip']:>6}"
        lines.append(f"{who:<20} {counts} {pace:>16.1f}")
    said = [(name, sum(row.get("sure") == sure for row in rows)) for sure, name in SURE.items()]
    if any(n for _, n in said):
        lines.append("\nhow sure: " + ", ".join(f"{n} {name}" for name, n in said))
    if preferred:
        places = Counter(row["position"] for row in preferred)
        n = len(preferred)
        share, chance = places[0] / n, statistics.mean(1 / len(row.get("ranked", "12")) for row in preferred)
        lines.append(
            f"\nposition: the first shown was preferred in {share:.3f} ± {math.sqrt(share * (1 - share) / n):.3f} "
            f"of {n} (without bias: {chance:.3f})"
        )
    pairs = [row["checkpoint"] for row in preferred if len(set(row["checkpoint"])) > 1]
    for name in sorted({name for pair in pairs for name in pair}):
        outcomes = [pair[0] == name for pair in pairs if name in pair]
        lines.append(
            f"{name} was preferred in {sum(outcomes)} of the {len(outcomes)} questions that compare it with another"
        )
    lines.append(agreement(rows))
    return "\n".join(lines)


def anonymous(rows: list[dict]) -> list[dict]:
    """Return the rows with P1, P2 … for people, in the order of the file. Further answers change no number."""
    names = {who: f"P{i}" for i, who in enumerate(dict.fromkeys(row["annotator"] for row in rows), 1)}
    return [row | {"annotator": names[row["annotator"]]} for row in rows]
