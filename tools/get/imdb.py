"""The Large Movie Review Dataset (Maas et al. 2011): the task is to continue a review's first words positively.

    python -m tools.get.imdb                   download it (42 MB) and write the files to out/data/imdb
    python -m tools.get.imdb --source FILES    read JSONL or parquet with text and label

It writes pretraining text, prompts of 2–4 words (2–8 tokens, as in Rafailov et al. 2023), and labelled reviews for the
models of experiments/sentiment.py. A hash sends 60% to text and prompts, 30% to these models, 10% to evaluation.
"""

import zlib
from pathlib import Path

import numpy as np

from common import cli
from data.files import InputError, read_jsonl
from tools.get.download import from_hub, write_files

FOLDER = Path(__file__).resolve().parents[2] / "out/data/imdb"
PARTS = ["pretrain"] * 60 + ["labeller"] * 15 + ["judge"] * 15 + ["eval"] * 10


def reviews(source: str) -> list[tuple[str, int]]:
    """Return (text, 1 if positive else 0) for each labelled review. A label of -1 means that there is none."""
    rows = read_jsonl(source, {"text": str, "label": int})
    for number, row in enumerate(rows, 1):
        if row["label"] not in (-1, 0, 1):
            raise InputError(f'{source}: row {number}: "label" is {row["label"]}, not 1 (positive) or 0 (negative)')
    labelled = [(row["text"], row["label"]) for row in rows if row["label"] >= 0]
    print(f"{source}: {len(rows) - len(labelled):,} reviews without a label were left out")
    return labelled


def prepare(source: str) -> None:
    parts: dict[str, dict[str, int]] = {name: {} for name in PARTS}  # text → label
    for text, label in reviews(source):
        text = text.replace("<br />", "\n").strip()
        part = PARTS[zlib.crc32(text.encode()) % 100]  # by the text alone, so copies of a review get the same part
        if text:
            parts[part].setdefault(text, label)
    if min(map(len, parts.values())) < 10:
        raise InputError(f"{source}: has too few labelled reviews; give the complete data set")
    rng = np.random.default_rng(0)

    def openings(texts: list[str]) -> list[dict]:
        """Return prompts of 2–4 words, in random order."""
        return [{"prompt": " ".join(texts[i].split()[: rng.integers(2, 5)])} for i in rng.permutation(len(texts))]

    prompts = openings([*parts["pretrain"]])
    half = len(prompts) // 2
    files = {"pretrain": [{"text": text} for text in parts["pretrain"]]}
    files |= {"compare": prompts[:half], "ppo": prompts[half:], "eval": openings([*parts["eval"]])}
    labelled = [(part, *review) for part in ("labeller", "judge", "eval") for review in parts[part].items()]
    files["labelled"] = [{"part": part, "text": text, "label": label} for part, text, label in labelled]
    write_files(FOLDER, files)


def main() -> None:
    parser = cli.Parser(description="the Large Movie Review Dataset")
    parser.add_argument("--source", default="", help="JSONL or parquet with text and label: a file, folder or pattern")
    source = parser.parse_args().source
    prepare(source or f"{from_hub('stanfordnlp/imdb', 'plain_text/t*.parquet', kind='dataset')}/plain_text")


if __name__ == "__main__":
    cli.run_main(main, "tools.get.imdb")
