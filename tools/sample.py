"""Answers to a prompt, from one model or two, or a conversation in turns.

python -m tools.sample out/ppo --compare out/sft --prompt "Tell me about a shy owl who lost a red key near the lake."
python -m tools.sample out/ppo --chat
python -m tools.sample out/ppo --prompt "…" --reward out/reward
"""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiktoken
import torch

from common import cli, nets
from common.cli import Count, Number, Share, Whole
from data import InputError, encode_prompt
from data.chat import Messages, template_of
from data.files import read_object
from model import GPT, ScalarModel


@dataclass
class Config:
    prompt: str = ""  # the text to continue
    chat: bool = False  # talk in turns, through the model's chat template; an empty line ends it
    compare: str = ""  # a second run folder, answering beside the first
    reward: str = ""  # run folder of a reward model: show its score, and for a run of PPO the KL to its frozen copy
    samples: Count = 4  # answers from each model
    response_len: Count = 128  # longest answer, in tokens
    temperature: Number = 1.0  # 0 is greedy
    top_k: Whole = 0  # keep the k likeliest tokens; 0 keeps all
    top_p: Share = 1.0  # keep the fewest likeliest tokens with this mass; 1 keeps all
    seed: Whole = 0  # of the sampler
    device: str = "auto"  # auto, cpu, cuda or mps


def answers(
    model: GPT,
    encoding: tiktoken.Encoding,
    prompt: str | Messages,
    n: int,
    cfg: Config,
    rng: torch.Generator,
    reward: ScalarModel | None = None,
    ref: GPT | None = None,
) -> list[tuple[str, str]]:
    """Return n answers to a prompt, each with what is printed behind it: " …" if it did not end, score and KL."""
    ids = encode_prompt(encoding, prompt)
    context = min(net.config.block_size - len(net.config.suffix) for net in (model, reward, ref) if net)
    room = context - max(1, len(ids))
    if room < 1:
        raise InputError(f"--prompt: {len(ids)} tokens leave no room in the context of {context}")
    how = {"temperature": cfg.temperature, "top_k": cfg.top_k, "top_p": cfg.top_p, "generator": rng}
    tokens, prompt_len, length = model.generate([ids] * n, min(cfg.response_len, room), **how)
    ended = [row[end - 1] in model.config.ends for row, end in zip(tokens.tolist(), length.tolist())]
    behind = ["" if each else " …" for each in ended]
    with torch.no_grad():
        if reward:
            scores = reward.scores(tokens, length).tolist()
            behind = [f"{mark}  score {score:+.2f}" for mark, score in zip(behind, scores)]
        if ref:
            log_ratio = model.logprobs(tokens, prompt_len, length) - ref.logprobs(tokens, prompt_len, length)  # (n, R)
            behind = [f"{mark}  KL {kl:.2f}" for mark, kl in zip(behind, log_ratio.sum(1).tolist())]
    found = zip(tokens.tolist(), prompt_len.tolist(), length.tolist(), ended)
    return [(encoding.decode(row[start : end - e]), mark) for (row, start, end, e), mark in zip(found, behind)]


def readers(cfg: Config, folder: str, encoding: tiktoken.Encoding, device: torch.device) -> dict[str, Any]:
    """Return what reads the answers, with --reward: its model, and the frozen copy of the run in `folder`."""
    if not cfg.reward:
        return {}
    reward = nets.load_reward(device, encoding, folder, None, cfg.reward)
    about = Path(folder) / "config.json"
    options = read_object(about).get("options", {}) if about.exists() else {}
    if "kl_coef" not in options:
        return {"reward": reward}
    return {"reward": reward, "ref": nets.load_gpt(options.get("ref") or options["init"], device)[0]}


def talk(model: GPT, encoding: tiktoken.Encoding, cfg: Config, rng: torch.Generator, **readers: Any) -> None:
    """Read a line, answer it, and so on. The model sees as much of the conversation as fits; without a chat template
    it sees the line alone, as it is."""
    messages: Messages = []
    in_turns = bool(template_of(encoding))
    if not in_turns:
        print("the model has no chat template, so it goes on with each line as it is")
    while said := input("> ").strip():
        messages.append({"role": "user", "content": said})
        while len(messages) > 1 and len(encode_prompt(encoding, messages)) > model.config.block_size - 16:
            del messages[:2]  # what is oldest no longer fits
        ((text, mark),) = answers(model, encoding, messages if in_turns else said, 1, cfg, rng, **readers)
        messages.append({"role": "assistant", "content": text.strip()})
        print(f"{text.strip()}{mark}\n", flush=True)


def main() -> None:
    cfg, folder = cli.parse(Config, positional="DIR")
    device = cli.pick_device(cfg.device)
    if cfg.chat and (cfg.prompt or cfg.compare):
        raise InputError("--chat: takes neither --prompt nor --compare; leave them out")
    for name in filter(None, [folder, cfg.compare]):
        model, encoding = nets.load_gpt(name, device)
        rng, read_by = torch.Generator().manual_seed(cfg.seed), readers(cfg, name, encoding, device)
        if cfg.chat:
            with suppress(EOFError):
                talk(model, encoding, cfg, rng, **read_by)
            return
        print(f"\n{name}")
        for text, mark in answers(model, encoding, cfg.prompt, cfg.samples, cfg, rng, **read_by):
            print(f"  ·{text}{mark}")


if __name__ == "__main__":
    cli.run_main(main)
