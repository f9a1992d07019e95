"""Sample several answers to each prompt, and let a function compare them: a simulated person."""

import itertools
import math
from pathlib import Path
from typing import Any

from tiktoken import Encoding

import data
from common import dist, judges, nets
from common.judges import Judge
from data.chat import template_variables
from data.label import Answer, preference
from data.rng import generator, seed_of, shuffler
from model import GPT

KEPT = ("prompt", "tools", "chat_template_kwargs")  # columns of a prompt that its comparisons have too


def sample_responses(
    model: GPT,
    encoding: Encoding,
    prompts: list[list[int]],
    samples: int,
    response_len: int,
    temperature: float,
    seed: int,
    size: int = 0,
) -> list[list[Answer]]:
    """`samples` answers to each prompt, of at most `response_len` tokens with the end; `size` prompts at a time."""
    repeated = [prompt for prompt in prompts for _ in range(samples)]
    most = min(512, max(1, 2**16 // (max(map(len, repeated)) + response_len)))  # limits the cache size
    rows = min(most, size * samples or most)
    found = nets.generate(model, repeated, response_len, temperature, generator(seed), rows)
    answers = []
    for row, first, end in zip(*(x.tolist() for x in found)):
        ended = row[end - 1] in model.config.ends
        answers.append(Answer(encoding.decode(row[first : end - ended]), ended, row[first:end]))
    return [answers[i : i + samples] for i in range(0, len(answers), samples)]


def simulate(
    prompts: list[dict], texts: list[str], answers: list[list[Answer]], judge: Judge, temperature: float, seed: int
) -> list[dict]:
    """Decide every pair of answers to a prompt: choose a with probability σ((judge a − judge b) / temperature).

    This is the model of Bradley and Terry (1952). "p_chosen" is the probability of the choice; it shows the amount of
    noise in the labels. Pairs of identical texts are left out. `prompts` are rows; the judge sees them with `texts`.
    """
    rng = shuffler("choices", seed)
    shown = [row | {"prompt": text} for row, text in zip(prompts, texts)]
    scores = iter(judge([row | {"response": answer[0]} for row, each in zip(shown, answers) for answer in each]))
    rows = []
    for row, each in zip(prompts, answers):
        about = {name: row[name] for name in KEPT if name in row}
        scored = [(Answer(*answer), next(scores)) for answer in each]
        for (a, score_a), (b, score_b) in itertools.combinations(scored, 2):
            if a.text == b.text:
                continue
            p = 0.5 + 0.5 * math.tanh((score_a - score_b) / temperature / 2)  # σ, in a form that cannot overflow
            if rng.random() >= p:
                a, b, p = b, a, 1 - p
            rows.append(about | preference([a, b]) | {"p_chosen": round(p, 4)})
    return rows


def sample_and_compare(cfg: Any, source: str, judge: str, policy: GPT, encoding: Encoding, target: Path) -> None:
    """Let the policy answer the prompts of `source` and the judge compare; write the comparisons to `target`.

    `cfg` has the options of reward.py. Raises InputError if all answers are alike.
    """
    asked = data.read_prompts(source, encoding)[: cfg.n_prompts or None]
    lengths = [max(1, len(prompt.ids)) + cfg.response_len for prompt in asked]
    what = f"prompts of {source} (with --response_len {cfg.response_len})"
    asked = data.keep_short(asked, lengths, nets.context(cfg, policy), what, dist.print0)
    ids, prompts = zip(*asked)
    compares = judges.load_function(judge)
    judges.check_columns(judge, prompts)
    dist.print0(f"{cfg.init} answers {len(asked):,} prompts of {source}, {cfg.samples} times each; {judge} compares")
    texts = [data.prompt_text(encoding, row["prompt"], template_variables(row, source)) for row in prompts]
    how = cfg.samples, cfg.response_len, cfg.temperature, seed_of("answers", cfg.seed), cfg.micro_batch_size
    answers = sample_responses(policy, encoding, ids, *how)
    rows = simulate(prompts, texts, answers, compares, cfg.label_temperature, seed_of("choices", cfg.seed))
    if not rows:
        raise data.InputError(f"--init {cfg.init}: its samples are all alike; raise --temperature or --samples")
    data.write_jsonl(target, rows)
