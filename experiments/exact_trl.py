"""One run of TRL's PPO in the world of letters, for exact.py: the policy in --out, without its tokenizer.

It gets the options of letters.py in the way of race_trl.py. The score is the world's own, with its cap.
"""

import argparse
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, set_seed

import ppo
from common import cli
from experiments import letters
from experiments.race_trl import padded_tokenizer, trainer


class World(torch.nn.Module):
    """A reward model as TRL reads one: every position of a row has the score of its whole answer."""

    base_model_prefix = "answers"

    def __init__(self):
        super().__init__()
        self.score = torch.nn.Identity()

    def answers(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_) -> SimpleNamespace:
        scores = []
        for row, n in zip(input_ids.tolist(), attention_mask.sum(1).tolist()):
            word = "".join(letters.LETTERS[token] for token in row[1:n] if token != 5)  # the prompt is one letter
            scores.append(letters.PAID[letters.PLACE[word]])
        at_each = torch.tensor(scores)[:, None, None].expand(*input_ids.shape, 1)
        return SimpleNamespace(hidden_states=[at_each])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("init", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True, help="a Hugging Face folder")
    parser.add_argument("--beta", type=float, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--resume", action="store_true", help="taken and not used: TRL's PPO cannot go on")
    options = parser.parse_args()
    set_seed(options.seed)
    given = letters.options(letters.place(), options.beta, options.seed, out=options.out)
    cfg = cli.parse(ppo.Config, given)
    policy, ref = (AutoModelForCausalLM.from_pretrained(options.init) for _ in range(2))
    value = AutoModelForSequenceClassification.from_pretrained(options.init, num_labels=1)
    torch.nn.init.zeros_(value.score.weight)  # as ppo.py's, where a function is the reward
    tokenizer = padded_tokenizer(options.init)
    trainer(cfg, tokenizer, ["a"] * cfg.batch_size, policy, ref, World(), value, None).train()
    policy.save_pretrained(options.out)


if __name__ == "__main__":
    main()
