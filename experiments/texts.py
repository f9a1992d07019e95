"""What can be said of answers without a judge: how likely the start finds them, how alike they are, and what of."""

from collections.abc import Iterable

import torch
from tiktoken import Encoding
from torch import Tensor

import data
from data import Row
from model import GPT

FIRST = 12  # words of a text that are compared, so that short and long texts have as many
BACK = "\n\nWhich question does this answer?"


@torch.no_grad()
def log_p(model: GPT, rows: list[Row], size: int = 32) -> tuple[Tensor, Tensor]:
    """Log-probability of each row's response, in nats, at temperature 1, and the number of its tokens: (N,), (N,)."""
    found = []
    for i in range(0, len(rows), size):
        tokens, prompt_len, length = data.pad(rows[i : i + size])
        found.append((model.logprobs(tokens, prompt_len, length).double().sum(1), length - prompt_len))
    total, n = zip(*found)
    return torch.cat(total), torch.cat(n)


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def fluency(start: GPT, encoding: Encoding, prompts: Iterable[str | list], answers: list[tuple[str, bool]]) -> float:
    """log π₀ per token of the answers (text, whether it ended) to prompts, over all tokens together, in nats."""
    rows = [data.encode_row(encoding, start.config.eos, prompt, *answer) for prompt, answer in zip(prompts, answers)]
    total, n = log_p(start, rows)
    return (total.sum() / n.sum()).item()


def about_question(start: GPT, encoding: Encoding, asked: list[str], answers: list[str]) -> float:
    """By how many nats an answer makes its question more likely to the start than the next question's answer does."""
    total = []
    for given in (answers, [*answers[1:], answers[0]]):
        pairs = [(user(answer + BACK), question) for answer, question in zip(given, asked)]
        total.append(log_p(start, [data.encode_row(encoding, start.config.eos, *pair, False) for pair in pairs])[0])
    return (total[0] - total[1]).mean().item()


def distinct_bigrams(answers: list[str]) -> float:
    """The share of the pairs of adjacent words, of all texts together, that are different ones (Li et al. 2016)."""
    words = [text.lower().split()[:FIRST] for text in answers]
    pairs = [pair for each in words for pair in zip(each, each[1:])]
    return len(set(pairs)) / max(1, len(pairs))
