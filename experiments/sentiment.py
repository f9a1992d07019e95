"""Two linear models of sentiment, fitted on different film reviews.

    python -m tools.get.imdb             the reviews
    python -m experiments.sentiment      fit both models

Then `--judge experiments/sentiment.py:labeller` simulates the person who compares, and `:judge` only measures.
"""

import functools
import re
import zlib

import numpy as np
import torch
import torch.nn.functional as F

from common import cli
from data.files import InputError, read_jsonl
from tools.get import imdb

BUCKETS = 2**18  # for hashed words and word pairs
PIECE = 200  # characters: the models are fitted on pieces as long as the texts that they will judge, too


def features(text: str) -> list[int]:
    """Return the hashes of the distinct words and of the distinct pairs of adjacent words."""
    words = re.findall(r"[a-z']+", text.lower())
    pairs = [f"{a} {b}" for a, b in zip(words, words[1:])]
    return sorted({zlib.crc32(word.encode()) % BUCKETS for word in words + pairs})


def fit(texts: list[str], labels: list[int]) -> np.ndarray:
    """Fit a logistic regression on `features` in seconds. Returns weights (BUCKETS + 1,); the last is the bias."""
    rows = [features(text) for text in texts]
    ids = torch.tensor([i for row in rows for i in row])
    start = torch.tensor([0] + [len(row) for row in rows[:-1]]).cumsum(0)
    scale = torch.tensor([1 / max(1, len(row)) ** 0.5 for row in rows])
    target = torch.tensor(labels, dtype=torch.float32)
    weight, bias = torch.zeros(BUCKETS, 1, requires_grad=True), torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.Adam([weight, bias], lr=0.05)
    for _ in range(60):
        logits = F.embedding_bag(ids, weight, start, mode="sum")[:, 0] * scale + bias
        loss = F.binary_cross_entropy_with_logits(logits, target) + 1e-4 * weight.square().sum() / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return torch.cat([weight[:, 0], bias]).detach().numpy()


def probability(weights: np.ndarray, text: str) -> float:
    """Return the linear model's probability that a text is positive."""
    row = features(text)
    return float(1 / (1 + np.exp(-(weights[row].sum() / max(1, len(row)) ** 0.5 + weights[-1]))))


@functools.cache
def _weights(name: str) -> np.ndarray:
    path = imdb.FOLDER / f"{name}.npy"
    if not path.exists():
        raise InputError(f"{path}: does not exist; run python -m experiments.sentiment first")
    return np.load(path)


def labeller(prompt: str, response: str) -> float:
    """Simulate a person: return the probability, in [0, 1], that the whole text is positive."""
    return probability(_weights("labeller"), prompt + response)


def judge(prompt: str, response: str) -> float:
    """Measure independently: return 1 if the whole text is positive, else 0."""
    return float(probability(_weights("judge"), prompt + response) > 0.5)


def main() -> None:
    """Fit both models, and print their accuracy on reviews of neither."""
    parts: dict[str, list[tuple[str, int]]] = {"labeller": [], "judge": [], "eval": []}
    for row in read_jsonl(imdb.FOLDER / "labelled.jsonl", {"part": str, "text": str, "label": int}):
        parts[row["part"]].append((row["text"], row["label"]))
    for name in ("labeller", "judge"):
        pieces = [(text[i : i + PIECE], label) for text, label in parts[name] for i in range(0, len(text), PIECE)]
        weights = fit(*zip(*parts[name], *pieces))
        np.save(imdb.FOLDER / f"{name}.npy", weights)
        right = [(probability(weights, text) > 0.5) == label for text, label in parts["eval"]]
        print(f"{name}: held-out accuracy {np.mean(right):.3f}")


if __name__ == "__main__":
    cli.run_main(main)
