"""What is measured: an iteration, held-out prompts, the report before → after, best-of-n, a reward model.

Nothing here changes a net. Every mean is printed with its standard error (±).
"""

import math
from collections.abc import Callable

import tiktoken
import torch
from torch import Tensor

import common
from common.judges import Judge, ask
from data import Group, InputError

Texts = list[tuple[str, str]]  # (prompt, response)
BY_TOKEN = ("logp", "ref_logp", "entropy", "rewards", "values", "advantages", "returns", "ratio")
Answer = Callable[[list[list[int]], int], tuple[dict[str, Tensor], Texts]]  # see `evaluate`


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
    columns = {name: common.gather(x.float()) for name, x in rows.items()}  # of all processes
    score, length = columns["objective/scores"], columns["response_len"]
    found = {name: x.mean() for name, x in columns.items()} | {
        "objective/scores_std": score.std(correction=0),
        "objective/kl_max": columns["objective/kl"].max(),
        "score_length_correlation": correlation(score, length),
        "token_entropy": common.masked_mean(batch["entropy"], mask),
    }
    if "returns" in batch:
        spread = masked_variance(batch["returns"], mask).clamp(min=1e-8)
        error = masked_variance(batch["returns"] - batch["values"], mask)
        found["value/explained_variance"] = 1 - error / spread
    numbers = torch.stack([x.float() for x in found.values()]).tolist()  # one wait for the device
    return dict(zip(found, numbers)) | {"kl_coef": kl_coef}


def by_token(
    batch: dict[str, Tensor], pairs: Texts, encoding: tiktoken.Encoding, iteration: int, kl_coef: float
) -> dict:
    """A rollout as plain lists, for rollout.json: each answer with what the step made of each of its tokens.

    At most 256 answers and about 65,536 tokens, of this process alone. Numbers have five digits.
    """
    mask, answers = batch["mask"].cpu(), []
    n = min(len(mask), 256, max(1, 65_536 // mask.shape[1]))
    columns = {name: batch[name][:n].tolist() for name in BY_TOKEN if name in batch}
    heads = [batch[name][:n].tolist() for name in ("tokens", "prompt_len", "length", "ended", "score", "final_score")]
    for i, (row, start, end, ended, score, final_score) in enumerate(zip(*heads)):
        answer = {"prompt": pairs[i][0], "response": pairs[i][1], "ended": ended, "score": score}
        answer |= {"final_score": final_score, "tokens": [spelled(token, encoding) for token in row[start:end]]}
        for name, column in columns.items():
            answer[name] = [float(f"{x:.5g}") for x in column[i][: end - start]]
        answers.append(answer)
    return {"iteration": iteration, "kl_coef": kl_coef, "answers": answers}


def spelled(token: int, encoding: tiktoken.Encoding) -> str | list[int] | dict[str, str]:
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
    return common.masked_mean((x - common.masked_mean(x, mask)).square(), mask)


# --- held-out prompts -------------------------------------------------------------------------------------------------


def evaluate(answer: Answer, prompts: list[list[int]], judges: dict[str, Judge]) -> dict[str, list]:
    """One answer to each prompt: a column for each measure, one number a prompt; and "texts", (prompt, response) pairs.

    `answer(prompts, start)` gives a batch that has been read (see ppo.py) and its texts; `start` is the number of the
    first prompt, for the random numbers. The processes of torchrun share the work; each returns all of it.
    """
    found: dict[int, dict[str, list]] = {}  # by the number of the first prompt
    starts = list(range(0, len(prompts), 128))
    for start in common.together(common.share(starts), starts):
        batch, pairs = answer(prompts[start : start + 128], start)
        new = {name: ask(judge, pairs) for name, judge in judges.items()}
        new["score"] = batch["score"].tolist()
        new["KL to the start (nats)"] = ((batch["logp"] - batch["ref_logp"]) * batch["mask"]).sum(1).tolist()
        new["length (tokens)"] = batch["mask"].sum(1).tolist()
        new["ended by EOS"] = batch["ended"].float().tolist()
        new["texts"] = pairs
        found[start] = new
    parts = {start: part for each in common.gather_objects(found) for start, part in each.items()}
    in_order = [parts[start] for start in sorted(parts)]
    return {name: [x for part in in_order for x in part[name]] for name in in_order[0]}


def summary(columns: dict[str, list], judges: dict[str, Judge], kl_coef: float) -> tuple[dict[str, float], float]:
    """An evaluation as metrics, and how good it is: the first judge's mean, or without one score − β KL."""
    means = {
        name: torch.tensor(columns[name], dtype=torch.float64).mean().item() for name in columns if name != "texts"
    }
    metrics = {"eval/score": means["score"], "eval/kl": means["KL to the start (nats)"]}
    if not judges:
        return metrics, metrics["eval/score"] - kl_coef * metrics["eval/kl"]
    metrics["eval/judge"] = means[next(iter(judges))]
    return metrics, metrics["eval/judge"]


def mean_and_error(column: list[float]) -> tuple[float, float]:
    x = torch.tensor(column, dtype=torch.float64)
    return x.mean().item(), x.std().item() / len(x) ** 0.5 if len(x) > 1 else 0.0


def cell(column: list[float]) -> str:
    mean, error = mean_and_error(column)
    return f"{mean:8.3f} ± {error:.3f}"


def paired(before: dict[str, list], after: dict[str, list], judges: dict[str, Judge]) -> dict:
    """The numbers of `report` and every answer, for report.json. A pair of numbers is a mean and its ±."""
    names = [name for name in before if name != "texts"]
    rows, measure = {}, next(iter(judges), "score")
    for name in names:
        columns = before[name], after[name], differences(before[name], after[name])
        rows[name] = dict(zip(("before", "after", "change"), map(mean_and_error, columns)))
    answers = []
    for i, ((prompt, first), (_, second)) in enumerate(zip(before["texts"], after["texts"])):
        sides = {"before": (first, before), "after": (second, after)}
        sides = {side: {"text": text} | {n: column[n][i] for n in names} for side, (text, column) in sides.items()}
        answers.append({"prompt": prompt} | sides)
    won = mean_and_error(wins(before[measure], after[measure]))
    return {"table": rows, "win_rate": won, "by": measure, "answers": answers}


def differences(before: list[float], after: list[float]) -> list[float]:
    return [b - a for a, b in zip(before, after)]


def wins(before: list[float], after: list[float]) -> list[float]:
    return [(b > a) + 0.5 * (b == a) for a, b in zip(before, after)]


def report(before: dict[str, list], after: dict[str, list], judges: dict[str, Judge]) -> str:
    """The table before → after, the win rate, and four answers side by side.

    Both columns answer the same prompts, each with its own random numbers. So the ± of the change comes from the
    differences per prompt, and shared random numbers cannot decide a win.
    """
    title = f"{len(before['texts'])} held-out prompts"
    lines = [f"\n{title:<28}{'before':>18}  {'after':>18}  {'change':>18}"]
    for name in before:
        if name == "texts":
            continue
        cells = [cell(column) for column in (before[name], after[name], differences(before[name], after[name]))]
        lines.append(f"{name:<28}" + "  ".join(f"{text:>18}" for text in cells))
    measure = next(iter(judges), "score")
    won = cell(wins(before[measure], after[measure]))
    lines.append(f"{'win rate against the start':<28}{'':>18}  {won:>18}  (by {measure}, ties half)\n")
    for (prompt, first), (_, second) in list(zip(before["texts"], after["texts"]))[:4]:
        lines += [f"  {prompt.strip()}", f"    before  {first.strip()}", f"    after   {second.strip()}"]
    return "\n".join(lines)


# --- best of n --------------------------------------------------------------------------------------------------------


def best_of_sizes(option: str) -> list[int]:
    """The numbers of --best_of. Raises InputError for what is not a list of numbers above 0."""
    try:
        sizes = [int(word) for word in option.split(",") if word]
    except ValueError:
        sizes = [0]
    if any(n < 1 for n in sizes) or (option and not sizes):
        raise InputError(f"--best_of {option}: give numbers above 0, separated by commas")
    return sizes


def expected_at_best(scores: Tensor, values: Tensor, n: int) -> Tensor:
    """The expected value of the best-scored of n answers, from N ≥ n answers to each prompt: (P, N), (P, N) → (P,).

    Unbiased: it is the mean over all n-subsets. The i-th answer from below (i = 1…N) is the best of a subset of n with
    probability C(i − 1, n − 1) / C(N, n) (Nakano et al. 2021, arXiv 2112.09332).
    """
    N = scores.shape[1]
    weight = torch.tensor([math.comb(i, n - 1) / math.comb(N, n) for i in range(N)], dtype=torch.float64)
    ordered = values.gather(1, scores.argsort(dim=1, stable=True))
    return ordered.double() @ weight


def best_of(answer: Answer, prompts: list[list[int]], judges: dict[str, Judge], sizes: list[int]) -> str:
    """A table of best-of-n by the score: what choosing among n answers of the start gives, for each n of `sizes`.

    Its KL to the start is at most log n − (n − 1) / n (Stiennon et al. 2020, appendix G.3; Beirami et al. 2024).
    """
    N = max(sizes)
    found = evaluate(answer, [prompt for prompt in prompts for _ in range(N)], judges)
    columns = {name: torch.tensor(found[name]).view(len(prompts), N) for name in [*judges, "score"]}
    lines = [f"\n{'best of n by the score':<24}{'KL (nats)':>10}  " + "  ".join(f"{name:>24}" for name in columns)]
    for n in sizes:
        cells = [cell(expected_at_best(columns["score"], x, n).tolist()) for x in columns.values()]
        kl = math.log(n) - (n - 1) / n
        lines.append(f"{n:<24}{kl:>10.2f}  " + "  ".join(f"{text:>24}" for text in cells))
    return "\n".join(lines)


# --- a reward model -------------------------------------------------------------------------------------------------


def agreement(groups: list[Group], scores: list[Tensor]) -> tuple[dict[str, float], list[tuple]]:
    """Held-out metrics, and ten rows (from, to, pairs, mean predicted, observed win rate) of a calibration table."""
    margin = torch.cat([margins(group, each) for group, each in zip(groups, scores)])  # (P,)
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


def margins(group: Group, scores: Tensor) -> Tensor:
    """score of the winner − score of the loser for each pair of a group."""
    winner, loser = torch.tensor(group.pairs).T
    return scores[winner] - scores[loser]


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


def by_source_and_length(groups: list[Group], scores: list[Tensor]) -> str:
    """Accuracy for each source that the rows name, and whether the model likes length more than people do."""
    lines = []
    sources = sorted({group.source for group in groups})
    for source in sources if len(sources) > 1 else []:
        chosen = [i for i, group in enumerate(groups) if group.source == source]
        found, _ = agreement([groups[i] for i in chosen], [scores[i] for i in chosen])
        pairs = sum(len(groups[i].pairs) for i in chosen)
        accuracy = f"{found['eval/accuracy']:.3f} ± {found['eval/accuracy_se']:.3f}"
        lines.append(f"{source or 'no source':<32} {pairs:>7,} pairs  {accuracy}")
    people, model = [], []
    for group, each in zip(groups, scores):
        length = torch.tensor([float(len(row.tokens) - row.prompt_len) for row in group.rows])
        differs = margins(group, length)
        people.append((differs[differs != 0] > 0).double())
        model.append((margins(group, each) * differs.sign() > 0)[differs != 0].double())
    longer = [f"{100 * torch.cat(each).mean():.1f}%" for each in (people, model)]
    lines.append(f"the longer response wins {longer[0]} of the pairs by the labels, {longer[1]} by the scores")
    return "\n".join(lines)
