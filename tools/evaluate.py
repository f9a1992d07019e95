"""Measure what a run has made: a policy before → after, the best of n answers, or a reward model.

python -m tools.evaluate out/ppo                               the table that ppo.py ends with, made again
python -m tools.evaluate out/ppo --best_of 1,4,16              beside it, the best of so many of the reference's
python -m tools.evaluate out/reward --data COMPARISONS.jsonl   does a reward model agree with comparisons?
"""

import math
import re
import sys
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import data
import ppo
from common import agreement, cli, dist, folders, judges, measure, nets
from common.cli import Whole
from data import InputError, tales
from data.files import read_object
from model import ScalarModel


@dataclass
class Config(ppo.Config):
    # of this command
    best_of: str = ""  # such as 1,4,16: show the best of so many answers of the reference too
    n_prompts: Whole = 0  # of a reward model: use the first so many prompts of --data; 0: all


def of_its_run(folder: str, argv: list[str]) -> Config:
    """Return the options of the run in `folder`, where `argv` does not say otherwise. Of a run of sft.py two count.

    Raises InputError if an option names another model than it did in that run.
    """
    path, known = Path(folder) / "config.json", {"seed", "init"}
    about = read_object(path) if path.exists() else {}
    options, inputs = about.get("options", {}), about.get("inputs", {})
    if not isinstance(options, dict) or not isinstance(inputs, dict):
        raise InputError(f'{path}: "options" or "inputs" is no JSON object; remove the file')
    if about.get("stage") == "ppo":
        known = {field.name for field in fields(ppo.Config)} - {"out", "resume", "device"}
        if forked := [f"--{name}" for name, x in options.items() if x and name not in ppo.Config.__dataclass_fields__]:
            dist.print0(f"{path}: {', '.join(forked)}: not in this ppo.py, so this measures without")
    its = cli.as_words({name: x for name, x in options.items() if name in known})
    cfg, _ = cli.parse(Config, its + argv, positional="DIR")
    for name in ("init", "ref", "reward"):
        now = getattr(cfg, name)
        if now == options.get(name) and name in inputs and folders.fingerprint(now) != inputs[name]:
            what = f"--{name} {now}: is not the model that it was in this run"
            raise InputError(f"{path}: {what}; start where the run did, or name that model with --{name}")
    return cfg


def evaluate_policy(cfg: Config, folder: str) -> None:
    """Print the table before → after, and with --best_of the best of n answers of the reference."""
    if not re.fullmatch(r"([1-9]\d*,?)*", cfg.best_of):
        raise InputError(f"--best_of {cfg.best_of}: give numbers above 0, separated by commas")
    sizes = [int(word) for word in cfg.best_of.split(",") if word]
    device, autocast = cli.setup(cfg)
    start, ref, value, score, encoding = ppo.build(cfg, device, autocast)
    policy, policy_encoding = nets.load_gpt(folder, device)
    nets.check_vocabulary(folder, policy_encoding, encoding, cfg.init)
    cli.prepare(cfg, policy)
    no_batch = replace(cfg, batch_size=dist.WORLD, minibatch_size=dist.WORLD)
    _, held_out = ppo.load_prompts(no_batch, start, encoding)
    judged_by = judges.load_functions(cfg.judge or ("" if cfg.data else tales.MEASURES))

    answer = partial(ppo.answer, cfg, autocast, (ref, value, score))
    measured = partial(measure.held_out, answer, encoding, judged_by)
    before = measured(ref, held_out, "before", cfg.seed)
    after = measured(policy, held_out, "after", cfg.seed)
    dist.print0(measure.report(measure.paired(before, after, judged_by)))
    if sizes:
        found = measured(ref, [prompt for prompt in held_out for _ in range(max(sizes))], "best of", cfg.seed)
        names = [name for name in (*judged_by, "score", "final score", "disagreement") if name in found]
        columns = {name: torch.tensor(found[name]).view(len(held_out), -1) for name in names}
        dist.print0(best_of_table(columns, sizes))


def best_of_table(columns: dict[str, Tensor], sizes: list[int]) -> str:
    """Return what the best of n answers of the reference is like, for each n of `sizes`. columns: (P, N) each.

    The best has the highest final score.
    """
    rows = [["best of n by the final score", "KL (nats)", *columns]]
    for n in sizes:
        found = [expected_at_best(columns["final score"], x, n).tolist() for x in columns.values()]
        cells = [measure.cell(measure.mean_and_error(column), len(column)) for column in found]
        rows.append([n, f"{best_of_kl(n):.2f}", *cells])
    lines = [f"{n:<30}{kl:>10}" + "".join(f"  {x:>24}" for x in cells) for n, kl, *cells in rows]
    return "\n".join(["", *lines])


def best_of_kl(n: int) -> float:
    """Return the KL of the best of n answers to the reference, at most, in nats (Beirami et al. 2024, 2401.01879)."""
    return math.log(n) - (n - 1) / n


def expected_at_best(scores: Tensor, values: Tensor, n: int) -> Tensor:
    """Return the expected value of the best-scored of n answers, from N ≥ n to each prompt: (P, N), (P, N) → (P,).

    It is the mean over all n-subsets. The i-th answer from below (i = 1…N) is the best of a subset with probability
    C(i − 1, n − 1) / C(N, n) (Nakano et al. 2021, arXiv 2112.09332).
    """
    N = scores.shape[1]
    weight = torch.tensor([math.comb(i, n - 1) / math.comb(N, n) for i in range(N)], dtype=torch.float64)
    ordered = values.gather(1, scores.argsort(dim=1, stable=True))
    return ordered.double() @ weight


def evaluate_reward(cfg: Config, folder: str) -> None:
    """Print how well a reward model agrees with the comparisons in --data."""
    if not cfg.data:
        raise InputError("--data: name the comparisons to measure the reward model on")
    device, autocast = cli.setup(cfg)
    model, encoding = nets.load_scalar(folder, device)
    cli.prepare(cfg, model)
    groups = data.comparisons(cfg.data, encoding, model.config.eos, dist.print0)[: cfg.n_prompts or None]
    lengths = [max(len(row.tokens) for row in group.rows) for group in groups]
    groups = data.keep_short(groups, lengths, nets.context(cfg, model), f"comparisons of {cfg.data}", dist.print0)
    scores = agreement.read_scores(model, groups, cfg.micro_batch_size or 4, device, autocast)
    found, table = agreement.summary(groups, agreement.margins(groups, scores))
    dist.print0(f"{folder} on {cfg.data}: {found['eval/prompts']:,} prompts")
    dist.print0(f"{agreement.report(found, table)}\n\n{by_source_and_length(groups, scores)}")


def by_source_and_length(groups: list[data.Group], scores: Tensor) -> str:
    """Return the accuracy for each source that the rows name, and how often the longer response wins."""
    margin = agreement.margins(groups, scores)
    length = torch.tensor([float(len(row.tokens) - row.prompt_len) for group in groups for row in group.rows])
    longer = agreement.margins(groups, length).sign()
    by_group = margin.split([len(group.pairs) for group in groups])
    sources, lines = sorted({group.source for group in groups}), []
    for source in sources if len(sources) > 1 else []:
        chosen = [i for i, group in enumerate(groups) if group.source == source]
        some = torch.cat([by_group[i] for i in chosen])
        found, _ = agreement.summary([groups[i] for i in chosen], some)
        lines.append(f"{source or 'no source':<32} {len(some):>7,} pairs  {agreement.accuracy_text(found)}")
    people, model = ((x[longer != 0] > 0).double().mean() for x in (longer, margin * longer))
    share = f"the longer response wins {people:.1%} of the pairs by the labels, {model:.1%} by the scores"
    equal = "the two responses of every pair are equally long"
    return "\n".join([*lines, share if longer.any() else equal])


def main() -> None:
    cfg, folder = cli.parse(Config, positional="DIR")
    model, _ = nets.load(folder)
    if isinstance(model, ScalarModel):
        evaluate_reward(cfg, folder)
    else:
        evaluate_policy(of_its_run(folder, sys.argv[1:]), folder)


if __name__ == "__main__":
    cli.run_main(main)
