"""The shapes that public data sets have: conversations, whole dialogues, parquet. Some go through all stages."""

import json

import pytest

import data
from common import nets, runs
from data import InputError
from tests.conftest import make_gpt, run, write
from tools import label
from tools.get import hh

WORDS = ["fox", "tale", "yes", "no", "me"]
QUESTIONS = [f"tell {a} {b} {c}" for a in WORDS for b in WORDS for c in WORDS]


def said(role, content):
    return {"role": role, "content": content}


def ultrafeedback(i, question):
    """ "prompt" is a text, "chosen" and "rejected" are conversations that begin with it; and there are columns more."""
    good, bad = (said("user", question), said("assistant", "yes.")), (said("user", question), said("assistant", "no."))
    more = {"prompt_id": str(i), "score_chosen": 8.0, "messages": list(good)}
    return {"prompt": question, "chosen": list(good), "rejected": list(bad)} | more


def dialogue(i, question):
    start = f"\n\nHuman: {question}\n\nAssistant: me?\n\nHuman: a tale\n\nAssistant:"
    return {"chosen": f"{start} yes.", "rejected": f"{start} no."}


def repeated(i, question):
    """The prompt of dialogues stands beside them too."""
    return {"prompt": question} | dialogue(i, question)


def implicit(i, question):
    """The prompt is what the two conversations share."""
    before = [said("system", "be me"), said("user", question)]
    return {"chosen": [*before, said("assistant", "yes.")], "rejected": [*before, said("assistant", "no.")]}


def explicit(i, question):
    answers = {name: [said("assistant", text)] for name, text in (("chosen", "yes."), ("rejected", "no."))}
    return {"prompt": [said("user", question)]} | answers


SHAPES = {
    "ultrafeedback": (ultrafeedback, "conversational preferences"),
    "hh": (dialogue, "dialogues as in HH"),
    "hh with a prompt": (repeated, "dialogues as in HH"),
    "implicit": (implicit, "conversational preferences"),
    "explicit": (explicit, "conversational preferences"),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_preference_set_is_named_and_what_is_left_out_is_counted(shape, encoding, tmp_path):
    make, name = SHAPES[shape]
    rows = [make(i, question) for i, question in enumerate(QUESTIONS)]
    rows[3] = json.loads(json.dumps(rows[3]).replace("yes.", ""))  # an empty answer
    rows[5] = json.loads(json.dumps(rows[5]).replace("yes.", "no."))
    heard = []
    groups = data.comparisons(write(tmp_path / "x.jsonl", rows), encoding, encoding.eot_token, heard.append)
    assert len(groups) == 123 and f"{name}, 125 rows" in heard[0]
    assert "1 left out" in heard[0] and "empty" in heard[0]
    assert "same" in heard[0] or "1 left out (pairs of equal texts)" in heard[0]
    winner, loser = (encoding.decode(groups[0].rows[i].tokens) for i in groups[0].pairs[0])
    assert winner.endswith(" yes.<|endoftext|>") and loser.endswith(" no.<|endoftext|>")
    assert QUESTIONS[0] in winner and winner.split(" yes.")[0].endswith("\n\nAssistant:")


def test_parquet_is_read_as_jsonl_is(folders, encoding):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    tmp = folders["tmp"]
    rows = [ultrafeedback(i, question) | {"verdict": None} for i, question in enumerate(QUESTIONS)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp / "x.parquet")
    write(tmp / "x.jsonl", rows)
    for read in (data.comparisons, data.prompts):
        more = (299,) if read is data.comparisons else ()
        assert read(tmp / "x.parquet", encoding, *more) == read(tmp / "x.jsonl", encoding, *more)
    calls = [[{"name": "f", "arguments": {"a": 1}}], [{"name": "g", "arguments": {"b": "c"}}]]
    rows = [{"prompt": "x", "calls": call} for call in calls]  # the table gives each call both arguments
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp / "z.parquet")
    assert data.read_jsonl(tmp / "z.parquet", {"prompt": str}) == rows
    (tmp / "y.parquet").write_bytes(b"PAR1 not")
    with pytest.raises(InputError, match="y.parquet: not a parquet file"):
        data.prompts(tmp / "y.parquet", encoding)


@pytest.mark.parametrize("shape", ["ultrafeedback", pytest.param("hh", marks=pytest.mark.slow)])
def test_a_public_set_in_miniature_goes_through_all_three_stages(folders, encoding, shape, monkeypatch):
    tmp = folders["tmp"]
    policy = make_gpt(vocab_size=encoding.n_vocab, eos=encoding.eot_token, block_size=160)
    nets.save_model(policy, encoding, folders["sft"] / "model.pt")
    make, name = SHAPES[shape]
    rows = [make(i, question) for i, question in enumerate(QUESTIONS)]
    write(tmp / "pairs.jsonl", rows)
    if shape == "hh":
        monkeypatch.setattr(hh, "FOLDER", tmp / "hh")
        hh.prepare([(tmp / "pairs.jsonl", "")], messages=True)
        tuned, prompts = tmp / "hh" / "sft.jsonl", tmp / "hh" / "ppo.jsonl"
    else:
        tuned = write(tmp / "messages.jsonl", [{"messages": row["messages"]} for row in rows])
        prompts = tmp / "messages.jsonl"
    start = ["--init", folders["sft"], "--epochs", 1, "--evals", 1, "--lr", 1e-3]
    for script, options in {
        "sft.py": ["--data", tuned, *start, "--out", "out/sft"],
        "reward.py": ["--data", "pairs.jsonl", "--response_len", 4],
        "ppo.py": ["--data", prompts, "--iterations", 1, "--batch_size", 8, "--minibatch_size", 8, "--response_len", 4]
        + ["--eval_prompts", 4],
    }.items():
        done = run(script, *options, cwd=tmp)
        assert done.returncode == 0, done.stderr
        if script == "reward.py":
            assert f"pairs.jsonl: {name}, 125 rows" in done.stdout
    assert len(runs.read_metrics(tmp / "out" / "ppo")) == 1


@pytest.mark.parametrize("row, words", [
    ({"messages": []}, "a conversation is a list of messages"),
    ({"messages": [{"role": "robot", "content": "x"}]}, 'a message has a "role"'),
    ({"messages": [{"role": "user", "content": 3}]}, 'a message has a "role"'),
    ({"messages": [{"role": "user", "content": "x"}]}, "the last message is not the assistant's"),
])  # fmt: skip
def test_a_damaged_conversation_is_named(encoding, tmp_path, row, words):
    with pytest.raises(InputError, match=f"x.jsonl: row 1: {words}"):
        data.completions(write(tmp_path / "x.jsonl", [row]), encoding, 299)


def test_people_may_compare_answers_to_conversations_and_a_special_token_in_one_stays_text(folders, encoding):
    tmp = folders["tmp"]
    rows = [{"messages": [said("user", question)]} for question in QUESTIONS[:6]]
    rows[2]["messages"][0]["content"] += data.EOS_TEXT
    cfg = label.Config(init=str(folders["sft"]), prompts=str(tmp / "m.jsonl"), response_len=6, device="cpu")
    write(tmp / "m.jsonl", rows)
    prompts, make = label.prepare(cfg)
    questions = [make(prompt) for prompt in prompts]
    assert [question.prompt for question in questions] == [row["messages"] for row in rows]
    row = {"prompt": questions[2].prompt, "ranked": [answer.text for answer in questions[2].answers]}
    (group,) = data.comparisons(write(tmp / "mine.jsonl", [row]), encoding, encoding.eot_token)
    prompt = data.encode_prompt(encoding, questions[2].prompt)
    assert [row.tokens[: row.prompt_len] for row in group.rows] == [prompt, prompt]
    assert encoding.eot_token not in prompt
