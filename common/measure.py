"""What is measured: an iteration, answers to held-out prompts, the table before → after.

Nothing here changes a net. In the reports ± is one standard error, and brackets are an interval of 95% for a share.
Where fewer than FEWEST prompts leave the error unknown, their number stands in its place.
"""

import math
from collections.abc import Callable

import torch
from tiktoken import Encoding
from torch import Tensor

from common import dist
from common.judges import Judge
from data import Prompt, token_text
from data.rng import generator
from model import GPT

Batch = dict[str, Tensor]
KL, ENDED = "KL to the reference (nats)", "ended by EOS"  # rows of the table
FEWEST = 10  # with fewer values or clusters, ± 1.96 standard errors hold the truth in clearly less than 95%
BY_TOKEN = ("logp", "ref_logp", "entropy", "rewards", "values", "advantages", "returns", "ratio")

# --- one iteration ----------------------------------------------------------------------------------------------------


def rollout_metrics(batch: Batch, judged: list[float], kl_coef: float) -> dict[str, float]:
    """The metrics of an iteration: sums over a response, then means over the responses of all processes.

    Names that TRL has mean what they mean there. Its val/num_eos_tokens, policy/approxkl_avg and val/ratio count all
    EOS of a batch, or pads too, so ours are `ended`, policy/approxkl and policy/ratio.
    """
    mask = batch["mask"]
    kl = ((batch["logp"] - batch["ref_logp"]) * mask).sum(1)  # (B,) nats
    rows = {
        "objective/kl": kl,
        "objective/entropy": -(batch["logp"] * mask).sum(1),  # in expectation the entropy of a response
        "objective/scores": batch["score"],  # as it came, without a cap or TRL's penalty
        "objective/non_score_reward": batch["rewards"].sum(1) - batch["final_score"],  # −β KL, but in a fork
        "objective/rlhf_reward": batch["rewards"].sum(1),
        "ended": batch["ended"],  # by EOS
        "response_len": mask.sum(1),
    }
    if "disagreement" in batch:
        rows["objective/disagreement"] = batch["disagreement"]
    if judged:
        rows["objective/judge"] = torch.tensor(judged, device=kl.device)
    columns = {name: dist.gather(x.float()) for name, x in rows.items()}  # of all processes
    score, length = columns["objective/scores"], columns["response_len"]
    found = {name: x.mean() for name, x in columns.items()} | {
        "objective/scores_std": score.std(correction=0),
        "objective/kl_max": columns["objective/kl"].max(),
        "score_length_correlation": correlation(score, length),  # near 1: the reward model likes length
        "token_entropy": dist.masked_mean(batch["entropy"], mask),  # of the next-token distributions
    }
    if "returns" in batch:  # 1: value and return differ by a constant; 0: the values say no more than a mean does
        spread = masked_variance(batch["returns"], mask)
        error = masked_variance(batch["returns"] - batch["values"], mask)
        found["value/explained_variance"] = torch.where(spread > 1e-8, 1 - error / spread, 0.0)
    numbers = torch.stack([x.float() for x in found.values()]).tolist()  # one wait for the device
    return dict(zip(found, numbers)) | {"kl_coef": kl_coef}


def as_rows(batch: Batch, encoding: Encoding, eos: int) -> list[dict]:
    """Every answer as a row: "prompt" and "response" as text, without the EOS, and the prompt's columns."""
    rows = []
    lists = [batch[name].tolist() for name in ("tokens", "prompt_len", "length", "ended")]
    for columns, tokens, start, end, ended in zip(batch.get("columns", [{}] * len(batch["tokens"])), *lists):
        prompt = [] if tokens[:start] == [eos] else tokens[:start]  # what an empty prompt starts from
        response = tokens[start : end - 1] if ended else tokens[start:end]
        rows.append(columns | {"prompt": encoding.decode(prompt), "response": encoding.decode(response)})
    return rows


def by_token(batch: Batch, rows: list[dict], encoding: Encoding, iteration: int, kl_coef: float, judged: list) -> dict:
    """A rollout as plain lists, for rollout.json: each answer with what the step made of each of its tokens.

    At most 256 answers and about 65,536 tokens, of this process alone. Numbers have five digits.
    """
    n = min(256, max(1, 65_536 // batch["mask"].shape[1]))
    columns = {name: x[:n].tolist() for name, x in batch.items() if name != "columns"}
    answers = []
    for i, (start, end) in enumerate(zip(columns["prompt_len"], columns["length"])):
        answer = {name: rows[i][name] for name in ("prompt", "response")} | ({"judge": judged[i]} if judged else {})
        answer |= {name: columns[name][i] for name in ("ended", "score", "final_score")}
        answer["ids"] = columns["tokens"][i][:end]  # the prompt's too
        answer["tokens"] = [token_text(token, encoding) for token in columns["tokens"][i][start:end]]
        for name in (name for name in BY_TOKEN if name in columns):
            answer[name] = [float(f"{x:.5g}") for x in columns[name][i][: end - start]]
        answers.append(answer)
    return {"iteration": iteration, "kl_coef": kl_coef, "answers": answers}


def correlation(x: Tensor, y: Tensor) -> Tensor:
    """Pearson's; 0 where one of the two does not vary."""
    x, y = x - x.mean(), y - y.mean()
    return (x * y).sum() / (x.norm() * y.norm()).clamp(min=1e-8)


def masked_variance(x: Tensor, mask: Tensor) -> Tensor:
    """The variance of x over the places where `mask` is true, in all processes together."""
    return dist.masked_mean((x - dist.masked_mean(x, mask)).square(), mask)


# --- held-out prompts -------------------------------------------------------------------------------------------------


def held_out(
    answer: Callable, encoding: Encoding, judges: dict[str, Judge], policy: GPT, prompts: list[Prompt], *key: str | int
) -> dict[str, list]:
    """One answer to each prompt: a column for each measure, one number per prompt; and "rows", prompt and response.

    `answer(policy, prompts, rng)` gives a batch that has been read (see ppo.py). Its random numbers depend on the key
    and the first prompt's number. Each process of torchrun answers and judges parts of its own, and returns all of
    them. With --shard all processes gather together, so each has as many parts, and one prompt at least.
    """
    found: dict[int, dict[str, list]] = {}  # by the number of the first prompt
    longest = max(len(prompt.ids) for prompt in prompts) or 1
    size = max(1, min(128, 2**16 // longest))  # limits the memory of long prompts
    starts = list(range(0, len(prompts), size))
    if dist.is_sharded(policy):
        n = -(-len(starts) // dist.WORLD) * dist.WORLD
        starts = [len(prompts) * i // n for i in range(n)]
    ends = dict(zip(starts, [*starts[1:], len(prompts)]))
    for start in dist.counted(dist.mine(starts), f"held-out prompts, {key[0]}"):
        batch = answer(policy, prompts[start : ends[start]], generator(*key, start))
        rows = as_rows(batch, encoding, policy.config.eos)
        found[start] = {name: judge(rows) for name, judge in judges.items()} | {
            "score": batch["score"].tolist(),
            "final score": batch["final_score"].tolist(),
            **{name: batch[name].tolist() for name in ("disagreement",) if name in batch},  # of several reward models
            KL: ((batch["logp"] - batch["ref_logp"]) * batch["mask"]).sum(1).tolist(),
            "length (tokens)": batch["mask"].sum(1).tolist(),
            ENDED: batch["ended"].float().tolist(),
            "rows": rows,
        }
    parts = {start: part for each in dist.gather_objects(found) for start, part in each.items()}
    in_order = [parts[start] for start in sorted(parts)]
    return {name: [x for part in in_order for x in part[name]] for name in in_order[0]}


def summary(columns: dict[str, list], judges: dict[str, Judge], kl_coef: float) -> tuple[dict[str, float], float]:
    """Means over held-out prompts as metrics, and their goodness: the first judge's, else final score − β KL."""
    names = {"eval/score": "score", "eval/final_score": "final score", "eval/kl": KL}
    names |= {"eval/judge": next(iter(judges))} if judges else {}
    metrics = {metric: mean_and_error(columns[name])[0] for metric, name in names.items()}
    return metrics, metrics.get("eval/judge", metrics["eval/final_score"] - kl_coef * metrics["eval/kl"])


def mean_and_error(column: list[float]) -> tuple[float, float | None]:
    """The mean, and its standard error; None of fewer than FEWEST values."""
    x = torch.tensor(column, dtype=torch.float64)
    return x.mean().item(), x.std().item() / len(x) ** 0.5 if len(x) >= FEWEST else None


def share(p: float, n: float) -> tuple[float, float, float]:
    """p, and the ends of Wilson's interval of 95% for a share p of n independent values (Wilson 1927).

    It has a width at 0 and 1 too. Values between 0 and 1, such as a tie of 0.5, vary less, so it is wide enough.
    """
    z2 = 1.96**2 / n
    middle, half = (p + z2 / 2) / (1 + z2), math.sqrt(z2 * (p * (1 - p) + z2 / 4)) / (1 + z2)
    return p, max(0.0, middle - half), min(1.0, middle + half)


def paired(before: dict[str, list], after: dict[str, list], judges: dict[str, Judge]) -> dict:
    """The table before → after with every answer, for report.json.

    A cell is a mean and its standard error or None, or where it is a share the share and the ends of its interval. Both
    columns answer the same prompts, each with its own random numbers. So the ± of the change comes from the differences
    per prompt, and shared random numbers cannot decide a win. A win goes by the first judge, else by the final score.
    """
    names, measure = [name for name in before if name != "rows"], next(iter(judges), "final score")
    table, n = {}, len(before["rows"])
    for name in names:
        change = [b - a for a, b in zip(before[name], after[name])]
        columns = {"before": before[name], "after": after[name], "change": change}
        table[name] = {side: mean_and_error(column) for side, column in columns.items()}
    table[ENDED] |= {side: share(table[ENDED][side][0], n) for side in ("before", "after")}
    wins = [(b > a) + 0.5 * (b == a) for a, b in zip(before[measure], after[measure])]
    answers = []
    for i, row in enumerate(before["rows"]):
        answer = {"prompt": row["prompt"]}
        for side, columns in (("before", before), ("after", after)):
            answer[side] = {"text": columns["rows"][i]["response"]} | {name: columns[name][i] for name in names}
        answers.append(answer)
    won = {"win_rate": share(sum(wins) / n, n), "win_rate_ceiling": win_rate_ceiling(table[KL]["after"][0])}
    return {"table": table, **won, "by": measure, "answers": answers}


def win_rate_ceiling(kl: float) -> float:
    """The highest win rate against the reference, ties half, that a policy at a mean KL (nats) can have by any judge.

    A win rate is the mean of u, an answer's rank among the reference's own, and the law of u is at most `kl` away from
    uniform. The best law is ∝ e^{cu}: c w − log((e^c − 1) / c) nats for a win rate w (Gui et al. 2024, 2406.00832).
    """
    low, high = -10.0, min(kl, 700.0) + 2  # log c
    for _ in range(60):
        c = math.exp((low + high) / 2)
        w = 1 / -math.expm1(-c) - 1 / c
        needed = c * (w - 1) - math.log(-math.expm1(-c) / c)
        low, high = (low, math.log(c)) if needed > kl else (math.log(c), high)
    return w


def report(found: dict) -> str:
    """`paired` as text: the table, the win rate, and four answers side by side."""
    sides, n = ("before", "after", "change"), len(found["answers"])
    lines = [f"\n{n} held-out prompts".ljust(31) + "  ".join(f"{side:>20}" for side in sides)]
    for name, row in found["table"].items():
        lines.append(f"{name:<30}" + "  ".join(f"{cell(row[side], n):>20}" for side in sides))
    won = f"{'win rate against the reference':<30}{'':>20}  {cell(found['win_rate'], n):>20}"
    lines.append(f"{won} of {found['win_rate_ceiling']:.3f} possible at this KL (by {found['by']}, ties half)\n")
    for each in found["answers"][:4]:
        lines.append(f"  {each['prompt'].strip()}")
        lines += [f"    {side:<6}  {each[side]['text'].strip()}" for side in ("before", "after")]
    return "\n".join(lines)


def cell(found: tuple, n: int) -> str:
    """A cell of `paired` as text; n is the number of prompts."""
    mean, error, *high = found
    if high:
        return f"{mean:.3f} [{error:.3f}, {high[0]:.3f}]"
    return f"{mean:.3f} (n {n})" if error is None else f"{mean:.3f} ± {error:.3f}"
