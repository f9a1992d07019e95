"""Evaluation on held-out prompts, and the report before → after. It measures a policy and changes nothing."""

from collections.abc import Callable

import torch

Judge = Callable[[str, str], float]  # (prompt, response) -> how good


def evaluate(
    answer: Callable[[list[list[int]], int], tuple[dict, list[tuple[str, str]]]],
    prompts: list[list[int]],
    judges: dict[str, Judge],
) -> dict[str, list]:
    """One answer to each prompt: a column for each measure, one number a prompt; and "texts", (prompt, response) pairs.

    `answer(prompts, start)` gives a batch that has been read (see ppo.py) and its texts; `start` is the number of the
    first prompt, for the random numbers.
    """
    columns: dict[str, list] = {}
    for start in range(0, len(prompts), 128):
        batch, pairs = answer(prompts[start : start + 128], start)
        kl = ((batch["logp"] - batch["ref_logp"]) * batch["mask"]).sum(1)
        new = {name: [float(judge(*pair)) for pair in pairs] for name, judge in judges.items()}
        new["score"] = batch["score"].tolist()
        new["KL to the start (nats)"] = kl.tolist()
        new["length (tokens)"] = batch["mask"].sum(1).tolist()
        new["ended by EOS"] = batch["ended"].float().tolist()
        new["texts"] = pairs
        for name, column in new.items():
            columns.setdefault(name, []).extend(column)
    return columns


def report(before: dict[str, list], after: dict[str, list], judges: dict[str, Judge]) -> str:
    """The table before → after with standard errors, the win rate, and four answers side by side."""
    n = len(before["texts"])
    lines = [f"\n{n} held-out prompts                 before              after"]
    for name in before:
        if name == "texts":
            continue
        cells = []
        for column in (before[name], after[name]):
            x = torch.tensor(column, dtype=torch.float64)
            error = x.std() / n**0.5 if n > 1 else 0
            cells.append(f"{x.mean():8.3f} ± {error:.3f}")
        lines.append(f"{name:<28}{cells[0]:>18}  {cells[1]:>18}")
    measure = next(iter(judges), "score")
    wins = sum((b > a) + 0.5 * (b == a) for a, b in zip(before[measure], after[measure])) / n
    lines.append(f"{'win rate against the start':<28}{'':>18}  {wins:8.3f}  (by {measure}, ties half)\n")
    for (prompt, first), (_, second) in list(zip(before["texts"], after["texts"]))[:4]:
        lines += [f"  {prompt.strip()}", f"    before  {first.strip()}", f"    after   {second.strip()}"]
    return "\n".join(lines)
