"""OpenAI's TL;DR (Stiennon et al. 2020): Reddit posts, their summaries, and people's choices between two summaries.

    python -m tools.get.tldr                      download posts and comparisons (600 MB); write files to out/data/tldr
    python -m tools.get.tldr --source FOLDER          read your own train.jsonl, valid.jsonl and batch….json
    python -m tools.get.tldr --init out/smollm2   measure lengths with that model's tokenizer instead of GPT-2's

A prompt is the subreddit, the title and the post, and ends in "TL;DR:"; a summary begins with a space. If a prompt is
longer than --length tokens, the end of its post is removed, at a line break if possible. The command writes posts with
their own summaries to fine-tune on, comparisons of the split `train`, and prompts for PPO. The validation posts give
the evaluation prompts.
"""

import bisect
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from common import cli, nets
from data.files import InputError, iterate_jsonl
from data.tokenizer import encode_text, gpt2_encoding
from tools.get.download import download, write_files

URL = "https://openaipublic.blob.core.windows.net/summarize-from-feedback"
FOLDER = Path(__file__).resolve().parents[2] / "out/data/tldr"
POSTS = {name: f"datasets/tldr_3_filtered/{name}" for name in ("train.jsonl", "valid.jsonl")}
BATCHES = {name: f"dataset/comparisons/{name}" for name in (f"batch{i}.json" for i in [*range(3, 21), 22])}
COLUMNS = dict.fromkeys(["subreddit", "title", "post", "summary"], str)
PROMPT = "SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"  # Huang et al. 2024, detail 2


@dataclass
class Config:
    source: str = ""  # a folder with train.jsonl, valid.jsonl and batch….json, in place of the download
    init: str = ""  # a run folder whose tokenizer measures lengths, in place of GPT-2's
    length: int = 512  # longest prompt, in tokens


def prompt_of(post: dict, count: Callable[[str], int], length: int, tally: Counter[str]) -> str:
    """Return a post's prompt of at most `length` tokens. Cuts at the last line break that fits, else inside a line."""
    text = post["post"]

    def prompt(end: int) -> str:
        return PROMPT.format_map(post | {"post": text[:end]})

    breaks = [i for i, character in enumerate(text) if character == "\n"]
    choices = {"not cut": [len(text)], "cut at a line break": breaks, "cut inside a line": range(len(text))}
    for how, ends in choices.items():
        fitting = bisect.bisect_right(ends, length, key=lambda end: count(prompt(end)))
        if fitting:
            tally[f"posts {how}"] += 1
            return prompt(ends[fitting - 1])
    raise InputError(f"--length {length}: a post's title alone is longer; give a larger length")


def comparisons(path: Path, prompt: Callable[[dict], str], tally: Counter[str]) -> Iterator[dict]:
    """Yield the rows of a batch that compare two different summaries of a post in the split `train`."""
    for number, row in enumerate(iterate_jsonl(path, {"info": dict, "summaries": list, "choice": int}), 1):
        try:
            first, second = (summary["text"].strip() for summary in row["summaries"])
            good, bad = [(first, second), (second, first)][row["choice"]]
        except (LookupError, TypeError, AttributeError, ValueError):
            raise InputError(f"{path}: row {number}: needs two summaries and a choice of 0 or 1; fix the row") from None
        if not {"subreddit", "title", "post"} <= row["info"].keys():
            tally["comparisons omitted, not of a Reddit post"] += 1
        elif row.get("split") != "train":
            tally[f"comparisons omitted, of the split {row.get('split')}"] += 1
        elif good == bad or not good or not bad:
            tally["comparisons omitted, of the same summary twice or of none"] += 1
        else:
            yield {"prompt": prompt(row["info"]), "chosen": f" {good}", "rejected": f" {bad}"}


def prepare(source: Path, count: Callable[[str], int], length: int) -> None:
    batches = [source / name for name in BATCHES if (source / name).exists()]
    if not batches:
        raise InputError(f"--source {source}: holds no {next(iter(BATCHES))} or other batch; give the complete folder")
    tally: Counter[str] = Counter()
    prompt = partial(prompt_of, count=count, length=length, tally=tally)

    def pairs(name: str) -> list[dict]:
        rows = iterate_jsonl(source / name, COLUMNS)
        return [{"prompt": prompt(row), "completion": f" {row['summary'].strip()}"} for row in rows]

    files = {"sft": pairs("train.jsonl")}
    files["ppo"] = [{"prompt": row["prompt"]} for row in files["sft"]]
    files["eval"] = [{"prompt": row["prompt"]} for row in pairs("valid.jsonl")]
    files["compare"] = [row for path in batches for row in comparisons(path, prompt, tally)]
    write_files(FOLDER, files, tally)


def main() -> None:
    cfg = cli.parse(Config)
    encoding = nets.load(cfg.init, option="--init")[1] if cfg.init else gpt2_encoding()
    if not cfg.source:
        for name, place in (POSTS | BATCHES).items():
            download(f"{URL}/{place}", FOLDER / name, None)
    prepare(Path(cfg.source or FOLDER), lambda text: len(encode_text(encoding, text)), cfg.length)


if __name__ == "__main__":
    sys.argv[0] = "tools.get.tldr"
    cli.run_main(main)
