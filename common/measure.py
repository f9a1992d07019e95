"""What is measured: an iteration, answers to held-out prompts, the table before → after, a reward model.

Nothing here changes a net. Every mean is printed with its standard error (±).
"""

import math
from collections.abc import Callable

import tiktoken
import torch
from torch import Tensor

from common import dist
from common.judges import Judge
from data import Group, Prompt
from data.rng import generator
from model import GPT

KL = "KL to the start (nats)"  # a row of the table
BY_TOKEN = ("logp", "ref_logp", "entropy", "rewards", "values", "advantages", "returns", "ratio")

# --- one iteration ----------------------------------------------------------------------------------------------------


def rollout_metrics(batch: dict[str, Tensor], judged: list[float], kl_coef: float) -> dict[str, float]:
    """TRL's names: sums over a response, then means over the responses of all processes.

    objective/scores         the score as it came; rlhf_reward has the final one
    objective/entropy        −Σ log π of the sampled tokens, as in TRL; its expected value is the entropy of a response
    objective/kl_max         the largest KL of a response
    token_entropy            the mean entropy of the next-token distributions
    score_length_correlation near 1: the reward model likes length
    value/explained_variance 1 − var(return − value) / var(return) over tokens: 1 is perfect, 0 is no better than a mean
    """
    mask = batch["mask"]
    kl = ((batch["logp"] - batch["ref_logp"]) * mask).sum(1)  # (B,) nats
    rows = {
        "objective/kl": kl,
        "objective/entropy": -(batch["logp"] * mask).sum(1),
        "objective/scores": batch["score"],
        "objective/non_score_reward": -kl_coef * kl,
        "objective/rlhf_reward": batch["final_score"] - kl_coef * kl,
        "val/num_eos_tokens": batch["ended"],
        "response_len": mask.sum(1),
    }
    if judged:
        rows["objective/judge"] = torch.tensor(judged, device=kl.device)
    columns = {name: dist.gather(x.float()) for name, x in rows.items()}  # of all processes
    score, length = columns["objective/scores"], columns["response_len"]
    found = {name: x.mean() for name, x in columns.items()} | {
        "objective/scores_std": score.std(correction=0),
        "objective/kl_max": columns["objective/kl"].max(),
        "score_length_correlation": correlation(score, length),
        "token_entropy": dist.masked_mean(batch["entropy"], mask),
    }
    if "returns" in batch:
        spread = masked_variance(batch["returns"], mask).clamp(min=1e-8)
        error = masked_variance(batch["returns"] - batch["values"], mask)
        found["value/explained_variance"] = 1 - error / spread
    numbers = torch.stack([x.float() for x in found.values()]).tolist()  # one wait for the device
    return dict(zip(found, numbers)) | {"kl_coef": kl_coef}


def as_rows(batch: dict[str, Tensor], encoding: tiktoken.Encoding, eos: int) -> list[dict]:
    """Every answer as a row: "prompt" and "response" as text, without the EOS, and the prompt's columns."""
    rows = []
    lists = [batch[name].tolist() for name in ("tokens", "prompt_len", "length", "ended")]
    for columns, tokens, start, end, ended in zip(batch.get("columns", [{}] * len(batch["tokens"])), *lists):
        prompt = [] if tokens[:start] == [eos] else tokens[:start]  # what an empty prompt starts from
        response = tokens[start : end - 1] if ended else tokens[start:end]
        rows.append(columns | {"prompt": encoding.decode(prompt), "response": encoding.decode(response)})
    return rows


def by_token(
    batch: dict[str, Tensor], rows: list[dict], encoding: tiktoken.Encoding, iteration: int, kl_coef: float
) -> dict:
    """A rollout as plain lists, for rollout.json: each answer with what the step made of each of its tokens.

    At most 256 answers and about 65,536 tokens, of this process alone. Numbers have five digits.
    """
    mask, answers = batch["mask"].cpu(), []
    n = min(len(mask), 256, max(1, 65_536 // mask.shape[1]))
    columns = {name: batch[name][:n].tolist() for name in BY_TOKEN if name in batch}
    heads = [batch[name][:n].tolist() for name in ("tokens", "prompt_len", "length", "ended", "score", "final_score")]
    for i, (row, start, end, ended, score, final_score) in enumerate(zip(*heads)):
        answer = {"prompt": rows[i]["prompt"], "response": rows[i]["response"], "ended": ended, "score": score}
        answer |= {"final_score": final_score, "tokens": [token_text(token, encoding) for token in row[start:end]]}
        for name, column in columns.items():
            answer[name] = [float(f"{x:.5g}") for x in column[i][: end - start]]
        answers.append(answer)
    return {"iteration": iteration, "kl_coef": kl_coef, "answers": answers}


def token_text(token: int, encoding: tiktoken.Encoding) -> str | list[int] | dict[str, str]:
    """A token for JSON: its text, its bytes if they are only a part of a character, or {"special": its name}."""
    raw = encoding.decode_single_token_bytes(token)
    if token in encoding._special_tokens.values():
        return {"special": raw.decode("utf-8", "replace")}
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return list(raw)


def correlation(x: Tensor, y: Tensor) -> Tensor:
    """Pearson's; 0 where one of the two does not vary."""
    x, y = x - x.mean(), y - y.mean()
    return (x * y).sum() / (x.norm() * y.norm()).clamp(min=1e-8)


def masked_variance(x: Tensor, mask: Tensor) -> Tensor:
    """The variance of x over the places where `mask` is true, in all processes together."""
    return dist.masked_mean((x - dist.masked_mean(x, mask)).square(), mask)


# --- held-out prompts -------------------------------------------------------------------------------------------------


def held_out(
    answer: Callable[[GPT, list[Prompt], torch.Generator], dict[str, Tensor]],
    encoding: tiktoken.Encoding,
    judges: dict[str, Judge],
    policy: GPT,
    prompts: list[Prompt],
    *key: str | int,
) -> dict[str, list]:
    """One answer to each prompt: a column for each measure, one number per prompt; and "rows", prompt and response.

    `answer(policy, prompts, rng)` gives a batch that has been read (see ppo.py). Its random numbers depend on the key
    and the first prompt's number. The processes of torchrun share the work; each returns all of it.
    """
    found: dict[int, dict[str, list]] = {}  # by the number of the first prompt
    longest = max(len(prompt.ids) for prompt in prompts) or 1
    size = max(1, min(128, 2**16 // longest))  # limits the memory of long prompts
    starts = list(range(0, len(prompts), size))
    for start in dist.pad_to_equal(dist.mine(starts), starts):
        batch = answer(policy, prompts[start : start + size], generator(*key, start))
        rows = as_rows(batch, encoding, policy.config.eos)
        new = {name: judge(rows) for name, judge in judges.items()}
        new["score"] = batch["score"].tolist()
        new[KL] = ((batch["logp"] - batch["ref_logp"]) * batch["mask"]).sum(1).tolist()
        new["length (tokens)"] = batch["mask"].sum(1).tolist()
        new["ended by EOS"] = batch["ended"].float().tolist()
        new["rows"] = rows
        found[start] = new
    parts = {start: part for each in dist.gather_objects(found) for start, part in each.items()}
    in_order = [parts[start] for start in sorted(parts)]
    return {name: [x for part in in_order for x in part[name]] for name in in_order[0]}


def summary(columns: dict[str, list], judges: dict[str, Judge], kl_coef: float) -> tuple[dict[str, float], float]:
    """Measures of held-out prompts as metrics, and their goodness: the first judge's mean, else score − β KL."""
    names = {"eval/score": "score", "eval/kl": KL} | ({"eval/judge": next(iter(judges))} if judges else {})
    metrics = {metric: mean_and_error(columns[name])[0] for metric, name in names.items()}
    return metrics, metrics.get("eval/judge", metrics["eval/score"] - kl_coef * metrics["eval/kl"])


def mean_and_error(column: list[float]) -> tuple[float, float]:
    """The mean, and its standard error."""
    x = torch.tensor(column, dtype=torch.float64)
    return x.mean().item(), x.std().item() / len(x) ** 0.5 if len(x) > 1 else 0.0


def paired(before: dict[str, list], after: dict[str, list], judges: dict[str, Judge]) -> dict:
    """The table before → after with every answer, for report.json. A pair of numbers is a mean and its ±.

    Both columns answer the same prompts, each with its own random numbers. So the ± of the change comes from the
    differences per prompt, and shared random numbers cannot decide a win.
    """
    names, measure = [name for name in before if name != "rows"], next(iter(judges), "score")
    table = {}
    for name in names:
        change = [b - a for a, b in zip(before[name], after[name])]
        columns = {"before": before[name], "after": after[name], "change": change}
        table[name] = {side: mean_and_error(column) for side, column in columns.items()}
    wins = [(b > a) + 0.5 * (b == a) for a, b in zip(before[measure], after[measure])]
    answers = []
    for i, row in enumerate(before["rows"]):
        answer = {"prompt": row["prompt"]}
        for side, columns in (("before", before), ("after", after)):
            answer[side] = {"text": columns["rows"][i]["response"]} | {name: columns[name][i] for name in names}
        answers.append(answer)
    return {"table": table, "win_rate": mean_and_error(wins), "by": measure, "answers": answers}


def report(found: dict) -> str:
    """`paired` as text: the table, the win rate, and four answers side by side."""
    lines = [f"\n{len(found['answers'])} held-out prompts".ljust(29) + f"{'before':>18}  {'after':>18}  {'change':>18}"]
    for name, row in found["table"].items():
        lines.append(f"{name:<28}" + "  ".join(f"{cell(row[side]):>18}" for side in ("before", "after", "change")))
    won = f"{'win rate against the start':<28}{'':>18}  {cell(found['win_rate']):>18}"
    lines.append(f"{won}  (by {found['by']}, ties half)\n")
    for each in found["answers"][:4]:
        lines.append(f"  {each['prompt'].strip()}")
        lines += [f"    {side:<6}  {each[side]['text'].strip()}" for side in ("before", "after")]
    return "\n".join(lines)


def cell(pair: tuple[float, float]) -> str:
    mean, error = pair
    return f"{mean:8.3f} ± {error:.3f}"


# --- a reward model -------------------------------------------------------------------------------------------------


def margins(groups: list[Group], scores: Tensor) -> Tensor:
    """The score of the winner − the score of the loser of every pair (P,), from the scores (N,) of all responses."""
    offset, pairs = 0, []
    for group in groups:
        pairs += [(offset + winner, offset + loser) for winner, loser in group.pairs]
        offset += len(group.rows)
    winner, loser = torch.tensor(pairs).to(scores.device).T
    return scores[winner] - scores[loser]


def agreement(groups: list[Group], margin: Tensor) -> tuple[dict[str, float], list[tuple]]:
    """Metrics of the groups' margins (P,), and ten rows (from, to, pairs, mean predicted, observed win rate) of a
    calibration table."""
    certain = [p for group in groups for p in group.certainty]
    right = (margin > 0).double() + 0.5 * (margin == 0).double()
    metrics = {"eval/accuracy": right.mean().item()}
    metrics["eval/accuracy_se"] = clustered_error(right, [len(group.pairs) for group in groups])
    if not any(map(math.isnan, certain)):
        metrics["eval/accuracy_ceiling"] = sum(certain) / len(certain)

    # A file lists the winner first. Half of the pairs are turned round, or every observed win rate would be 1.
    turned = torch.arange(len(margin)) % 2 == 1
    predicted = torch.where(turned, -margin, margin).sigmoid()
    tenth = (predicted * 10).long().clamp(max=9)
    table = []
    for i in range(10):
        inside = tenth == i
        n = int(inside.sum())
        if n:
            observed = (~turned[inside]).float().mean().item()
            table.append((i / 10, i / 10 + 0.1, n, predicted[inside].mean().item(), observed))
    metrics["eval/calibration_error"] = sum(n * abs(p - seen) for _, _, n, p, seen in table) / len(margin)
    return metrics, table


def clustered_error(x: Tensor, sizes: list[int]) -> float:
    """The standard error of the mean of x (P,). Values of one group depend on each other; groups are independent.

    The pairs of one prompt share responses. Liang and Zeger 1986: the deviations of a group are summed, then squared.
    """
    if len(sizes) < 2:
        return 0.0
    deviations = torch.stack([part.sum() for part in (x - x.mean()).split(sizes)])
    n = len(sizes)
    return math.sqrt(deviations.square().sum().item() * n / (n - 1)) / len(x)


def agreement_report(metrics: dict[str, float], table: list[tuple]) -> str:
    """Held-out accuracy, its ± by prompt, beside what the noise allows; and the calibration table."""
    first = f"\nheld-out accuracy {metrics['eval/accuracy']:.3f} ± {metrics['eval/accuracy_se']:.3f}"
    if "eval/accuracy_ceiling" in metrics:
        first += f" (the noise in these labels allows {metrics['eval/accuracy_ceiling']:.3f})"
    lines = [first, "\nwin rate        pairs   predicted   observed"]
    for low, high, n, predicted, observed in table:
        lines.append(f"{low:.1f} – {high:.1f}   {n:>8,}       {predicted:.3f}      {observed:.3f}")
    return "\n".join(lines)
