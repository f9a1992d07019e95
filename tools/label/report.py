"""Summarise a file of answers: counts, position bias, model against model, and agreement between people."""

import itertools
import math
import statistics
from collections import Counter, defaultdict

import numpy as np

from common.measure import share
from data.files import VERDICTS, is_verdict
from data.rng import shuffler
from tools.label.sitting import key_of, question_of

SURE = {3: "very sure", 2: "fairly sure", 1: "not sure"}
RESAMPLES = 2000
INTERVAL = "{:.3f} ({:.3f} to {:.3f})".format


def summarise(rows: list[dict]) -> dict:
    """Return what `report` says, for JSON. Shares are (value, ends of an interval of 95%)."""
    people = {}
    for who in sorted({row["annotator"] for row in rows}):
        mine = [row for row in rows if row["annotator"] == who]
        n = Counter(row["verdict"] if is_verdict(row) else "preferred" for row in mine)
        counts = {name: n[name] for name in ("preferred", *VERDICTS)}
        people[who] = counts | {"median_seconds": statistics.median(row["seconds"] for row in mine)}
    sure = Counter(row["sure"] for row in rows if row.get("sure") in list(SURE))
    found: dict = {"annotators": people, "sure": {name: sure[level] for level, name in SURE.items()}}
    preferred = [row for row in rows if not is_verdict(row)]
    if n := len(preferred):
        found["first_shown"] = {"n": n, "preferred": share(sum(row["position"] == 0 for row in preferred) / n, n)}
        found["first_shown"]["unbiased"] = statistics.mean(1 / len(row["checkpoint"]) for row in preferred)
    return found | {"models": contests(rows), "agreement": agreement(rows)}


def report(rows: list[dict]) -> str:
    """Report counts by annotator, position bias, model against model, and agreement on questions that people share."""
    found = summarise(rows)
    lines = ["annotator             preferences   ties  all bad  skips   median seconds"]
    for who, n in found["annotators"].items():
        counts = f"{n['preferred']:>12} {n['tie']:>6} {n['bad']:>8} {n['skip']:>6}"
        lines.append(f"{who:<20} {counts} {n['median_seconds']:>16.1f}")
    if any(found["sure"].values()):
        lines.append("\nhow sure: " + ", ".join(f"{n} {name}" for name, n in found["sure"].items()))
    if first := found.get("first_shown"):
        said = f"{INTERVAL(*first['preferred'])} of {first['n']} (without bias: {first['unbiased']:.3f})"
        lines.append(f"\nthe first shown was preferred in {said}")
    for pair in found["models"]:
        models = f"{pair['model']} against {pair['other']}"
        lines.append(
            f"{models}: {INTERVAL(*pair['win_rate'])} (prompts: {pair['prompts']}; a tie or both bad is a half)"
        )
    for i, group in enumerate(found["agreement"]):
        name = f"  {' and '.join(group['people'])}" if i else "agreement"
        figure = INTERVAL(*group["alpha"]) if group["alpha"] else "undefined: all said the same"
        lines.append(f"{name}: the same in {group['same']} of {group['pairs']} pairs of answers, alpha {figure}")
    note = "(Krippendorff's alpha of the best response, tie or all bad; 95% by a bootstrap over prompts)"
    none = "agreement: no two people judged the same question (use --people 2)"
    return "\n".join([*lines, note if found["agreement"] else none])


def contests(rows: list[dict]) -> list[dict]:
    """Return for each two models how often the first is preferred to the second: a tie or both bad is a half.

    A prompt counts once, with the mean of its answers, because these are not independent.
    """
    won: defaultdict[tuple, defaultdict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        for better, worse in itertools.combinations(row["checkpoint"], 2):  # of a preference; best first
            if better != worse and row.get("verdict") != "skip":
                value = 0.5 if is_verdict(row) else float(better < worse)
                won[min(better, worse), max(better, worse)][key_of(row)].append(value)
    found = []
    for (model, other), by_prompt in sorted(won.items()):
        n, mean = len(by_prompt), statistics.fmean(map(statistics.fmean, by_prompt.values()))
        found.append({"model": model, "other": other, "win_rate": share(mean, n), "prompts": n})
    return found


def agreement(rows: list[dict]) -> list[dict]:
    """Return alpha, for all people and for each two, and how often two people said the same.

    A value is "tie", "bad", or the number of the best response, by checkpoint and then by text. A skip is no value.
    """
    units: defaultdict[tuple, dict[str, object]] = defaultdict(dict)  # (prompt, number) → person → value
    for row in rows:
        question = question_of(row)
        responses = [(name, answer.text) for name, answer in zip(question.checkpoints, question.answers)]
        if row.get("verdict") != "skip":
            best = sorted(responses).index(responses[0])
            units[key_of(row), question.number][row["annotator"]] = row.get("verdict", best)
    people = sorted({who for said in units.values() for who in said})
    groups = [people, *itertools.combinations(people, 2)] if len(people) > 2 else [people]
    found = []
    for group in groups:
        part = {question: {who: said[who] for who in group if who in said} for question, said in units.items()}
        pairs = [a == b for said in part.values() for a, b in itertools.combinations(said.values(), 2)]
        if pairs:
            value = alpha(part)
            value = None if math.isnan(value[0]) else value
            found.append({"people": list(group), "same": sum(pairs), "pairs": len(pairs), "alpha": value})
    return found


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
