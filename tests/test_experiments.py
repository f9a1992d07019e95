"""What the experiments read of a run is what the run printed; what they change in ppo.py is there."""

import ast
import json
import math
import os
import re
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import ppo
import reward
import sft
from common import cli, measure, nets, runs
from data import InputError
from experiments import (
    adaptive,
    atlas,
    atlas_page,
    ensembles,
    fewer,
    harness,
    helpful,
    lora,
    overoptimise,
    person,
    race,
    recipe,
    reviewer,
    reviews,
    rounds,
    sentence,
    texts,
    trust,
)
from experiments.forks import __main__ as forks
from tests import puzzle
from tests.conftest import ROOT, make_gpt, run, write
from tools import evaluate


def test_what_is_measured_of_a_run_is_read_as_it_was_printed(folders, capsys):
    """The closing table, before and after; and the best of four answers is the one with the highest final score."""
    words = [*map(str, (folders["sft"], "--init", folders["sft"], "--reward", folders["reward"]))]
    prompts = str(folders["tmp"] / "prompts.jsonl")
    words += ["--data", prompts, "--eval_data", prompts, "--judge", f"{__file__}:length", "--best_of", "1,4"]
    words += ["--device", "cpu", "--eval_prompts", "12", "--response_len", "8"]
    seen = {}
    with pytest.MonkeyPatch.context() as patch:
        paired, table = measure.paired, evaluate.best_of_table
        patch.setattr(measure, "paired", lambda *a: seen.setdefault("paired", paired(*a)))
        patch.setattr(evaluate, "best_of_table", lambda columns, n: seen.update(columns) or table(columns, n))
        evaluate.evaluate_policy(evaluate.of_its_run(words[0], words), words[0])
    text = capsys.readouterr().out
    rows = harness.closing_table(text)
    judge = f"{__file__}:length"
    for name in (judge, "score", harness.KL, measure.ENDED):
        found = seen["paired"]["table"][name]
        assert rows[name] == tuple(measure.cell(found[side], 12) for side in ("before", "after"))
    best = seen["final score"].argsort(dim=1, stable=True)[:, -1:]
    by_hand = [seen[name].gather(1, best).double().mean().item() for name in (judge, "final score")]
    assert harness.best_of(seen["final score"], seen[judge], 4) == pytest.approx((0.6363, *by_hand), abs=1e-4)


def length(prompt: str, response: str) -> float:
    return len(response) / 10


@pytest.mark.parametrize("what", recipe.VARIANTS)
def test_what_a_variant_changes_of_ppo_is_in_it(what):
    _, options, changes = recipe.VARIANTS[what]
    source = (ROOT / "ppo.py").read_text()
    assert (recipe.changed(source, changes) != source) == bool(changes)
    ast.parse(recipe.changed(source, changes))
    assert all(option[2:] in ppo.Config.__dataclass_fields__ for option in options[::2])


@pytest.mark.parametrize(
    "stage, options",
    [
        *((sft, each.SFT) for each in (helpful, reviews)),
        *((reward, each.REWARD) for each in (fewer, helpful, reviews, sentence)),
        *((ppo, each.TASK + each.PPO) for each in (reviews, sentence)),
        *((ppo, options) for options in (helpful.PPO, adaptive.OPTIONS, lora.OWN_OPTIONS)),
    ],
)
def test_a_stage_has_the_options_that_it_is_given(stage, options):
    cli.parse(stage.Config, [*map(str, options), "--resume"])


def test_the_goal_is_reached_where_the_mean_of_five_iterations_is_high_enough():
    judges = [1.0, 0.0, 0.9, 0.94, 0.96, 0.97, 0.98, 1.0]
    lines = [{"objective/judge": judge} for judge in judges]
    assert race.to_goal(lines) == 7  # 0.9, 0.94, 0.96, 0.97, 0.98 have the mean 0.95
    assert race.to_goal(lines[:6]) is None


def test_the_interval_over_seeds_is_students():
    assert harness.t_interval([1.0, 2.0, 3.0]) == "2.00 [-0.48, 4.48]"  # 2 ± 4.303 / √3
    assert harness.t_interval([1.0, 2.0, 3.0], 1, 0, 4) == "2.0 [0.0, 4.0]"


def test_holms_correction_multiplies_the_smallest_p_value_by_all_and_never_falls():
    assert recipe.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])  # 3 × 0.01, 2 × 0.03, not 1 × 0.04
    assert recipe.holm([0.6, 0.9]) == [1.0, 1.0]


def test_the_sign_flip_test_counts_the_signs_that_are_as_far_from_zero():
    assert recipe.sign_flip_test([1.0, 2.0, 3.0]) == 2 / 8  # all + and all −
    assert recipe.sign_flip_test([1.0, 2.0, -3.0]) == 1.0  # the sum is 0


def test_the_best_policy_weighs_the_starts_answers_by_their_score():
    """Four answers, each π₀'s in a quarter of the cases: π* ∝ exp(score / β), its KL and its means by hand."""
    score, judge = [0.0, 1.0, 2.0, 3.0], [0.1, 0.9, 0.5, 0.2]
    weights = [math.exp(x / 2) for x in score]
    pi = [w / sum(weights) for w in weights]
    by_hand = (
        sum(p * math.log(4 * p) for p in pi),
        sum(map(math.prod, zip(pi, judge))),
        sum(map(math.prod, zip(pi, score))),
    )
    found = harness.tilted(torch.tensor([score], dtype=torch.float64), torch.tensor([judge], dtype=torch.float64), 2.0)
    assert found == pytest.approx((*by_hand, 1 / sum(p * p for p in pi)), abs=1e-9)


def test_the_starts_answers_are_scored_by_every_reward_model_and_drawn_once(folders, tmp_path, monkeypatch):
    for name, source in (("sft", "sft"), ("reward", "reward"), ("again", "reward")):
        shutil.copytree(folders[source], tmp_path / "out" / name)
    prompts = folders["tmp"] / "prompts.jsonl"
    options = ["--data", prompts, "--response_len", 8, "--batch_size", 4, "--judge", f"{__file__}:length"]
    found = harness.start_answers(tmp_path, ["reward", "again"], 2, 3, 0, *options)
    assert found["judge"].shape == (2, 3) and torch.equal(found["reward"], found["again"])
    monkeypatch.setattr(harness.ppo, "answer", None)  # a second call reads the file
    assert torch.equal(harness.start_answers(tmp_path, ["reward", "again"], 2, 3, 0, *options)["judge"], found["judge"])


def test_beta_has_settled_where_the_kl_stays_near_the_target_to_the_end():
    kl = [1.5] * 10 + [6.0] * 30
    lines = [{"objective/kl": x} for x in kl]
    # a mean of ten iterations is at least 4.8 once eight of them are at 6
    assert adaptive.settled(lines) == 18
    assert adaptive.settled([*lines, *lines[:10]]) is None
    assert adaptive.settled(lines[10:]) == 10


def test_the_fit_finds_the_coefficients_that_made_a_curve_and_goes_on_with_it():
    alpha, beta, start = 0.4, 0.07, 0.6
    kl = {n: math.log(n) - (n - 1) / n for n in (1, 2, 4, 8, 16, 32, 64, 256, 1024)}
    judge = {n: start + x**0.5 * (alpha - beta * x**0.5) for n, x in kl.items()}
    known = [judge[n] for n in (1, 2, 4, 8, 16, 32, 64)]
    expected = [alpha, beta, judge[256], judge[1024]]
    for more in ([], [9.0]):  # what n = 128 has is not looked at
        assert overoptimise.fit(np.array([known + more] * 2)) == pytest.approx(np.array([expected] * 2), abs=1e-9)


def test_the_prediction_is_written_from_few_answers_and_must_be_there_before_the_many(tmp_path, monkeypatch, capsys):
    asked, rng = [], torch.Generator().manual_seed(0)

    def answers(seed: int, n: int) -> dict[str, torch.Tensor]:
        asked.append(n)
        return {name: torch.rand(3, n, generator=rng, dtype=torch.float64) for name in ("reward", "judge")}

    for name, few in {"MODELS": {"reward": (1000, 226)}, "SIZES": [1, 2, 4, 8], "FITTED": 4, "PREDICTED": (8,)}.items():
        monkeypatch.setattr(overoptimise, name, few)
    (tmp_path / "results").mkdir()
    monkeypatch.setattr(harness, "__file__", str(tmp_path / "harness.py"))
    monkeypatch.setattr(overoptimise, "PREDICTION", tmp_path / "results" / overoptimise.PREDICTION.name)
    monkeypatch.setattr(overoptimise, "answers", answers)
    monkeypatch.setattr(overoptimise, "draw", lambda *_: None)
    monkeypatch.setattr("sys.argv", ["overoptimise.py", "--seeds", "1,2"])
    with pytest.raises(SystemExit):
        overoptimise.main()
    assert not asked and "write it first, with --predict" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["overoptimise.py", "--seeds", "1,2", "--predict"])
    overoptimise.main()
    assert asked == [4, 4]
    monkeypatch.setattr("sys.argv", ["overoptimise.py", "--seeds", "1,2"])
    overoptimise.main()
    assert asked == [4, 4, 8, 8]
    written = [json.loads(path.read_text()) for path in sorted((tmp_path / "results").iterdir())]
    guessed, measured = (each["found"]["models"]["reward"] for each in written)
    assert written[0]["command"] == "python -m experiments.overoptimise --seeds 1,2 --predict"
    _, low, high = guessed["fit"][2]  # the judge at n = 8
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| 1,000 | 226 | 8 |"))
    assert row.endswith("| hit |" if low <= measured["judge"][3][0] <= high else "| miss |")


def test_the_copy_of_reward_takes_as_many_steps_as_it_is_told(tmp_path):
    target = recipe.write_changed("reward.py", {overoptimise.ONE_EPOCH: "14"}, tmp_path / "new")
    (steps,) = [line for line in target.read_text().splitlines() if line.startswith("    steps = ")]
    assert steps.split("#")[0].strip() == "steps = 14" and target.is_absolute()


def test_the_bootstrap_draws_seeds_and_prompts_again():
    constant = np.full((3, 4, 2), 0.7)
    assert np.allclose(harness.bootstrap(constant, lambda curve: curve), 0.7)
    for shape in ((2, 1, 1), (1, 2, 1)):  # two numbers drawn again: a mean of 0, 0.5 or 1, each end in a quarter
        assert harness.bootstrap(np.array([0.0, 1.0]).reshape(shape), lambda curve: 10 * curve) == [[5, 0, 10]]


def test_the_agreement_is_over_pairs_of_unlike_judge_and_a_tie_of_the_score_is_half():
    judge, score = [[0.0, 1.0, 1.0, 2.0]], [[0.0, 3.0, 1.0, 1.0]]
    # pairs of unlike judge: 01 right, 02 right, 03 right, 13 wrong, 23 a tie; 12 is left out
    found = harness.agreement(torch.tensor(score, dtype=torch.float64), torch.tensor(judge, dtype=torch.float64))
    assert found == pytest.approx(3.5 / 5)


def test_labels_beside_lines_keep_apart():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figure, axis = pyplot.subplots(layout="constrained")
    axis.set_ylim(0, 1)
    harness.label_ends(axis, {"a": (1, 0.50, "C0"), "b": (1, 0.49, "C1"), "c": (1, 0.9, "C2")})
    figure.draw_without_rendering()
    boxes = {text.get_text(): text.get_window_extent() for text in axis.texts}
    assert not boxes["a"].overlaps(boxes["b"]) and boxes["b"].y0 < boxes["a"].y0 < boxes["c"].y0


def test_a_stage_runs_once_and_its_log_belongs_to_one_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    counted = tmp_path / "n.txt"
    script = "import sys\nprint('failing' in sys.argv)\nopen('../n.txt', 'a').write('x')\n"
    (tmp_path / "count.py").write_text(f"{script}assert 'failing' not in sys.argv, 'bad'\n")
    for _ in range(2):
        text = harness.stage(tmp_path / "runs", "first", "count.py", "--seed", 1)
    assert counted.read_text() == "x" and text.splitlines()[1] == "False" and harness.seconds(text) < 60
    with pytest.raises(SystemExit, match="first.log: is of another command"):
        harness.stage(tmp_path / "runs", "first", "count.py", "--seed", 2)
    with pytest.raises(SystemExit, match="AssertionError: bad"):
        harness.stage(tmp_path / "runs", "second", "count.py", "failing")
    assert not (tmp_path / "runs" / "second.log").exists()
    with pytest.raises(SystemExit, match="AssertionError: bad"):  # as a run that was stopped, or met another
        harness.stage(tmp_path / "runs", "second", "count.py", "failing", may_fail=harness.DIVERGED)


def test_the_seconds_of_a_stage_are_its_own_and_those_of_its_pretraining(tmp_path):
    """Not those of a run beside it, which writes into the same folder, nor those of a run that had ended before."""
    began = time.time()
    for name, took in (("pretrain", 19.3), ("sft", 42.1), ("beside", 99.0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"seconds": took}))
    assert harness.run_seconds(tmp_path / "sft", began - 1) == pytest.approx(19.3 + 42.1)
    os.utime(tmp_path / "pretrain" / "config.json", (began - 9, began - 9))
    assert harness.run_seconds(tmp_path / "sft", began - 1) == pytest.approx(42.1)
    (tmp_path / "beside" / "config.json").write_text(json.dumps({"model_type": "gpt2"}))  # TRL's run says no seconds
    for name in ("beside", "none"):
        assert harness.run_seconds(tmp_path / name, began - 5) == pytest.approx(5, abs=1)


def pretend(monkeypatch, tmp_path, kl=lambda words: 2.0) -> list[tuple]:
    """Stages of the forks that run nothing: their commands. The judge of a run is a hundredth of its KL."""
    commands = []

    def stage(folder, name, *words, may_fail=None):
        commands.append((name, *map(str, words)))
        numbers = {forks.KL: kl(commands[-1]), forks.JUDGE: kl(commands[-1]) / 100, "score": 1.0}
        return "".join(f"{row}  0.500 (n 4)  {x:.3f} (n 4)  0.100 (n 4)\n" for row, x in numbers.items()) + "took 9 s\n"

    monkeypatch.setattr(harness, "FOLDER", tmp_path)
    monkeypatch.setattr(harness, "start", lambda seed: tmp_path)
    monkeypatch.setattr(forks, "stage", stage)
    return commands


def option(words: tuple, name: str) -> str:
    return words[words.index(name) + 1] if name in words else ""


def test_a_run_of_a_fork_has_its_own_folder_for_each_rate_and_beta_and_ppo_shares_the_default(monkeypatch, tmp_path):
    commands = pretend(monkeypatch, tmp_path)
    assert forks.run(1, "PPO", [], []) == {"judge": 0.02, "KL": 2.0, "score": 1.0, "seconds": 9.0}
    forks.run(1, "PPO", [], [], 1, 0.05)
    assert commands == [("ppo", "ppo.py", "--seed", "1")] * 2
    forks.run(1, "PPO", [], [], 2, 0.1)
    forks.run(1, "RLOO", ["grpo", "rloo"], [], 1, 0.05)
    assert commands[2][1:] == ("ppo.py", "--seed", "1", "--lr", "0.0008", "--kl_coef", "0.1", *commands[2][-2:])
    assert len({option(words, "--out") for words in commands[1:]}) == 3
    source = (ROOT / "ppo.py").read_text()
    with open(commands[3][1]) as file:
        assert file.read() == forks.patched(source, "grpo", "rloo")


def test_a_forks_beta_is_matched_by_kl_to_ppos_at_each_rate_and_the_highest_judge_comes_first(monkeypatch, tmp_path):
    def kl(words):
        rate = float(option(words, "--lr") or 4e-4) / 4e-4
        return 2.0 * (0.05 / float(option(words, "--kl_coef") or 0.05)) ** 0.5 * (rate if "RLOO" in words[0] else 1)

    commands = pretend(monkeypatch, tmp_path, kl)
    half, same, twice = sorted(forks.choose("RLOO"), key=lambda each: each["rate"])
    assert [each["beta"] for each in (half, same, twice)] == [pytest.approx(x, abs=1e-3) for x in (0.0125, 0.05, 0.2)]
    assert [each["KL"] for each in (half, same, twice)] == pytest.approx([2, 2, 2], rel=0.02)
    assert {option(words, "--seed") for words in commands} == {"10", "11"}
    assert forks.matched(0.05, 2.1, 2.0) == 0.05 and forks.matched(0.05, 90.0, 2.0) == 0.2  # near enough; at most × 4
    judges = [each["judge"] for each in forks.choose("RLOO")]
    assert judges == sorted(judges, reverse=True)


def test_a_diff_of_ones_own_runs_beside_the_default_and_a_changed_one_runs_again(monkeypatch, tmp_path, capsys):
    mine = tmp_path / "mine.diff"
    commands = pretend(monkeypatch, tmp_path, lambda words: 3.0 if "mine" in words[0] else 2.0 + int(words[3]) / 10)
    labels = set()
    for name in ("length_penalty", "clip_higher"):
        mine.write_text((forks.HERE / f"{name}.diff").read_text())
        argv = ["forks", "--diff", str(mine), "--seeds", "1,2", "--kl_coef", "0.1"]
        monkeypatch.setattr("sys.argv", argv)
        forks.main()
        labels |= {words[0] for words in commands if "mine" in words[0]}
    assert len(labels) == 2
    of_mine = [words for words in commands if "mine" in words[0]]
    assert all(option(words, "--kl_coef") == "0.1" for words in of_mine) and len(commands) == 8
    table = capsys.readouterr().out.splitlines()  # header, rule, default, mine
    kl = harness.t_interval([3.0 - 2.1, 3.0 - 2.2])  # paired by seed
    assert f"| {kl} |" in table[3] and table[3].startswith("| mine.diff | 2 of 2 |")
    assert table[2].startswith("| default | 2 of 2 |  |  |  | 0.0")


def test_the_table_of_forks_has_the_rates_and_betas_that_were_chosen(monkeypatch, tmp_path, capsys):
    commands, kept = pretend(monkeypatch, tmp_path), {}
    tried = {"GRPO": [{"rate": 2, "beta": 0.3, "judge": 0.9}, {"rate": 1, "beta": 0.2}]}
    tried |= {"on-policy distillation": [{"rate": 0.5, "beta": None}]}
    (tmp_path / "forks-choice.json").write_text("{}")
    monkeypatch.setattr(forks, "CHOICE", tmp_path / "forks-choice.json")
    monkeypatch.setattr(harness, "read_results", lambda name: tried)
    monkeypatch.setattr(harness, "write_results", lambda name, found: kept.update({name: found}))
    monkeypatch.setattr("sys.argv", ["forks", "--seeds", "1,2"])
    forks.main()
    ran = [(option(words, "--lr"), option(words, "--kl_coef")) for words in commands if words[0] != "sft"]
    assert ran == [("0.0008", "0.3")] * 2 + [("0.0002", "")] * 2 + [("", "")] * 2
    names = ["default", "GRPO, rate × 2, β 0.3", "on-policy distillation, rate × 0.5"]
    assert list(kept["forks"]) == names and [words[:2] for words in commands].count(("sft", "sft.py")) == 2
    assert [line.split(" | ")[0] for line in capsys.readouterr().out.splitlines()[2:]] == [f"| {x}" for x in names]


@pytest.mark.parametrize(
    "words, said",
    [
        (["--diff", "LICENSE"], "LICENSE: does not apply to ppo.py"),
        (["--kl_coef", "0.1"], "--kl_coef: there is no such option"),
        ([], "run `python -m experiments.forks --choose` first"),
    ],
)
def test_forks_that_cannot_run_are_refused_before_anything_runs(monkeypatch, tmp_path, words, said):
    commands = pretend(monkeypatch, tmp_path)
    monkeypatch.setattr(forks, "CHOICE", tmp_path / "none.json")
    monkeypatch.setattr("sys.argv", ["forks", *words])
    monkeypatch.chdir(ROOT)
    with pytest.raises(InputError, match=said):
        forks.main()
    assert commands == []


def test_a_run_that_diverged_is_a_result_where_that_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    said = str(runs.Run.diverged(SimpleNamespace(folder=tmp_path), 3, "objective/kl", math.nan))
    (tmp_path / "diverge.py").write_text(f"raise SystemExit({said!r})\n")
    for _ in range(2):
        text = harness.stage(tmp_path / "runs", "third", "diverge.py", may_fail=harness.DIVERGED)
        assert f"failed: {said}" in text and not harness.closing_table(text)
    with pytest.raises(SystemExit, match="objective/kl is nan"):
        harness.stage(tmp_path / "runs", "fourth", "diverge.py")


QUESTION = (
    "<|im_start|>user\nHow do I start meditating at home?<|im_end|>\n<|im_start|>assistant\n"  # start, medit, home
)
WHOLE = "Meditating begins at home in a quiet room where you close both eyes and breathe slowly."


@pytest.mark.parametrize(
    "response, score",
    [
        (WHOLE, 1.0),
        (WHOLE[:-1], 0.6),  # it does not end
        (WHOLE + " It calms.", 0.8),  # a second sentence
        ("1. " + WHOLE, 0.8),  # a list
        ("I am happy to help you with that question.", 0.4),  # an empty phrase
        ("Start meditating at home.", 0.7),  # the question alone
        (
            "Meditating home room room room room room room.",
            0.7 + 0.3 * 1 / 7 * 3 / 8,
        ),  # one new word of three, of eight
        ("", 0.0),
    ],
)
def test_the_person_wants_one_sentence_that_ends_and_answers(response, score):
    assert person.labeller(QUESTION, response) == pytest.approx(score)


def test_the_log_probability_of_an_answer_is_the_sum_over_its_tokens(gpt, encoding):
    rows = [
        data.encode_row(encoding, gpt.config.eos, "ask me.", text, ended)
        for text, ended in ((" yes", True), (" no no", False))
    ]
    total, n = texts.log_p(gpt, rows, size=1)
    by_hand = []
    for row in rows:
        logp = gpt(torch.tensor([row.tokens])).log_softmax(-1)[0]
        by_hand.append(sum(logp[i - 1, row.tokens[i]].item() for i in range(row.prompt_len, len(row.tokens))))
    assert total.tolist() == pytest.approx(by_hand, abs=1e-4)
    assert n.tolist() == [len(row.tokens) - row.prompt_len for row in rows]
    pairs = [(" yes", True), (" no no", False)]
    assert texts.fluency(gpt, encoding, ["ask me."] * 2, pairs) == pytest.approx(
        sum(by_hand) / sum(n.tolist()), abs=1e-4
    )


@pytest.fixture
def wide(encoding):
    return make_gpt(vocab_size=encoding.n_vocab, eos=encoding.eot_token, block_size=200)


def test_answers_that_change_places_are_as_much_less_about_their_questions(wide, encoding):
    asked, answers = ["tell me a tale?", "yes or no?"], ["a fox.", "no."]
    apart = texts.about_question(wide, encoding, asked, answers)
    assert apart == pytest.approx(-texts.about_question(wide, encoding, asked, answers[::-1]), abs=1e-4)
    assert abs(apart) > 0.01 and texts.about_question(wide, encoding, asked, ["a fox."] * 2) == 0


def test_pairs_of_words_are_counted_among_the_first_of_each_text():
    assert texts.distinct_bigrams(["A b a b", "a b"]) == 2 / 4  # a b, b a
    assert texts.distinct_bigrams(["a " * 12 + "b c d"]) == 1 / 11


def test_ppo_on_its_way_is_the_five_iterations_nearest_in_kl():
    lines = [{"objective/kl": float(i), "objective/judge": i / 10} for i in range(8)]  # means of five: 2, 3, 4, 5
    assert harness.on_its_way(lines, 3.4) == pytest.approx(0.3)
    assert harness.on_its_way(lines, 0.0) == pytest.approx(0.2)


def test_the_critic_learns_the_order_of_words(monkeypatch):
    """Both kinds have the same words; only what stands first differs."""
    for name, value in (("EPOCHS", 12), ("BATCH", 16), ("LR", 3e-3)):
        monkeypatch.setattr(reviewer, name, value)
    pairs = [(f"{a} film {x} {b}", int(a == "good")) for a, b in (("good", "bad"), ("bad", "good")) for x in "abcdefgh"]
    model, encoding = reviewer.fit(pairs)
    assert [int(x > 0) for x in reviewer.score(model, encoding, [text for text, _ in pairs])] == [
        label for _, label in pairs
    ]


@pytest.mark.slow
def test_a_seed_of_the_sentences_is_measured_on_all_sides(wide, encoding, tmp_path, monkeypatch):
    nets.save_model(wide, encoding, tmp_path / "model.pt")
    prompts = [{"prompt": [{"role": "user", "content": f"ask {i}."}]} for i in range(40)]
    monkeypatch.setattr(sentence, "HERE", tmp_path / "here")
    monkeypatch.setattr(sentence.hh, "FOLDER", tmp_path)
    for name in ("ppo", "eval"):
        write(tmp_path / f"{name}.jsonl", prompts)
    small = ["--response_len", 6]
    for name, value in (("N_COMPARE", 20), ("LONGEST", 90), ("BEST_OF", (1, 2))):
        monkeypatch.setattr(sentence, name, value)
    monkeypatch.setattr(sentence, "REWARD", [*sentence.REWARD, *small])
    monkeypatch.setattr(sentence, "TASK", [*sentence.TASK, *small])
    monkeypatch.setattr(sentence, "PPO", "--iterations 5 --eval_prompts 16".split())

    def stage(folder, name, *words):
        folder.mkdir(parents=True, exist_ok=True)
        done = run(*words, "--device", "cpu", cwd=folder)
        assert not done.returncode, done.stderr
        return "took 60 s"

    monkeypatch.setattr(sentence, "stage", stage)
    sentence.write_files(tmp_path)
    found = sentence.run(tmp_path, 0)
    report = json.loads((tmp_path / "here/seed-0/out/ppo/report.json").read_text())["table"]
    for side in ("before", "after"):
        assert found["sides"][side]["the person's score"] == pytest.approx(report[sentence.LABELLER][side][0])
        assert found["sides"][side]["ended by EOS"] == pytest.approx(report[measure.ENDED][side][0])
    assert found["minutes"] == 2 and [row["n"] for row in found["best of n"]] == [1, 2]
    assert "| before | after |" in harness.before_and_after([found, found])[
        0
    ] and "| 2 | 0.19 |" in harness.beside_table([found])


START, FIRST = "out/sft", "out/rounds-1"
ROUNDS = {  # name → who answered each round's prompts that the reward model reads, where PPO begins, its iterations
    "1": ([START], START, 64),
    "the-start-answers-2": ([START] * 2, START, 64),
    "the-start-answers-3": ([START] * 3, START, 64),
    "long-3": ([START] * 3, START, 192),
    "the-policy-answers-2": ([START, FIRST], START, 64),
    "the-policy-answers-3": ([START, FIRST, "out/rounds-the-policy-answers-2"], START, 64),
    "from-the-last-policy-2": ([START, FIRST], FIRST, 64),
    "from-the-last-policy-3": ([START, FIRST, (last := "out/rounds-from-the-last-policy-2")], last, 64),
    "last-labels-alone-2": ([FIRST], FIRST, 64),
    "last-labels-alone-3": ([(last := "out/rounds-last-labels-alone-2")], last, 64),
}


@pytest.fixture
def in_rounds(monkeypatch, tmp_path):
    """The rounds with two labels each, of the prompts 0, 1, 2; then 3, 4, 5; and so on. Results go to tmp_path."""
    asked = [{"prompt": rounds.tales.PROMPT.format(**dict.fromkeys(rounds.tales.SLOTS, i))} for i in range(12)]
    monkeypatch.setattr(rounds.tales, "rows", lambda: {"compare": asked})
    for name, value in (("PROMPTS", 3), ("LABELS", 2), ("FOLDER", tmp_path), ("__file__", f"{tmp_path}/rounds.py")):
        monkeypatch.setattr(rounds, name, value)
    monkeypatch.setattr(harness, "__file__", str(tmp_path / "harness.py"))
    return asked


def test_each_way_of_going_on_has_as_many_labels_a_round_and_the_first_reference(in_rounds, monkeypatch, tmp_path):
    ran = {}

    def stage(folder, name, *words):
        words, out = list(map(str, words)), folder / option(words, "--out")
        assert ran.setdefault(name, words) == words
        out.mkdir(parents=True, exist_ok=True)
        if name.endswith("-asked"):
            prompts = data.read_jsonl(folder / option(words, "--data"), {})
            write(out / "comparisons.jsonl", [row | {"by": option(words, "--init")} for row in prompts])
        row = {"before": [0.5, 0], "after": [0.25, 0], "change": [-0.25, 0.1]}
        table = {name: row for name in (harness.JUDGE, measure.KL, "score")}
        (out / "report.json").write_text(json.dumps({"table": table}))
        write(out / "metrics.jsonl", [{"step": 0, "objective/kl": 0.25}])

    monkeypatch.setattr(rounds, "stage", stage)
    found = rounds.run(1, 3)
    assert {way: len(ends) for way, ends in found.items()} == dict.fromkeys(rounds.WAYS, 3) | {rounds.LONG: 1}
    ppo_runs = {name: words for name, words in ran.items() if words[0] == "ppo.py"}
    assert ppo_runs.keys() == {f"rounds-{name}" for name in ROUNDS}
    for name, (policies, begin, iterations) in ROUNDS.items():
        words, reward_model = ppo_runs[f"rounds-{name}"], ran[f"rounds-{name}-reward"]
        first = int(name[-1]) - 1 if name.startswith("last") else 0  # the first round whose labels count
        wanted = [in_rounds[3 * (first + i) + j] | {"by": policy} for i, policy in enumerate(policies) for j in (0, 1)]
        assert data.read_jsonl(tmp_path / "kl/seed-1" / option(reward_model, "--data"), {}) == wanted
        assert option(words, "--reward") == option(reward_model, "--out") and "--init" not in reward_model
        given = [option(words, each) for each in ("--init", "--ref", "--iterations")]
        assert given == [begin, START, str(iterations)]
    monkeypatch.setattr(rounds, "LABELS", 4)
    with pytest.raises(SystemExit, match="3 labels, not 4"):
        rounds.run(1, 3)


def test_the_judge_by_round_is_a_mean_over_seeds_and_ways_are_compared_by_pairs_of_a_seed(monkeypatch):
    judge = {"the start answers": 0.6, "the policy answers": 0.7, "from the last policy": 0.9, "last labels alone": 0.4}
    end = lambda after: {"before": 0.5, "after": after, "score": 1.0, "kl": 2.0}  # noqa: E731
    runs = [{way: [end(0.55), end(x + noise)] for way, x in judge.items()} for noise in (0.0, 0.03, 0.06)]
    for each, after in zip(runs, (0.8, 0.9, 1.0)):
        each[rounds.LONG] = [end(after)]
    by_way, apart = (table.splitlines()[2:] for table in rounds.tables(runs))
    half = 4.303 * 0.03 / 3**0.5
    assert by_way[2].startswith(
        f"| from the last policy | 0.55 [0.55, 0.55] | 0.93 [{0.93 - half:.2f}, {0.93 + half:.2f}] |"
    )
    assert by_way[4].startswith(f"| {rounds.LONG} |  | 0.90 [")
    assert apart[:2] == [
        "| the policy answers | the start answers | 0.10 [0.10, 0.10] |",
        "| from the last policy | the policy answers | 0.20 [0.20, 0.20] |",
    ]
    assert apart[2] == "| last labels alone | from the last policy | -0.50 [-0.50, -0.50] |"
    half = 4.303 * 0.07 / 3**0.5  # the differences are 0.1, 0.03, −0.04
    assert apart[3] == f"| from the last policy | {rounds.LONG} | 0.03 [{0.03 - half:.2f}, {0.03 + half:.2f}] |"


@pytest.mark.slow
def test_two_rounds_run_as_commands_and_every_run_is_measured_against_the_first_start(
    in_rounds, wide, encoding, tmp_path, monkeypatch
):
    pytest.importorskip("matplotlib")
    folder = tmp_path / "kl" / "seed-3"
    nets.save_model(wide, encoding, folder / "out" / "sft" / "model.pt")
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": f"ask {i}."} for i in range(40)])
    few = "--response_len 6 --batch_size 4 --minibatch_size 4 --eval_prompts 12 --lr 0.01".split()
    few += ["--data", prompts, "--eval_data", prompts, "--judge", harness.JUDGE]
    small = {"reward.py": few[:2], "ppo.py": few}

    def stage(folder, name, *words):
        if words[0] == "sft.py" or (folder / words[-1] / "report.json").exists():
            return
        done = run(*words, *small[words[0]], "--device", "cpu", cwd=folder)
        assert not done.returncode, done.stderr

    monkeypatch.setattr(rounds, "stage", stage)
    two = {way: rounds.WAYS[way] for way in ("the start answers", "from the last policy")}
    for name, value in (("ITERATIONS", 2), ("WAYS", two), ("PAIRS", [[*two]])):
        monkeypatch.setattr(rounds, name, value)
    monkeypatch.setattr("sys.argv", ["rounds", "--seeds", "3", "--rounds", "2"])
    rounds.main()
    written = json.loads((tmp_path / "results" / "rounds.json").read_text())
    reports = {path.parent.name: json.loads(path.read_text()) for path in folder.glob("out/*/report.json")}
    reports = {name: report for name, report in reports.items() if "answers" in report}
    assert len(reports) == 1 + 2 + 1 and (tmp_path / "rounds.svg").exists()
    before = [[answer["before"]["text"] for answer in report["answers"]] for report in reports.values()]
    assert all(texts == before[0] for texts in before)  # the first start's, wherever PPO began
    for way in rounds.WAYS:
        report = reports[f"rounds-{way.replace(' ', '-')}-2"]
        kl = np.mean([answer["after"][measure.KL] for answer in report["answers"]])
        assert written["found"]["3"][way][1]["kl"] == pytest.approx(kl)


def test_a_puzzle_is_a_copy_with_one_change_that_it_tells_only_when_asked(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    said = []
    for words in ([], ["--hint"], ["--reveal"]):
        monkeypatch.setattr("sys.argv", ["puzzle", "17", *words])
        puzzle.main()
        said.append(capsys.readouterr().out)
    copied = {str(path.relative_to("out/puzzle-17")): path.read_text() for path in Path("out/puzzle-17").rglob("*.py")}
    (changed,) = [name for name, text in copied.items() if text != (ROOT / name).read_text()]
    ast.parse(copied[changed])
    assert "python out/puzzle-17/ppo.py --out out/puzzled-17" in said[0]
    assert changed not in said[0].replace("puzzle-17/ppo.py", "").replace("python ppo.py", "")
    assert changed in said[1] and f"`{changed}`" in said[2] and "```diff\n- " in said[2]
    names = [puzzle.form_of(i) for i in range(len(atlas.shown_forms()))]
    assert sorted(names) == sorted(atlas.shown_forms()) and all(map(puzzle.hint, names))


def test_a_form_stands_under_what_is_seen_of_it_or_among_the_silent_or_the_free(tmp_path, monkeypatch):
    def ran(judge=0.96, nats=3.0, share=0.99, **seen):
        numbers = {"KL": (0, -0.1, 4), "ratio": (1, 1, 1), "approxkl": (0, 0, 0), "score": (0, 0, 1)} | seen
        run = {name: dict(zip(("first", "lowest", "highest"), x)) | {"last": x[2]} for name, x in numbers.items()}
        run |= {name: {"last": 0.99, "lowest": 0.9} for name in ("explained variance", "entropy", "length", "ended")}
        end = {"judge": judge, "score": 1.0, "KL": nats}
        return {"options": {}, "30": run | {"end": end}, "letters": {"share": share, "TV": 0.1}}

    stops, before, below = [*atlas_page.SYMPTOMS][:3]
    target = {"options": {"kl_target": 2.0}}
    cases = [
        (ran() | {"letters": {"failed": "RuntimeError: an index"}}, stops),
        (ran(KL=(6, 6, 9)), before),
        (ran(KL=(0, -2, 4)), below),
        (ran(KL=(0, 0, 40)), "KL leaps"),
        (ran(KL=(0, 0, 5)) | target, atlas_page.MISSED),
        (ran(judge=0.8), atlas_page.SILENT),
        (ran(nats=5.0), atlas_page.SILENT),  # 2 nats for the same score, at β = 0.05
        (ran(share=0.96), atlas_page.SILENT),
        (ran(judge=0.95, nats=3.5, share=0.98), atlas_page.FREE),
        (ran(), atlas_page.INERT),
    ]
    found = {"right": ran(), "right-target": ran() | target} | dict(zip(atlas.shown_forms(), [run for run, _ in cases]))
    monkeypatch.setattr(atlas_page, "read_results", lambda name: found)
    monkeypatch.setattr(atlas_page, "draw", lambda *given: None)
    atlas_page.write(atlas.shown_forms(), atlas.NEEDS, atlas.WHY, tmp_path / "atlas.md")
    text = (tmp_path / "atlas.md").read_text()
    places = {}
    for heading, part in re.findall(r"^## (.+?)\n([\s\S]*?)(?=^## |\Z)", text, re.MULTILINE):
        places |= {name: heading for name in re.findall(r"^\*\*(\d+\w)\*\* breaks", part, re.MULTILINE)}
    assert places == dict(zip(atlas.shown_forms(), [heading for _, heading in cases]))
    assert re.findall(r"^\| (?:of|show|are|cost|change) .* \| (\d*) ?\|$", text, re.MULTILINE) == ["", *"53110"]


@pytest.mark.parametrize(
    "sentence, n, what",
    [
        ("trust this model to about 2.5 nats: `--kl_target` at most that", 32, "right"),
        ("trust this model to about 0.6 nats: `--kl_target` at most that", 4, "too early"),
        ("no turn up to 4.5 nats: `--kl_target` at most that", 256, "too late"),
        ("do not trust this model: the second sees no rise", 1, "too early"),
    ],
)
def test_a_predicted_turn_is_right_within_one_doubling_of_n(sentence, n, what):
    """The judge turns at n = 16: log 16 − 15 / 16 = 1.835 nats."""
    found = trust.turns(f"$ python x\nthe judge turns at 1.8 nats\n\n{sentence}\ntook 5 s\n")
    assert found == {"predicted": n, "true": 16} and trust.verdict(found) == what


def test_a_quarter_of_the_comparisons_is_turned_round_whole(tmp_path):
    rows = [{"prompt": f"p{i // 4}", "chosen": f"a{i}", "rejected": f"b{i}", "p_chosen": 0.9} for i in range(400)]
    rows = [row | {"chosen_ids": [i], "rejected_ids": [-i]} for i, row in enumerate(rows)]
    (tmp_path / "out" / "reward").mkdir(parents=True)
    write(tmp_path / "out" / "reward" / "comparisons.jsonl", rows)
    found = data.read_jsonl(tmp_path / ensembles.comparisons(tmp_path, 0.25), {})
    assert len(found) == 4 * ensembles.PROMPTS
    turned = [row for row, was in zip(found, rows) if row != was]
    assert len(turned) == len(found) / 4
    for row in turned:
        i = int(row["chosen"][1:])
        same = {"prompt": f"p{i // 4}", "chosen": f"b{i}", "rejected": f"a{i}", "p_chosen": 0.1}
        assert row == same | {"chosen_ids": [-i], "rejected_ids": [i]}
