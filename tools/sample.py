"""Answers to a prompt, from one model or two, or a conversation in turns.

python -m tools.sample out/ppo --compare out/sft --prompt "Tell me about a shy owl who lost a red key near the lake."
python -m tools.sample out/ppo --chat
"""

from contextlib import suppress
from dataclasses import dataclass

import tiktoken
import torch

from common import cli, nets
from common.cli import Count, Number, Share, Whole
from data import InputError, encode_prompt
from data.chat import Messages
from model import GPT


@dataclass
class Config:
    prompt: str = ""  # the text to continue
    chat: bool = False  # talk in turns, through the model's chat template; an empty line ends it
    compare: str = ""  # a second run folder, answering beside the first
    samples: Count = 4  # answers from each model
    response_len: Count = 128  # longest answer, in tokens
    temperature: Number = 1.0  # 0 is greedy
    top_k: Whole = 0  # keep the k likeliest tokens; 0 keeps all
    top_p: Share = 1.0  # keep the fewest likeliest tokens with this mass; 1 keeps all
    seed: Whole = 0  # of the sampler
    device: str = "auto"  # auto, cpu, cuda or mps


def answers(
    model: GPT, encoding: tiktoken.Encoding, prompt: str | Messages, n: int, cfg: Config, rng: torch.Generator
) -> list[tuple[str, str]]:
    """Return n answers to a prompt, each with what is printed behind it: " …" if it did not end."""
    ids = encode_prompt(encoding, prompt)
    room = model.config.block_size - max(1, len(ids))
    if room < 1:
        raise InputError(f"--prompt: {len(ids)} tokens leave no room in the context of {model.config.block_size}")
    how = {"temperature": cfg.temperature, "top_k": cfg.top_k, "top_p": cfg.top_p, "generator": rng}
    tokens, prompt_len, length = model.generate([ids] * n, min(cfg.response_len, room), **how)
    found = []
    for row, start, end in zip(tokens.tolist(), prompt_len.tolist(), length.tolist()):
        ended = row[end - 1] in model.config.ends
        found.append((encoding.decode(row[start : end - ended]), "" if ended else " …"))
    return found


def talk(model: GPT, encoding: tiktoken.Encoding, cfg: Config, rng: torch.Generator) -> None:
    """Read a line, answer it, and so on. The model sees as much of the conversation as fits."""
    messages: Messages = []
    while said := input("> ").strip():
        messages.append({"role": "user", "content": said})
        while len(messages) > 1 and len(encode_prompt(encoding, messages)) > model.config.block_size - 16:
            del messages[:2]  # what is oldest no longer fits
        ((text, mark),) = answers(model, encoding, messages, 1, cfg, rng)
        messages.append({"role": "assistant", "content": text.strip()})
        print(f"{text.strip()}{mark}\n", flush=True)


def main() -> None:
    cfg, folder = cli.parse(Config, positional="DIR")
    device = cli.pick_device(cfg.device)
    if cfg.chat and (cfg.prompt or cfg.compare):
        raise InputError("--chat: takes neither --prompt nor --compare; leave them out")
    for name in filter(None, [folder, cfg.compare]):
        model, encoding = nets.load_gpt(name, device)
        rng = torch.Generator().manual_seed(cfg.seed)
        if cfg.chat:
            with suppress(EOFError):
                talk(model, encoding, cfg, rng)
            return
        print(f"\n{name}")
        for text, mark in answers(model, encoding, cfg.prompt, cfg.samples, cfg, rng):
            print(f"  ·{text}{mark}")


if __name__ == "__main__":
    cli.run_main(main)
