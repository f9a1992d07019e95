"""Input: this package reads and checks files, turns text into token ids, and builds batches.

README.md has the formats. The readers ignore other columns and strip nothing: the space between a prompt and its answer
is the file's to write. Every text is complete and gets EOS unless a column "…_ended" says that a limit cut it.
"""

# ruff: noqa: I001 (several names on a line)
from data.batches import (
    Group, Prompt, Row, hold_out, keep_short, micro_batches, pad, random_windows, shuffled, token_stream, windows,
)  # fmt: skip
from data.chat import prompt_text
from data.files import InputError, documents, first_row, has_rows, read_jsonl, write_jsonl
from data.rows import (
    comparisons, completions, encode_row, prompt_rows, prompt_texts, prompts, prompts_and_held_out, read_prompts,
)  # fmt: skip
from data.tokenizer import (
    EOS_TEXT, SPLIT, encode_prompt, encode_text, encoding_from_state, encoding_state, gpt2_encoding, learn_bpe,
    token_text,
)  # fmt: skip
