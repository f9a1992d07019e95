"""data/tales.py: the world and its judge."""

import statistics
from pathlib import Path

import pytest

from data import tales

PROMPT = "Tell me about a shy owl who lost a red key near the lake."
STORY = [
    "Once a shy owl lived near the lake.",
    "One day the owl lost a red key near the lake.",
    "It asked a bee for help.",
    "Then the owl found the key.",
    "The owl was happy again.",
]


@pytest.fixture(scope="module")
def rows():
    return tales.rows()


@pytest.mark.parametrize(
    "what, change, score",
    [
        ("all that was asked for", {}, 1.0),
        ("another animal", {1: "One day the dog lost a red key near the lake."}, 0.75),
        ("another thing", {3: "Then the owl found the sword."}, 0.75),
        ("another place", {0: "Once a shy owl lived near the castle."}, 0.75),
        ("a sad end", {4: "The owl cried all night."}, 0.75),
        ("a loss before a happy end", {3: "But the key was never found."}, 0.75),
        ("a repeated sentence", {2: "One day the owl lost a red key near the lake."}, 0.5),
        ("no proper end", {4: "The owl walked all day."}, 0.375),
        ("a sentence that breaks off", {4: "The owl was"}, 0.75 * 0.8 * 0.5),
        ("a sentence outside the grammar", {2: "It asked help for a bee."}, 0.8),
    ],
)
def test_the_judge_counts(what, change, score):
    story = " ".join(change.get(i, sentence) for i, sentence in enumerate(STORY))
    assert tales.judge(PROMPT, " " + story) == pytest.approx(score)


def test_nothing_and_noise_are_worth_nothing():
    assert tales.judge(PROMPT, "") == 0 and tales.judge(PROMPT, " owl key lake happy") == 0
    assert tales.judge("What is an owl?", " ".join(STORY)) == 0


def test_every_sentence_of_the_corpus_is_grammatical_but_for_those_that_break_off(rows):
    for row in rows["sft"][:2000]:
        whole = [s for s in tales.sentences(row["completion"]) if s.endswith(".")]
        assert all(tales.GRAMMAR.fullmatch(s) for s in whole), row


def test_the_corpus_is_uneven_and_only_sometimes_perfect(rows):
    scores = [tales.judge(row["prompt"], row["completion"]) for row in rows["sft"]]
    assert 0.5 < statistics.mean(scores) < 0.75
    assert 0.1 < sum(s == 1 for s in scores) / len(scores) < 0.4


def test_training_comparison_ppo_and_evaluation_prompts_are_disjoint(rows):
    files = {name: {r["prompt"] for r in content} for name, content in rows.items() if name != "pretrain"}
    names = list(files)
    assert not any(files[a] & files[b] for i, a in enumerate(names) for b in names[i + 1 :])
    asked = {r["text"].split(".")[0] + "." for r in rows["pretrain"] if r["text"].startswith("Tell")}
    assert asked <= files["sft"] and len(files["eval"]) == 512


def test_files_that_another_version_wrote_are_written_anew(tmp_path, monkeypatch, rows):
    monkeypatch.setattr(tales, "FOLDER", tmp_path / "tales")
    monkeypatch.setattr(tales, "rows", lambda: rows)
    first = Path(tales.path("eval"))
    content = first.read_text()
    first.write_text("mine\n")
    assert Path(tales.path("eval")).read_text() == "mine\n"  # this version's, so it is left alone
    (tmp_path / "tales" / "version").write_text("older")
    assert Path(tales.path("eval")).read_text() == content
    (tmp_path / "tales" / "version").unlink()  # as before there was such a file
    first.write_text("old\n")
    assert Path(tales.path("eval")).read_text() == content
