"""A judge of film reviews that is not linear: a small transformer, trained from random weights.

    python -m experiments.reviewer         after tools.get.imdb

It learns from the reviews that are set apart for a judge. So it shares neither reviews nor method with the labeller of
experiments/sentiment.py, which counts words and pairs. Then `--judge experiments/reviewer.py:judge` measures.
"""

import functools

import torch
import torch.nn.functional as F
from tiktoken import Encoding

import data
from common import cli, nets
from experiments.sentiment import PIECE
from model import GPT, GPTConfig, ScalarModel
from tools.get import imdb

VOCABULARY, CONTEXT, EPOCHS, BATCH, LR = 2048, 72, 3, 64, 1e-3  # a piece of a review has some sixty tokens
load = functools.cache(nets.load_scalar)


def score(model: ScalarModel, encoding: Encoding, texts: list[str]) -> torch.Tensor:
    """The log-odds (N,) that a text, up to its last CONTEXT tokens, is positive."""
    rows = [data.Row(data.encode_text(encoding, text)[-CONTEXT:] or [model.config.eos], 0) for text in texts]
    tokens, _, length = data.pad(rows)
    return model.scores(tokens, length)


def fit(pairs: list[tuple[str, int]]) -> tuple[ScalarModel, Encoding]:
    """The classifier and its tokenizer, from texts and their labels, 1 or 0."""
    encoding = data.learn_bpe([text for text, _ in pairs], VOCABULARY)
    torch.manual_seed(0)
    config = GPTConfig(encoding.n_vocab, CONTEXT, n_layer=2, n_head=4, n_embd=128, dropout=0.1, eos=encoding.eot_token)
    model = ScalarModel(GPT(config)).train()
    optimizer, steps = nets.adamw(model, LR, 0.1), EPOCHS * len(pairs) // BATCH
    for step in range(steps):
        texts, labels = zip(*data.shuffled(pairs, BATCH, 0, None, step))
        F.binary_cross_entropy_with_logits(score(model, encoding, texts), torch.tensor(labels).float()).backward()
        nets.step_optimizer(optimizer, model, nets.warmup_cosine(step, steps, LR, 50), 1.0)
    return model.eval(), encoding


@torch.no_grad()
def judge(prompts: list[str], responses: list[str]) -> list[float]:
    """Measure independently: 1 where the whole text is more likely positive than not, else 0."""
    texts, found = [prompt + response for prompt, response in zip(prompts, responses)], []
    if not (imdb.FOLDER / "critic.pt").exists():
        raise data.InputError(f"{imdb.FOLDER}/critic.pt: does not exist; run python -m experiments.reviewer first")
    for i in range(0, len(texts), 256):
        found += (score(*load(imdb.FOLDER / "critic.pt"), texts[i : i + 256]) > 0).float().tolist()
    return found


def main() -> None:
    """Fit it, and print its accuracy on pieces of reviews that no model has learned from."""
    pieces: dict[str, list[tuple[str, int]]] = {"labeller": [], "judge": [], "eval": []}
    for row in data.read_jsonl(imdb.FOLDER / "labelled.jsonl", {"part": str, "text": str, "label": int}):
        text = row["text"]
        pieces[row["part"]] += [(text[i : i + PIECE], row["label"]) for i in range(0, len(text), PIECE)]
    nets.save_model(*fit(pieces["judge"]), imdb.FOLDER / "critic.pt")
    texts, labels = zip(*pieces["eval"])
    right = [found == label for found, label in zip(judge([""] * len(texts), texts), labels)]
    print(f"critic: held-out accuracy {sum(right) / len(right):.3f} on {len(right):,} pieces of {PIECE} characters")


if __name__ == "__main__":
    cli.run_main(main)
