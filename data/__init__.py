"""What comes in: files are read and checked here, turned into token ids, and batched.

    text to pretrain on   .txt (one document), or JSONL with "text" (a document a line)
    fine-tuning           JSONL "prompt", "completion"
    comparisons           JSONL "prompt", "chosen", "rejected"; or "prompt", "ranked" (a list, best first)
    prompts               JSONL "prompt"

A text is complete and gets EOS, unless the row says otherwise: "completion_ended", "chosen_ended", "rejected_ended"
(true or false) or "ranked_ended" (a list) mark a sample that the length limit cut. Further columns are ignored.
Nothing is stripped: the space between a prompt and its completion is part of one of the two. Special tokens count as
such in prompts alone.
"""

from data.batches import (
    Group,
    Row,
    by_length,
    comparisons,
    completions,
    encode_row,
    fit,
    hold_out,
    micro_batches,
    pad,
    prompts,
    random_windows,
    select,
    shuffled,
    token_stream,
    windows,
)
from data.files import (
    InputError,
    documents,
    download,
    download_from_hub,
    first_row,
    iterate_jsonl,
    read_jsonl,
    suffix,
    write_jsonl,
)
from data.tokenizer import (
    EOS_TEXT,
    SPLIT,
    encode_prompt,
    encoding_from_state,
    encoding_state,
    gpt2_encoding,
    learn_bpe,
)
