"""Sample several responses to a prompt, and simulate a person who compares them."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import tiktoken
import torch

from data.tokenizer import encode_prompt
from model import GPT

Answer = tuple[str, bool]  # a response, and whether it ended with EOS before the length limit


def sample_responses(
    model: GPT,
    encoding: tiktoken.Encoding,
    prompts: list[str],
    samples: int,
    response_len: int,
    temperature: float,
    seed: int,
) -> list[list[Answer]]:
    """Sample `samples` responses to each prompt: (text, whether EOS is among its `response_len` tokens)."""
    repeated = [ids for prompt in prompts for ids in [encode_prompt(encoding, prompt)] * samples]
    generator = torch.Generator().manual_seed(seed)
    texts = []
    rows = min(512, max(1, 2**16 // (max(map(len, repeated)) + response_len)))  # limits the cache size
    for start in range(0, len(repeated), rows):
        part = repeated[start : start + rows]
        tokens, prompt_len, length = model.generate(part, response_len, temperature=temperature, generator=generator)
        for row, first, end in zip(tokens.tolist(), prompt_len.tolist(), length.tolist()):
            ended = row[end - 1] == model.config.eos
            texts.append((encoding.decode(row[first : end - ended]), ended))
    return [texts[i : i + samples] for i in range(0, len(texts), samples)]


def simulate(
    prompts: list[str],
    responses: list[list[Answer]],
    judge: Callable[[str, str], float],
    temperature: float,
    seed: int,
) -> list[dict]:
    """Decide every pair of responses to a prompt: choose a with probability σ((judge a − judge b) / temperature).

    This is the model of Bradley and Terry (1952). "p_chosen" is the probability of the choice; it shows the amount of
    noise in the labels. Pairs of identical answers are omitted.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for prompt, answers in zip(prompts, responses):
        scores = [judge(prompt, text) for text, _ in answers]
        for a, b in itertools.combinations(range(len(answers)), 2):
            if answers[a] == answers[b]:
                continue
            p = 0.5 + 0.5 * math.tanh((scores[a] - scores[b]) / temperature / 2)  # σ, in a form that cannot overflow
            if rng.random() >= p:
                a, b, p = b, a, 1 - p
            rows.append({"prompt": prompt} | preference([answers[a], answers[b]]) | {"p_chosen": round(p, 4)})
    return rows


def preference(ordered: list[Answer]) -> dict:
    """Return the columns of a row for two or more responses, which a person ordered from best to worst."""
    if len(ordered) > 2:
        return {"ranked": [text for text, _ in ordered], "ranked_ended": [ended for _, ended in ordered]}
    (chosen, chosen_ended), (rejected, rejected_ended) = ordered
    texts = {"chosen": chosen, "rejected": rejected}
    return texts | {"chosen_ended": chosen_ended, "rejected_ended": rejected_ended}
