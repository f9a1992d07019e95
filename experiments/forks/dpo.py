"""DPO: the policy learns from the comparisons themselves, without reward model, value net and sampling.

    python -m experiments.forks.dpo                          the comparisons that reward.py sampled → out/dpo
    python -m experiments.forks.dpo --data COMPARISONS.jsonl --init out/mine --out out/mine-dpo
    python ppo.py --iterations 0 --out out/dpo               measure it on held-out prompts, as PPO is measured

The best policy under the KL term, π* ∝ π₀ exp(s / β), can be solved for the score: s = β log(π* / π₀) + β log Z. Z
depends on the prompt alone, so it cancels between two answers. What remains is the loss of reward.py,
−log σ(s_winner − s_loser), with β log(π / π₀) of the whole answer as the score (Rafailov et al. 2023, arXiv
2305.18290, equation 7). All pairs of one prompt are one batch element, as in reward.py. No prompt is held out.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

import common
import data
from data import InputError
from model import GPT
from reward import pairwise_loss


@dataclass
class Config:
    data: str = "out/reward/comparisons.jsonl"  # JSONL comparisons, as for reward.py
    init: str = "out/sft"  # run folder of the starting policy; its frozen copy is the reference
    out: str = "out/dpo"  # run folder to write
    seed: int = 0  # of the data order
    device: str = "auto"  # auto, cpu, cuda or mps
    dtype: str = "auto"  # auto, float32 or bfloat16 (autocast)
    kl_coef: float = 0.15  # β: smaller goes further from the start
    epochs: int = 1  # passes over the comparisons
    batch_size: int = 4  # prompts a step, each with all its responses, over all processes
    micro_batch_size: int = 0  # prompts in one forward; 0: the whole batch
    lr: float = 3e-4  # peak of the learning rate
    warmup: int = 10  # steps of warm-up
    max_grad_norm: float = 1.0  # gradients are clipped to this; 0: not clipped
    block_size: int = 0  # longest prompt and response together, in tokens; 0: the model's context
    resume: bool = False  # continue the run in --out


def log_ratios(policy: GPT, ref: GPT, groups: list[data.Group], device: torch.device) -> Tensor:
    """log π − log π₀ of each response of the groups, in nats, summed over its tokens: (N,)."""
    batch = data.pad([row for group in groups for row in group.rows], device)
    with torch.no_grad():
        ref_logp = ref.logprobs(*batch)  # (N, R)
    return (policy.logprobs(*batch) - ref_logp).sum(1)


def margins(rewards: Tensor, groups: list[data.Group]) -> Tensor:
    """reward of the winner − reward of the loser of every pair, from the rewards (N,) of all responses: (P,)."""
    offset, pairs = 0, []
    for group in groups:
        pairs += [(offset + winner, offset + loser) for winner, loser in group.pairs]
        offset += len(group.rows)
    winner, loser = torch.tensor(pairs, device=rewards.device).T
    return rewards[winner] - rewards[loser]


def train(cfg: Config) -> None:
    device, autocast = common.setup(cfg)
    run = common.Run(cfg)
    if cfg.kl_coef == 0:
        raise InputError("--kl_coef 0: DPO cannot do without the KL term; give a number above 0")
    policy, encoding = common.load_gpt(cfg.init, device, "--init")
    groups = data.comparisons(cfg.data, encoding, policy.config.eos, common.say)
    lengths = [max(len(row.tokens) for row in group.rows) for group in groups]
    groups = data.keep_short(groups, lengths, common.context(cfg, policy), f"comparisons of {cfg.data}", common.say)
    ref = common.freeze(copy.deepcopy(policy), autocast)
    policy.eval()  # no dropout: before the first step π is π₀, and the loss log 2
    optimizer = common.adamw(policy, cfg.lr, 0.0)
    steps = cfg.epochs * max(1, len(groups) // cfg.batch_size)
    run.start(steps, model=policy, optimizer=optimizer)
    n_pairs = sum(len(group.pairs) for group in groups)
    common.say(f"{cfg.data} → {cfg.out}: {n_pairs:,} pairs of {len(groups):,} prompts, on {device}")

    for step in range(run.step, steps):
        run.begin_step()
        # 1 The prompts of this step, each with all its responses.
        batch = data.shuffled(groups, cfg.batch_size, cfg.seed, None, step)
        mine = common.share(batch)
        size = cfg.micro_batch_size or len(batch)
        # 2 Forward and backward, one micro-batch at a time.
        sums = torch.zeros(3, device=device)  # loss, right pairs, margins
        for start in range(0, len(mine), size):
            part = mine[start : start + size]
            with autocast:
                rewards = cfg.kl_coef * log_ratios(policy, ref, part, device)
            margin = margins(rewards, part)
            loss = pairwise_loss(margin, part) / len(batch)
            loss.backward()
            sums += torch.stack([loss.detach(), (margin > 0).sum(), margin.detach().sum()])
        # 3 One step of the optimizer.
        lr = common.warmup_cosine(step, steps, cfg.lr, cfg.warmup)
        norm = common.step_optimizer(optimizer, policy, lr, cfg.max_grad_norm)
        # 4 Metrics, under TRL's names, and checkpoints.
        total_loss, right, margin = common.total(sums).tolist()
        n_pairs = sum(len(group.pairs) for group in batch)
        metrics = {"loss/train": total_loss, "rewards/accuracies": right / n_pairs, "rewards/margins": margin / n_pairs}
        metrics |= {"grad_norm": norm.item(), "lr": lr}
        metrics |= run.speed(sum(len(row.tokens) for group in batch for row in group.rows))
        shown = ("loss/train", "rewards/accuracies", "rewards/margins", "tokens_per_s")
        run.log(step, metrics, show=shown if step % 20 == 0 or step + 1 == steps else ())
        if run.must_save(step, (step + 1) % 200 == 0):
            run.save(step + 1, policy, encoding, {}, optimizer=optimizer)
    run.finish(device)


def main() -> None:
    train(common.parse(Config))


if __name__ == "__main__":
    common.run_main(main)
