"""Summarise a file of answers: counts, position bias, and agreement between people."""

import itertools
import math
import statistics
from collections import Counter, defaultdict

import numpy as np

from data.files import is_verdict
from data.rng import shuffler
from tools.label.sitting import question_of

SURE = {3: "very sure", 2: "fairly sure", 1: "not sure"}
RESAMPLES = 2000


def report(rows: list[dict]) -> str:
    """Report counts by annotator, position bias, wins by checkpoint, and agreement on questions that people share."""
    lines = ["annotator             preferences   ties  all bad  skips   median seconds"]
    for who in sorted({row["annotator"] for row in rows}):
        mine = [row for row in rows if row["annotator"] == who]
        n = Counter(row["verdict"] if is_verdict(row) else "preferred" for row in mine)
        seconds = statistics.median(row["seconds"] for row in mine)
        lines.append(f"{who:<20} {n['preferred']:>12} {n['tie']:>6} {n['bad']:>8} {n['skip']:>6} {seconds:>16.1f}")
    if sure := Counter(row["sure"] for row in rows if row.get("sure") in list(SURE)):
        lines.append("\nhow sure: " + ", ".join(f"{sure[level]} {name}" for level, name in SURE.items()))
    preferred = [row for row in rows if not is_verdict(row)]
    if n := len(preferred):
        share = sum(row["position"] == 0 for row in preferred) / n
        error = math.sqrt(share * (1 - share) / n)
        fair = statistics.mean(1 / len(row["checkpoint"]) for row in preferred)
        lines.append(f"\nthe first shown was preferred in {share:.3f} ± {error:.3f} of {n} (without bias: {fair:.3f})")
    compared = [row["checkpoint"] for row in preferred if len(set(row["checkpoint"])) > 1]  # each best first
    for name in sorted(set(itertools.chain(*compared))):
        won = [names[0] == name for names in compared if name in names]
        lines.append(f"{name} was preferred in {sum(won)} of the {len(won)} questions that compare it with another")
    return "\n".join([*lines, agreement(rows)])


def agreement(rows: list[dict]) -> str:
    """Report alpha, for all people and for each two, and how often two people said the same.

    A value is "tie", "bad", or the number of the best response, by checkpoint and then by text. A skip is no value.
    """
    units: defaultdict[tuple, dict[str, object]] = defaultdict(dict)  # (prompt, number) → person → value
    for row in rows:
        question = question_of(row)
        responses = [(name, answer.text) for name, answer in zip(question.checkpoints, question.answers)]
        if row.get("verdict") != "skip":
            best = sorted(responses).index(responses[0])
            units[row["prompt"], question.number][row["annotator"]] = row.get("verdict", best)
    people = sorted({who for said in units.values() for who in said})
    groups = [people, *itertools.combinations(people, 2)] if len(people) > 2 else [people]
    lines = []
    for group in groups:
        part = {question: {who: said[who] for who in group if who in said} for question, said in units.items()}
        pairs = [a == b for said in part.values() for a, b in itertools.combinations(said.values(), 2)]
        if not pairs:
            continue
        value, low, high = alpha(part)
        figure = "undefined: all said the same" if math.isnan(value) else f"{value:.3f} ({low:.3f} to {high:.3f})"
        name = "agreement" if group is people else f"  {' and '.join(group)}"
        lines.append(f"{name}: the same in {sum(pairs)} of {len(pairs)} pairs of answers, alpha {figure}")
    if not lines:
        return "agreement: no two people judged the same question (use --people 2)"
    lines.append("(Krippendorff's alpha of the best response, tie or all bad; 95% by a bootstrap over prompts)")
    return "\n".join(lines)


def alpha(units: dict[tuple, dict[str, object]]) -> tuple[float, float, float]:
    """Return Krippendorff's alpha for nominal values, and the 2.5th and 97.5th percentile of its bootstrap.

        1 − (n − 1) Σ_u Σ_c n_uc (n_u − n_uc) / (n_u − 1)  /  (n² − Σ_c n_c²)

    for n_uc values c in unit u, n_u = Σ_c n_uc ≥ 2 (Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability",
    section C). The bootstrap draws prompts, because the questions of one prompt are not independent. nan: one value.
    """
    shared = [(prompt, list(said.values())) for (prompt, _), said in units.items() if len(said) > 1]
    values = {value for _, said in shared for value in said}
    if len(values) < 2:
        return math.nan, math.nan, math.nan
    counts = np.array([[said.count(value) for value in values] for _, said in shared])  # n_uc
    totals = counts.sum(1, keepdims=True)  # n_u
    disagreement = (counts * (totals - counts) / (totals - 1)).sum(1)  # of each unit
    places = {prompt: place for place, prompt in enumerate(dict.fromkeys(prompt for prompt, _ in shared))}
    place = [places[prompt] for prompt, _ in shared]  # of each unit's prompt

    def estimate(times: np.ndarray) -> float:
        """Return alpha if each prompt counts so many times."""
        weights = times[place]
        n_c = weights @ counts
        n = n_c.sum()
        expected = n**2 - (n_c**2).sum()
        return 1 - (n - 1) * (weights @ disagreement) / expected if expected else math.nan

    rng, chances = shuffler("alpha"), np.full(len(places), 1 / len(places))
    draws = [estimate(rng.multinomial(len(places), chances)) for _ in range(RESAMPLES)]
    low, high = np.nanpercentile(draws, [2.5, 97.5])
    return float(estimate(np.ones(len(places), dtype=int))), float(low), float(high)
