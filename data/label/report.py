"""Summarise a label file."""

import itertools
import math
import statistics
from collections import Counter, defaultdict

from data.files import is_verdict


def report(rows: list[dict]) -> str:
    """Report counts by annotator, position bias, wins by checkpoint, and agreement on questions that people share."""
    preferred = [row for row in rows if not is_verdict(row)]
    lines = ["annotator             preferences   ties  skips   median seconds"]
    for who in sorted({row["annotator"] for row in rows}):
        mine = [row for row in rows if row["annotator"] == who]
        kinds = Counter(row.get("verdict", "preferred") for row in mine)
        pace = statistics.median(row["seconds"] for row in mine)
        lines.append(f"{who:<20} {kinds['preferred']:>12} {kinds['tie']:>6} {kinds['skip']:>6} {pace:>16.1f}")
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
    choices: defaultdict[tuple, list] = defaultdict(list)  # (prompt, responses) → each person's best response
    for row in rows:
        if row.get("verdict") != "skip":
            texts = row.get("responses") or row.get("ranked") or [row["chosen"], row["rejected"]]
            choices[row["prompt"], *sorted(texts)].append(None if is_verdict(row) else texts[0])
    shared = [list(itertools.combinations(best, 2)) for best in choices.values() if len(best) > 1]
    if shared:
        same = [a == b for pair in shared for a, b in pair]
        lines.append(f"agreement on the best: {sum(same)} of {len(same)} pairs of people with the same question")
    else:
        lines.append("agreement: no two people judged the same question (use --people 2)")
    return "\n".join(lines)
