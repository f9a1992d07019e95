"""Stage 2: a reward model, the stage-1 trunk under a scalar head, trained on which of two responses was preferred.

    python reward.py                                     sample stories, let the tales' judge compare them, train
    python reward.py --data COMPARISONS.jsonl            train on comparisons that people made
    python reward.py --data PROMPTS.jsonl --judge FILE.py:function      sample, and let your function compare
    python reward.py --evaluate out/reward --data COMPARISONS.jsonl     only measure a reward model

What --data holds decides which it is: JSONL with "chosen" and "rejected", or with "ranked", or with "prompt" alone.
The loss is −log σ(s_winner − s_loser) on the scores at the last token (Christiano et al. 2017; Stiennon et al. 2020);
all pairs of one prompt are one batch element, and each of its responses goes through the trunk once (Ouyang et al.
2022, section 3.5). At the end gain and bias are set so that samples of the starting policy score mean 0, variance 1.
"""

import copy
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path

import tiktoken
import torch
import torch.nn.functional as F
from torch import Tensor

import common
import data
import fast
from common import compare as label
from common.measure import agreement, agreement_report, by_source_and_length, margins
from data import InputError, tales
from model import GPT, ScalarModel


@dataclass
class Config:
    # data and model
    data: str = ""  # JSONL comparisons, or JSONL prompts to sample and judge; empty: the tales' prompts
    init: str = "out/sft"  # run folder of the policy: it is sampled from, and its trunk becomes the reward model
    out: str = "out/reward"  # run folder to write
    evaluate: str = ""  # run folder of a reward model to measure on --data, in place of training one
    block_size: int = 0  # longest prompt and response together, in tokens; 0: the model's context
    # sampling and comparing
    judge: str = ""  # the simulated person, FILE.py:function, where --data holds prompts alone; the tales have theirs
    label_temperature: float = 0.1  # of the simulated person's choices: 0.1 judges 0.1 better right in 73%
    samples: int = 8  # responses sampled for each prompt, where --data holds prompts alone
    n_prompts: int = 0  # use the first so many prompts of --data; 0: all
    response_len: int = 64  # longest sampled response, in tokens
    temperature: float = 1.0  # of the samples
    # run
    seed: int = 0  # of samples, labels, head and data order
    device: str = "auto"  # auto, cpu, cuda or mps
    dtype: str = "auto"  # auto, float32 or bfloat16 (autocast)
    compile: bool = False  # torch.compile of the blocks, after a minute of compiling
    checkpoint_activations: bool = False  # in training keep less and compute more
    shard: bool = False  # divide the nets over the processes of torchrun, where one GPU cannot hold them
    resume: bool = False  # continue the run in --out
    tensorboard: bool = False  # write the metrics for TensorBoard too, into --out
    # training
    batch_size: int = 4  # prompts a step, each with all its responses, over all processes
    micro_batch_size: int = 0  # prompts in one forward; 0: the whole batch
    lr: float = 1e-3  # peak of the learning rate
    warmup: int = 10  # steps of warm-up
    weight_decay: float = 0.0  # on matrices
    max_grad_norm: float = 1.0  # gradients are clipped to this; 0: not clipped


# --- 1 comparisons ----------------------------------------------------------------------------------------------------


def sample_and_compare(
    cfg: Config, source: str, policy: GPT, encoding: tiktoken.Encoding, autocast: torch.autocast, target: Path
) -> None:
    """Sample the policy on the prompts of `source`, let the judge compare, write the comparisons to `target`."""
    name = cfg.judge or tales.MEASURES.split(",")[0]
    judge = common.load_function(name)
    texts = data.prompt_texts(source)[: cfg.n_prompts or None]
    lengths = [len(data.encode_prompt(encoding, text)) + cfg.response_len for text in texts]
    what = f"prompts of {source} (with --response_len {cfg.response_len})"
    texts = data.keep_short(texts, lengths, common.context(cfg, policy), what, common.say)
    common.say(f"{cfg.init} answers {len(texts):,} prompts of {source}, {cfg.samples} times each; {name} compares")
    seeds = common.seed_of("answers", cfg.seed), common.seed_of("choices", cfg.seed)
    with autocast:
        answers = label.sample_responses(
            policy, encoding, texts, cfg.samples, cfg.response_len, cfg.temperature, seeds[0]
        )
    shown = [data.prompt_text(encoding, text) for text in texts]
    rows = label.simulate(texts, answers, judge, cfg.label_temperature, seeds[1], shown)
    if not rows:
        raise InputError(
            f"--init {cfg.init}: its samples are all alike, so there is nothing to compare; raise --temperature"
        )
    data.write_jsonl(target, rows)


def build(
    cfg: Config, run: common.Run, autocast: torch.autocast, device: torch.device
) -> tuple[GPT, tiktoken.Encoding, list[data.Group], list[data.Group]]:
    """The starting policy, its tokenizer, groups to train on, and held-out groups."""
    source = cfg.data or tales.path("compare")
    columns = data.first_row(source)
    policy, encoding = common.load_gpt(cfg.init, device, "--init")
    comparisons: str | Path = source
    if {"chosen", "ranked"}.isdisjoint(columns):
        if cfg.data and not cfg.judge:
            raise InputError(
                f"{source}: has {', '.join(columns)}, which are no comparisons (prompt, chosen, rejected); rename "
                "them, or name a --judge that compares samples for its prompts"
            )
        options = (cfg.response_len, cfg.temperature, cfg.samples, cfg.n_prompts, cfg.label_temperature)
        key = run.inputs["init"], run.inputs["judge"], common.fingerprint(source), cfg.seed, cfg.block_size, *options
        make = partial(sample_and_compare, cfg, source, policy, encoding, autocast)
        comparisons = run.made("comparisons.jsonl", key, make)
    groups = data.comparisons(comparisons, encoding, policy.config.eos, common.say)[: cfg.n_prompts or None]
    lengths = [max(len(row.tokens) for row in group.rows) for group in groups]
    groups = data.keep_short(groups, lengths, common.context(cfg, policy), f"comparisons of {source}", common.say)
    held_out, groups = data.hold_out(groups, share=10)
    return policy, encoding, groups, held_out


# --- 2 loss -----------------------------------------------------------------------------------------------------------


def score_groups(model: ScalarModel, groups: list[data.Group], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Scores (N,) of all responses of the groups; winner and loser (P,), indices into them, of all their pairs."""
    tokens, _, length = data.pad([row for group in groups for row in group.rows], device)
    offset, pairs = 0, []
    for group in groups:
        pairs += [(offset + winner, offset + loser) for winner, loser in group.pairs]
        offset += len(group.rows)
    winner, loser = fast.to_device(torch.tensor(pairs), device).T
    return model.scores(tokens, length), winner, loser


def pairwise_loss(margin: Tensor, groups: list[data.Group]) -> Tensor:
    """Σ over groups of the mean over a group's pairs of −log σ(margin), margins (P,) = s_winner − s_loser."""
    weight = torch.cat([torch.full((n,), 1 / n) for n in (len(group.pairs) for group in groups)]).to(margin.device)
    return -(weight * F.logsigmoid(margin)).sum()


# --- 3 evaluation -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def read_scores(
    model: ScalarModel, groups: list[data.Group], cfg: Config, device: torch.device, autocast: torch.autocast
) -> list[Tensor]:
    """The scores (n,) of the n responses of each group, on the CPU."""
    model.eval()
    size, found = cfg.micro_batch_size or cfg.batch_size, []
    for start in range(0, len(groups), size):
        part = groups[start : start + size]
        with autocast:
            scores, _, _ = score_groups(model, part, device)
        found += scores.cpu().split([len(group.rows) for group in part])
    return found


def evaluate(
    model: ScalarModel, groups: list[data.Group], cfg: Config, device: torch.device, autocast: torch.autocast
) -> tuple[dict[str, float], list[tuple]]:
    scores = read_scores(model, groups, cfg, device, autocast)
    metrics, table = agreement(groups, scores)
    margin = torch.cat([margins(group, each) for group, each in zip(groups, scores)])
    return {"eval/loss": pairwise_loss(margin, groups).item() / len(groups)} | metrics, table


def inspect(cfg: Config) -> None:
    """Print how well the reward model of --evaluate agrees with the comparisons of --data."""
    device, autocast = common.setup(cfg)
    if not cfg.data:
        raise InputError("--evaluate: name the comparisons to measure on with --data")
    model, encoding = common.load_scalar(cfg.evaluate, device, "--evaluate")
    model = common.shard(model, cfg)
    groups = data.comparisons(cfg.data, encoding, model.config.eos, common.say)[: cfg.n_prompts or None]
    lengths = [max(len(row.tokens) for row in group.rows) for group in groups]
    groups = data.keep_short(groups, lengths, common.context(cfg, model), f"comparisons of {cfg.data}", common.say)
    scores = read_scores(model, groups, cfg, device, autocast)
    common.say(f"{cfg.evaluate} on {cfg.data}: {len(groups):,} prompts")
    common.say(agreement_report(*agreement(groups, scores)) + "\n\n" + by_source_and_length(groups, scores))


# --- 4 normalisation --------------------------------------------------------------------------------------------------


@torch.no_grad()
def normalize(model: ScalarModel, rows: list[data.Row], device: torch.device, autocast: torch.autocast) -> None:
    """Set gain and bias so that the scores of `rows` have mean 0 and variance 1 (Ziegler et al. 2019, section 2.2)."""
    scores = []
    for part in data.micro_batches(rows, 64):
        tokens, _, length = data.pad(part, device)
        with autocast:
            scores.append(model.scores(tokens, length))
    raw = torch.cat(scores)
    if not raw.isfinite().all():
        raise InputError("the scores of the policy's samples are not finite: the training has diverged; lower --lr")
    std = raw.std().clamp(min=1e-6)
    model.bias.copy_((model.bias - raw.mean()) / std)
    model.gain.copy_(model.gain / std)


def open_prompts(policy: GPT, groups: list[data.Group], cfg: Config) -> list[list[int]]:
    """512 prompts of `groups`, some of them again if there are fewer, that leave room for a response."""
    prompts = [row.tokens[: row.prompt_len] for row in (group.rows[0] for group in groups)]
    prompts = [p for p in prompts if len(p) + cfg.response_len <= policy.config.block_size][:512]
    if not prompts:
        raise InputError(
            f"--response_len {cfg.response_len}: no prompt leaves room for it in the context; give a smaller one"
        )
    return list(islice(cycle(prompts), 512))


def sample_policy(policy: GPT, prompts: list[list[int]], cfg: Config, autocast: torch.autocast) -> list[data.Row]:
    """An answer of the starting policy to each of 512 prompts."""
    policy, rows = common.whole(policy), []
    for start in range(0, 512, 128):
        generator = common.generator("normalize", cfg.seed, start)
        with autocast:
            sampled = policy.generate(
                prompts[start : start + 128], cfg.response_len, temperature=cfg.temperature, generator=generator
            )
        for tokens, prompt_len, length in zip(*(x.tolist() for x in sampled)):
            rows.append(data.Row(tokens[:length], prompt_len))
    return rows


# --- the loop ---------------------------------------------------------------------------------------------------------


def train(cfg: Config) -> None:
    device, autocast = common.setup(cfg)
    run = common.Run(cfg)
    policy, encoding, groups, held_out = build(cfg, run, autocast, device)
    prompts = open_prompts(policy, groups, cfg)  # before the training: it refuses a --response_len without room
    first_rows = [group.rows[0] for group in groups]
    run.about["prompts"] = torch.tensor([common.prompt_key(row.tokens[: row.prompt_len]) for row in first_rows])
    torch.manual_seed(cfg.seed)
    model = ScalarModel(copy.deepcopy(policy)).to(device)
    if cfg.compile:
        fast.compile_blocks(model.trunk)
    model.trunk.checkpoint_activations = cfg.checkpoint_activations
    policy, model = common.shard(policy, cfg), common.shard(model, cfg)
    optimizer = common.adamw(model, cfg.lr, cfg.weight_decay)
    steps = max(1, len(groups) // cfg.batch_size)  # one epoch: a second one overfits (Stiennon et al. 2020, C.1)
    run.start(steps, model=model, optimizer=optimizer)
    n_pairs = sum(len(group.pairs) for group in groups)
    common.say(
        f"{cfg.data or 'the tales'} → {cfg.out}: {n_pairs:,} pairs of {len(groups):,} prompts, "
        f"{len(held_out):,} prompts held out"
    )

    table: list[tuple] = []
    model.eval()  # no dropout: a score must not depend on chance
    for step in range(run.step, steps):
        run.begin_step()
        # 1 The prompts of this step, each with all its responses.
        batch = data.shuffled(groups, cfg.batch_size, cfg.seed, None, step)
        mine = common.share(batch, cfg.shard)
        size = cfg.micro_batch_size or len(batch)
        # 2 Forward and backward, one micro-batch at a time.
        loss = correct = torch.zeros((), device=device)
        for start in range(0, len(mine), size):
            part = mine[start : start + size]
            with autocast:
                scores, winner, loser = score_groups(model, part, device)
            margin = scores[winner] - scores[loser]
            part_loss = pairwise_loss(margin, part) / len(batch)
            part_loss.backward()
            loss, correct = loss + part_loss.detach(), correct + (margin > 0).sum()
        # 3 One step of the optimizer.
        lr = common.warmup_cosine(step, steps, cfg.lr, cfg.warmup)
        norm = common.step_optimizer(optimizer, model, lr, cfg.max_grad_norm)
        # 4 Metrics and checkpoints; at the end evaluation and normalisation.
        accuracy = common.total(correct).item() / sum(len(group.pairs) for group in batch)
        metrics = {"loss/train": common.total(loss).item(), "accuracy": accuracy, "grad_norm": norm.item(), "lr": lr}
        metrics |= run.speed(sum(len(row.tokens) for group in batch for row in group.rows))
        run.check(step, metrics)
        last = step + 1 == steps
        if last:
            found, table = evaluate(model, held_out, cfg, device, autocast)
            run.report(agreement_report(found, table), {"metrics": found, "calibration": table})
            metrics |= found
            normalize(model, sample_policy(policy, prompts, cfg, autocast), device, autocast)
            how = f"(gain {model.gain:.3f}, bias {model.bias:.3f})"
            common.say(f"\nscores of {cfg.init}'s samples now have mean 0, variance 1 {how}")
        run.log(step, metrics, show=("loss/train", "accuracy", "tokens_per_s") if step % 20 == 0 or last else ())
        if run.must_save(step, (step + 1) % 200 == 0):
            run.save(step + 1, model, encoding, {}, optimizer=optimizer)
    run.finish(device, table)


def main() -> None:
    cfg = common.parse(Config)
    inspect(cfg) if cfg.evaluate else train(cfg)


if __name__ == "__main__":
    common.run_main(main)
