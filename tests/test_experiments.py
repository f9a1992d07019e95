"""What the experiments read of a run is what the run printed; what they change in ppo.py is there."""

import ast
import json
import math
import os
import shutil
import time
from types import SimpleNamespace

import pytest
import torch

import data
import ppo
import reward
import sft
from common import cli, measure, nets, runs
from experiments import adaptive, critic, harness, helpful, overoptimise, person, race, recipe, reviews, sentence, texts
from experiments.forks import __main__ as forks
from tests.conftest import ROOT, make_gpt, run, write
from tools import evaluate


def test_what_is_measured_of_a_run_is_read_as_it_was_printed(folders, capsys):
    """The closing table, before and after, and the table of best of n."""
    words = [*map(str, (folders["sft"], "--init", folders["sft"], "--reward", folders["reward"]))]
    prompts = str(folders["tmp"] / "prompts.jsonl")
    words += ["--data", prompts, "--eval_data", prompts, "--judge", f"{__file__}:length", "--best_of", "1,4"]
    words += ["--device", "cpu", "--eval_prompts", "12", "--response_len", "8"]
    cfg, folder = cli.parse(evaluate.Config, words, positional="DIR")
    seen = {}
    with pytest.MonkeyPatch.context() as patch:
        paired, table = measure.paired, evaluate.best_of_table
        patch.setattr(measure, "paired", lambda *a: seen.setdefault("paired", paired(*a)))
        patch.setattr(evaluate, "best_of_table", lambda columns, n: seen.update(columns) or table(columns, n))
        evaluate.evaluate_policy(evaluate.of_its_run(cfg, folder), folder)
    text = capsys.readouterr().out
    rows = harness.closing_table(text)
    judge = f"{__file__}:length"
    for name in (judge, "score", harness.KL, measure.ENDED):
        found = seen["paired"]["table"][name]
        assert rows[name] == tuple(measure.cell(found[side], 12) for side in ("before", "after"))
    one, four = harness.best_of_n(text)
    best = seen["final score"].argsort(dim=1, stable=True)[:, -1:]
    for row, name in ((one.judge, judge), (one.score, "score")):
        assert row == pytest.approx(seen[name].double().mean().item(), abs=6e-4)
    for row, name in ((four.judge, judge), (four.score, "score")):
        assert row == pytest.approx(seen[name].gather(1, best).double().mean().item(), abs=6e-4)
    assert [(row.n, row.kl) for row in (one, four)] == [(1, 0), (4, pytest.approx(0.6363, abs=1e-4))]  # log 4 − 3 / 4


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
        *((reward, each.REWARD) for each in (helpful, reviews, sentence)),
        *((ppo, each.TASK + each.PPO) for each in (reviews, sentence)),
        *((ppo, options) for options in (helpful.PPO, adaptive.OPTIONS)),
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


@pytest.mark.parametrize("logarithm", [False, True])
def test_the_fit_finds_the_coefficients_that_made_a_curve(logarithm):
    alpha, beta, start = 0.4, 0.07, 0.6
    d = [0.5, 1.0, 2.0, 3.5]
    risen = [x * (alpha - beta * (math.log(x) if logarithm else x)) for x in d]
    curve = [(0.0, start, 0.0)] + [(x, start + r, 0.0) for x, r in zip(d, risen)]
    assert overoptimise.fit(curve, logarithm) == pytest.approx((alpha, beta, 0), abs=1e-9)


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
        harness.stage(tmp_path / "runs", "second", "count.py", "failing", may_diverge=True)


def test_the_seconds_of_a_stage_are_those_of_every_run_that_it_wrote(tmp_path):
    began = time.time()
    for name, took in (("pretrain", 19.3), ("sft", 42.1), ("before", 99.0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"seconds": took}))
    os.utime(tmp_path / "before" / "config.json", (began - 9, began - 9))
    assert harness.run_seconds(tmp_path, began - 1) == pytest.approx(19.3 + 42.1)
    assert harness.run_seconds(tmp_path / "none", began - 5) == pytest.approx(5, abs=1)


def test_a_row_of_ppo_is_of_the_beta_that_stands_beside_it(monkeypatch, tmp_path):
    commands = []
    monkeypatch.setattr(forks, "FOLDER", tmp_path)
    monkeypatch.setattr(forks, "start", lambda seed: tmp_path)
    monkeypatch.setattr(forks, "stage", lambda folder, name, *words: commands.append(words) or "took 1 s")
    monkeypatch.setattr(
        forks, "closing_table", lambda text: dict.fromkeys((forks.JUDGE, forks.KL, "score"), ("", "1 ±"))
    )
    forks.run("ppo", 0.05, 1)
    forks.run("ppo", 0.1, 1)
    assert commands[0] == ("ppo.py", "--seed", 1)
    assert commands[1][1:5] == ("--seed", 1, "--kl_coef", 0.1)


def test_a_run_that_diverged_is_a_result_where_that_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    said = str(runs.Run.diverged(SimpleNamespace(folder=tmp_path), 3, "objective/kl", math.nan))
    (tmp_path / "diverge.py").write_text(f"raise SystemExit({said!r})\n")
    for _ in range(2):
        text = harness.stage(tmp_path / "runs", "third", "diverge.py", may_diverge=True)
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
        monkeypatch.setattr(critic, name, value)
    pairs = [(f"{a} film {x} {b}", int(a == "good")) for a, b in (("good", "bad"), ("bad", "good")) for x in "abcdefgh"]
    model, encoding = critic.fit(pairs)
    assert [int(x > 0) for x in critic.score(model, encoding, [text for text, _ in pairs])] == [
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
