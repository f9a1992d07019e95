"""What the experiments read of a run is what the run printed; what they change in ppo.py is there."""

import ast
import json
import math
import os
import time
from types import SimpleNamespace

import pytest

import ppo
import reward
import sft
from common import cli, measure, runs
from experiments import adaptive, harness, helpful, lora, overoptimise, race, recipe, reviews
from experiments.forks import __main__ as forks
from tests.conftest import ROOT
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


@pytest.mark.parametrize("what", recipe.WITHOUT)
def test_what_is_taken_out_of_ppo_is_in_it(what):
    _, options, changes = recipe.WITHOUT[what]
    source = (ROOT / "ppo.py").read_text()
    assert (recipe.changed(source, changes) != source) == bool(changes)
    ast.parse(recipe.changed(source, changes))
    assert all(option[2:] in ppo.Config.__dataclass_fields__ for option in options[::2])


@pytest.mark.parametrize(
    "stage, options",
    [
        *((sft, each.SFT) for each in (helpful, reviews)),
        *((reward, each.REWARD) for each in (helpful, reviews)),
        *((ppo, each) for each in (helpful.PPO, reviews.TASK + reviews.PPO, adaptive.OPTIONS, lora.OWN_OPTIONS)),
        (evaluate, reviews.BEST_OF),
    ],
)
def test_a_stage_has_the_options_that_it_is_given(stage, options):
    cli.parse(stage.Config, [*map(str, options), "--resume"])


def test_the_goal_is_reached_where_the_mean_of_five_iterations_is_high_enough():
    judges = [1.0, 0.0, 0.9, 0.94, 0.96, 0.97, 0.98, 1.0]
    lines = [{"objective/judge": judge, "seconds": 10.0 * i} for i, judge in enumerate(judges)]
    assert race.to_goal(lines) == 60  # 0.9, 0.94, 0.96, 0.97, 0.98 have the mean 0.95
    assert race.to_goal(lines[:6]) is None


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
