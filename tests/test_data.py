"""data/: what is read, what is refused, the tokenizer, the batches."""

import hashlib
import json

import numpy as np
import pytest
import tiktoken

import data
from common import compare
from data import InputError, tales
from data.label import Answer, preference
from data.tokenizer import with_plain_tokens
from tests.conftest import make_gpt, write

ALPHABETS = [
    "plain text",
    "naïve café",
    "Привет, мир",
    "日本語のテスト",
    "🙂 emoji\n\ttabs  two",
    "a" * 50,
    "don't 123 !?",
]


def test_bpe_gives_back_every_string_it_never_saw(encoding):
    for text in ALPHABETS:
        assert encoding.decode(encoding.encode_ordinary(text)) == text


def test_bpe_merges_the_commonest_pair_first_and_counts_bytes():
    encoding = data.learn_bpe(["ababab xyxyxy xyxyxy"], 259)
    merges = sorted((rank, token) for token, rank in encoding._mergeable_ranks.items() if rank > 255)
    assert merges == [(256, b"xy"), (257, b" xy")] or merges[0] == (256, b"xy")
    assert encoding.n_vocab == 259 and encoding.eot_token == 258


def test_bpe_is_the_same_every_time_and_stops_where_nothing_repeats():
    texts = [row["text"] for row in tales.rows()["pretrain"][:300]]
    first, second = data.learn_bpe(texts, 400), data.learn_bpe(texts, 400)
    assert first._mergeable_ranks == second._mergeable_ranks and first.n_vocab == 400
    assert data.learn_bpe(["abc"], 1000).n_vocab == 257


def test_the_name_of_a_special_token_is_that_token_in_prompts_only(encoding):
    """In a conversation it is text, in whatever message; a plain token is one token everywhere."""
    eot, text = encoding.eot_token, "ask <|endoftext|> me"
    assert eot in data.encode_prompt(encoding, text) and eot not in data.encode_text(encoding, text)
    ids = data.encode_prompt(encoding, [{"role": "user", "content": text}])
    assert eot not in ids and encoding.decode(ids) == f"\n\nHuman: {text}\n\nAssistant:"
    encoding = with_plain_tokens(data.encoding_from_state(data.encoding_state(encoding)), [data.EOS_TEXT])
    assert eot in data.encode_text(encoding, text)
    assert eot in data.encode_prompt(encoding, [{"role": "user", "content": text}])


def test_an_encoding_survives_its_checkpoint_form(encoding):
    again = data.encoding_from_state(json.loads(json.dumps(data.encoding_state(encoding))))
    assert all(again.encode_ordinary(t) == encoding.encode_ordinary(t) for t in ALPHABETS)


def test_a_complete_text_gets_eos_and_a_cut_one_does_not(tmp_path, encoding):
    rows = [{"prompt": "ask", "completion": " yes"}, {"prompt": "ask", "completion": " yes", "completion_ended": False}]
    whole, cut = data.completions(write(tmp_path / "a.jsonl", rows), encoding, encoding.eot_token)
    assert whole.tokens == cut.tokens + [encoding.eot_token]
    assert whole.prompt_len == cut.prompt_len == len(encoding.encode_ordinary("ask"))


def test_an_empty_prompt_gets_eos_as_its_first_token(encoding):
    row = data.encode_row(encoding, 7, "", "yes")
    assert row.tokens[0] == 7 and row.prompt_len == 1


def test_pair_rows_of_one_prompt_share_its_responses(tmp_path, encoding):
    rows = [
        {"prompt": "p", "chosen": "a", "rejected": "b", "p_chosen": 0.9},
        {"prompt": "p", "chosen": "c", "rejected": "a", "p_chosen": 0.2},
        {"prompt": "q", "chosen": "a", "rejected": "b", "p_chosen": 0.5},
    ]
    first, second = data.comparisons(write(tmp_path / "c.jsonl", rows), encoding, 0)
    assert len(first.rows) == 3 and first.pairs == [(0, 1), (2, 0)] and first.certainty == [0.9, 0.8]
    assert len(second.rows) == 2 and second.pairs == [(0, 1)]


def test_a_ranked_list_is_all_its_pairs(tmp_path, encoding):
    (group,) = data.comparisons(write(tmp_path / "r.jsonl", [{"prompt": "p", "ranked": ["a", "b", "c"]}]), encoding, 0)
    assert group.pairs == [(0, 1), (0, 2), (1, 2)] and len(group.rows) == 3


def test_a_judge_on_any_scale_can_be_the_simulated_person():
    answers = [[("aaa", True), ("a", True)]] * 50
    judge = lambda rows: [-1000 * len(row["response"]) for row in rows]  # noqa: E731
    rows = compare.simulate([{"prompt": "p"}] * 50, ["p"] * 50, answers, judge, 0.1, seed=0)
    assert all(row["chosen"] == "a" and row["p_chosen"] == 1 for row in rows)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "no rows"),
        (b"\n\n", "no rows"),
        (b'{"prompt": "a"}\n{"prompt": \n', ":2: not JSON"),
        (b'{"prompt": "a"}\n[1]\n', ":2: not a JSON object"),
        (b'{"prompt": "a"}\n{"text": "b"}\n', ':2: no column "prompt"'),
        (b'{"prompt": 3}\n', ':1: "prompt" is not a text'),
        (b'{"prompt": "a"}\n\xff\xfe\n', ":2: not UTF-8"),
        (b'{"prompt": "\\ud800"}\n', ":1: not JSON"),
        (b'{"prompt": [{"role": [], "content": "a"}]}\n', ': row 1: a message has a "role"'),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path, encoding, content, message):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"bad\.jsonl") as error:
        data.prompts(path, encoding)
    assert message in str(error.value)


def test_a_byte_order_mark_is_not_part_of_the_text(tmp_path, encoding):
    path = tmp_path / "bom.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "ask"}\n')
    assert data.prompts(path, encoding) == [encoding.encode_ordinary("ask")]


def test_every_epoch_takes_every_row_once_and_in_another_order():
    items = list(range(64))
    for lengths in (None, [i % 7 for i in items]):
        epochs = [[x for s in range(8) for x in data.shuffled(items, 8, 3, lengths, 8 * e + s)] for e in range(2)]
        assert all(sorted(epoch) == items for epoch in epochs) and epochs[0] != epochs[1]
        assert data.shuffled(items, 8, 3, lengths, 5) == data.shuffled(items, 8, 3, lengths, 5)
        assert data.shuffled(items, 8, 3, lengths, 5) != data.shuffled(items, 8, 4, lengths, 5)
    assert sorted(data.shuffled([1, 2, 3], 8, 0, None, 5)) == [1, 2, 3]


def test_length_batches_pad_less():
    lengths = np.random.default_rng(0).integers(1, 100, 1024).tolist()

    def padding(by):
        batches = [data.shuffled(lengths, 16, 0, by, step) for step in range(64)]
        return sum(16 * max(batch) - sum(batch) for batch in batches)

    assert padding(lengths) < 0.2 * padding(None)


def is_held_out(text):
    digest = hashlib.sha256(repr(("hold out", text)).encode()).digest()
    return int.from_bytes(digest[:8], "little") // 2 < 2**63 / 10, digest[7::-1]


def test_every_stage_holds_out_the_same_prompts_whatever_its_options(tmp_path, encoding, capsys):
    """A tenth by a hash of the text; the lowest are evaluated, and no held-out prompt is trained on."""
    texts, eos, path = [f"ask {i}" for i in range(600)] + ["", "ask 7"], encoding.eot_token, tmp_path / "x.jsonl"
    more = {"completion": " a", "chosen": " a", "rejected": " b"}

    def found(texts, most, room=40):
        """Per stage, the texts that are trained on, and those that are evaluated."""
        write(path, [{"prompt": text} | more for text in texts])
        rows, groups = data.completions(path, encoding, eos), data.comparisons(path, encoding, eos)
        pairs = [data.hold_out(items, encoding, most)[::-1] for items in (rows, groups)]
        pairs.append(data.prompts_and_held_out(str(path), "", encoding, room, most))
        for trained, held in pairs:
            yield [[encoding.decode(ids_of(item)).removeprefix(data.EOS_TEXT) for item in x] for x in (trained, held)]

    def ids_of(item):
        if isinstance(item, data.Prompt):
            return item.ids
        row = item.rows[0] if isinstance(item, data.Group) else item
        return row.tokens[: row.prompt_len]

    lowest = sorted((text for text in {*texts} if is_held_out(text)[0]), key=lambda text: is_held_out(text)[1])
    assert 40 < len(lowest) < 80
    for case, most, room in ((texts, 512, 40), (texts, 5, 40), ([*texts, "one more"], 5, 41)):
        for trained, held in found(case, most, room):
            assert sorted({*trained}) == sorted({*case} - {*lowest})
            assert {*held} == {*lowest[:most]}
        assert len(held) == len({*held})  # ppo.py: once each
        left = len(lowest) - most
        assert capsys.readouterr().out.count(f"the other {left} are left out") == (3 if left > 0 else 0)
    few = [text for text in texts if not is_held_out(text)[0]][:3]
    for trained, held in found(few, 512):
        assert held == [min(few, key=lambda text: is_held_out(text)[1])] and sorted(trained + held) == sorted(few)
    with pytest.raises(InputError, match="--data: 1 different prompts are too few to hold some out .*; give more"):
        list(found(["a", "a"], 512))


def test_held_out_prompts_of_a_file_of_their_own_count_once_and_those_trained_on_are_said(tmp_path, encoding):
    path = write(tmp_path / "x.jsonl", [{"prompt": f"ask {i}"} for i in range(9)])
    other = write(tmp_path / "y.jsonl", [{"prompt": f"ask {i}"} for i in (20, 3, 20, 21, 4, 4)])
    said = []
    rest, held_out = data.prompts_and_held_out(str(path), str(other), encoding, 40, 512, said.append)
    assert [encoding.decode(prompt.ids) for prompt in held_out] == ["ask 20", "ask 3", "ask 21", "ask 4"]
    assert len(rest) == 9 and said == [f"2 prompts of {other} are in {path} too: they are trained on and evaluated"]
    _, two = data.prompts_and_held_out(str(path), str(other), encoding, 40, 2, said.append)
    order = sorted(held_out, key=lambda prompt: is_held_out(encoding.decode(prompt.ids))[1])
    assert len(two) == 2 and all(prompt in order[:2] for prompt in two)


def test_token_stream_is_the_documents_with_eos_behind_each(tmp_path, encoding):
    path = write(tmp_path / "t.jsonl", [{"text": "ask me."}, {"text": "yes"}])
    stream = data.token_stream(path, encoding, encoding.eot_token, tmp_path / "ids")
    a, b = encoding.encode_ordinary("ask me."), encoding.encode_ordinary("yes")
    assert stream.tolist() == a + [encoding.eot_token] + b + [encoding.eot_token]
    (tmp_path / "plain.txt").write_text("ask me.\nyes\n" * 3)
    stream = data.token_stream(tmp_path / "plain.txt", encoding, encoding.eot_token, tmp_path / "ids2")
    assert stream.tolist() == encoding.encode_ordinary("ask me.\nyes\n" * 3) + [encoding.eot_token]
    (tmp_path / "long.txt").write_text("ask me.\nyes\n" * 100_000)
    assert [len(text) for text in data.documents(tmp_path / "long.txt")] == [2**20 + 4, 1_200_000 - 2**20 - 4]
    stream = data.token_stream(tmp_path / "long.txt", encoding, encoding.eot_token, tmp_path / "ids3")
    assert stream.tolist().count(encoding.eot_token) == 1 and stream[-1] == encoding.eot_token


def test_sampled_ids_are_trained_on_as_they_were_sampled(tmp_path, encoding):
    """Other ids than those of encoding " yes" decode to it as well; PPO scores what was sampled, and so must this."""
    letters = [encoding.encode_single_token(byte) for byte in (b" ", b"y", b"e", b"s")]
    assert encoding.encode_ordinary(" yes") != letters
    answers = [Answer(" yes", True, letters), Answer(" no", False, encoding.encode_ordinary(" no"))]
    judge = lambda rows: [len(row["response"]) for row in rows]  # noqa: E731
    rows = compare.simulate([{"prompt": "ask"}], ["ask"], [answers], judge, 0.001, seed=0)
    (group,) = data.comparisons(write(tmp_path / "c.jsonl", rows), encoding, 7)
    start = encoding.encode_ordinary("ask")
    assert [row.tokens for row in group.rows] == [start + letters + [7], start + encoding.encode_ordinary(" no")]
    ranked = {"prompt": "ask"} | preference([*answers, Answer(" me", True, [5])])  # [5] is not " me"
    (group,) = data.comparisons(write(tmp_path / "r.jsonl", [ranked]), encoding, 7)
    assert group.rows[0].tokens == start + letters + [7]
    assert group.rows[2].tokens == start + encoding.encode_ordinary(" me") + [7]  # a text that was edited counts
    rows[0]["chosen_ids"] = [10**6, -1]  # of another vocabulary
    (group,) = data.comparisons(write(tmp_path / "o.jsonl", rows), encoding, 7)
    assert group.rows[0].tokens == start + encoding.encode_ordinary(" yes") + [7]


def test_an_answer_keeps_the_end_token_that_was_sampled_where_a_model_has_two(tmp_path, encoding):
    """What reward.py reads of its own samples are the very tokens, and older files without an end get `eos`."""
    n, special = encoding.n_vocab - 1, {"<e>": encoding.n_vocab - 1, "<f>": encoding.n_vocab}
    both = tiktoken.Encoding("2", pat_str=data.SPLIT, mergeable_ranks=encoding._mergeable_ranks, special_tokens=special)
    model = make_gpt(vocab_size=n + 2, eos=n, stops=(n + 1,))
    prompts = [f"ask {i % 7}" for i in range(60)]
    sampled = compare.sample_responses(model, both, list(map(both.encode_ordinary, prompts)), 4, 40, 1.0, seed=0)
    answers = [answer for four in sampled for answer in four]
    ends = [answer.ids[-1] for answer in answers if answer.ended]
    assert min(ends.count(n), ends.count(n + 1)) > 9 and len(ends) < len(answers)
    assert all(answer.ids[-1] < n for answer in answers if not answer.ended)
    assert not any("<e>" in answer.text or "<f>" in answer.text for answer in answers)
    rows = [{"prompt": prompt} | preference(four) for prompt, four in zip(prompts, sampled)]
    groups = data.comparisons(write(tmp_path / "r.jsonl", rows), both, n)
    for prompt, four, group in zip(prompts, sampled, groups):
        start = both.encode_ordinary(prompt)
        assert {tuple(row.tokens) for row in group.rows} == {(*start, *answer.ids) for answer in four}
    row = data.encode_row(both, n, "ask", "yes", True, both.encode_ordinary("yes"))
    assert row.tokens[-1] == n
    row = data.encode_row(both, n, "ask", "no", True, [*both.encode_ordinary("yes"), n + 1])  # was edited
    assert row.tokens == both.encode_ordinary("ask") + both.encode_ordinary("no") + [n]
    row = data.encode_row(both, n, "ask", "", True, [n + 1])
    assert row.tokens == [*both.encode_ordinary("ask"), n + 1]
    assert data.encode_row(both, n, "ask", "yes", False, [*both.encode_ordinary("yes"), n + 1]).tokens[-1] < n


def test_a_row_without_anything_to_learn_is_refused_with_its_number(tmp_path, encoding):
    rows = [{"prompt": "a", "completion": ""}, {"prompt": "a", "completion": "", "completion_ended": False}]
    assert len(data.completions(write(tmp_path / "c.jsonl", rows[:1]), encoding, 7)) == 1  # its EOS
    with pytest.raises(InputError, match="row 2: .*nothing|row 2: .*no end to learn"):
        data.completions(write(tmp_path / "d.jsonl", rows), encoding, 7)


def test_every_window_of_a_stream_is_drawn_the_last_one_too():
    stream = np.arange(10)
    starts = {row.tokens[0] for step in range(50) for row in data.random_windows(stream, 4, 8, 0, step)}
    assert starts == set(range(7))
