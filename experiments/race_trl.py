"""One run of TRL's PPO on the tales, for race.py: metrics.jsonl, a line an iteration, and the policy in --out.

TRL 1.12 is the last release that has PPOTrainer. It gets ppo.py's settings: the Adam, the clipping of gradients, the
warm-up and the value net's own rate are handed to it, for its options do not offer them. Two things stay its own: it
takes 1 from the score of an answer without EOS, and it draws other random numbers.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    TrainerCallback,
    set_seed,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

import ppo
from data import tales


class ClippedAdamW(torch.optim.AdamW):
    """AdamW that clips the gradients of each net first, as ppo.py does. A group is a net."""

    def step(self, closure=None):
        for group in self.param_groups:
            torch.nn.utils.clip_grad_norm_(group["params"], ppo.Config.max_grad_norm)
        return super().step(closure)


def padded_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer with a pad beyond the vocabulary: TRL hides pads from the nets, and no net can sample this one."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    return tokenizer


def trainer(
    cfg: ppo.Config,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    policy: torch.nn.Module,
    ref: torch.nn.Module,
    reward: torch.nn.Module,
    value: torch.nn.Module,
    missing_eos_penalty: float | None,
    callbacks: list[TrainerCallback] | None = None,
) -> PPOTrainer:
    """TRL's PPO with the settings of a Config of ppo.py."""
    rows = Dataset.from_dict({"input_ids": [tokenizer(prompt)["input_ids"] for prompt in prompts]})
    groups = [{"params": [*policy.parameters()], "lr": cfg.lr}, {"params": [*value.parameters()], "lr": cfg.value_lr}]
    optimizer = ClippedAdamW(groups, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0)
    factors = [lambda step: ppo.rates(step, cfg)[0] / cfg.lr, lambda step: ppo.rates(step, cfg)[1] / cfg.value_lr]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factors)
    args = PPOConfig(
        output_dir=cfg.out, per_device_train_batch_size=cfg.batch_size, gradient_accumulation_steps=1,
        num_mini_batches=cfg.batch_size // cfg.minibatch_size, num_ppo_epochs=cfg.epochs,
        total_episodes=cfg.iterations * cfg.batch_size, learning_rate=cfg.lr, response_length=cfg.response_len,
        temperature=cfg.temperature, kl_coef=cfg.kl_coef, gamma=cfg.gamma, lam=cfg.lam, cliprange=cfg.cliprange,
        cliprange_value=cfg.cliprange_value, vf_coef=1.0, stop_token="eos", missing_eos_penalty=missing_eos_penalty,
        local_rollout_forward_batch_size=cfg.batch_size, num_sample_generations=0, logging_steps=1, save_strategy="no",
        eval_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True, bf16=False, gradient_checkpointing=False,
        seed=cfg.seed,
    )  # fmt: skip
    return PPOTrainer(
        args=args, processing_class=tokenizer, model=policy, ref_model=ref, reward_model=reward, value_model=value,
        train_dataset=rows, eval_dataset=rows.select(range(cfg.batch_size)), callbacks=callbacks,
        optimizers=(optimizer, scheduler),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("sft", "reward", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True, help="a Hugging Face folder")
    parser.add_argument("--lr", type=float, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--iterations", type=int, default=64)
    parser.add_argument("--resume", action="store_true", help="taken and not used: TRL's PPO cannot go on")
    options = parser.parse_args()
    set_seed(options.seed)
    given = {"lr": options.lr, "value_lr": 2.5 * options.lr, "iterations": options.iterations, "seed": options.seed}
    cfg = ppo.Config(out=str(options.out), **given)  # the ratio of the two rates is ppo.py's own
    tokenizer = padded_tokenizer(options.sft)
    policy, ref = (AutoModelForCausalLM.from_pretrained(options.sft) for _ in range(2))
    reward, value = (AutoModelForSequenceClassification.from_pretrained(options.reward, num_labels=1) for _ in range(2))
    prompts = [json.loads(line)["prompt"] for line in open(tales.path("ppo"), encoding="utf-8")]

    options.out.mkdir(parents=True, exist_ok=True)
    metrics = open(options.out / "metrics.jsonl", "w", encoding="utf-8")
    judged: list[float] = []
    began = time.time()

    def generate(model, queries, *args):
        """TRL's own, and the judge of what it gives."""
        answers, logits = batch_generation(model, queries, *args)
        eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
        scores = []
        for query, answer in zip(queries.tolist(), answers[:, queries.shape[1] :].tolist()):
            answer = answer[: answer.index(eos)] if eos in answer else answer
            prompt = tokenizer.decode([token for token in query if token != pad])
            scores.append(tales.judge(prompt, tokenizer.decode(answer)))
        judged.append(sum(scores) / len(scores))
        return answers, logits

    class Record(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            nonlocal began
            began = time.time()

        def on_log(self, args, state, control, logs, **kwargs):
            line = {name: x for name, x in logs.items() if "/" in name}
            line |= {"step": len(judged) - 1, "seconds": time.time() - began, "objective/judge": judged[-1]}
            metrics.write(json.dumps(line) + "\n")
            metrics.flush()

    batch_generation, ppo_trainer.batch_generation = ppo_trainer.batch_generation, generate
    trainer(cfg, tokenizer, prompts, policy, ref, reward, value, 1.0, [Record()]).train()
    policy.save_pretrained(options.out)
    AutoTokenizer.from_pretrained(options.sft).save_pretrained(options.out)


if __name__ == "__main__":
    main()
