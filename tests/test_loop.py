"""The whole loop as a newcomer runs it, with no argument: what README promises."""

import re
from pathlib import Path

import pytest

from common import runs
from experiments.harness import GRAMMAR, JUDGE, KL, closing_table, number
from tests.conftest import run

pytestmark = pytest.mark.slow


def table(output: str) -> dict[str, list[float]]:
    """The closing table of ppo.py: its numbers before and after, by row."""
    return {name: [number(before), number(after)] for name, (before, after) in closing_table(output).items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder in which sft.py has run."""
    folder = tmp_path_factory.mktemp("loop")
    stage(folder, "sft.py")
    return folder


def stage(folder: Path, script: str, *options: object) -> str:
    done = run(script, *options, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_judge_rises_calmly_at_a_small_kl(folder):
    printed = stage(folder, "reward.py")
    accuracy, ceiling = map(float, re.search(r"accuracy (\S+) .* allows (\S+)\)", printed).groups())
    assert accuracy > ceiling - 0.05
    rows = table(stage(folder, "ppo.py"))
    before, after = rows[JUDGE]
    assert after >= 0.95
    for line in runs.read_metrics(folder / "out" / "ppo"):  # and the road there is calm
        assert line["objective/kl"] <= 6 and 0.97 <= line["policy/ratio"] <= 1.03
        assert line["objective/judge"] >= before - 0.12  # three standard errors of 64 answers
    assert rows["ended by EOS"][1] >= 0.97 and rows[GRAMMAR][1] >= 0.95
    assert 0.5 < rows[KL][1] <= 6


def test_without_the_kl_term_a_poor_reward_model_is_fooled_and_its_score_rises_further(folder):
    stage(folder, "reward.py", "--n_prompts", 20, "--batch_size", 1, "--out", "out/poor")
    options = ["--reward", "out/poor", "--judge", JUDGE]
    with_kl = table(stage(folder, "ppo.py", *options, "--out", "out/kept"))
    options += ["--kl_coef", 0, "--iterations", 160]
    without = table(stage(folder, "ppo.py", *options, "--out", "out/fooled"))
    assert with_kl[JUDGE][1] > without[JUDGE][1] + 0.05
    assert without["score"][1] > with_kl["score"][1]
    assert without[JUDGE][1] < without[JUDGE][0] - 0.05
    assert without[KL][1] > 2 * with_kl[KL][1]
