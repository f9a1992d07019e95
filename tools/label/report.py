"""Summarise a file of answers: counts, position bias, and agreement between people."""

import itertools
import math
import statistics
from collections import Counter, defaultdict

import numpy as np

from data.files import is_verdict
from data.rng import shuffler

SURE = {3: "very sure", 2: "fairly sure", 1: "not sure"}
RESAMPLES = 2000
Units = dict[tuple, dict[str, object]]  # question (its prompt, its responses) → person → value


def report(rows: list[dict]) -> str:
    """Report counts by annotator, position bias, wins by checkpoint, and agreement on questions that people share."""
    lines = ["annotator             preferences   ties  all bad  skips   median seconds"]
    for who in sorted({row["annotator"] for row in rows}):
        mine = [row for row in rows if row["annotator"] == who]
        kinds = Counter(row["verdict"] if is_verdict(row) else "preferred" for row in mine)
        counts = f"{kinds['preferred']:>12} {kinds['tie']:>6} {kinds['bad']:>8} {kinds['skip']:>6}"
        lines.append(f"{who:<20} {counts} {statistics.median(row['seconds'] for row in mine):>16.1f}")
    sure = Counter(row.get("sure", 0) for row in rows)
    if any(sure[level] for level in SURE):
        lines.append("\nhow sure: " + ", ".join(f"{sure[level]} {name}" for level, name in SURE.items()))
    preferred = [row for row in rows if not is_verdict(row)]
    if n := len(preferred):
        share = sum(row["position"] == 0 for row in preferred) / n
        chance = statistics.mean(1 / len(row["checkpoint"]) for row in preferred)
        error = math.sqrt(share * (1 - share) / n)
        first = f"the first shown was preferred in {share:.3f} ± {error:.3f} of {n}"
        lines.append(f"\nposition: {first} (without bias: {chance:.3f})")
    pairs = [row["checkpoint"] for row in preferred if len(set(row["checkpoint"])) > 1]
    for name in sorted(set(itertools.chain(*pairs))):
        won = [pair[0] == name for pair in pairs if name in pair]
        lines.append(f"{name} was preferred in {sum(won)} of the {len(won)} questions that compare it with another")
    return "\n".join([*lines, agreement(rows)])


def agreement(rows: list[dict]) -> str:
    """Report alpha, for all people and for each two, and how often two people said the same.

    A value is "tie", "bad", or the number of the best response, by checkpoint and then by text. So with two models it
    says which of them was preferred. A skip is no value.
    """
    units: defaultdict[tuple, dict[str, object]] = defaultdict(dict)
    for row in [row for row in rows if row.get("verdict") != "skip"]:
        texts = row["responses"] if is_verdict(row) else row.get("ranked") or [row["chosen"], row["rejected"]]
        numbered = sorted(zip(row["checkpoint"], texts))
        best = numbered.index((row["checkpoint"][0], texts[0]))
        units[row["prompt"], tuple(numbered)][row["annotator"]] = row["verdict"] if is_verdict(row) else best
    people = sorted({who for said in units.values() for who in said})
    lines = []
    for group in [people, *(itertools.combinations(people, 2) if len(people) > 2 else [])]:
        part = {question: {who: said[who] for who in group if who in said} for question, said in units.items()}
        pairs = [a == b for said in part.values() for a, b in itertools.combinations(said.values(), 2)]
        if pairs:
            value, low, high = alpha(part)
            alike = math.isnan(value)
            interval = "undefined: all said the same of all" if alike else f"{value:.3f} ({low:.3f} to {high:.3f})"
            name = "agreement" if group is people else f"  {' and '.join(group)}"
            lines.append(f"{name}: the same in {sum(pairs)} of {len(pairs)} pairs of answers, alpha {interval}")
    if not lines:
        return "agreement: no two people judged the same question (use --people 2)"
    lines.append("(Krippendorff's alpha of the best response, tie or all bad; 95% by a bootstrap over prompts)")
    return "\n".join(lines)


def alpha(units: Units) -> tuple[float, float, float]:
    """Return Krippendorff's alpha for nominal values, and the 2.5th and 97.5th percentile of its bootstrap.

    With n_uc values c in unit u, n_u = Σ_c n_uc ≥ 2 of them, and n values in all (Krippendorff 2011, "Computing
    Krippendorff's Alpha-Reliability", section C):

        1 − (n − 1) Σ_u Σ_c n_uc (n_u − n_uc) / (n_u − 1)  /  (n² − Σ_c n_c²)

    The bootstrap draws prompts, because the questions of one prompt are not independent. People stay as they are. All
    three are nan if there is only one value; a draw with only one value is left out.
    """
    shared = {question: list(said.values()) for question, said in units.items() if len(said) > 1}
    values = sorted({value for said in shared.values() for value in said}, key=str)
    if len(values) < 2:
        return math.nan, math.nan, math.nan
    places = {prompt: place for place, prompt in enumerate(dict.fromkeys(prompt for prompt, _ in shared))}
    counts = np.zeros((len(places), len(values)))  # n_c of each prompt
    disagreement = np.zeros(len(places))
    for (prompt, _), said in shared.items():
        for value, n in Counter(said).items():
            counts[places[prompt], values.index(value)] += n
            disagreement[places[prompt]] += n * (len(said) - n) / (len(said) - 1)

    def weighted(weights: np.ndarray) -> np.ndarray:
        """Return alpha (draws,) if prompts count as often as `weights` (draws, prompts) says."""
        total = weights @ counts  # (draws, values)
        n = total.sum(1)
        with np.errstate(invalid="ignore"):
            return 1 - (n - 1) * (weights @ disagreement) / (n**2 - (total**2).sum(1))

    rng, chances = shuffler("alpha"), np.full(len(places), 1 / len(places))
    draws = [weighted(rng.multinomial(len(places), chances, 100)) for _ in range(RESAMPLES // 100)]  # bounds the memory
    low, high = np.nanpercentile(draws, [2.5, 97.5])
    return float(weighted(np.ones((1, len(places))))[0]), float(low), float(high)
