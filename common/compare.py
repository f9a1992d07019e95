"""Sample several responses to a prompt, and simulate a person who compares them."""

import itertools
import math
from collections.abc import Callable

import tiktoken

from common.judges import ask
from data.label import Answer, preference
from data.rng import generator, shuffler
from data.tokenizer import encode_prompt
from model import GPT


def sample_responses(
    model: GPT,
    encoding: tiktoken.Encoding,
    prompts: list[str],
    samples: int,
    response_len: int,
    temperature: float,
    seed: int,
) -> list[list[Answer]]:
    """Sample `samples` responses of at most `response_len` tokens, EOS included, to each prompt."""
    repeated = [ids for prompt in prompts for ids in [encode_prompt(encoding, prompt)] * samples]
    chance = generator(seed)
    answers = []
    rows = min(512, max(1, 2**16 // (max(map(len, repeated)) + response_len)))  # limits the cache size
    for start in range(0, len(repeated), rows):
        part = repeated[start : start + rows]
        tokens, prompt_len, length = model.generate(part, response_len, temperature=temperature, generator=chance)
        for row, first, end in zip(tokens.tolist(), prompt_len.tolist(), length.tolist()):
            ended = row[end - 1] in model.config.ends
            ids = row[first : end - ended]
            answers.append(Answer(encoding.decode(ids), ended, ids))
    return [answers[i : i + samples] for i in range(0, len(answers), samples)]


def simulate(
    prompts: list[str],
    responses: list[list[Answer]],
    judge: Callable[[str, str], float],
    temperature: float,
    seed: int,
    shown: list[str] | None = None,
) -> list[dict]:
    """Decide every pair of responses to a prompt: choose a with probability σ((judge a − judge b) / temperature).

    This is the model of Bradley and Terry (1952). "p_chosen" is the probability of the choice; it shows the amount of
    noise in the labels. Pairs of identical texts are omitted. The judge sees `shown` in place of the prompts.
    """
    rng = shuffler("choices", seed)
    rows = []
    pairs = [(prompt, answer[0]) for prompt, compared in zip(shown or prompts, responses) for answer in compared]
    judged = iter(ask(judge, pairs))
    for prompt, compared in zip(prompts, responses):
        answers = [Answer(*answer) for answer in compared]
        scores = list(itertools.islice(judged, len(answers)))
        for a, b in itertools.combinations(range(len(answers)), 2):
            if answers[a].text == answers[b].text:
                continue
            p = 0.5 + 0.5 * math.tanh((scores[a] - scores[b]) / temperature / 2)  # σ, in a form that cannot overflow
            if rng.random() >= p:
                a, b, p = b, a, 1 - p
            rows.append({"prompt": prompt} | preference([answers[a], answers[b]]) | {"p_chosen": round(p, 4)})
    return rows
