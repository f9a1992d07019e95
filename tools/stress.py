"""A reward model under pressure: up to which KL does a second one agree that its favourite answers get better?

python -m tools.stress out/reward                                 the second is trained on half of the comparisons
python -m tools.stress out/reward --judge FILE.py:function        where the truth is known: where that turns, too

The first takes the best of n answers of the policy that it was trained from, and the second judges them. The larger n,
the more the first one's errors decide (Gao et al. 2022, arXiv 2210.10760). The second has other errors: it saw half of
the prompts, and its head started elsewhere. Errors of the trunk, which both share, are not seen here.
"""

import json
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tiktoken
import torch
from torch import Tensor

import data
import ppo
import reward
from common import cli, dist, folders, judges, measure, nets
from common.cli import Count, Whole
from data import InputError, Prompt, tales
from data.rng import generator
from data.rows import of_one_shape
from model import GPT
from tools.evaluate import best_of_kl, expected_at_best


@dataclass
class Config(cli.Shared):
    second: str = ""  # run folder of a second reward model; empty: one is trained, into DIR-second
    prompts: str = ""  # JSONL "prompt"; empty: the held-out prompts of the comparisons (the tales have their own)
    judge: str = ""  # FILE.py:function, the truth where it is known
    n: Annotated[int, (2, 10**9)] = 256  # answers to each prompt
    n_prompts: Count = 64  # the first so many prompts
    unended_cap: float = -1.0  # highest score without EOS
    seed: Whole = 0  # of the answers


def comparisons_of(its: reward.Config, folder: str) -> str:
    """Return the file of the comparisons that the run in `folder` was trained on. Raises InputError if it is gone."""
    made = Path(folder) / "comparisons.jsonl"
    source = its.data if its.data and not made.exists() else str(made)
    if folders.fingerprint(source):
        return source
    raise InputError(f"{source}: the comparisons of {folder} are gone; bring them back, or name --second and --prompts")


def train_second(cfg: Config, its: reward.Config, folder: str) -> str:
    """Train a reward model as that in `folder` was, with another seed on half of its prompts. Return its run folder."""
    out, rows_of = f"{Path(folder)}-second", {}  # prompt → rows, in the order of the file
    done = Path(out) / "report.json"
    if done.exists() and done.stat().st_mtime > (Path(folder) / "model.pt").stat().st_mtime:
        return out
    for row in data.read_jsonl(comparisons_of(its, folder), {}):
        shaped = row if "prompt" in row else of_one_shape(row)[1]  # a dialogue holds its prompt
        if isinstance(shaped, dict):
            rows_of.setdefault(json.dumps(shaped["prompt"]), []).append(row)
    half = list(rows_of)[: its.n_prompts or None][::2]
    data.write_jsonl(f"{out}.jsonl", (row for prompt in half for row in rows_of[prompt]))
    new = {"data": f"{out}.jsonl", "judge": "", "n_prompts": 0, "seed": its.seed + 1, "out": out, "device": cfg.device}
    with torch.enable_grad():
        reward.train(replace(its, **new))
    return out


def held_out(cfg: Config, its: reward.Config, folder: str, policy: GPT, encoding: tiktoken.Encoding) -> list[Prompt]:
    """Return the prompts to answer. Raises InputError if they are too few to say anything."""
    if cfg.prompts or not its.data:
        found = data.read_prompts(path := cfg.prompts or tales.path("eval"), encoding)
    else:
        groups = data.comparisons(path := comparisons_of(its, folder), encoding, policy.config.eos)
        rows = [group.rows[0] for group in data.hold_out(groups[: its.n_prompts or None], encoding)[0]]
        found = [Prompt([*ids], {}) for ids in dict.fromkeys(tuple(row.tokens[: row.prompt_len]) for row in rows)]
    room = nets.context(its, policy) - its.response_len
    found = data.keep_short(found, [max(1, len(p.ids)) for p in found], room, f"prompts of {path}", dist.print0)
    if len(found) < measure.FEWEST:
        raise InputError(f"{path}: {len(found)} held-out prompts are too few; name a file with more as --prompts")
    return found[: cfg.n_prompts]


def draw(cfg: Config, its: reward.Config, folder: str, second: str) -> dict[str, Tensor]:
    """Return (P, n) each: what "first", "second" and "judge" say of n answers to P prompts, and their "length"."""
    device, autocast = cli.setup(cfg)
    policy, encoding = nets.load_gpt(its.init, device, "--init")
    prompts, eos, found = held_out(cfg, its, folder, policy, encoding), policy.config.eos, defaultdict(list)
    how = {"response_len": its.response_len, "temperature": its.temperature, "unended_cap": cfg.unended_cap}
    how, scorers = ppo.Config(**how, micro_batch_size=cfg.micro_batch_size), {}
    for name, path in (("first", folder), ("second", second)):
        scorers[name] = ppo.scorer(nets.load_reward(device, encoding, its.init, None, path), encoding, eos, how)
    for i, prompt in enumerate(dist.counted(prompts, f"prompts, {cfg.n} answers each")):
        with autocast:
            batch = ppo.rollout(policy, [prompt.ids] * cfg.n, how, generator("stress", cfg.seed, i))
            for name, score in scorers.items():
                found[name].append(ppo.final_scores(batch | {"score": score(batch)}, how))
        found["length"].append(batch["length"] - batch["prompt_len"])
        rows = measure.as_rows(batch | {"columns": [prompt.columns] * cfg.n}, encoding, eos)
        for judge in judges.load_functions(cfg.judge).values():
            found["judge"].append(torch.tensor(judge(rows)))
    return {name: torch.stack(x).double().cpu() for name, x in found.items()}


def turn(curves: Tensor) -> int:
    """Return the place of the first n that no larger n beats by more than 1.96 standard errors of the change.

    curves (P, S): of each prompt a measure of the best of n answers, for S sizes n.
    """
    rises = [curves[:, i + 1 :] - curves[:, i : i + 1] for i in range(curves.shape[1] - 1)]
    return [*((x.mean(0) > 1.96 * x.std(0) / len(x) ** 0.5).any().item() for x in rises), False].index(False)


def report(drawn: dict[str, Tensor]) -> str:
    """Return what `draw` has found as text: spread, length, a row for each n; the last line says how far to trust."""
    first, second, n = drawn["first"], drawn["second"], drawn["first"].shape[1]
    sizes = [2**i for i in range((n - 1).bit_length())] + [n]
    kl, ordered = [best_of_kl(size) for size in sizes], second.sort(1).values
    rank = sum(torch.searchsorted(ordered, second, right=right) for right in (False, True)) - 1  # twice, ties half
    measures = drawn | {"second prefers": rank / (2 * n - 2)}  # to this share of the other answers
    names = [name for name in ("first", "second", "second prefers", "judge") if name in measures]
    curves = {name: torch.stack([expected_at_best(first, measures[name], s) for s in sizes], 1) for name in names}
    inside, longer = (x - x.mean(1, keepdim=True) for x in (first, drawn["length"]))
    share = measure.correlation(inside.flatten(), longer.flatten()).item() ** 2
    lines = [f"\n{len(first)} prompts, {n} answers each; the first selects, the second judges"]
    lines += [f"spread of the score within prompts {inside.square().mean().sqrt():.3f}, in all {first.std():.3f}"]
    lines += [f"length explains {share:.1%} of the score within prompts", ""]
    lines += ["best of   KL at most" + "".join(f"{name:>20}" for name in names)]
    for i, size in enumerate(sizes):
        cells = [measure.cell(measure.mean_and_error(curves[name][:, i].tolist()), len(first)) for name in names]
        lines.append(f"{size:>7}{kl[i]:>13.2f}" + "".join(f"{cell:>20}" for cell in cells))
    i, last = turn(curves["second"]), len(sizes) - 1
    if "judge" in names:
        j = turn(curves["judge"])
        lines.append(f"\nthe judge {'turns at' if j < last else 'does not turn up to'} {kl[j]:.1f} nats")
    start = "trust this model to about" if i < last else "no turn up to"
    said = f"{start} {kl[i]:.1f} nats: `--kl_target` at most that"
    return "\n".join([*lines, "", said if i else "do not trust this model: the second sees no rise"])


def main() -> None:
    cfg, folder = cli.parse(Config, positional="DIR")
    its = cli.parse(reward.Config, ["--like", folder])
    dist.print0(report(draw(cfg, its, folder, cfg.second or train_second(cfg, its, folder))))


if __name__ == "__main__":
    cli.run_main(main, "tools.stress")
