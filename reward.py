"""Stage 2: a reward model, the stage-1 model with a scalar head, trained on which of two responses was preferred.

    python reward.py                                  sample stories, let the tales' judge compare them, train
    python reward.py --data COMPARISONS.jsonl         train on comparisons that people made
    python reward.py --data PROMPTS.jsonl --judge FILE.py:function      sample, and let your function compare

What --data holds decides which it is: JSONL with "chosen" and "rejected", or with "ranked", or with "prompt" alone.
The loss is −log σ(s_winner − s_loser) on the scores at the last token (Christiano et al. 2017; Stiennon et al. 2020).
All pairs of one prompt are one batch element, and each of its responses goes through the trunk once (Ouyang et al.
2022, section 3.5). At the end gain and bias are set so that samples of the starting policy score mean 0, variance 1.
"""

from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice

import tiktoken
import torch
import torch.nn.functional as F
from torch import Tensor

import data
from common import agreement, cli, compare, dist, lora, nets, runs
from common.cli import Count, Number, Positive, Whole
from data import InputError, tales
from data.rng import generator
from model import GPT, ScalarModel

WARMUP = 10  # steps in which the rate rises
N_NORMALIZE = 512  # samples of the starting policy that fix gain and bias


@dataclass
class Config(cli.Shared):
    # data and model
    data: str = ""  # JSONL comparisons, or JSONL prompts to sample and judge; empty: the tales' prompts
    init: str = "out/sft"  # run folder of the policy: it is sampled from, and its trunk becomes the reward model
    out: str = "out/reward"  # run folder to write
    block_size: Whole = 0  # longest prompt and response together, in tokens; 0: the model's context
    n_prompts: Whole = 0  # use only the first so many prompts of --data; 0: all
    seed: Whole = 0  # random seed of samples, labels, head and data order
    # samples: to compare, where --data holds prompts alone, and to normalise the scores
    response_len: Count = 64  # longest sampled response, in tokens
    temperature: Positive = 1.0  # temperature of the samples
    samples: Count = 8  # responses to each prompt, to compare
    judge: str = ""  # the simulated person that compares, FILE.py:function; the tales have theirs
    label_temperature: Positive = 0.1  # noise of the judge: at 0.1, a response judged 0.1 better wins in 73%
    # training
    batch_size: Count = 4  # prompts per step, each with all its responses, over all processes
    lr: Number = 1e-3  # peak of the learning rate


# --- the loop ---------------------------------------------------------------------------------------------------------


def train(cfg: Config) -> None:
    device, autocast = cli.setup(cfg)
    run = runs.Run(cfg)
    policy, encoding, groups, held_out = build(cfg, run, autocast, device)
    samples = sample_policy(policy, groups, cfg, autocast)
    torch.manual_seed(cfg.seed)
    model = ScalarModel(policy).to(device).eval()  # eval: no dropout, or a score would depend on chance
    cli.prepare(cfg, model)
    optimizer = nets.adamw(model, cfg.lr, 0.0)
    steps = max(1, len(groups) // cfg.batch_size)  # one epoch: a second one overfits (Stiennon et al. 2020, C.1)
    run.start(steps, model=model, optimizer=optimizer)
    counts = f"{sum(len(group.pairs) for group in groups):,} pairs of {len(groups):,} prompts"
    dist.print0(f"{cfg.data or 'the tales'} → {cfg.out}: {counts}, {len(held_out):,} prompts held out")

    for step in range(run.step, steps):
        # 1 The prompts of this step, each with all its responses.
        batch = data.shuffled(groups, cfg.batch_size, cfg.seed, None, step)
        mine = dist.mine(batch, cfg.shard)
        size = cfg.micro_batch_size or cfg.batch_size
        # 2 Forward and backward, one micro-batch at a time.
        loss, correct = torch.zeros((), device=device), torch.zeros((), device=device)
        for start in range(0, len(mine), size):
            part = mine[start : start + size]
            with autocast:
                scores = agreement.score_groups(model, part, device)
            margin = agreement.margins(part, scores)
            part_loss = pairwise_loss(margin, part) / len(batch)
            part_loss.backward()
            loss, correct = loss + part_loss.detach(), correct + (margin > 0).sum()
        # 3 One step of the optimizer.
        lr = nets.warmup_cosine(step, steps, cfg.lr, WARMUP)
        norm = nets.step_optimizer(optimizer, model, lr, cfg.max_grad_norm)
        # 4 Metrics and checkpoints; at the end evaluation and normalisation.
        accuracy = dist.total(correct).item() / sum(len(group.pairs) for group in batch)
        metrics = {"loss/train": dist.total(loss).item(), "accuracy": accuracy, "grad_norm": norm.item(), "lr": lr}
        last = step + 1 == steps
        if last:
            with run.timed("evaluate"):
                scores = agreement.read_scores(model, held_out, size, device, autocast)
                margin = agreement.margins(held_out, scores)
                found, table = agreement.summary(held_out, margin)
                metrics |= {"eval/loss": pairwise_loss(margin, held_out).item() / len(held_out)} | found
                normalize(model, samples, cfg.micro_batch_size or 64, device, autocast)
        tokens = sum(len(row.tokens) for group in batch for row in group.rows)
        run.log(step, metrics, ("loss/train", "accuracy", "tokens_per_s"), tokens)
        if last:
            with autocast:
                pairs = agreement.scored_pairs(model, held_out, encoding, device)
            run.report(agreement.report(found, table), {"metrics": found, "calibration": table, "pairs": pairs})
            how = f"(gain {model.gain:.3f}, bias {model.bias:.3f})"
            dist.print0(f"\nscores of {cfg.init}'s samples now have mean 0, variance 1 {how}")
        if run.due(step, cfg.save_every or 200):
            run.save(step + 1, model, encoding, {}, optimizer=optimizer)
    run.finish(device)


# --- 1 comparisons ----------------------------------------------------------------------------------------------------


def build(
    cfg: Config, run: runs.Run, autocast: torch.autocast, device: torch.device
) -> tuple[GPT, tiktoken.Encoding, list[data.Group], list[data.Group]]:
    """The starting policy, its tokenizer, groups to train on, and held-out groups."""
    source = comparisons = cfg.data or tales.path("compare")
    columns = data.first_row(source)
    policy, encoding = nets.load_gpt(cfg.init, device, "--init", lora.Trunks(cfg.lora, autocast))
    if {"chosen", "ranked"}.isdisjoint(columns):
        if cfg.data and not cfg.judge:
            what = f"{source}: has {', '.join(columns)}, which are no comparisons (prompt, chosen, rejected)"
            raise InputError(f"{what}; rename them, or name a --judge that compares samples for its prompts")
        judge = cfg.judge or tales.MEASURES.split(",")[0]
        with autocast:
            make = partial(compare.sample_and_compare, cfg, source, judge, policy, encoding)
            comparisons = run.made("comparisons.jsonl", make)
    elif cfg.judge:
        raise InputError(f"--judge: {source} holds comparisons already; leave it out, or name a file of prompts")
    groups = data.comparisons(comparisons, encoding, policy.config.eos, dist.print0)[: cfg.n_prompts or None]
    lengths = [max(len(row.tokens) for row in group.rows) for group in groups]
    groups = data.keep_short(groups, lengths, nets.context(cfg, policy), f"comparisons of {source}", dist.print0)
    held_out, groups = data.hold_out(groups, encoding, say=dist.print0)
    return policy, encoding, groups, held_out


# --- 2 loss -----------------------------------------------------------------------------------------------------------


def pairwise_loss(margin: Tensor, groups: list[data.Group]) -> Tensor:
    """Σ over groups of the mean over a group's pairs of −log σ(margin); a margin (P,) is s_winner − s_loser."""
    weight = torch.cat([torch.full((n,), 1 / n) for n in (len(group.pairs) for group in groups)]).to(margin.device)
    return -(weight * F.logsigmoid(margin)).sum()


# --- 3 normalisation --------------------------------------------------------------------------------------------------


@torch.no_grad()
def normalize(
    model: ScalarModel, rows: list[data.Row], size: int, device: torch.device, autocast: torch.autocast
) -> None:
    """Set gain and bias so that the scores of `rows`, `size` of them at a time, have mean 0 and variance 1 (Ziegler et
    al. 2019, section 2.2)."""
    scores = []
    for part in dist.counted([*data.micro_batches(rows, size)], "scores of samples"):
        tokens, _, length = data.pad(part, device)
        with autocast:
            scores.append(model.scores(tokens, length))
    raw = torch.cat(scores)
    if not raw.isfinite().all():
        raise InputError("the scores of the policy's samples are not finite: the training has diverged; lower --lr")
    std = raw.std().clamp(min=1e-6)
    model.bias.copy_((model.bias - raw.mean()) / std)
    model.gain.copy_(model.gain / std)


def sample_policy(policy: GPT, groups: list[data.Group], cfg: Config, autocast: torch.autocast) -> list[data.Row]:
    """An answer of the starting policy to each of N_NORMALIZE prompts, some of them again if there are fewer.

    Raises InputError if no prompt leaves room for a response.
    """
    prompts = [group.rows[0].tokens[: group.rows[0].prompt_len] for group in groups]
    room = nets.context(cfg, policy) - cfg.response_len
    prompts = [prompt for prompt in prompts if len(prompt) <= room][:N_NORMALIZE]
    if not prompts:
        raise InputError(f"--response_len {cfg.response_len}: no prompt leaves room for it in the context; give less")
    prompts, rng = list(islice(cycle(prompts), N_NORMALIZE)), generator("normalize", cfg.seed)
    with autocast:
        sampled = nets.generate(policy, prompts, cfg.response_len, cfg.temperature, rng, cfg.micro_batch_size or 128)
    return [data.Row(tokens[:length], prompt_len) for tokens, prompt_len, length in zip(*(x.tolist() for x in sampled))]


def main() -> None:
    train(cli.parse(Config))


if __name__ == "__main__":
    cli.run_main(main)
