"""TRL's PPO in the world of letters, for exact.py: where it lands, and the script of one run.

It gets the options of letters.py in the way of race_trl.py. The score is the world's own, with its cap.
"""

import argparse
from pathlib import Path
from types import SimpleNamespace

import torch

import ppo
from common import cli, nets
from experiments import letters
from experiments.harness import seconds, stage
from tools import hf


def land(beta: float, seed: int) -> dict[str, float]:
    """Where TRL's PPO ends, and its seconds."""
    folder, name = letters.place(), f"trl-{beta:g}-{seed}"
    if not (folder / "start-hf").exists():
        hf.convert(str(folder / "start"), folder / "start-hf")
    words = ["--init", folder / "start-hf", "--out", folder / f"{name}-hf", "--beta", beta, "--seed", seed]
    text = stage(folder, name, "experiments/exact_trl.py", *words)
    _, encoding = nets.load_gpt(folder / "start")
    policy, _ = hf.read_model(folder / f"{name}-hf", encoding)
    (folder / name).mkdir(exist_ok=True)
    nets.save_model(policy, encoding, folder / name / "model.pt")
    return letters.ended(folder / name, beta) | {"seconds": seconds(text)}


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
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, set_seed

    from experiments.race_trl import padded_tokenizer, trainer

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
