"""DPO: the policy learns from the comparisons themselves, without reward model, value net and sampling.

    python -m experiments.forks.dpo                          the comparisons that reward.py sampled → out/dpo
    python -m experiments.forks.dpo --data COMPARISONS.jsonl --init out/mine --out out/mine-dpo
    python -m tools.evaluate out/dpo                         measure it on held-out prompts, as PPO is measured

The best policy under the KL term, π* ∝ π₀ exp(s / β), can be solved for the score: s = β log(π* / π₀) + β log Z. Z
depends on the prompt alone, so it cancels between two answers. What remains is the loss of reward.py,
−log σ(s_winner − s_loser), with β log(π / π₀) of the whole answer as the score (Rafailov et al. 2023, arXiv
2305.18290, equation 7). All pairs of one prompt are one batch element, as in reward.py. No prompt is held out.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

import data
from common import agreement, cli, dist, lora, nets, runs
from common.cli import Count, Number, Positive, Whole
from model import GPT
from reward import WARMUP, pairwise_loss


@dataclass
class Config(cli.Shared):
    data: str = "out/reward/comparisons.jsonl"  # JSONL comparisons, as for reward.py
    init: str = "out/sft"  # run folder of the starting policy; its frozen copy is the reference
    out: str = "out/dpo"  # run folder to write
    seed: Whole = 0  # of the data order
    kl_coef: Positive = 0.15  # β: smaller goes further from the start
    epochs: Count = 1  # passes over the comparisons
    batch_size: Count = 4  # prompts a step, each with all its responses, over all processes
    lr: Number = 3e-4  # peak of the learning rate
    block_size: Whole = 0  # longest prompt and response together, in tokens; 0: the model's context


def log_ratios(policy: GPT, ref: GPT, groups: list[data.Group], device: torch.device) -> Tensor:
    """log π − log π₀ of each response of the groups, in nats, summed over its tokens: (N,)."""
    batch = data.pad([row for group in groups for row in group.rows], device)
    with torch.no_grad():
        ref_logp = ref.logprobs(*batch)  # (N, R)
    return (policy.logprobs(*batch) - ref_logp).sum(1)


def train(cfg: Config) -> None:
    device, autocast = cli.setup(cfg)
    run = runs.Run(cfg)
    trunks = lora.Trunks(cfg.lora, autocast)
    policy, encoding = nets.load_gpt(cfg.init, device, "--init", trunks)
    groups = data.comparisons(cfg.data, encoding, policy.config.eos, dist.print0)
    lengths = [max(len(row.tokens) for row in group.rows) for group in groups]
    groups = data.keep_short(groups, lengths, nets.context(cfg, policy), f"comparisons of {cfg.data}", dist.print0)
    ref = nets.freeze(nets.load_gpt(cfg.init, device, "--init", trunks)[0], autocast)
    policy.eval()  # no dropout: before the first step π is π₀, and the loss log 2
    cli.prepare(cfg, policy, ref)
    optimizer = nets.adamw(policy, cfg.lr, 0.0)
    steps = cfg.epochs * max(1, len(groups) // cfg.batch_size)
    run.start(steps, model=policy, optimizer=optimizer)
    n_pairs = sum(len(group.pairs) for group in groups)
    dist.print0(f"{cfg.data} → {cfg.out}: {n_pairs:,} pairs of {len(groups):,} prompts, on {device}")

    for step in range(run.step, steps):
        # 1 The prompts of this step, each with all its responses.
        batch = data.shuffled(groups, cfg.batch_size, cfg.seed, None, step)
        mine = dist.mine(batch, cfg.shard)
        size = cfg.micro_batch_size or len(batch)
        # 2 Forward and backward, one micro-batch at a time.
        sums = torch.zeros(3, device=device)  # loss, right pairs, margins
        for start in range(0, len(mine), size):
            part = mine[start : start + size]
            with autocast:
                rewards = cfg.kl_coef * log_ratios(policy, ref, part, device)
            margin = agreement.margins(part, rewards)
            loss = pairwise_loss(margin, part) / len(batch)
            loss.backward()
            sums += torch.stack([loss.detach(), (margin > 0).sum(), margin.detach().sum()])
        # 3 One step of the optimizer.
        lr = nets.warmup_cosine(step, steps, cfg.lr, WARMUP)
        norm = nets.step_optimizer(optimizer, policy, lr, cfg.max_grad_norm)
        # 4 Metrics, under TRL's names, and checkpoints.
        total_loss, right, margin = dist.total(sums).tolist()
        n_pairs = sum(len(group.pairs) for group in batch)
        metrics = {"loss/train": total_loss, "rewards/accuracies": right / n_pairs, "rewards/margins": margin / n_pairs}
        metrics |= {"grad_norm": norm.item(), "lr": lr}
        shown = ("loss/train", "rewards/accuracies", "rewards/margins", "tokens_per_s")
        tokens = sum(len(row.tokens) for group in batch for row in group.rows)
        run.log(step, metrics, shown, tokens)
        if run.due(step, cfg.save_every or 200):
            run.save(step + 1, policy, encoding, {}, optimizer=optimizer)
    run.finish(device)


def main() -> None:
    train(cli.parse(Config))


if __name__ == "__main__":
    cli.run_main(main)
