"""Stage 3: PPO against a frozen copy of the starting policy, with the KL between the two charged to the reward.

    python ppo.py                                            the tales: out/sft and out/reward → out/ppo
    python ppo.py --data PROMPTS.jsonl --init out/sft --reward out/reward --judge FILE.py:function
    python ppo.py --reward FILE.py:function                  train on any Python function in place of a reward model
    python ppo.py --kl_coef 0                                what the KL term is for: see the reward being hacked
    python ppo.py --iterations 0                             only evaluate the policy in --out

Four nets: the policy; its frozen copy, the reference; a frozen reward model; and a value net that starts as the reward
model. (If a Python function takes the reward model's place, the value net starts as the policy's trunk under a head of
zeros.) Each iteration answers a batch of prompts, scores the answers, and improves the policy on them. The loop in
`train` is the table of contents, one function a step; a fork changes one of them.

    Batch: what each step adds                       shape                made by
      tokens, prompt_len, length, ended              (B, T) (B,) …        1 rollout
      logp, ref_logp, values, entropy, mask, score   (B, R) … (B,)        2 read
      rewards, advantages, returns, final_score      (B, R) … (B,)        3 estimate
      ratio, of the last epoch                       (B, R)               4 update

tokens are right-padded. Columns of the (B, R) tensors are response tokens: column r is about the token at position
prompt_len + r, and R is the longest response. These tensors are 0 outside the response; mask is true inside it. In a
part of the batch, B, T and R become b, t and r. prompt_len and length stay on the CPU.

Ziegler et al. 2019 (arXiv 1909.08593) is the set-up, Schulman et al. 2017 (1707.06347) the update, Stiennon et al. 2020
(2009.01325) the separate value net that starts as the reward model. Left out on purpose: shared trunks for policy and
value, an entropy bonus, whitening of rewards, dropout.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import tiktoken
import torch
from torch import Tensor

import common
import data
import fast
from common.measure import (
    Judge,
    Texts,
    best_of,
    best_of_sizes,
    by_token,
    evaluate,
    paired,
    report,
    rollout_metrics,
    summary,
)
from data import InputError, tales
from model import GPT, ScalarModel, response_window

Batch = dict[str, Tensor]
STANDING_STILL = {  # what `update` reports for a net that it does not train
    "loss/policy_avg": 0.0, "policy/approxkl_avg": 0.0, "policy/clipfrac_avg": 0.0, "policy/grad_norm": 0.0,
    "loss/value_avg": 0.0, "val/clipfrac_avg": 0.0, "value/grad_norm": 0.0, "val/ratio": 1.0,
}  # fmt: skip
SHOWN = ["objective/scores", "objective/judge", "objective/kl", "val/ratio", "val/num_eos_tokens", "tokens_per_s"]
SHOWN += ["eval/score", "eval/judge", "eval/kl"]


@dataclass
class Config:
    # data and models
    data: str = ""  # JSONL "prompt"; empty: the tales' prompts
    eval_data: str = ""  # held-out JSONL "prompt"; empty: a part of --data (the tales have their own)
    init: str = "out/sft"  # run folder of the starting policy; its frozen copy is the reference
    ref: str = ""  # run folder of the reference, if it is not --init (where --init is itself a run of PPO)
    reward: str = "out/reward"  # run folder of the reward model, or FILE.py:function to train on
    judge: str = ""  # FILE.py:function, never trained on; of several (commas) the first is measured in training too
    out: str = "out/ppo"  # run folder to write
    block_size: int = 0  # longest prompt and answer together, in tokens; 0: the model's context
    # run
    seed: int = 0  # of prompts, samples and minibatches
    device: str = "auto"  # auto, cpu, cuda or mps
    dtype: str = "auto"  # auto, float32 or bfloat16 (autocast)
    compile: bool = False  # torch.compile of the blocks, after a minute of compiling
    checkpoint_activations: bool = False  # in training keep less and compute more
    shard: bool = False  # divide the nets over the processes of torchrun, where one GPU cannot hold them
    save_every: int = 20  # iterations between checkpoints
    resume: bool = False  # continue the run in --out; more --iterations than before prolong it
    tensorboard: bool = False  # write the metrics for TensorBoard too, into --out
    # training
    iterations: int = 64  # rounds of answer → score → update; 0: only evaluate
    batch_size: int = 64  # prompts an iteration, over all processes
    epochs: int = 1  # passes over an iteration's answers
    minibatch_size: int = 32  # answers an optimizer step, over all processes
    micro_batch_size: int = 0  # answers in one forward; 0: the whole minibatch
    response_len: int = 64  # longest answer, in tokens
    temperature: float = 1.0  # of sampling and of all log-probabilities
    lr: float = 4e-4  # of the policy; it rises at first and is annealed to 0
    value_lr: float = 1e-3  # of the value net, annealed to 0
    value_warmup: int | None = None  # first iterations, in which only the value net learns; default 2, or a quarter
    lr_warmup: int | None = None  # iterations after these, in which the policy's rate rises; default 4, or a quarter
    # PPO
    kl_coef: float = 0.05  # β: reward charged per nat of KL to the frozen copy
    kl_target: float = 0.0  # nats a response; above 0, β adapts towards it (Ziegler et al. 2019, section 2.2)
    kl_stop: float = 0.0  # nats a response; an iteration above this ends the run, because it has left the language
    horizon: int = 10000  # episodes in which an adaptive β moves by a factor of at most 1.22
    gamma: float = 1.0  # discount
    lam: float = 0.95  # λ of GAE
    cliprange: float = 0.2  # ε of the policy's ratio
    cliprange_value: float = 0.2  # a value that moved further than this towards its return gets no gradient
    vf_coef: float = 1.0  # scales the value loss; Adam undoes that, except through max_grad_norm
    max_grad_norm: float = 1.0  # gradients are clipped to this, each net's by itself; 0: not clipped
    score_clip: float = 0.0  # scores are clipped to ± this; 0: not clipped
    unended_cap: float | None = None  # highest score without EOS; default −1, or inf for a function
    # evaluation
    eval_prompts: int = 512  # held-out prompts to evaluate on
    eval_every: int = 0  # evaluate every so many iterations and keep the best policy as best.pt; 0: only at the end
    best_of: str = ""  # such as 1,4,16: at the end, show the best of so many answers of the reference too


# --- 1 rollout --------------------------------------------------------------------------------------------------------


def rollout(policy: GPT, prompts: list[list[int]], cfg: Config, generator: torch.Generator) -> Batch:
    """The policy answers: tokens (B, T), prompt_len (B,), length (B,), ended (B,): whether EOS is the last token."""
    tokens, prompt_len, length = policy.generate(
        prompts, cfg.response_len, temperature=cfg.temperature, generator=generator
    )
    last = fast.pick(tokens, torch.arange(len(tokens)), length - 1)  # (B,)
    ended = torch.isin(last, fast.to_device(torch.tensor(policy.config.ends), last.device))
    return {"tokens": tokens, "prompt_len": prompt_len, "length": length, "ended": ended}


def texts(batch: Batch, encoding: tiktoken.Encoding, eos: int) -> Texts:
    """(prompt, response) of every row as text, without the EOS."""
    pairs = []
    columns = [batch[name].tolist() for name in ("tokens", "prompt_len", "length", "ended")]
    for row, start, end, ended in zip(*columns):
        prompt = [] if row[:start] == [eos] else row[:start]  # what an empty prompt starts from
        response = row[start : end - 1] if ended else row[start:end]
        pairs.append((encoding.decode(prompt), encoding.decode(response)))
    return pairs


def by_length(batch: Batch, size: int) -> list[Tensor]:
    """Split the row indices of a PPO batch into parts of at most `size`. Rows of similar length share a part."""
    return list(batch["length"].argsort(stable=True).split(size))


def select(batch: Batch, index: Tensor) -> Batch:
    """Select the rows `index` of a PPO batch and cut them to the longest: (B, T) to (b, t), (B, R) to (b, r)."""
    device = batch["tokens"].device
    rows = fast.to_device(index, device)
    part = {name: x[rows if x.device == device else index] for name, x in batch.items()}
    t = int(part["length"].max())
    r = int((part["length"] - part["prompt_len"]).max())
    for name, x in part.items():
        if x.dim() == 2:
            part[name] = x[:, :t] if name == "tokens" else x[:, :r]
    return part


# --- 2 read -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def read(
    batch: Batch, policy: GPT, ref: GPT, value: ScalarModel | None, score: Callable[[Batch], Tensor], cfg: Config
) -> Batch:
    """What every net makes of the answers: logp, ref_logp, values, entropy, mask (B, R), score (B,).

    The old log-probabilities come from the forward that training uses, not from the decode, so that the ratio is 1 at
    the first step. Rows of like length share a micro-batch, which is cut to its own longest.
    """
    device = batch["tokens"].device
    _, mask = response_window(batch["prompt_len"], batch["length"])
    mask = fast.to_device(mask, device)  # (B, R)
    out = {name: torch.zeros(mask.shape, device=device) for name in ("logp", "ref_logp", "values", "entropy")}
    out |= {"score": torch.zeros(len(mask), device=device), "mask": mask}
    reads_text = getattr(score, "reads_text", False)
    if reads_text:  # a function of the user is asked once, and computes in its own precision
        with torch.autocast(device.type, enabled=False):
            out["score"] = score(batch)
    parts = by_length(batch, cfg.micro_batch_size or cfg.minibatch_size // common.WORLD)
    if cfg.shard:
        parts = common.together(parts, parts)
    for index in parts:
        part = select(batch, index)
        sequences = part["tokens"], part["prompt_len"], part["length"]
        logp, entropy = policy.logprobs_and_entropy(*sequences, cfg.temperature)  # (b, r)
        ref_logp = ref.logprobs(*sequences, cfg.temperature)
        rows, width = fast.to_device(index, device), logp.shape[1]
        out["logp"][rows, :width] = logp
        out["ref_logp"][rows, :width] = ref_logp
        out["entropy"][rows, :width] = entropy
        if value is not None:
            out["values"][rows, :width] = value.values(*sequences)
        if not reads_text:
            out["score"][rows] = score(part)
    return out


def scorer(reward: ScalarModel | Judge, encoding: tiktoken.Encoding, eos: int) -> Callable[[Batch], Tensor]:
    """A function batch → scores (B,), from a reward model or from a Python function (prompt, response) -> float.

    A reward model reads the very tokens that were sampled; only a function gets text.
    """
    if isinstance(reward, ScalarModel):
        return lambda batch: reward.scores(batch["tokens"], batch["length"])

    def score(batch: Batch) -> Tensor:
        scores = common.ask(reward, texts(batch, encoding, eos))
        return torch.tensor(scores, dtype=torch.float32, device=batch["tokens"].device)

    score.reads_text = True
    return score


# --- 3 estimate -------------------------------------------------------------------------------------------------------


def estimate(batch: Batch, kl_coef: float, cap: float, cfg: Config) -> Batch:
    """Per-token rewards → GAE → whitening: rewards, advantages, returns (B, R), final_score (B,).

    Every token costs β (log π(y_t) − log π₀(y_t)) (Ziegler et al. 2019, equation 2). The last token earns the final
    score: the score, clipped if asked, and at most `cap` where EOS is missing. GAE: Schulman et al. 2016, equation 16.
    """
    mask, values, score = batch["mask"], batch["values"], batch["score"]
    if cfg.score_clip:
        score = score.clamp(-cfg.score_clip, cfg.score_clip)
    score = torch.where(batch["ended"], score, score.clamp(max=cap))  # (B,)

    rewards = -kl_coef * (batch["logp"] - batch["ref_logp"])  # (B, R)
    last = mask.sum(1, keepdim=True) - 1  # (B, 1) column of each row's last token
    rewards = rewards.scatter_add(1, last, score[:, None].to(rewards.dtype)) * mask

    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = torch.zeros_like(score)  # 0 after the last token, like values outside the response
    for r in reversed(range(mask.shape[1])):
        delta = rewards[:, r] + cfg.gamma * next_value - values[:, r]
        next_advantage = (delta + cfg.gamma * cfg.lam * next_advantage) * mask[:, r]
        advantages[:, r] = next_advantage
        next_value = values[:, r]
    returns = (advantages + values) * mask  # from the advantages as they are, before whitening
    return {"rewards": rewards, "advantages": whiten(advantages, mask), "returns": returns, "final_score": score}


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """x (B, R) shifted and scaled to mean 0, variance 1 over the masked places of the whole batch; 0 elsewhere."""
    centred = x - common.masked_mean(x, mask)
    variance = common.masked_mean(centred.square(), mask)
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
    value: ScalarModel | None,
    policy_optimizer: torch.optim.Optimizer | None,
    value_optimizer: torch.optim.Optimizer | None,
    batch: Batch,
    lr: float,
    cfg: Config,
    autocast: torch.autocast,
    seed: int,
    value_lr: float | None = None,
) -> dict[str, float]:
    """`epochs` passes over the batch in minibatches, one step of each net's optimizer a minibatch. Returns metrics.

    A net whose optimizer is None stands still and costs nothing. Without a value net `value` and its optimizer are
    None. The value net learns at `value_lr`, or at `lr` if that is None. Losses are means over the tokens of the whole
    minibatch (all micro-batches, all processes), so how it is split changes nothing.
    """
    batch["ratio"] = batch["mask"].float()
    value_optimizer = value_optimizer if value is not None else None
    value_lr = lr if value_lr is None else value_lr
    sums = dict.fromkeys(STANDING_STILL, 0.0)
    generator, n_steps = common.generator(seed), 0
    for _ in range(cfg.epochs):
        order = torch.randperm(len(batch["tokens"]), generator=generator)
        for rows in order.split(cfg.minibatch_size // common.WORLD):
            minibatch = select(batch, rows)
            n_tokens = common.total(minibatch["mask"].sum())  # of all micro-batches and processes
            for index in by_length(minibatch, cfg.micro_batch_size or len(rows)):
                part = select(minibatch, index)
                mask = part["mask"]
                sequences = part["tokens"], part["prompt_len"], part["length"]
                if policy_optimizer:
                    with autocast:
                        logp = policy.logprobs(*sequences, cfg.temperature)  # (b, r)
                    pg_losses, ratio = policy_loss(logp, part["logp"], part["advantages"], cfg.cliprange)
                    pg_loss = (pg_losses * mask).sum() / n_tokens
                    pg_loss.backward()
                    with torch.no_grad():
                        approxkl = 0.5 * (logp - part["logp"]).square()
                        clipped = pg_losses > -part["advantages"] * ratio
                        batch["ratio"][fast.to_device(rows[index], mask.device), : mask.shape[1]] = ratio * mask
                        sums["loss/policy_avg"] += pg_loss
                        sums["policy/approxkl_avg"] += (approxkl * mask).sum() / n_tokens
                        sums["policy/clipfrac_avg"] += (clipped * mask).sum() / n_tokens
                        sums["val/ratio"] += (ratio * mask).sum() / n_tokens
                if value_optimizer:
                    with autocast:
                        values = value.values(*sequences)  # (b, r)
                    vf_losses = value_loss(values, part["values"], part["returns"], cfg.cliprange_value)
                    vf_loss = (vf_losses * mask).sum() / n_tokens
                    (cfg.vf_coef * vf_loss).backward()
                    with torch.no_grad():
                        clipped = vf_losses > 0.5 * (values - part["returns"]).square()
                        sums["loss/value_avg"] += vf_loss
                        sums["val/clipfrac_avg"] += (clipped * mask).sum() / n_tokens
            if policy_optimizer:
                norm = common.step_optimizer(policy_optimizer, policy, lr, cfg.max_grad_norm)
                sums["policy/grad_norm"] += norm / common.WORLD
            if value_optimizer:
                norm = common.step_optimizer(value_optimizer, value, value_lr, cfg.max_grad_norm)
                sums["value/grad_norm"] += norm / common.WORLD
            n_steps += 1
    measured = {name: x / n_steps for name, x in sums.items() if isinstance(x, Tensor)}
    if not measured:
        return dict(STANDING_STILL)
    means = common.total(torch.stack(list(measured.values()))).tolist()  # one wait for the device
    return STANDING_STILL | dict(zip(measured, means))


# --- 5 rates and β ---------------------------------------------------------------------------------------------------


def rates(step: int, cfg: Config) -> tuple[float, float]:
    """The learning rates of policy and value net at an iteration. At 0 the policy stands still.

    The reward model was trained on last tokens alone, so what the value net says of a prefix is a guess at first. It
    learns for some iterations before the policy moves; then the policy's rate rises. Both fall to 0 in a straight line.
    """
    alone = min(2, cfg.iterations // 4) if cfg.value_warmup is None else cfg.value_warmup  # less in a short run
    rising = min(4, cfg.iterations // 4) if cfg.lr_warmup is None else cfg.lr_warmup
    left = 1 - step / cfg.iterations
    if step < alone:
        return 0.0, cfg.value_lr * left
    risen = min(1.0, (step - alone + 1) / max(1, rising))
    return cfg.lr * risen * left, cfg.value_lr * left


def adapt(kl_coef: float, kl: float, episodes: int, cfg: Config) -> float:
    """β for the next iteration, from the KL to the reference in nats per response.

    Ziegler et al. 2019, section 2.2; like their code, with episodes / horizon in the place of the paper's K.
    """
    if not cfg.kl_target:
        return kl_coef
    error = min(max(kl / cfg.kl_target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * episodes / cfg.horizon)


# --- what the loop needs ----------------------------------------------------------------------------------------------


def build(
    cfg: Config, policy: GPT, encoding: tiktoken.Encoding, device: torch.device, autocast: torch.autocast
) -> tuple[GPT, ScalarModel, Callable[[Batch], Tensor], float]:
    """The policy's frozen copy, the value net, the function that scores, the highest score of a response without EOS.

    Raises InputError if the reward model cannot read what the policy writes.
    """
    start = copy.deepcopy(policy)  # a copy: freezing changes the model
    if cfg.ref:
        start, ref_encoding = common.load_gpt(cfg.ref, device, "--ref")
        common.check_vocabulary(f"--ref {cfg.ref}", ref_encoding, encoding, cfg.init)
        if start.config.block_size < common.context(cfg, policy):
            raise InputError(f"--ref {cfg.ref}: its context is shorter than the policy's; give a smaller --block_size")
    ref = common.shard(common.freeze(start, autocast), cfg)
    if ".py:" in cfg.reward:
        reward, cap = common.load_function(cfg.reward), float("inf")
        value = ScalarModel(copy.deepcopy(policy)).to(device)
        torch.nn.init.zeros_(value.head.weight)
    else:
        reward, reward_encoding = common.load_scalar(cfg.reward, device, "--reward")
        common.check_vocabulary(f"--reward {cfg.reward}", reward_encoding, encoding, cfg.init)
        if reward.config.block_size < common.context(cfg, policy):
            raise InputError(
                f"--reward {cfg.reward}: its context is shorter than the policy's; give a --block_size it can read"
            )
        value, cap = copy.deepcopy(reward), -1.0
        reward = common.shard(common.freeze(reward, autocast), cfg)
    for net in (policy, value):
        net.eval().requires_grad_(True)  # eval: no dropout, or the ratio would not be 1
    policy.checkpoint_activations = value.trunk.checkpoint_activations = cfg.checkpoint_activations
    if cfg.compile:
        trunks = [reward.trunk] if isinstance(reward, ScalarModel) else []
        fast.compile_blocks(policy, ref, value.trunk, *trunks)
    policy, value = common.shard(policy, cfg), common.shard(value, cfg)
    if cfg.unended_cap is not None:
        cap = cfg.unended_cap
    return ref, value, scorer(reward, encoding, policy.config.eos), cap


# --- the loop ---------------------------------------------------------------------------------------------------------


def train(cfg: Config) -> None:
    device, autocast = common.setup(cfg)
    run = common.Run(cfg)
    if (cfg.value_warmup or 0) >= cfg.iterations > 0:
        raise InputError(
            f"--value_warmup {cfg.value_warmup}: leaves the policy no iteration; give fewer than --iterations"
        )
    if cfg.batch_size % common.WORLD or cfg.minibatch_size % common.WORLD:
        raise InputError(f"--batch_size and --minibatch_size must be multiples of the {common.WORLD} processes")
    if cfg.temperature == 0:
        raise InputError("--temperature 0: a policy that always says the same cannot learn; give a number above 0")
    if cfg.kl_target and (cfg.kl_coef == 0 or cfg.horizon < cfg.batch_size):
        raise InputError("--kl_target: needs a --kl_coef above 0 to scale, and a --horizon of at least --batch_size")
    sizes = best_of_sizes(cfg.best_of)
    policy, encoding = common.load_gpt(cfg.init, device, "--init")
    sources = cfg.data or tales.path("ppo"), cfg.eval_data or ("" if cfg.data else tales.path("eval"))
    room = common.context(cfg, policy) - cfg.response_len
    if room < 1:
        raise InputError(f"--response_len {cfg.response_len}: leaves no room for a prompt in the context; give less")
    prompts, held_out = data.prompts_and_held_out(*sources, encoding, room, cfg.eval_prompts, common.say)
    if cfg.iterations and len(prompts) < cfg.batch_size:
        raise InputError(
            f"--batch_size {cfg.batch_size}: {sources[0]} leaves {len(prompts)} prompts to train on; give less"
        )
    start = common.shard(common.freeze(copy.deepcopy(policy), autocast), cfg) if cfg.ref else None
    ref, value, score, cap = build(cfg, policy, encoding, device, autocast)
    judges = common.load_functions(cfg.judge or ("" if cfg.data else tales.MEASURES))
    first_judge = next(iter(judges.values()), None)
    policy_optimizer = common.adamw(policy, cfg.lr, 0.0, eps=1e-5)
    value_optimizer = common.adamw(value, cfg.value_lr, 0.0, eps=1e-5)

    saved = {"value": value, "policy_optimizer": policy_optimizer, "value_optimizer": value_optimizer}
    kl_coef = run.state["kl_coef"] if run.state else cfg.kl_coef
    if cfg.iterations:
        run.start(cfg.iterations, model=policy, **saved)
        common.say(
            f"{cfg.init}, {cfg.reward} → {cfg.out}: {len(prompts):,} prompts, {len(held_out):,} held out"
            f"{common.known_prompts(cfg.reward, held_out)}, on {device}"
        )

    def answer(purpose: str, model: GPT, some: list[list[int]], first: int) -> tuple[Batch, Texts]:
        """`model` answers some held-out prompts, with random numbers of this purpose alone."""
        with autocast:
            batch = rollout(common.whole(model, autocast), some, cfg, common.generator(purpose, cfg.seed, first))
            batch |= read(batch, model, ref, None, score, cfg)
        return batch, texts(batch, encoding, model.config.eos)

    for step in range(run.step, cfg.iterations):
        run.begin_step()
        # 1 The policy answers a batch of prompts.
        ids = common.share(data.shuffled(prompts, cfg.batch_size, cfg.seed, None, step))
        chance = common.generator("rollout", cfg.seed, step, common.RANK)
        with run.timed("rollout"), autocast:
            batch = rollout(common.whole(policy, autocast), ids, cfg, chance)
        with run.timed("score"), autocast:
            # 2 Reward model, frozen copy and value net read the answers.
            batch |= read(batch, policy, ref, value, score, cfg)
            # 3 Each token gets its reward, advantage and return.
            batch |= estimate(batch, kl_coef, cap, cfg)
        # 4 The value net learns from them; after its warm-up, so does the policy.
        with run.timed("update"):
            lr, value_lr = rates(step, cfg)
            learning = policy_optimizer if lr else None
            seed = common.seed_of("minibatches", cfg.seed, step, common.RANK)
            losses = update(policy, value, learning, value_optimizer, batch, lr, cfg, autocast, seed, value_lr)
        # 5 β moves; metrics, a sample and a checkpoint are written.
        pairs = texts(batch, encoding, policy.config.eos)
        judged = common.ask(first_judge, pairs) if first_judge else []
        metrics = rollout_metrics(batch, judged, kl_coef) | losses | run.times
        metrics |= {"lr": lr, "value_lr": value_lr, "episode": (step + 1) * cfg.batch_size}
        metrics |= run.speed(int(common.total(batch["mask"].sum())))
        if learning:
            kl_coef = adapt(kl_coef, metrics["objective/kl"], cfg.batch_size, cfg)
        last = step + 1 == cfg.iterations
        run.check(step, metrics)
        due = cfg.eval_every and (last or (step + 1) % cfg.eval_every == 0)
        if due:
            found, goodness = summary(
                evaluate(partial(answer, "evaluate", policy), held_out, judges), judges, cfg.kl_coef
            )
            metrics |= found
            run.keep_best(goodness, policy, encoding)
        run.log(step, metrics, show=SHOWN)
        if cfg.kl_stop and metrics["objective/kl"] > cfg.kl_stop:
            raise run.diverged(step + 1, "the KL to the reference", f"above --kl_stop {cfg.kl_stop:g}")
        if step % 20 == 0 or last:
            run.sample(step + 1, f"[{batch['score'][0].item():+.2f}] {''.join(pairs[0])}")
        if run.must_save(step, (step + 1) % cfg.save_every == 0):
            run.write("rollout.json", by_token(batch, pairs, encoding, step + 1, metrics["kl_coef"]))
            run.save(step + 1, policy, encoding, {"kl_coef": kl_coef}, **saved)

    if not cfg.iterations:
        policy, out_encoding = common.load_gpt(cfg.out, device, "--out")
        common.check_vocabulary(f"--out {cfg.out}", out_encoding, encoding, cfg.init)
        policy = common.shard(policy, cfg)
    before = evaluate(partial(answer, "before", start or ref), held_out, judges)
    after = evaluate(partial(answer, "after", policy), held_out, judges)
    run.report(report(before, after, judges), paired(before, after, judges))
    if sizes:
        common.say(best_of(partial(answer, "best of", ref), held_out, judges, sizes))
    if cfg.iterations:
        run.finish(device)


def main() -> None:
    train(common.parse(Config))


if __name__ == "__main__":
    common.run_main(main)
