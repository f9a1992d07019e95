"""The Large Movie Review Dataset (Maas et al. 2011): the task is to continue a review's first words positively.

    python -m tools.get.imdb                          download it (84 MB) and write the files to out/data/imdb
    python -m tools.get.imdb --source FILE_OR_DIR     read the tar.gz, its unpacked folder, or JSONL with text and label

Writes pretraining text, prompts of 2–4 words (2–8 tokens, as in the sentiment task of Rafailov et al. 2023), and two
linear sentiment models fitted on disjoint reviews. `labeller` simulates the person who compares; `judge` only measures.
A hash of the text assigns each review to a part: 60% are pretraining text and give the prompts for comparisons and
PPO; 15% fit each linear model; 10% give evaluation prompts and the linear models' held-out accuracy.
"""

import functools
import re
import sys
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from common import cli
from data.files import InputError, iterate_jsonl
from tools.get.download import download, write_files

URL = "https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz"
CHECKSUM = "md5:7c2ac02c03563afcf9b574c7e56c153a"
FOLDER = Path(__file__).resolve().parents[2] / "out/data/imdb"
BUCKETS = 2**18  # for hashed words and word pairs
RESPONSE = 200  # characters: the linear models are fitted on pieces as long as the texts they will judge


@dataclass
class Config:
    source: str = ""  # the tar.gz, its unpacked folder, or JSONL with text and label, in place of the download


def reviews(source: Path) -> Iterator[tuple[str, int]]:
    """Yield (text, 1 if positive else 0) for each labelled review. In JSONL, a label of -1 means that there is none."""
    if source.suffix == ".jsonl":
        unlabelled = 0
        for number, row in enumerate(iterate_jsonl(source, {"text": str, "label": int}), 1):
            if row["label"] not in (-1, 0, 1):
                raise InputError(f'{source}: row {number}: "label" is {row["label"]}, not 1 (positive) or 0 (negative)')
            unlabelled += row["label"] == -1
            if row["label"] >= 0:
                yield row["text"], row["label"]
        print(f"{source}: {unlabelled:,} reviews without a label were left out")
        return
    wanted = re.compile(r"(train|test)/(pos|neg)/[^/]+\.txt$")
    try:
        if source.is_dir():
            paths = (path for path in sorted(source.rglob("*.txt")) if wanted.search(path.as_posix()))
            yield from ((path.read_text("utf-8"), int(path.parent.name == "pos")) for path in paths)
            return
        with tarfile.open(source) as archive:
            for member in archive:
                if member.isfile() and (match := wanted.search(member.name)):
                    yield archive.extractfile(member).read().decode("utf-8"), int(match[2] == "pos")
    except (OSError, tarfile.TarError, EOFError, zlib.error, UnicodeDecodeError) as error:
        what = f"cannot be read ({type(error).__name__}: {error})"
        raise InputError(f"{source}: {what}; give the tar.gz, its unpacked folder, or JSONL") from None


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
    parts: dict[str, dict[str, int]] = {"pretrain": {}, "labeller": {}, "judge": {}, "eval": {}}  # text → label
    for text, label in reviews(source):
        text = text.replace("<br />", "\n").strip()
        key = zlib.crc32(text.encode()) % 100  # depends on the text alone, so copies of a review get the same part
        part = "pretrain" if key < 60 else "labeller" if key < 75 else "judge" if key < 90 else "eval"
        if text:
            parts[part].setdefault(text, label)
    if min(map(len, parts.values())) < 10:
        n = sum(map(len, parts.values()))
        raise InputError(f"{source}: {n} labelled reviews are too few; give the complete data set")
    rng = np.random.default_rng(0)

    def prompts(texts: list[str]) -> list[dict]:
        """Return the first 2–4 words: usually 2–8 tokens if the vocabulary has a few thousand tokens."""
        return [{"prompt": " ".join(text.split()[: rng.integers(2, 5)])} for text in texts]

    def pieces(rows: dict[str, int]) -> list[tuple[str, int]]:
        return [(text[i : i + RESPONSE], rows[text]) for text in rows for i in range(0, len(text), RESPONSE)]

    texts, held_out = [*parts["pretrain"]], [*parts["eval"]]
    texts = [texts[i] for i in rng.permutation(len(texts))]
    half = len(texts) // 2
    files = {"pretrain": [{"text": text} for text in parts["pretrain"]]}
    files |= {"compare": prompts(texts[:half]), "ppo": prompts(texts[half:])}
    files["eval"] = prompts([held_out[i] for i in rng.permutation(len(held_out))])
    write_files(FOLDER, files)
    for name in ("labeller", "judge"):
        weights = fit(*map(list, zip(*parts[name].items(), *pieces(parts[name]))))
        np.save(FOLDER / f"{name}.npy", weights)
        for what, rows in (("pieces", pieces(parts["eval"])), ("whole reviews", parts["eval"].items())):
            right = [(probability(weights, text) > 0.5) == label for text, label in rows]
            print(f"{name}: held-out accuracy {np.mean(right):.3f} on {what}")


def main() -> None:
    source = Path(cli.parse(Config).source or FOLDER / "aclImdb_v1.tar.gz")
    if source == FOLDER / "aclImdb_v1.tar.gz":
        download(URL, source, CHECKSUM)
    prepare(source)


if __name__ == "__main__":
    sys.argv[0] = "tools.get.imdb"
    cli.run_main(main)
