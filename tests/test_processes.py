"""Two processes under torchrun: the same run as one, where the batch is the same."""

import json
import sys

import pytest

from tests.conftest import run, write


def losses(folder):
    return [json.loads(line)["loss/train"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "script, kind",
    [
        ("sft.py", "pairs"),
        pytest.param("sft.py", "text", marks=pytest.mark.slow),
        pytest.param("reward.py", "comparisons", marks=pytest.mark.slow),
    ],
)
def test_two_processes_train_as_one_does(folders, script, kind):
    tmp = folders["tmp"]
    options = ["--data", tmp / f"{kind}.jsonl", "--init", folders["sft"], "--batch_size", 6, "--lr", 1e-3]
    options += ["--response_len", 8] if script == "reward.py" else ["--evals", 1]
    one, two = run(script, *options, "--out", tmp / "one"), run(script, *options, "--out", tmp / "two", processes=2)
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    assert losses(tmp / "two") == pytest.approx(losses(tmp / "one"), abs=1e-4)


def test_ppo_runs_on_two_processes_and_logs_the_whole_batch(folders):
    tmp = folders["tmp"]
    options = ["--data", tmp / "prompts.jsonl", "--init", folders["sft"], "--reward", folders["reward"]]
    options += ["--out", tmp / "p"]
    options += ["--iterations", 2, "--batch_size", 8, "--minibatch_size", 4, "--response_len", 8, "--eval_prompts", 8]
    done = run("ppo.py", *options, processes=2)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp / "p" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and lines[1]["episode"] == 16
    assert abs(lines[0]["val/ratio"] - 1) < 0.05 and lines[0]["objective/kl"] == 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the threads' names from /proc")
def test_no_thread_of_the_process_group_outlives_it(tmp_path):
    """One that lives on may want Python's lock while the interpreter ends, which aborts the process now and then."""
    script = tmp_path / "ends.py"
    script.write_text(
        "import pathlib, ppo, common, torch\n"
        "def names(): return [t.read_text().strip() for t in pathlib.Path('/proc/self/task').glob('*/comm')]\n"
        "def main():\n"
        "    common.setup(ppo.Config(device='cpu'))\n"
        "    torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))]).step()\n"
        "    common.total(torch.ones(1))\n"
        "    assert any('gloo' in name for name in names()), names()\n"
        "common.run_main(main)\n"
        "assert not any('gloo' in name for name in names()), names()\n"
    )
    done = run(script, processes=2)
    assert done.returncode == 0, done.stderr


def test_a_process_that_fails_says_why_and_ends_the_others(tmp_path):
    script = tmp_path / "fails.py"
    script.write_text(
        "import ppo, common, torch\n"
        "def main():\n"
        "    common.setup(ppo.Config(device='cpu'))\n"
        "    if common.RANK == 1: raise ArithmeticError('of one process')\n"
        "    common.total(torch.ones(1))\n"
        "common.run_main(main)\n"
    )
    done = run(script, processes=2)
    assert done.returncode == 1 and "ArithmeticError: of one process" in done.stderr


def test_two_processes_share_an_evaluation_and_report_what_one_reports(folders):
    tmp = folders["tmp"]
    rows = [{"prompt": f"ask {a} {b} {c} {d}."} for a in "yn" for b in "yno" for c in "yesno" for d in "tale of a fox"]
    options = ["--data", tmp / "prompts.jsonl", "--eval_data", write(tmp / "eval.jsonl", rows), "--response_len", 8]
    options += ["--init", folders["sft"], "--reward", folders["reward"], "--out", folders["sft"], "--iterations", 0]
    options += ["--best_of", "1,2"]
    one, two = (run("ppo.py", *options, processes=n) for n in (1, 2))
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    assert len(rows) > 256 and "390 held-out prompts" in one.stdout and two.stdout == one.stdout


def test_every_process_starts_from_the_weights_of_the_first(tmp_path):
    script = tmp_path / "starts.py"
    script.write_text(
        "import ppo, common, torch\n"
        "def main():\n"
        "    cfg = ppo.Config(device='cpu', out='x')\n"
        "    common.setup(cfg)\n"
        "    net = torch.nn.Linear(3, 2)\n"
        "    torch.nn.init.constant_(net.weight, 1.0 + common.RANK)\n"
        "    common.Run(cfg).start(1, model=net)\n"
        "    assert (net.weight == 1).all(), net.weight\n"
        "common.run_main(main)\n"
    )
    done = run(script, cwd=tmp_path, processes=2)
    assert done.returncode == 0, done.stderr
