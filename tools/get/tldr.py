"""OpenAI's TL;DR (Stiennon et al. 2020): Reddit posts, their summaries, and people's choices between two summaries.

    python -m tools.get.tldr                      download posts and comparisons (600 MB); write files to out/data/tldr
    python -m tools.get.tldr --source FOLDER          read your own train.jsonl, valid.jsonl and batch….json
    python -m tools.get.tldr --init out/smollm2   measure lengths with that model's tokenizer instead of GPT-2's

A prompt is the subreddit, the title and the post, and ends in "TL;DR:" without a space. A summary begins with a space,
is a complete text and gets EOS. If a prompt is longer than --length tokens, the end of its post is removed, at a line
break if possible; the command prints the number of such posts. It writes posts with their own summaries to fine-tune
on, comparisons of the split `train`, and prompts for PPO. The validation posts give the evaluation prompts.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from data.files import InputError, iterate_jsonl, write_jsonl
from data.tokenizer import encode_text, gpt2_encoding
from tools.get.download import download

URL = "https://openaipublic.blob.core.windows.net/summarize-from-feedback"
FOLDER = Path(__file__).resolve().parents[2] / "out/data/tldr"
POSTS = {name: f"datasets/tldr_3_filtered/{name}" for name in ("train.jsonl", "valid.jsonl")}
BATCHES = {name: f"dataset/comparisons/{name}" for name in (f"batch{i}.json" for i in [*range(3, 21), 22])}
PROMPT = "SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"  # Huang et al. 2024, detail 2


def prompt_of(post: dict, count: Callable[[str], int], length: int, tally: Counter[str]) -> str:
    """Return a post's prompt of at most `length` tokens. Cuts at the last line break that fits, else inside a line."""
    text, cut = post["post"], ""
    make = lambda text: PROMPT.format(subreddit=post["subreddit"], title=post["title"], post=text)  # noqa: E731
    while count(make(text)) > length and "\n" in text:
        text, cut = text[: text.rindex("\n")], "posts cut at a line break"
    if count(make(text)) > length:
        if count(make("")) > length:
            raise InputError(f"--length {length}: a post's title alone is longer; give a larger length")
        fits, too_long, cut = 0, len(text), "posts cut inside a line"
        while too_long - fits > 1:
            middle = (fits + too_long) // 2
            fits, too_long = (middle, too_long) if count(make(text[:middle])) <= length else (fits, middle)
        text = text[:fits]
    tally[cut] += 1
    return make(text)


def completion(text: str) -> str:
    """Return the summary with one space before it and none after it."""
    return f" {text.strip()}"


def comparisons(path: Path, prompt: Callable[[dict], str], tally: Counter[str]) -> Iterator[dict]:
    """Yield the rows of a batch that compare two different summaries of a post in the split `train`."""
    for number, row in enumerate(iterate_jsonl(path, {"info": dict, "summaries": list, "choice": int}), 1):
        try:
            good, bad = (row["summaries"][i]["text"].strip() for i in ((0, 1), (1, 0))[row["choice"]])
        except (LookupError, TypeError, AttributeError):
            raise InputError(f"{path}: row {number}: needs two summaries and a choice of 0 or 1; fix the row") from None
        if "post" not in row["info"]:
            tally["comparisons omitted, not of a Reddit post"] += 1
        elif row.get("split") != "train":
            tally[f"comparisons omitted, of the split {row.get('split')}"] += 1
        elif good == bad or not good or not bad:
            tally["comparisons omitted, of the same summary twice or of none"] += 1
        else:
            yield {"prompt": prompt(row["info"]), "chosen": completion(good), "rejected": completion(bad)}


def prompts(rows: list[dict]) -> list[dict]:
    return [{"prompt": row["prompt"]} for row in rows]


def prepare(source: Path, count: Callable[[str], int], length: int) -> None:
    tally: Counter[str] = Counter()

    def prompt(post: dict) -> str:
        return prompt_of(post, count, length, tally)

    def posts(name: str) -> Iterator[dict]:
        columns = dict.fromkeys(("subreddit", "title", "post", "summary"), str)
        for row in iterate_jsonl(source / name, columns):
            yield {"prompt": prompt(row), "completion": completion(row["summary"])}

    batches = [source / name for name in BATCHES if (source / name).exists()]
    if not batches:
        raise InputError(f"--source {source}: holds no {next(iter(BATCHES))} or other batch; give the complete folder")
    train, held_out = list(posts("train.jsonl")), list(posts("valid.jsonl"))
    compared = [row for path in batches for row in comparisons(path, prompt, tally)]
    files = {"sft": train, "compare": compared, "ppo": prompts(train), "eval": prompts(held_out)}
    for name, rows in files.items():
        print(f"{FOLDER / name}.jsonl: {write_jsonl(FOLDER / f'{name}.jsonl', rows):,} rows")
    for what, n in sorted(tally.items()):
        print(f"{what or 'posts not cut'}: {n:,}")


def main() -> None:
    parser = argparse.ArgumentParser(description="OpenAI's TL;DR posts and comparisons")
    parser.add_argument("--source", type=Path, help="a folder with train.jsonl, valid.jsonl and batch….json")
    parser.add_argument("--init", help="run folder whose tokenizer measures lengths (default: GPT-2's)")
    parser.add_argument("--length", type=int, default=512, help="longest prompt, in tokens (default: 512)")
    options = parser.parse_args()
    try:
        if options.init:
            import common

            encoding = common.load(options.init, option="--init")[1]
        else:
            encoding = gpt2_encoding()
        source = options.source or FOLDER
        if options.source is None:
            FOLDER.mkdir(parents=True, exist_ok=True)
            for name, place in (POSTS | BATCHES).items():
                if not (FOLDER / name).exists():
                    download(f"{URL}/{place}", FOLDER / name, None)
        prepare(source, lambda text: len(encode_text(encoding, text)), options.length)
    except InputError as error:
        print(f"tools.get.tldr: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
