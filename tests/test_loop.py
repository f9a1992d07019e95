"""The whole loop as a newcomer runs it, with no argument: what README promises."""

import re

import pytest

import common
from tests.conftest import run

pytestmark = pytest.mark.slow


def table(output: str) -> dict[str, list[float]]:
    """The closing table of ppo.py: its numbers before and after, by row."""
    rows = re.findall(r"^(\S.*?)\s+(-?\d+\.\d+) ± \S+\s+(-?\d+\.\d+) ± \S+\s+-?\d+\.\d+ ±", output, re.MULTILINE)
    return {name: [float(before), float(after)] for name, before, after in rows}


def test_the_judge_rises_calmly_at_a_small_kl_and_without_the_kl_term_the_score_rises_further_and_the_judge_falls(
    tmp_path,
):
    for script in ("sft.py", "reward.py"):
        done = run(script, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    accuracy, ceiling = map(float, re.search(r"accuracy (\S+) ± .* allows (\S+)\)", done.stdout).groups())
    assert accuracy > ceiling - 0.05
    with_kl = run("ppo.py", cwd=tmp_path)
    without = run("ppo.py", "--kl_coef", 0, "--iterations", 160, "--out", "out/hacked", cwd=tmp_path)
    assert with_kl.returncode == without.returncode == 0, with_kl.stderr + without.stderr
    rows, hacked = table(with_kl.stdout), table(without.stdout)
    before, after = rows["data/tales.py:judge"]
    assert after >= 0.95
    for line in common.read_metrics(tmp_path / "out" / "ppo"):  # and the road there is calm
        assert line["objective/kl"] <= 6 and 0.97 <= line["val/ratio"] <= 1.03
        assert line["objective/judge"] >= before - 0.12  # three standard errors of 64 answers
    assert rows["ended by EOS"][1] >= 0.97 and rows["data/tales.py:grammar"][1] >= 0.95
    assert 0.5 < rows["KL to the start (nats)"][1] <= 6
    assert hacked["score"][1] > rows["score"][1]
    assert hacked["data/tales.py:judge"][1] < after - 0.01
    assert hacked["KL to the start (nats)"][1] > 2 * rows["KL to the start (nats)"][1]
