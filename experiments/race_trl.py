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

    tokenizer = AutoTokenizer.from_pretrained(options.sft, padding_side="left")
    n_tokens = AutoModelForCausalLM.from_pretrained(options.sft).config.vocab_size
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    nets = [AutoModelForCausalLM.from_pretrained(options.sft) for _ in range(2)]
    nets += [AutoModelForSequenceClassification.from_pretrained(options.reward, num_labels=1) for _ in range(2)]
    for net in nets:
        net.resize_token_embeddings(max(n_tokens, len(tokenizer)))
        net.config.pad_token_id = tokenizer.pad_token_id
    policy, ref, reward, value = nets
    prompts = [json.loads(line)["prompt"] for line in open(tales.path("ppo"), encoding="utf-8")]
    rows = Dataset.from_dict({"input_ids": [tokenizer(prompt)["input_ids"] for prompt in prompts]})

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
    cfg = ppo.Config(
        lr=options.lr, value_lr=2.5 * options.lr, iterations=options.iterations
    )  # the ratio of ppo.py's own
    groups = [{"params": [*policy.parameters()], "lr": cfg.lr}, {"params": [*value.parameters()], "lr": cfg.value_lr}]
    optimizer = ClippedAdamW(groups, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0)
    factors = [lambda step: ppo.rates(step, cfg)[0] / cfg.lr, lambda step: ppo.rates(step, cfg)[1] / cfg.value_lr]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factors)
    args = PPOConfig(
        output_dir=str(options.out), per_device_train_batch_size=64, gradient_accumulation_steps=1,
        num_mini_batches=2, num_ppo_epochs=1, total_episodes=options.iterations * 64, learning_rate=options.lr,
        response_length=64, temperature=1.0, kl_coef=0.05, gamma=1.0, lam=0.95, cliprange=0.2, cliprange_value=0.2,
        vf_coef=1.0, stop_token="eos", missing_eos_penalty=1.0, local_rollout_forward_batch_size=64,
        num_sample_generations=0, logging_steps=1, save_strategy="no", eval_strategy="no", report_to=[],
        disable_tqdm=True, use_cpu=True, bf16=False, gradient_checkpointing=False, seed=options.seed,
    )  # fmt: skip
    PPOTrainer(
        args=args, processing_class=tokenizer, model=policy, ref_model=ref, reward_model=reward, value_model=value,
        train_dataset=rows, eval_dataset=rows.select(range(64)), callbacks=[Record()],
        optimizers=(optimizer, scheduler),
    ).train()  # fmt: skip
    policy.resize_token_embeddings(n_tokens)
    policy.save_pretrained(options.out)
    AutoTokenizer.from_pretrained(options.sft).save_pretrained(options.out)


if __name__ == "__main__":
    main()
