"""Input: this package reads and checks files, turns text into token ids, and builds batches.

    text to pretrain on   .txt (one document), or JSONL with "text" (one document per line)
    fine-tuning           JSONL "prompt", "completion"
    comparisons           JSONL "prompt", "chosen", "rejected"; or "prompt", "ranked" (a list, best first)
    prompts               JSONL "prompt"

Every text is complete and gets EOS by default. The columns "completion_ended", "chosen_ended", "rejected_ended" (true
or false) and "ranked_ended" (a list) mark a sample that the length limit cut. "chosen_ids", "rejected_ids" and
"ranked_ids" hold the ids of sampled answers. The readers ignore other columns. They strip nothing: the prompt or the
completion must contain the space between the two. Special tokens are encoded as special tokens in prompts only.
"""

# ruff: noqa: I001 (several names on a line)
from data.chat import prompt_text
from data.files import (
    InputError, cannot_write, documents, first_row, has_rows, is_verdict, iterate_jsonl, read_jsonl, replacing, suffix,
    write_jsonl,
)  # fmt: skip
from data.rows import (
    Group, Row, comparisons, completions, encode_row, hold_out, hold_out_prompts, keep_short, micro_batches, pad,
    prompt_texts, prompts, prompts_and_held_out, random_windows, shuffled, token_stream, windows,
)  # fmt: skip
from data.tokenizer import (
    EOS_TEXT, SPLIT, encode_prompt, encode_text, encoding_from_state, encoding_state, gpt2_encoding, learn_bpe,
)  # fmt: skip
