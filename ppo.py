"""Stage 3: PPO against a frozen copy of the starting policy, with the KL between the two charged to the reward.

    python ppo.py                                     the tales: out/sft and out/reward → out/ppo
    python ppo.py --data PROMPTS.jsonl --init out/sft --reward out/reward --judge FILE.py:function
    python ppo.py --reward FILE.py:function           train on any Python function in place of a reward model
    python ppo.py --kl_coef 0                         what the KL term is for: see the reward being hacked

Four nets: the policy; its frozen copy, the reference; a frozen reward model; and a value net that starts as the reward
model. If the reward is a Python function, the value net starts from the policy's weights, with a head of zeros. Each
iteration answers a batch of prompts, scores the answers, and improves the policy on them. The loop in `train` comes
first and is the table of contents: one function per step, and a fork changes one of them.

    Batch: what each step adds                       shape                made by
      tokens, prompt_len, length, ended              (B, T) (B,) …        1 rollout
      columns, of the prompts' rows in the file      B dicts              1 train
      logp, ref_logp, values, entropy, mask, score   (B, R) … (B,)        2 read (disagreement: of several rewards)
      rewards, advantages, returns, final_score      (B, R) … (B,)        3 estimate
      ratio, of the last epoch                       (B, R)               4 update

tokens are right-padded, and length counts the prompt too. Column r of the (B, R) tensors is about the response token at
position prompt_len + r; they are 0 outside the response, and mask is true inside it. A part of the batch has b, t and r
for B, T and R.

Set-up: Ziegler et al. 2019 (arXiv 1909.08593). Update: Schulman et al. 2017 (1707.06347). Separate value net: Stiennon
et al. 2020 (2009.01325). Left out on purpose: a trunk shared with the value net, an entropy bonus, whitened rewards.
"""

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import tiktoken
import torch
from torch import Tensor

import data
from common import cli, dist, judges, lora, measure, nets, runs
from common.cli import Count, Number, Positive, Share, Whole
from data import InputError, Prompt, tales
from data.rng import generator, seed_of
from model import GPT, ScalarModel, response_window

Batch = dict[str, Tensor]  # and "columns", a list
WINDOW = ["logp", "ref_logp", "values", "entropy", "mask", "rewards", "advantages", "returns", "ratio"]  # all (B, R)
SHOWN = ["objective/scores", "objective/judge", "objective/kl", "response_len", "ended", "value/explained_variance"]
SHOWN += ["tokens_per_s", "eval/score", "eval/final_score", "eval/judge", "eval/kl"]


@dataclass
class Config(cli.Shared):
    # data and models
    data: str = ""  # JSONL "prompt"; empty: the tales' prompts
    eval_data: str = ""  # held-out JSONL "prompt"; empty: a part of --data (the tales have their own)
    init: str = "out/sft"  # run folder of the starting policy
    ref: str = ""  # run folder of the reference, if --init is itself a run of PPO; empty: the same as --init
    reward: str = "out/reward"  # run folder of the reward model, or FILE.py:function; several (commas) are combined
    combine: str = "mean"  # of several rewards: mean, min, or lcb (the mean less one standard deviation over them)
    judge: str = ""  # FILE.py:function that only measures; of several (commas) the first measures in training too
    out: str = "out/ppo"  # run folder to write
    block_size: Whole = 0  # longest prompt and answer together, in tokens; 0: the model's context
    seed: Whole = 0  # random seed of prompts, samples and minibatches
    # training
    iterations: Count = 64  # rounds of answer → score → update
    batch_size: Count = 64  # prompts per iteration, over all processes
    epochs: Count = 1  # passes over an iteration's answers
    minibatch_size: Count = 32  # answers per optimizer step, over all processes
    response_len: Count = 64  # longest answer, in tokens
    temperature: Positive = 1.0  # temperature of sampling and of all log-probabilities
    lr: Number = 4e-4  # peak learning rate of the policy; it rises at first and falls to 0
    value_lr: Number = 1e-3  # learning rate of the value net; it falls to 0
    value_warmup: Whole = 2  # iterations at the start in which only the value net learns; at most a quarter of all
    # PPO
    kl_coef: Number = 0.05  # β: reward charged per nat of KL to the frozen copy
    kl_target: Number = 0.0  # nats per response; β moves by up to 5% per iteration to reach it; 0: β is fixed
    kl_stop: Number = 0.0  # nats per response; the run stops when an iteration has more: its texts are nonsense; 0: off
    gamma: Share = 1.0  # discount
    lam: Share = 0.95  # λ of GAE: 1 has no bias, less has less noise
    cliprange: Number = 0.2  # ε: a token's probability ratio is clipped to 1 ± ε
    cliprange_value: Number = 0.2  # a value is clipped to its old value ± this
    unended_cap: float | None = None  # highest score without EOS; default −1, or inf if all rewards are functions
    # evaluation
    eval_prompts: Count = 512  # held-out prompts to evaluate on
    eval_every: Whole = 0  # evaluate every so many iterations and keep the best policy as best.pt; 0: only at the end


# --- the loop ---------------------------------------------------------------------------------------------------------


def train(cfg: Config) -> None:
    if cfg.kl_target and not cfg.kl_coef:
        raise InputError("--kl_target: needs a --kl_coef above 0 to start from")
    device, autocast = cli.setup(cfg)
    run = runs.Run(cfg)
    policy, ref, value, score, encoding = build(cfg, device, autocast)
    prompts, held_out = load_prompts(cfg, policy, encoding)
    judged_by = judges.load_functions(cfg.judge or ("" if cfg.data else tales.MEASURES))
    policy_optimizer = nets.adamw(policy, cfg.lr, weight_decay=0.0, eps=1e-5)
    value_optimizer = nets.adamw(value, cfg.value_lr, weight_decay=0.0, eps=1e-5)
    saved = {"value": value, "policy_optimizer": policy_optimizer, "value_optimizer": value_optimizer}
    kl_coef = run.state["kl_coef"] if run.state else cfg.kl_coef
    measured = partial(measure.held_out, partial(answer, cfg, autocast, (ref, value, score)), encoding, judged_by)
    run.start(cfg.iterations, model=policy, **saved)
    dist.print0(f"{cfg.init}, {cfg.reward} → {cfg.out}: {len(prompts):,} prompts, {len(held_out):,} held out, {device}")

    for step in range(run.step, cfg.iterations):
        # 1 The policy answers a batch of prompts.
        asked = dist.mine(data.shuffled(prompts, cfg.batch_size, cfg.seed, lengths=None, step=step))
        rng = generator("rollout", cfg.seed, step, dist.RANK)
        with run.timed("rollout"), autocast:
            batch = rollout(dist.gathered(policy, autocast), [prompt.ids for prompt in asked], cfg, rng)
        batch["columns"] = [prompt.columns for prompt in asked]
        # 2 Reward model, frozen copy and value net read the answers.
        with run.timed("score"), autocast:
            batch |= read(batch, policy, ref, value, score, cfg)
        # 3 Each token gets its reward, advantage and return.
        batch |= estimate(batch, kl_coef, cfg)
        # 4 The value net learns from them; after its warm-up, so does the policy.
        lr, value_lr = rates(step, cfg)
        seed = seed_of("minibatches", cfg.seed, step, dist.RANK)
        with run.timed("update"):
            losses = update(policy, value, policy_optimizer, value_optimizer, batch, lr, value_lr, cfg, autocast, seed)
        # 5 β moves; metrics, a sample and a checkpoint are written.
        rows = measure.as_rows(batch, encoding, policy.config.eos)
        judged = next(iter(judged_by.values()))(rows) if judged_by else []
        metrics = measure.rollout_metrics(batch, judged, kl_coef) | losses
        metrics |= {"lr": lr, "value_lr": value_lr, "episode": (step + 1) * cfg.batch_size}
        next_kl_coef = adapt(kl_coef, metrics["objective/kl"], cfg) if lr else kl_coef
        if cfg.eval_every and ((step + 1) % cfg.eval_every == 0 or step + 1 == cfg.iterations):
            with run.timed("evaluate"):
                found, goodness = measure.summary(measured(policy, held_out, "evaluate", cfg.seed), judged_by, kl_coef)
                run.keep_best(goodness, policy, encoding)
            metrics |= found
        run.log(step, metrics, SHOWN, tokens=int(dist.total(batch["mask"].sum())))
        if 0 < cfg.kl_stop < metrics["objective/kl"]:
            raise run.diverged(step + 1, "the KL to the reference", f"above --kl_stop {cfg.kl_stop:g}")
        if step % 20 == 0 or step + 1 == cfg.iterations:
            run.sample(step + 1, f"[{batch['score'][0].item():+.2f}] {rows[0]['prompt']}{rows[0]['response']}")
        if run.due(step, cfg.save_every or 20):
            run.write("rollout.json", measure.by_token(batch, rows, encoding, step + 1, kl_coef, judged))
            run.save(step + 1, policy, encoding, {"kl_coef": next_kl_coef}, **saved)
        kl_coef = next_kl_coef

    before = measured(ref, held_out, "before", cfg.seed)
    after = measured(policy, held_out, "after", cfg.seed)
    found = measure.paired(before, after, judged_by)
    run.report(measure.report(found), found)
    run.finish(device)


# --- 1 rollout --------------------------------------------------------------------------------------------------------


def rollout(policy: GPT, prompts: list[list[int]], cfg: Config, rng: torch.Generator) -> Batch:
    """The policy answers: tokens (B, T), prompt_len (B,), length (B,), ended (B,): whether an end token is the last."""
    how = cfg.response_len, cfg.temperature, rng, cfg.micro_batch_size
    tokens, prompt_len, length = nets.generate(policy, prompts, *how)
    last = tokens[torch.arange(len(tokens)), length - 1]  # (B,)
    ended = torch.isin(last, torch.tensor(policy.config.ends, device=last.device))
    return {"tokens": tokens, "prompt_len": prompt_len, "length": length, "ended": ended}


def select(batch: Batch, index: Tensor) -> Batch:
    """The rows `index` of a batch, cut to the longest of them: tokens (B, T) to (b, t), WINDOW (B, R) to (b, r)."""
    place = {batch[name].device: index.to(batch[name].device) for name in ("tokens", "length")}  # each device once
    part = {name: x[place[x.device]] for name, x in batch.items() if name != "columns"}
    r = int((part["length"] - part["prompt_len"]).max())
    part["tokens"] = part["tokens"][:, : int(part["length"].max())]
    return part | {name: part[name][:, :r] for name in WINDOW if name in part}


def split(batch: Batch, cfg: Config) -> list[Tensor]:
    """The rows of each micro-batch; rows of like length share one. With --shard every process gets as many parts."""
    size = cfg.micro_batch_size or cfg.minibatch_size // dist.WORLD
    parts = list(batch["length"].argsort(stable=True).split(size))
    return dist.pad_to_equal(parts, parts) if cfg.shard else parts


# --- 2 read -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def read(batch: Batch, policy: GPT, ref: GPT, value: ScalarModel, score: Callable, cfg: Config) -> Batch:
    """What every net makes of the answers: logp, ref_logp, values, entropy, mask (B, R), score (B,).

    The old log-probabilities come from the forward that training uses, not from the decode, so that the ratio is 1 at
    the first step. `score` gets the whole batch, since a function is asked once for all answers.
    """
    device = batch["tokens"].device
    _, mask = response_window(batch["prompt_len"], batch["length"])
    found = {name: torch.zeros(mask.shape, device=device) for name in ("logp", "ref_logp", "values", "entropy")}
    found |= {"mask": mask.to(device), "score": score(batch)}
    for index in split(batch, cfg):
        part = select(batch, index)
        sequences = part["tokens"], part["prompt_len"], part["length"]
        new = {"values": value.values(*sequences), "ref_logp": ref.logprobs(*sequences, cfg.temperature)}  # (b, r)
        new["logp"], new["entropy"] = policy.logprobs_and_entropy(*sequences, cfg.temperature)
        for name, x in new.items():
            found[name][index.to(device), : x.shape[1]] = x
    return found


def scorer(reward: ScalarModel | judges.Judge | list, encoding: tiktoken.Encoding, eos: int, cfg: Config) -> Callable:
    """A function batch → scores (B,), from a reward model, a function rows → list of numbers, or a list of these.

    A reward model reads the very tokens that were sampled; only a function gets text. The scores of several are
    combined (Coste et al. 2023, arXiv 2310.02743), and the batch gets their standard deviation as "disagreement".
    """
    rewards = reward if isinstance(reward, list) else [reward]

    @torch.no_grad()
    def score(batch: Batch) -> Tensor:
        device = batch["tokens"].device
        scores = torch.zeros(len(rewards), len(batch["tokens"]), device=device)
        for row, reward in zip(scores, rewards):
            if not isinstance(reward, ScalarModel):
                with torch.autocast(device.type, enabled=False):  # a user's function computes in its own precision
                    row.copy_(torch.tensor(reward(measure.as_rows(batch, encoding, eos)), dtype=torch.float32))
                continue
            for index in split(batch, cfg):
                part = select(batch, index)
                row[index.to(device)] = reward.scores(part["tokens"], part["length"])
        if len(rewards) == 1:
            return scores[0]
        mean, batch["disagreement"] = scores.mean(0), scores.std(0, correction=0)
        return {"mean": mean, "min": scores.amin(0), "lcb": mean - batch["disagreement"]}[cfg.combine]

    return score


# --- 3 estimate -------------------------------------------------------------------------------------------------------


def estimate(batch: Batch, kl_coef: float, cfg: Config) -> Batch:
    """Per-token rewards → GAE → whitening: rewards, advantages, returns (B, R), final_score (B,).

    Every token costs β (log π(y_t) − log π₀(y_t)) (Ziegler et al. 2019, equation 2). The last token earns the final
    score. GAE: Schulman et al. 2016, equation 16.
    """
    mask, final_score = batch["mask"], final_scores(batch, cfg)
    rewards = -kl_coef * (batch["logp"] - batch["ref_logp"])  # (B, R)
    last = mask.sum(1, keepdim=True) - 1  # (B, 1) column of each row's last token
    rewards = rewards.scatter_add(1, last, final_score[:, None].to(rewards.dtype)) * mask

    values, advantages = batch["values"], torch.zeros_like(rewards)
    next_value = next_advantage = torch.zeros_like(final_score)  # 0 after the last token, even if the answer was cut
    for r in reversed(range(mask.shape[1])):
        delta = rewards[:, r] + cfg.gamma * next_value - values[:, r]
        next_advantage = (delta + cfg.gamma * cfg.lam * next_advantage) * mask[:, r]
        advantages[:, r] = next_advantage
        next_value = values[:, r]
    returns = (advantages + values) * mask  # from the advantages as they are, before whitening
    return {"rewards": rewards, "advantages": whiten(advantages, mask), "returns": returns, "final_score": final_score}


def final_scores(batch: Batch, cfg: Config) -> Tensor:
    """The scores (B,), at most --unended_cap where EOS is missing: what PPO raises, and what picks the best of n."""
    by_model = not all(map(judges.is_function, cfg.reward.split(",")))  # whose scores have a unit
    cap = (-1.0 if by_model else math.inf) if cfg.unended_cap is None else cfg.unended_cap
    return torch.where(batch["ended"], batch["score"], batch["score"].clamp(max=cap))


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """x (B, R) shifted and scaled to mean 0, variance 1 over the masked places of the whole batch; 0 elsewhere."""
    centred = x - dist.masked_mean(x, mask)
    variance = dist.masked_mean(centred.square(), mask)
    return centred * (variance + 1e-8).rsqrt() * mask


# --- 4 update ---------------------------------------------------------------------------------------------------------


def policy_loss(logp: Tensor, old_logp: Tensor, advantages: Tensor, cliprange: float) -> tuple[Tensor, Tensor]:
    """max(−A ρ, −A clip(ρ, 1 ± ε)) for each token (B, R), and ρ (Schulman et al. 2017, equation 7)."""
    ratio = (logp - old_logp).exp()
    clipped_ratio = ratio.clamp(1 - cliprange, 1 + cliprange)
    return torch.maximum(-advantages * ratio, -advantages * clipped_ratio), ratio


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, cliprange: float) -> Tensor:
    """½ max((V − R)², (V_clipped − R)²) for each token (B, R): the value clipping of OpenAI Baselines."""
    clipped = old_values + (values - old_values).clamp(-cliprange, cliprange)
    return 0.5 * torch.maximum((values - returns).square(), (clipped - returns).square())


def update(
    policy: GPT,
    value: ScalarModel,
    policy_optimizer: torch.optim.Optimizer,
    value_optimizer: torch.optim.Optimizer,
    batch: Batch,
    lr: float,
    value_lr: float,
    cfg: Config,
    autocast: torch.autocast,
    seed: int,
) -> dict[str, float]:
    """`epochs` passes over the batch, one step of each optimizer per minibatch. At `lr` 0 the policy stands still.

    Losses and metrics are means over the tokens of the whole minibatch (all micro-batches, all processes), so how it is
    split changes nothing. Returns the metrics, and puts the last epoch's ratio into the batch.
    """
    batch["ratio"] = batch["mask"].float()  # for rollout.json
    rng, sums, n_steps = generator(seed), defaultdict(float), 0
    for _ in range(cfg.epochs):
        order = torch.randperm(len(batch["tokens"]), generator=rng)
        for rows in order.split(cfg.minibatch_size // dist.WORLD):
            n_tokens = dist.total(batch["mask"][rows.to(batch["mask"].device)].sum())
            rows = rows[batch["length"][rows].argsort(stable=True)]  # rows of like length together
            for index in rows.split(cfg.micro_batch_size or len(rows)):
                part = select(batch, index)
                mask, advantages, returns = part["mask"], part["advantages"], part["returns"]
                sequences = part["tokens"], part["prompt_len"], part["length"]
                with autocast:
                    logp = policy.logprobs(*sequences, cfg.temperature)  # (b, r)
                    values = value.values(*sequences)  # (b, r)
                pg_losses, ratio = policy_loss(logp, part["logp"], advantages, cfg.cliprange)
                vf_losses = value_loss(values, part["values"], returns, cfg.cliprange_value)
                loss = ((pg_losses + vf_losses) * mask).sum() / n_tokens  # two nets without a common weight
                loss.backward()
                batch["ratio"][index.to(mask.device), : mask.shape[1]] = ratio.detach() * mask
                by_token = {
                    "loss/policy_avg": pg_losses,
                    "policy/approxkl": 0.5 * (logp - part["logp"]).square(),
                    "policy/clipfrac_avg": pg_losses > -advantages * ratio,
                    "policy/ratio": ratio,
                    "loss/value_avg": vf_losses,
                    "val/clipfrac_avg": vf_losses > 0.5 * (values - returns).square(),
                }
                for name, x in by_token.items():
                    sums[name] += (x.detach() * mask).sum() / n_tokens
            norm = nets.step_optimizer(policy_optimizer, policy, lr, cfg.max_grad_norm)
            sums["policy/grad_norm"] += norm / dist.WORLD  # each process has the whole norm
            norm = nets.step_optimizer(value_optimizer, value, value_lr, cfg.max_grad_norm)
            sums["value/grad_norm"] += norm / dist.WORLD
            n_steps += 1
    means = dist.total(torch.stack(list(sums.values()))) / n_steps
    return dict(zip(sums, means.tolist()))


# --- 5 rates and β ----------------------------------------------------------------------------------------------------


def rates(step: int, cfg: Config) -> tuple[float, float]:
    """The learning rates of policy and value net at an iteration. Both are multiplied by a factor that falls to 0.

    The reward model was trained on last tokens alone, so what the value net says of a prefix is a guess at first. It
    learns alone for some iterations. Then the policy's rate rises over four, or over a quarter of a short run.
    """
    alone = min(cfg.value_warmup, cfg.iterations // 4)
    rising = max(1, min(4, cfg.iterations // 4))
    risen = min(1.0, max(0, step - alone + 1) / rising)
    left = 1 - step / cfg.iterations
    return cfg.lr * risen * left, cfg.value_lr * left


def adapt(kl_coef: float, kl: float, cfg: Config) -> float:
    """β for the next iteration, from the KL in nats per response (Ziegler et al. 2019, section 2.2, with K = 0.25)."""
    if not cfg.kl_target:
        return kl_coef
    error = min(max(kl / cfg.kl_target - 1, -0.2), 0.2)
    return kl_coef * (1 + 0.25 * error)


# --- nets and prompts -------------------------------------------------------------------------------------------------


def build(
    cfg: Config, device: torch.device, autocast: torch.autocast
) -> tuple[GPT, GPT, ScalarModel, Callable[[Batch], Tensor], tiktoken.Encoding]:
    """Policy, frozen reference, value net, function that scores, tokenizer. Raises InputError if they do not fit."""
    if cfg.combine not in ("mean", "min", "lcb"):
        raise InputError(f"--combine {cfg.combine}: give mean, min or lcb")
    trunks = lora.Trunks(cfg.lora, autocast)  # what the nets share with --lora
    policy, encoding = nets.load_gpt(cfg.init, device, "--init", trunks)
    ref, ref_encoding = nets.load_gpt(cfg.ref or cfg.init, device, "--ref", trunks)
    nets.check_vocabulary(f"--ref {cfg.ref}", ref_encoding, encoding, cfg.init)
    names, load = cfg.reward.split(","), partial(nets.load_reward, device, encoding, cfg.init, trunks)
    rewards = [judges.load_function(name) if judges.is_function(name) else load(name) for name in names]
    frozen = [ref, *(each for each in rewards if isinstance(each, ScalarModel))]
    if judges.is_function(names[0]):
        value = ScalarModel(nets.load_gpt(cfg.init, device, "--init", trunks)[0]).to(device)
        torch.nn.init.zeros_(value.head.weight)
    else:
        value, _ = nets.load_scalar(names[0], device, "--reward", trunks)
    if min(net.config.block_size - len(net.config.suffix) for net in (value, *frozen)) < nets.context(cfg, policy):
        raise InputError("--ref or --reward has a shorter context than --init; give a --block_size that fits all")
    for net in (policy, value):
        net.eval().requires_grad_(True)  # eval: no dropout, or the ratio would not be 1
    for net in frozen:
        nets.freeze(net, autocast)
    cli.prepare(cfg, policy, value, *frozen)
    return policy, ref, value, scorer(rewards, encoding, policy.config.eos, cfg), encoding


def load_prompts(cfg: Config, policy: GPT, encoding: tiktoken.Encoding) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts to train on, and held-out ones. Raises InputError where the options leave too few of them."""
    size = min(cfg.batch_size, cfg.minibatch_size)
    if cfg.batch_size % size or size % dist.WORLD:
        raise InputError(f"--batch_size has to be a multiple of --minibatch_size, and that of {dist.WORLD} processes")
    if size < cfg.minibatch_size:
        dist.print0(f"--minibatch_size {cfg.minibatch_size}: a batch of {size} answers is one minibatch")
    path = cfg.data or tales.path("ppo")
    eval_path = cfg.eval_data or ("" if cfg.data else tales.path("eval"))
    room = nets.context(cfg, policy) - cfg.response_len
    prompts, held_out = data.prompts_and_held_out(path, eval_path, encoding, room, cfg.eval_prompts, dist.print0)
    if len(prompts) < cfg.batch_size or cfg.shard and len(held_out) < dist.WORLD:
        what = f"{path} leaves {len(prompts)} prompts, and {len(held_out)} are held out"
        raise InputError(f"--batch_size {cfg.batch_size}: {what}; give less, or more prompts")
    judges.check_columns(f"{cfg.reward},{cfg.judge}", [prompt.columns for prompt in prompts + held_out])
    return prompts, held_out


def answer(
    cfg: Config, autocast: torch.autocast, readers: tuple, policy: GPT, prompts: list[Prompt], rng: torch.Generator
) -> Batch:
    """`policy` answers some held-out prompts; reference, value net and scorer (`readers`) read them; final_score."""
    with autocast:
        batch = rollout(dist.gathered(policy, autocast), [prompt.ids for prompt in prompts], cfg, rng)
        batch["columns"] = [prompt.columns for prompt in prompts]
        batch |= read(batch, policy, *readers, cfg)
    return batch | {"final_score": final_scores(batch, cfg)}


def main() -> None:
    train(cli.parse(Config))


if __name__ == "__main__":
    cli.run_main(main)
