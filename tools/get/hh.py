"""Anthropic's HH (Bai et al. 2022): dialogues with an assistant, two final answers for each, and a person's choice.

    python -m tools.get.hh                            download the helpful-base set and write its files to out/data/hh
    python -m tools.get.hh --sets harmless-base,…     other sets: helpful-online, helpful-rejection-sampled
    python -m tools.get.hh --source FILE …            read your own .jsonl or .jsonl.gz files
    python -m tools.get.hh --messages                 write conversations, for the model's own chat template

The train files give fine-tuning pairs (the chosen answers), comparisons, and prompts for PPO; the test files, or every
tenth opening question of --source, the prompts to evaluate on. The texts contain offensive language.
"""

import json
import zlib
from collections import Counter
from pathlib import Path

from common import cli
from data.chat import split_dialogue
from data.files import InputError, numbered
from tools.get.download import from_hub, write_files

FOLDER = Path(__file__).resolve().parents[2] / "out/data/hh"
SETS = ("helpful-base", "helpful-online", "helpful-rejection-sampled", "harmless-base")


def fetch(sets: list[str]) -> list[tuple[Path, str]]:
    """Download the train and test files of some of SETS. Returns (file, split) for `prepare`."""
    if unknown := set(sets) - set(SETS):
        raise InputError(f"--sets: there is no {min(unknown)}; give some of {', '.join(SETS)}")
    folder = from_hub("Anthropic/hh-rlhf", *(f"{name}/*.jsonl.gz" for name in sets), kind="dataset")
    splits = {"train": "train", "test": "eval"}
    return [(folder / name / f"{part}.jsonl.gz", split) for name in sets for part, split in splits.items()]


def prepare(sources: list[tuple[Path, str]], messages: bool = False) -> None:
    """Read the (file, split) of `sources`. The split "" sends every tenth opening to "eval", the rest to "train"."""
    tally: Counter[str] = Counter()
    kept: dict[str, list[dict]] = {"train": [], "eval": []}
    for source, split in sources:
        for _, row in numbered(source, {"chosen": str, "rejected": str}):
            pair = split_dialogue(row, messages)
            if isinstance(pair, str):
                tally[f"omitted, {pair}"] += 1
            else:
                tenth = zlib.crc32(pair.pop("opening").encode()) % 10 == 0
                kept[split or ("eval" if tenth else "train")].append(pair)
    if not kept["train"] or not kept["eval"]:
        raise InputError(f"{sources[0][0]}: too few dialogues for a held-out set; give a complete file")
    train, held_out = kept.values()
    files = {"sft": [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in train], "compare": train}
    for name, pairs in (("ppo", train), ("eval", held_out)):  # each different prompt once
        files[name] = [*{json.dumps(pair["prompt"]): {"prompt": pair["prompt"]} for pair in pairs}.values()]
    write_files(FOLDER, files, tally)


def main() -> None:
    parser = cli.Parser(description="Anthropic's HH comparisons")
    parser.add_argument("--source", type=Path, nargs="+", help=".jsonl or .jsonl.gz files with chosen and rejected")
    parser.add_argument("--sets", default=SETS[0], help=f"comma-separated, of {', '.join(SETS)}")
    parser.add_argument("--messages", action="store_true", help="write conversations, lists of role and content")
    options = parser.parse_args()
    sources = [(source, "") for source in options.source or []] or fetch(options.sets.split(","))
    prepare(sources, options.messages)


if __name__ == "__main__":
    cli.run_main(main, "tools.get.hh")
