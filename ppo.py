"""Stage 3: PPO against a frozen copy of the starting policy, with the KL between the two charged to the reward.

    python ppo.py                                            the tales: out/sft and out/reward → out/ppo
    python ppo.py --data PROMPTS.jsonl --init out/sft --reward out/reward --judge FILE.py:function
    python ppo.py --reward FILE.py:function                  train on any Python function in place of a reward model
    python ppo.py --kl_coef 0                                what the KL term is for: see the reward being hacked
    python ppo.py --iterations 0                             only evaluate the policy in --out

Four functions in the order of the paper, and the loop in `train` is their table of contents; a fork changes one:

    1 rollout      the policy answers a batch of prompts
    2 read         reward model, frozen copy and value net read the answers
    3 estimate     per-token rewards, GAE, whitening
    4 update       epochs of clipped updates over minibatches

Ziegler et al. 2019 (arXiv 1909.08593) is the set-up, Schulman et al. 2017 (1707.06347) the update, Stiennon et al. 2020
(2009.01325) the separate value net that starts as the reward model. Left out on purpose: shared trunks for policy and
value, an entropy bonus, whitening of rewards, dropout.
"""

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass

import tiktoken
import torch
from torch import Tensor

import common
import data
from data import InputError, tales
from model import GPT, ScalarModel, gather_positions, response_window, to_device

Judge = Callable[[str, str], float]  # (prompt, response) -> how good
Batch = dict[str, Tensor]  # tokens (B, T), prompt_len and length (B,) on the CPU, then what each function adds


@dataclass
class Config:
    data: str = ""  # JSONL "prompt"; empty: the tales' prompts
    eval_data: str = ""  # held-out JSONL "prompt"; empty: a part of --data (the tales have their own)
    init: str = "out/sft"  # run folder of the starting policy; its frozen copy is the reference
    reward: str = "out/reward"  # run folder of the reward model, or FILE.py:function to train on
    judge: str = ""  # FILE.py:function (several: commas), measured, never trained on; on the tales their own
    out: str = "out/ppo"  # run folder to write
    seed: int = 0  # of prompts, samples and minibatches
    device: str = "auto"  # auto, cpu, cuda or mps
    dtype: str = "auto"  # auto, float32 or bfloat16 (autocast)
    compile: bool = False  # torch.compile of the blocks, after a minute of compiling
    iterations: int = 32  # rounds of answer → score → update; 0: only evaluate
    batch_size: int = 128  # prompts an iteration, over all processes
    epochs: int = 4  # passes over an iteration's answers
    minibatch_size: int = 32  # answers an optimizer step, over all processes
    micro_batch_size: int = 0  # answers in one forward; 0: the whole minibatch
    response_len: int = 64  # longest answer, in tokens
    temperature: float = 1.0  # of sampling and, alike, of all log-probabilities
    lr: float = 3e-4  # of policy and value net, annealed to 0
    kl_coef: float = 0.05  # β: reward charged per nat of KL to the frozen copy
    kl_target: float = 0.0  # nats a response; above 0, β adapts towards it (Ziegler et al. 2019, section 2.2)
    horizon: int = 10000  # episodes over which an adaptive β moves
    gamma: float = 1.0  # discount
    lam: float = 0.95  # λ of GAE
    cliprange: float = 0.2  # ε of the policy's ratio
    cliprange_value: float = 0.2  # how far a value may move from its old one before its gradient stops
    vf_coef: float = 1.0  # scales the value loss; its net and its Adam are its own, so this acts through clipping alone
    max_grad_norm: float = 1.0  # gradients are clipped to this, each net's by itself; 0: not clipped
    score_clip: float = 0.0  # scores are clipped to ± this; 0: not clipped
    unended_cap: float | None = None  # highest score without EOS; default −1, or inf for a function
    block_size: int = 0  # longest prompt and answer together, in tokens; 0: the model's context
    drop_long: bool = False  # leave out prompts that with the answer exceed that
    eval_prompts: int = 512  # held-out prompts to evaluate on
    save_every: int = 20  # iterations between checkpoints
    resume: bool = False  # continue the run in --out


# --- 1 ---------------------------------------------------------------------------------------------------------------


def rollout(policy: GPT, prompts: list[list[int]], cfg: Config, generator: torch.Generator) -> Batch:
    """The policy answers: tokens (B, T), prompt_len (B,), length (B,), ended (B,)."""
    sampled = policy.generate(prompts, cfg.response_len, temperature=cfg.temperature, generator=generator)
    tokens, prompt_len, length = sampled
    ended = gather_positions(tokens, length[:, None] - 1)[:, 0] == policy.config.eos
    return {"tokens": tokens, "prompt_len": prompt_len, "length": length, "ended": ended}


# --- 2 ---------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def read(
    batch: Batch, policy: GPT, ref: GPT, value: ScalarModel | None, score: Callable[[Batch], Tensor], cfg: Config
) -> Batch:
    """What every net makes of the answers: score (B,), logp, ref_logp, values (B, R), mask (B, R).

    The old log-probabilities come from the forward that training uses, not from the decode, so that the ratio is 1 at
    the first step. Answers are read shortest first, in micro-batches that each pad to their own longest.
    """
    mask = to_device(response_window(batch["prompt_len"], batch["length"])[1], batch["tokens"].device)
    out = {name: torch.zeros(mask.shape, device=mask.device) for name in ("logp", "ref_logp", "values")}
    out |= {"score": torch.zeros(len(mask), device=mask.device), "mask": mask}
    for index in by_length(batch, cfg.micro_batch_size or cfg.minibatch_size):
        part = select(batch, index)
        where = part["tokens"], part["prompt_len"], part["length"]
        logp = policy.logprobs(*where, cfg.temperature)  # (b, r)
        r, rows = logp.shape[1], to_device(index, mask.device)
        out["logp"][rows, :r] = logp
        out["ref_logp"][rows, :r] = ref.logprobs(*where, cfg.temperature)
        if value is not None:
            out["values"][rows, :r] = value.values(*where)
        out["score"][rows] = score(part)
    return out


def scorer(reward: ScalarModel | Judge, encoding: tiktoken.Encoding, eos: int) -> Callable[[Batch], Tensor]:
    """A function batch → scores (B,), from a reward model or from a Python function (prompt, response) -> float.

    A reward model reads the very tokens that were sampled; only a function gets text.
    """
    if isinstance(reward, ScalarModel):
        return lambda batch: reward.scores(batch["tokens"], batch["length"])
    return lambda batch: torch.tensor(
        [float(reward(*pair)) for pair in texts(batch, encoding, eos)], device=batch["tokens"].device
    )


def by_length(batch: Batch, size: int) -> list[Tensor]:
    """Row indices in parts of at most `size`, rows of like length together."""
    return list(batch["length"].argsort(stable=True).split(size))


def select(batch: Batch, index: Tensor) -> Batch:
    """The rows `index`, cut to their own longest: (B, T) to (b, t) and (B, R) to (b, r)."""
    on_device = to_device(index, batch["tokens"].device)
    part = {name: x[on_device if x.device == on_device.device else index] for name, x in batch.items()}
    t, r = int(part["length"].max()), int((part["length"] - part["prompt_len"]).max())
    return {name: x if x.dim() == 1 else x[:, : t if name == "tokens" else r] for name, x in part.items()}


def texts(batch: Batch, encoding: tiktoken.Encoding, eos: int) -> list[tuple[str, str]]:
    """(prompt, response) of every row as text, without the EOS."""
    pairs = []
    for row, start, end, ended in zip(*(batch[name].tolist() for name in ("tokens", "prompt_len", "length", "ended"))):
        prompt = [] if row[:start] == [eos] else row[:start]  # what an empty prompt starts from
        pairs.append((encoding.decode(prompt), encoding.decode(row[start : end - ended])))
    return pairs


# --- 3 ---------------------------------------------------------------------------------------------------------------


def estimate(batch: Batch, kl_coef: float, cap: float, cfg: Config) -> Batch:
    """Per-token rewards → GAE → whitening: rewards, advantages, returns (B, R), all 0 outside the response.

    The score, clipped if asked and capped where EOS is missing, is paid at the last token; every token pays
    β (log π(y_t) − log π₀(y_t)) (Ziegler et al. 2019, equation 2). GAE: Schulman et al. 2016, equation 16.
    """
    mask, values = batch["mask"], batch["values"]
    score = batch["score"]
    if cfg.score_clip:
        score = score.clamp(-cfg.score_clip, cfg.score_clip)
    score = torch.where(batch["ended"], score, score.clamp(max=cap))  # (B,)
    last = mask.sum(1) - 1  # (B,) column of each row's last token
    rewards = -kl_coef * (batch["logp"] - batch["ref_logp"])  # (B, R)
    rewards = rewards.scatter_add(1, last[:, None], score[:, None].to(rewards.dtype)) * mask
    advantages = torch.zeros_like(rewards)
    following = torch.zeros_like(score)  # the advantage one token later
    for r in reversed(range(mask.shape[1])):
        next_value = values[:, r + 1] if r + 1 < mask.shape[1] else torch.zeros_like(score)  # 0 after the last token
        delta = rewards[:, r] + cfg.gamma * next_value - values[:, r]
        following = (delta + cfg.gamma * cfg.lam * following) * mask[:, r]
        advantages[:, r] = following
    returns = (advantages + values) * mask  # from the advantages as they are, before whitening
    return {"rewards": rewards, "advantages": whiten(advantages, mask), "returns": returns, "final_score": score}


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """x (B, R) shifted and scaled to mean 0, variance 1 over the masked places of all processes; 0 elsewhere."""
    n, first = common.total(torch.stack([mask.sum().to(x.dtype), (x * mask).sum()]))
    mean = first / n
    variance = common.total(((x - mean).square() * mask).sum()) / n
    return (x - mean) * (variance + 1e-8).rsqrt() * mask


# --- 4 ---------------------------------------------------------------------------------------------------------------


def policy_loss(logp: Tensor, old_logp: Tensor, advantages: Tensor, cliprange: float) -> tuple[Tensor, Tensor]:
    """max(−A ρ, −A clip(ρ, 1 ± ε)) for each token (B, R), and ρ (Schulman et al. 2017, equation 7)."""
    ratio = (logp - old_logp).exp()
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)), ratio


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
    cfg: Config,
    autocast: torch.autocast,
    seed: int,
) -> dict[str, float]:
    """`epochs` passes over the batch in minibatches, one step of each net's optimizer a minibatch. Returns metrics.

    Losses are means over the tokens of the whole minibatch (all micro-batches, all processes), so how it is split
    changes nothing.
    """
    names = ["loss/policy_avg", "loss/value_avg", "policy/approxkl_avg", "policy/clipfrac_avg", "val/ratio"]
    sums = torch.zeros(len(names), device=batch["tokens"].device)
    generator, n_steps = torch.Generator().manual_seed(seed), 0
    for _ in range(cfg.epochs):
        order = torch.randperm(len(batch["tokens"]), generator=generator)
        for chosen in order.split(max(1, cfg.minibatch_size // common.WORLD)):
            minibatch = select(batch, chosen)
            n_tokens = common.total(minibatch["mask"].sum())
            for index in by_length(minibatch, cfg.micro_batch_size or len(chosen)):
                part = select(minibatch, index)
                where, mask = (part["tokens"], part["prompt_len"], part["length"]), part["mask"]
                with autocast:
                    logp, values = policy.logprobs(*where, cfg.temperature), value.values(*where)  # (b, r)
                losses, ratio = policy_loss(logp, part["logp"], part["advantages"], cfg.cliprange)
                pg = (losses * mask).sum() / n_tokens
                vf = (value_loss(values, part["values"], part["returns"], cfg.cliprange_value) * mask).sum() / n_tokens
                pg.backward()
                (cfg.vf_coef * vf).backward()
                with torch.no_grad():
                    approxkl = 0.5 * ((logp - part["logp"]).square() * mask).sum() / n_tokens
                    clipfrac = (((ratio - 1).abs() > cfg.cliprange) * mask).sum() / n_tokens
                    sums += torch.stack([pg, vf, approxkl, clipfrac, (ratio * mask).sum() / n_tokens])
            common.step_optimizer(policy_optimizer, policy, lr, cfg.max_grad_norm)
            common.step_optimizer(value_optimizer, value, lr, cfg.max_grad_norm)
            n_steps += 1
    return dict(zip(names, (common.total(sums) / n_steps).tolist()))


# --- 5 ---------------------------------------------------------------------------------------------------------------


def adapt(kl_coef: float, kl: float, episodes: int, cfg: Config) -> float:
    """β for the next iteration, from the KL to the reference in nats a response (Ziegler et al. 2019, section 2.2)."""
    if not cfg.kl_target:
        return kl_coef
    error = min(max(kl / cfg.kl_target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * episodes / cfg.horizon)


def rollout_metrics(batch: Batch, judged: list[float], kl_coef: float) -> dict[str, float]:
    """TRL's names. Sums are over a response, means over responses, all processes included."""
    kl = ((batch["logp"] - batch["ref_logp"]) * batch["mask"]).sum(1)  # (B,) nats
    columns = {
        "objective/kl": kl,
        "objective/entropy": -(batch["logp"] * batch["mask"]).sum(1),
        "objective/scores": batch["score"],
        "objective/non_score_reward": -kl_coef * kl,
        "objective/rlhf_reward": batch["final_score"] - kl_coef * kl,
        "val/num_eos_tokens": batch["ended"].float(),
        "response_len": batch["mask"].sum(1),
    }
    if judged:
        columns["objective/judge"] = torch.tensor(judged, device=kl.device)
    sums = common.total(torch.stack([x.float().sum() for x in columns.values()]))
    means = (sums / (len(kl) * common.WORLD)).tolist()
    return dict(zip(columns, means)) | {"kl_coef": kl_coef}


def evaluate(
    policy: GPT,
    ref: GPT,
    prompts: list[list[int]],
    score: Callable[[Batch], Tensor],
    judges: dict[str, Judge],
    encoding: tiktoken.Encoding,
    cfg: Config,
    autocast: torch.autocast,
) -> dict[str, list]:
    """A column for each measure, one number a prompt, on one answer to each; and "texts", the pairs themselves."""
    columns: dict[str, list] = {}
    for start in range(0, len(prompts), 128):
        with autocast:
            batch = rollout(policy, prompts[start : start + 128], cfg, common.generator(cfg.seed, 9, start))
            batch |= read(batch, policy, ref, None, score, cfg)
        pairs = texts(batch, encoding, policy.config.eos)
        new = {name: [float(judge(*pair)) for pair in pairs] for name, judge in judges.items()}
        new["score"] = batch["score"].tolist()
        new["KL to the start (nats)"] = ((batch["logp"] - batch["ref_logp"]) * batch["mask"]).sum(1).tolist()
        new["length (tokens)"] = batch["mask"].sum(1).tolist()
        new["ended by EOS"] = batch["ended"].float().tolist()
        new["texts"] = pairs
        for name, column in new.items():
            columns.setdefault(name, []).extend(column)
    return columns


def report(before: dict[str, list], after: dict[str, list], judges: dict[str, Judge]) -> str:
    """The table before → after with standard errors, the win rate, and four answers side by side."""
    n = len(before["texts"])
    lines = [f"\n{n} held-out prompts                 before              after"]
    for name in [name for name in before if name != "texts"]:
        cells = []
        for column in (before[name], after[name]):
            x = torch.tensor(column, dtype=torch.float64)
            cells.append(f"{x.mean():8.3f} ± {x.std() / n**0.5 if n > 1 else 0:.3f}")
        lines.append(f"{name:<28}{cells[0]:>18}  {cells[1]:>18}")
    by = next(iter(judges), "score")
    wins = sum((b > a) + 0.5 * (b == a) for a, b in zip(before[by], after[by])) / n
    lines.append(f"{'win rate against the start':<28}{'':>18}  {wins:8.3f}  (by {by}, ties half)\n")
    for (prompt, first), (_, second) in list(zip(before["texts"], after["texts"]))[:4]:
        lines += [f"  {prompt.strip()}", f"    before  {first.strip()}", f"    after   {second.strip()}"]
    return "\n".join(lines)


def load_prompts(path: str, encoding: tiktoken.Encoding, room: int, cfg: Config) -> list[list[int]]:
    """Prompts as ids, none longer than `room`: raises InputError, or with --drop_long leaves the longer ones out."""
    prompts = data.prompts(path, encoding)
    what = f"prompts of {path} (with --response_len {cfg.response_len})"
    return data.fit(prompts, [max(1, len(p)) for p in prompts], room, cfg.drop_long, what)


def train(cfg: Config) -> None:
    device, autocast = common.setup(cfg)
    common.check_out(cfg)
    if cfg.batch_size % common.WORLD or cfg.minibatch_size % common.WORLD:
        raise InputError(f"--batch_size and --minibatch_size must be multiples of the {common.WORLD} processes")
    if cfg.temperature == 0:
        raise InputError("--temperature 0: a policy that always says the same cannot learn; give a number above 0")
    policy, encoding = common.load_gpt(cfg.init, device, "--init")
    room = common.context(cfg, policy) - cfg.response_len
    prompts = load_prompts(cfg.data or tales.path("ppo"), encoding, room, cfg)
    if cfg.eval_data or not cfg.data:
        held_out = load_prompts(cfg.eval_data or tales.path("eval"), encoding, room, cfg)
    else:
        known = list(dict.fromkeys(map(tuple, prompts)))  # a prompt that comes twice falls on one side
        chosen = set(random.Random(0).sample(known, min(cfg.eval_prompts, -(-len(known) // 10))))
        held_out = [list(p) for p in known if p in chosen]
        prompts = [p for p in prompts if tuple(p) not in chosen]
    held_out = held_out[: cfg.eval_prompts]
    if cfg.iterations and len(prompts) < cfg.batch_size:
        raise InputError(
            f"--batch_size {cfg.batch_size}: there are {len(prompts)} prompts to train on; give fewer or add some"
        )
    names = cfg.judge.split(",") if cfg.judge else [] if cfg.data else ["data/tales.py:judge", "data/tales.py:grammar"]
    judges = {name: common.load_function(name) for name in names}

    # The nets: policy and its frozen copy; a frozen reward model (or a function), and a value net that starts as it.
    ref = common.freeze(copy.deepcopy(policy), autocast)
    policy.eval().requires_grad_(True)  # eval: no dropout, or the ratio would not be 1
    if ".py:" in cfg.reward:
        reward, cap = common.load_function(cfg.reward), float("inf")
        value = ScalarModel(copy.deepcopy(policy)).to(device)
        torch.nn.init.zeros_(value.head.weight)
    else:
        reward, reward_encoding = common.load_scalar(cfg.reward, device, "--reward")
        if data.encoding_state(reward_encoding) != data.encoding_state(encoding):
            raise InputError(
                f"--reward {cfg.reward}: was trained with another vocabulary than {cfg.init}; train it from that policy"
            )
        if reward.config.block_size < room + cfg.response_len:
            raise InputError(
                f"--reward {cfg.reward}: its context is shorter than that of {cfg.init}; give a smaller --block_size"
            )
        value, cap = copy.deepcopy(reward), -1.0
        reward = common.freeze(reward, autocast)
    value.eval().requires_grad_(True)
    cap = cap if cfg.unended_cap is None else cfg.unended_cap
    score = scorer(reward, encoding, policy.config.eos)
    if cfg.compile:
        common.compile_blocks(policy, ref, value, *([reward] if isinstance(reward, ScalarModel) else []))
    policy_optimizer = common.adamw(policy, cfg.lr, 0.0, eps=1e-5)
    value_optimizer = common.adamw(value, cfg.lr, 0.0, eps=1e-5)

    run = common.Run(cfg)
    if cfg.iterations:
        parts = {"value": value, "policy_optimizer": policy_optimizer, "value_optimizer": value_optimizer}
        run.start(cfg.iterations, model=policy, **parts)
        common.say(
            f"{cfg.init}, {cfg.reward} → {cfg.out}: {len(prompts):,} prompts, {len(held_out):,} held out, on {device}"
        )
    kl_coef = run.state["kl_coef"] if run.state else cfg.kl_coef

    for step in range(run.step, cfg.iterations):
        ids = common.share(data.shuffled(prompts, cfg.batch_size, cfg.seed, None, step))
        with run.timed("rollout"), autocast:
            batch = rollout(policy, ids, cfg, common.generator(cfg.seed, 1, step, common.RANK))  # 1
        with run.timed("score"), autocast:
            batch |= read(batch, policy, ref, value, score, cfg)  # 2
            batch |= estimate(batch, kl_coef, cap, cfg)  # 3
        with run.timed("update"):
            lr = cfg.lr * (1 - step / cfg.iterations)
            seed = common.seed_of(cfg.seed, 2, step, common.RANK)
            losses = update(policy, value, policy_optimizer, value_optimizer, batch, lr, cfg, autocast, seed)  # 4

        pairs = texts(batch, encoding, policy.config.eos)
        judged = [float(next(iter(judges.values()))(*pair)) for pair in pairs] if judges else []
        metrics = rollout_metrics(batch, judged, kl_coef) | losses  # 5
        metrics |= {"lr": lr, "episode": (step + 1) * cfg.batch_size} | run.times
        metrics |= run.speed(int(common.total(batch["mask"].sum())))
        kl_coef = adapt(kl_coef, metrics["objective/kl"], cfg.batch_size, cfg)
        shown = (
            "objective/scores",
            "objective/judge",
            "objective/kl",
            "val/ratio",
            "val/num_eos_tokens",
            "tokens_per_s",
        )
        last = step + 1 == cfg.iterations
        run.log(step, metrics, show=shown if step % 5 == 0 or last else ())
        if step % 20 == 0 or last:
            run.sample(step + 1, f"[{batch['score'][0].item():+.2f}] {''.join(pairs[0])}")
        if (step + 1) % cfg.save_every == 0 or last:
            run.save(step + 1, policy, encoding, {"kl_coef": kl_coef}, **parts)

    if common.RANK == 0:
        if not cfg.iterations:
            policy, _ = common.load_gpt(cfg.out, device, "--out")
        before = evaluate(ref, ref, held_out, score, judges, encoding, cfg, autocast)
        after = evaluate(policy, ref, held_out, score, judges, encoding, cfg, autocast)
        common.say(report(before, after, judges))
    run.finish(device)


def main() -> None:
    train(common.parse(Config))


if __name__ == "__main__":
    common.run_main(main)
