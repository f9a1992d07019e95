"""The Large Movie Review Dataset (Maas et al. 2011): the task is to continue a review's first words positively.

    python -m tools.get.imdb                          download it (84 MB) and write the files to out/data/imdb
    python -m tools.get.imdb --source FILE_OR_DIR     read the tar.gz, its unpacked folder, or JSONL with text and label

It writes pretraining text, prompts of 2–4 words (2–8 tokens, as in Rafailov et al. 2023), and labelled reviews for the
models of experiments/sentiment.py. A hash sends 60% to text and prompts, 30% to these models, 10% to evaluation.
"""

import re
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from common import cli
from data.files import InputError, read_jsonl
from tools.get.download import download, write_files

URL = "https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz"
CHECKSUM = "md5:7c2ac02c03563afcf9b574c7e56c153a"
FOLDER = Path(__file__).resolve().parents[2] / "out/data/imdb"
PARTS = ["pretrain"] * 60 + ["labeller"] * 15 + ["judge"] * 15 + ["eval"] * 10


def reviews(source: Path) -> Iterator[tuple[str, int]]:
    """Yield (text, 1 if positive else 0) for each labelled review. In JSONL, a label of -1 means that there is none."""
    if source.suffix == ".jsonl":
        rows = read_jsonl(source, {"text": str, "label": int})
        for number, row in enumerate(rows, 1):
            if row["label"] not in (-1, 0, 1):
                raise InputError(f'{source}: row {number}: "label" is {row["label"]}, not 1 (positive) or 0 (negative)')
        labelled = [(row["text"], row["label"]) for row in rows if row["label"] >= 0]
        print(f"{source}: {len(rows) - len(labelled):,} reviews without a label were left out")
        yield from labelled
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


def prepare(source: Path) -> None:
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
    parser.add_argument("--source", type=Path, help="the tar.gz, its unpacked folder, or JSONL with text and label")
    source = parser.parse_args().source
    if not source:
        source = FOLDER / "aclImdb_v1.tar.gz"
        download(URL, source, CHECKSUM)
    prepare(source)


if __name__ == "__main__":
    cli.run_main(main, "tools.get.imdb")
