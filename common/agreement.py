"""How far a reward model agrees with comparisons: scores, accuracy, calibration; and what it says of each token."""

import math

import torch
import torch.nn.functional as F
from tiktoken import Encoding
from torch import Tensor

from common import dist
from common.measure import FEWEST, cell, share
from data import Group, pad, token_text
from model import ScalarModel


def score_groups(model: ScalarModel, groups: list[Group], device: torch.device) -> Tensor:
    """The scores (N,) of all responses of the groups."""
    tokens, _, length = pad([row for group in groups for row in group.rows], device)
    return model.scores(tokens, length)


@torch.no_grad()
def read_scores(
    model: ScalarModel, groups: list[Group], size: int, device: torch.device, autocast: torch.autocast
) -> Tensor:
    """`score_groups`, on the CPU, `size` groups at a time."""
    found = []
    for start in dist.counted(range(0, len(groups), size), "held-out pairs"):
        with autocast:
            found.append(score_groups(model, groups[start : start + size], device).cpu())
    return torch.cat(found)


def margins(groups: list[Group], scores: Tensor) -> Tensor:
    """The score of the winner − the score of the loser of every pair (P,), from the scores (N,) of all responses."""
    offset, pairs = 0, []
    for group in groups:
        pairs += [(offset + winner, offset + loser) for winner, loser in group.pairs]
        offset += len(group.rows)
    winner, loser = torch.tensor(pairs).to(scores.device).T
    return scores[winner] - scores[loser]


def summary(groups: list[Group], margin: Tensor) -> tuple[dict[str, float], list[tuple]]:
    """Metrics of the groups' margins (P,), and the rows (from, to, pairs, mean predicted, observed, low, high) of a
    calibration table: how often the better-scored response should win by its margin, in five tenths, and how often it
    does. The ends of intervals of 95% are there from FEWEST prompts on.
    """
    certain = [p for group in groups for p in group.certainty]
    right = (margin > 0).double() + 0.5 * (margin == 0).double()
    prompts = [tuple(group.rows[0].tokens[: group.rows[0].prompt_len]) for group in groups]
    number = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    cluster = torch.tensor([number[prompt] for prompt, group in zip(prompts, groups) for _ in group.pairs])
    metrics = dict(zip(("eval/accuracy", "eval/accuracy_low", "eval/accuracy_high"), clustered_share(right, cluster)))
    metrics["eval/prompts"] = len(number)
    if not any(map(math.isnan, certain)):
        metrics["eval/accuracy_ceiling"] = sum(certain) / len(certain)

    predicted, table = margin.abs().sigmoid(), []
    tenth = (predicted * 10).long().clamp(max=9)
    for i in range(5, 10):
        inside = tenth == i
        if n := int(inside.sum()):
            observed = clustered_share(right[inside], cluster[inside])
            table.append((i / 10, (i + 1) / 10, n, predicted[inside].mean().item(), *observed))
    metrics["eval/calibration_error"] = sum(n * abs(p - seen) for _, _, n, p, seen, *_ in table) / len(margin)
    return metrics, table


def clustered_share(x: Tensor, cluster: Tensor) -> tuple[float, ...]:
    """The mean of x (P,), a share, and from FEWEST clusters on the ends of its interval of 95%.

    It is Wilson's, with as many values as give an independent share the variance of this one (Korn and Graubard 1998;
    Dean and Pagano 2015).
    """
    cluster = cluster.unique(return_inverse=True)[1]
    p, clusters = x.mean().item(), int(cluster.max()) + 1
    if clusters < FEWEST:
        return (p,)
    error = clustered_error(x, cluster)
    return share(p, min(p * (1 - p) / error**2, len(x)) if error else clusters)


def clustered_error(x: Tensor, cluster: Tensor) -> float:
    """The standard error of the mean of x (P,), whose clusters are numbered from 0 (P,) and are independent.

    Pairs of one prompt are a cluster, wherever they stand: they share responses. Liang and Zeger 1986: the deviations
    of a cluster are summed, then squared.
    """
    n = int(cluster.max()) + 1
    deviations = torch.zeros(n, dtype=x.dtype).index_add(0, cluster, x - x.mean())
    return math.sqrt(deviations.square().sum().item() * n / (n - 1)) / len(x)


def accuracy_text(metrics: dict[str, float]) -> str:
    """The accuracy of `summary` with its interval, or with the number of prompts if they are few."""
    found = [metrics.get(f"eval/accuracy{end}") for end in ("", "_low", "_high")]
    return cell(found[:2] if None in found else found, metrics["eval/prompts"])


def report(metrics: dict[str, float], table: list[tuple]) -> str:
    """Held-out accuracy with its interval, beside what the noise allows; and the calibration table."""
    first = f"\nheld-out accuracy {accuracy_text(metrics)}"
    if "eval/accuracy_ceiling" in metrics:
        first += f" (the noise in these labels allows {metrics['eval/accuracy_ceiling']:.3f})"
    lines = [first, "\nwin rate        pairs   predicted   observed"]
    for low, high, n, predicted, *observed in table:
        ends = " [{:.3f}, {:.3f}]".format(*observed[1:]) if observed[1:] else ""
        lines.append(f"{low:.1f} – {high:.1f}   {n:>8,}       {predicted:.3f}      {observed[0]:.3f}{ends}")
    return "\n".join(lines)


@torch.no_grad()
def scored_pairs(model: ScalarModel, groups: list[Group], encoding: Encoding, device: torch.device) -> list[dict]:
    """The first pair of each of the first ten groups, for report.json: of both sides the score, the n tokens, and
    n + 1 scores of prefixes: of the prompt alone, and of the text up to each token, as if it ended there.
    """
    found = []
    for group in groups[:10]:
        rows = [group.rows[i] for i in group.pairs[0]]
        tokens, prompt_len, length = pad(rows, device)
        scores = model.scores(tokens, length).tolist()
        prefixes = model.values(F.pad(tokens, (0, 1)), prompt_len, length + 1).tolist()  # what follows is not read
        pair = {"prompt": encoding.decode(rows[0].tokens[: rows[0].prompt_len])}
        for side, row, score, prefix in zip(("chosen", "rejected"), rows, scores, prefixes):
            texts = [token_text(token, encoding) for token in row.tokens[row.prompt_len :]]
            prefix = [float(f"{x:.5g}") for x in prefix[: len(texts) + 1]]
            pair[side] = {"score": score, "tokens": texts, "prefix": prefix}
        found.append(pair)
    return found
