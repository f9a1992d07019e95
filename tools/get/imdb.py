"""The Large Movie Review Dataset (Maas et al. 2011): the task is to continue a review's first words positively.

    python -m tools.get.imdb                          download it (84 MB) and write the files to out/data/imdb
    python -m tools.get.imdb --source FILE_OR_DIR     read the tar.gz, its unpacked folder, or JSONL with text and label

Writes pretraining text, prompts of 2–4 words (2–8 tokens, as in the sentiment task of Rafailov et al. 2023), and two
linear sentiment models fitted on disjoint reviews. `labeller` simulates the person who compares; `judge` only measures.
A hash of the text assigns each review to a part: 60% are pretraining text and give the prompts for comparisons and
PPO; 15% fit each linear model; 10% give evaluation prompts and the linear models' held-out accuracy.
"""

import argparse
import functools
import re
import sys
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from data.files import InputError, iterate_jsonl, write_jsonl
from tools.get.download import download

URL = "https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz"
CHECKSUM = "md5:7c2ac02c03563afcf9b574c7e56c153a"
FOLDER = Path(__file__).resolve().parents[2] / "out/data/imdb"
BUCKETS = 2**18  # for hashed words and word pairs
RESPONSE = 200  # characters: the linear models are fitted on pieces as long as the texts they will judge


def reviews(source: Path) -> Iterator[tuple[str, int]]:
    """Yield (text, 1 if positive else 0) for each labelled review in the tar.gz, its unpacked folder, or JSONL.

    A label of -1 marks a review without one, which is left out. Raises InputError for any other label.
    """
    wanted = re.compile(r"(?:train|test)/(pos|neg)/[^/]+\.txt$")
    if source.is_dir():
        found = [(path, match) for path in sorted(source.rglob("*.txt")) if (match := wanted.search(path.as_posix()))]
        for path, match in found:
            yield decoded(path.read_bytes(), path), int(match[1] == "pos")
    elif source.suffix == ".jsonl":
        unlabelled = 0
        for number, row in enumerate(iterate_jsonl(source, {"text": str, "label": int}), 1):
            if row["label"] not in (-1, 0, 1):
                raise InputError(
                    f'{source}: row {number}: "label" is {row["label"]}; give 1 for positive, 0 for negative'
                )
            if row["label"] == -1:
                unlabelled += 1
            else:
                yield row["text"], row["label"]
        if unlabelled:
            print(f"{source}: {unlabelled:,} reviews without a label (-1) were left out")
    else:
        try:
            with tarfile.open(source) as archive:
                for member in archive:
                    if member.isfile() and (match := wanted.search(member.name)):
                        yield decoded(archive.extractfile(member).read(), member.name), int(match[1] == "pos")
        except (OSError, tarfile.TarError, EOFError, zlib.error) as error:
            raise InputError(
                f"{source}: cannot be read as a tar.gz ({type(error).__name__}); give the archive, its folder or JSONL"
            ) from None


def decoded(content: bytes, name: object) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{name}: not UTF-8; save the file as UTF-8") from None


def features(text: str) -> list[int]:
    """Return the hashes of the distinct words and of the distinct pairs of adjacent words."""
    words = re.findall(r"[a-z']+", text.lower())
    pairs = [f"{a} {b}" for a, b in zip(words, words[1:])]
    return sorted({zlib.crc32(word.encode()) % BUCKETS for word in words + pairs})


def fit(texts: list[str], labels: list[int]) -> np.ndarray:
    """Fit a logistic regression on `features` in seconds. Returns weights (BUCKETS + 1,); the last is the bias."""
    rows = [features(text) for text in texts]
    ids, start = torch.tensor([i for row in rows for i in row]), np.cumsum([0] + [len(row) for row in rows[:-1]])
    target = torch.tensor(labels, dtype=torch.float32)
    scale = torch.tensor([1 / max(1, len(row)) ** 0.5 for row in rows])
    weight = torch.zeros(BUCKETS, 1, requires_grad=True)
    bias = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.Adam([weight, bias], lr=0.05)
    for _ in range(60):
        logits = F.embedding_bag(ids, weight, torch.tensor(start), mode="sum")[:, 0] * scale + bias
        loss = F.binary_cross_entropy_with_logits(logits, target) + 1e-4 * weight.square().sum() / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return torch.cat([weight[:, 0], bias]).detach().numpy()


def stretches(text: str) -> list[str]:
    """Cut the text into pieces of at most RESPONSE characters."""
    return [text[start : start + RESPONSE] for start in range(0, len(text), RESPONSE)]


def probability(weights: np.ndarray, text: str) -> float:
    """Return the linear model's probability that a text is positive."""
    row = features(text)
    return float(1 / (1 + np.exp(-(weights[row].sum() / max(1, len(row)) ** 0.5 + weights[-1]))))


@functools.cache
def _weights(name: str) -> np.ndarray:
    path = FOLDER / f"{name}.npy"
    if not path.exists():
        raise InputError(f"{path}: does not exist; run python -m tools.get.imdb first")
    return np.load(path)


def labeller(prompt: str, response: str) -> float:
    """Simulate a person: return the probability, in [0, 1], that the whole text is positive."""
    return probability(_weights("labeller"), prompt + response)


def judge(prompt: str, response: str) -> float:
    """Measure independently: return 1 if the whole text is positive, else 0."""
    return float(probability(_weights("judge"), prompt + response) > 0.5)


def prepare(source: Path) -> None:
    parts: dict[str, list[tuple[str, int]]] = {"pretrain": [], "labeller": [], "judge": [], "eval": []}
    seen = set()
    for text, label in reviews(source):
        text = text.replace("<br />", "\n").strip()
        key = zlib.crc32(text.encode()) % 100  # depends on the text alone, so copies of a review get the same part
        if text and text not in seen:
            seen.add(text)
            parts["pretrain" if key < 60 else "labeller" if key < 75 else "judge" if key < 90 else "eval"].append(
                (text, label)
            )
    if min(map(len, parts.values())) < 10:
        raise InputError(f"{source}: {len(seen)} labelled reviews are too few; give the complete data set")
    FOLDER.mkdir(parents=True, exist_ok=True)

    def write(name: str, rows: list[dict]) -> None:
        print(f"{FOLDER / name}.jsonl: {write_jsonl(FOLDER / f'{name}.jsonl', rows):,} rows")

    # A prompt is the first 2–4 words: usually 2–8 tokens if the vocabulary has a few thousand tokens.
    rng = np.random.default_rng(0)
    order = lambda rows: [rows[i][0] for i in rng.permutation(len(rows))]  # noqa: E731
    prompts = lambda texts: [{"prompt": " ".join(t.split()[: rng.integers(2, 5)])} for t in texts]  # noqa: E731
    write("pretrain", [{"text": text} for text, _ in parts["pretrain"]])
    texts = order(parts["pretrain"])
    half = len(texts) // 2
    write("compare", prompts(texts[:half]))
    write("ppo", prompts(texts[half:]))
    write("eval", prompts(order(parts["eval"])))
    for name in ("labeller", "judge"):
        pieces = [(piece, label) for text, label in parts[name] for piece in [text, *stretches(text)]]
        weights = fit(*map(list, zip(*pieces)))
        np.save(FOLDER / f"{name}.npy", weights)
        right = [(probability(weights, p) > 0.5) == label for t, label in parts["eval"] for p in stretches(t)]
        whole = [(probability(weights, text) > 0.5) == label for text, label in parts["eval"]]
        print(f"{name}: held-out accuracy {np.mean(right):.3f} on pieces, {np.mean(whole):.3f} on whole reviews")


def main() -> None:
    parser = argparse.ArgumentParser(description="The Large Movie Review Dataset")
    parser.add_argument("--source", type=Path, help="the tar.gz, its unpacked folder, or JSONL with text and label")
    source = parser.parse_args().source
    try:
        if source is None:
            source = FOLDER / "aclImdb_v1.tar.gz"
            if not source.exists():
                FOLDER.mkdir(parents=True, exist_ok=True)
                download(URL, source, CHECKSUM)
        elif not source.exists():
            raise InputError(f"--source {source}: no such file or folder; give the tar.gz, its folder, or JSONL")
        prepare(source)
    except InputError as error:
        print(f"tools.get.imdb: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
