"""tools/get/imdb.py and the models of experiments/sentiment.py, on a small made-up data set."""

import json

import numpy as np
import pytest

from data import InputError
from experiments import sentiment
from tests.conftest import write
from tools.get import imdb

GOOD, BAD = "a wonderful film with great and moving acting", "an awful film with boring and terrible acting"


def made_up_reviews(n=400):
    rng = np.random.default_rng(0)
    filler = "the of it story plot scene music camera actor night day house town".split()
    for i in range(n):
        words = list(rng.choice(filler, 30)) + (GOOD if i % 2 else BAD).split()
        rng.shuffle(words)
        yield f"Review {i}: " + " ".join(words) + "<br /><br />The end.", i % 2


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(imdb, "FOLDER", tmp_path / "imdb")
    sentiment._weights.cache_clear()
    return tmp_path / "imdb"


def test_splits_are_disjoint_prompts_are_openings_and_the_two_models_are_independent(tmp_path, folder):
    reviews = [{"text": text, "label": label} for text, label in made_up_reviews()]
    imdb.prepare(write(tmp_path / "a.jsonl", reviews))
    sentiment.main()
    rows = {path.stem: [json.loads(line) for line in open(path)] for path in folder.glob("*.jsonl")}
    texts = [row["text"] for row in rows["pretrain"]]
    assert "<br" not in "".join(texts) and len(set(texts)) == len(texts)
    openings = {name: [row["prompt"] for row in rows[name]] for name in ("compare", "ppo", "eval")}
    assert len(openings["compare"]) + len(openings["ppo"]) == len(texts)
    assert not any(text.startswith(f"{prompt} ") for prompt in openings["eval"] if ":" in prompt for text in texts)
    for name in openings:
        assert all(2 <= len(prompt.split()) <= 4 for prompt in openings[name])
    parts = [{row["text"] for row in rows["labelled"] if row["part"] == part} for part in ("labeller", "judge", "eval")]
    assert len(set(texts).union(*parts)) == len(texts) + sum(map(len, parts)) == 400
    assert sentiment.judge("", GOOD) == 1 and sentiment.judge("", BAD) == 0
    assert sentiment.labeller("", GOOD) > 0.6 > 0.4 > sentiment.labeller("", BAD)
    assert not np.array_equal(np.load(folder / "judge.npy"), np.load(folder / "labeller.npy"))


def test_a_judge_without_its_file_says_what_to_run(folder):
    with pytest.raises(InputError, match="run python -m experiments.sentiment first"):
        sentiment.judge("", "text")


def test_labels_are_0_or_1_and_reviews_without_one_are_counted(tmp_path, capsys):
    rows = [{"text": "a", "label": 1}, {"text": "b", "label": -1}, {"text": "c", "label": 0}]
    assert imdb.reviews(write(tmp_path / "a.jsonl", rows)) == [("a", 1), ("c", 0)]
    assert "1 reviews without a label" in capsys.readouterr().out
    with pytest.raises(InputError, match='row 1: "label" is 5'):
        imdb.reviews(write(tmp_path / "a.jsonl", [{"text": "a", "label": 5}]))
