"""Agreement between people: Krippendorff's alpha for nominal values, with a bootstrap interval."""

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Iterable

import numpy as np

from data.files import is_verdict
from data.rng import shuffler

RESAMPLES = 2000
Units = dict[tuple, dict[str, object]]  # question → person → value


def units_of(rows: Iterable[dict]) -> Units:
    """Return what each person said of each question: "tie", "bad", or which response is the best. A skip is no value.

    Responses are numbered by checkpoint, then by text. So with two models a value says which of them was preferred.
    A question is its prompt and its responses.
    """
    units: defaultdict[tuple, dict[str, object]] = defaultdict(dict)
    for row in rows:
        if row.get("verdict") == "skip":
            continue
        texts = row["responses"] if is_verdict(row) else row.get("ranked") or [row["chosen"], row["rejected"]]
        numbered = sorted(zip(row["checkpoint"], texts))
        best = numbered.index((row["checkpoint"][0], texts[0]))
        units[row["prompt"], tuple(numbered)][row["annotator"]] = row["verdict"] if is_verdict(row) else best
    return units


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
    prompts = {prompt: place for place, prompt in enumerate(dict.fromkeys(question[0] for question in shared))}
    counts = np.zeros((len(prompts), len(values)))  # n_c of each prompt
    disagreement = np.zeros(len(prompts))
    for question, said in shared.items():
        place = prompts[question[0]]
        for value, n in Counter(said).items():
            counts[place, values.index(value)] += n
            disagreement[place] += n * (len(said) - n) / (len(said) - 1)

    def of(weights: np.ndarray) -> np.ndarray:
        """Return alpha (draws,) if prompts count as often as `weights` (draws, prompts) says."""
        total = weights @ counts  # (draws, values)
        n = total.sum(1)
        with np.errstate(invalid="ignore"):
            return 1 - (n - 1) * (weights @ disagreement) / (n**2 - (total**2).sum(1))

    if len(values) < 2:
        return math.nan, math.nan, math.nan
    rng, chances = shuffler("alpha"), np.full(len(prompts), 1 / len(prompts))
    draws = [of(rng.multinomial(len(prompts), chances, 100)) for _ in range(RESAMPLES // 100)]  # in parts: memory
    low, high = np.nanpercentile(draws, [2.5, 97.5])
    return float(of(np.ones((1, len(prompts))))[0]), float(low), float(high)


def agreement(rows: list[dict]) -> str:
    """Report alpha, for all people and for each two, and how often two people said the same."""
    units = units_of(rows)
    people = sorted({who for said in units.values() for who in said})
    lines = []
    for group in [people, *itertools.combinations(people, 2)]:
        part = {question: {who: said[who] for who in group if who in said} for question, said in units.items()}
        pairs = [a == b for said in part.values() for a, b in itertools.combinations(said.values(), 2)]
        if pairs and (group is people or len(people) > 2):
            value, low, high = alpha(part)
            name = "agreement" if group is people else f"  {' and '.join(group)}"
            interval = (
                "undefined: all said the same of all" if math.isnan(value) else f"{value:.3f} ({low:.3f} to {high:.3f})"
            )
            lines.append(f"{name}: the same in {sum(pairs)} of {len(pairs)} pairs of answers, alpha {interval}")
    if not lines:
        return "agreement: no two people judged the same question (use --people 2)"
    return "\n".join(
        [*lines, "(Krippendorff's alpha of the best response, tie or all bad; 95% by a bootstrap over prompts)"]
    )
