"""Comparisons from a person: sample several responses to a prompt, decide which is better, write the JSONL.

The person here is simulated: `simulate` lets a judge decide each pair as a noisy person would.
"""

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tiktoken
import torch

from data import encode_prompt
from model import GPT


def sample_responses(
    model: GPT,
    encoding: tiktoken.Encoding,
    prompts: list[str],
    samples: int,
    response_len: int,
    temperature: float,
    seed: int,
) -> list[list[tuple[str, bool]]]:
    """`samples` responses to each prompt, as (text, whether it ended with EOS before `response_len` tokens)."""
    repeated = [ids for prompt in prompts for ids in [encode_prompt(encoding, prompt)] * samples]
    generator = torch.Generator().manual_seed(seed)
    texts = []
    rows = max(1, 2**16 // (max(map(len, repeated)) + response_len))  # bounds the cache
    for start in range(0, len(repeated), rows):
        part = repeated[start : start + rows]
        tokens, prompt_len, length = model.generate(part, response_len, temperature=temperature, generator=generator)
        for row, first, end in zip(tokens.tolist(), prompt_len.tolist(), length.tolist()):
            ended = row[end - 1] == model.config.eos
            texts.append((encoding.decode(row[first : end - ended]), ended))
    return [texts[i : i + samples] for i in range(0, len(texts), samples)]


def simulate(
    prompts: list[str],
    responses: list[list[tuple[str, bool]]],
    judge: Callable[[str, str], float],
    temperature: float,
    seed: int,
) -> list[dict]:
    """Every pair of responses to a prompt, decided with probability σ((judge a − judge b) / temperature) for a.

    That is the model of Bradley and Terry (1952). "p_chosen" is the probability that the choice had: with it, a reader
    can tell how much of the labels is noise. Pairs of the same text are left out.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for prompt, answers in zip(prompts, responses):
        scores = [judge(prompt, text) for text, _ in answers]
        for a, b in itertools.combinations(range(len(answers)), 2):
            if answers[a] == answers[b]:
                continue
            p = 0.5 + 0.5 * math.tanh((scores[a] - scores[b]) / temperature / 2)  # σ, which cannot overflow
            if rng.random() >= p:
                a, b, p = b, a, 1 - p
            (chosen, chosen_ended), (rejected, rejected_ended) = answers[a], answers[b]
            row = {"prompt": prompt, "chosen": chosen, "rejected": rejected, "p_chosen": round(p, 4)}
            rows.append(row | {"chosen_ended": chosen_ended, "rejected_ended": rejected_ended})
    return rows


def write_rows(rows: list[dict], path: Path) -> None:
    """Write JSONL under a temporary name and rename it into place."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
    temporary.replace(path)
