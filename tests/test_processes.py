"""Two processes under torchrun: the same run as one, where the batch is the same; and nets divided over the two."""

import json
import re
import sys

import pytest
import torch

import ppo
from common import cli, dist, runs
from data import InputError
from tests.conftest import run, write


def losses(folder):
    return [json.loads(line)["loss/train"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("script, kind", [("sft.py", "pairs"), ("reward.py", "comparisons")])
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
    assert abs(lines[0]["policy/ratio"] - 1) < 0.05 and lines[0]["objective/kl"] == 0


VERSION = tuple(map(int, torch.__version__.split(".")[:2]))
needs_fsdp = pytest.mark.skipif(VERSION < (2, 8), reason="--shard needs torch 2.8")
PPO = ["--iterations", 2, "--batch_size", 8, "--minibatch_size", 4, "--response_len", 8, "--eval_prompts", 8]
PPO += ["--value_warmup", 0, "--save_every", 1, "--epochs", 2]
STEP = {  # one optimizer step of each net, and in stage 3 two iterations
    "sft.py": ["--batch_size", 6, "--epochs", 0.01],
    "reward.py": ["--batch_size", 6, "--n_prompts", 10, "--response_len", 8],
    "ppo.py": PPO,
}


def stage(folders, script: str, kind: str, *more: object, processes: int = 2):
    tmp = folders["tmp"]
    options = ["--data", tmp / f"{kind}.jsonl", "--init", folders["sft"], *STEP[script], *more]
    options += ["--reward", folders["reward"]] if script == "ppo.py" else []
    return run(script, *options, processes=processes)


def same(one, two, tolerance: float = 1e-5) -> None:
    """Two run folders have the same gradients (Adam's mean of them), and nearly all weights are the same: where a
    gradient is nothing but rounding noise, Adam makes a whole step of it."""
    states = [torch.load(folder / "state.pt", weights_only=True) for folder in (one, two)]
    for name in [name for name in states[0] if name.endswith("optimizer")]:
        mine, theirs = (torch.cat([x["exp_avg"].flatten() for x in state[name]["state"].values()]) for state in states)
        assert mine.norm() > 0 and (theirs - mine).norm() <= tolerance * mine.norm()
    models = [torch.load(folder / "model.pt", weights_only=True)["model"] for folder in (one, two)]
    assert models[0].keys() == models[1].keys()
    apart = torch.cat([(models[0][name] - models[1][name]).flatten().abs() for name in models[0]])
    assert apart.quantile(0.99) <= tolerance


@needs_fsdp
@pytest.mark.slow
@pytest.mark.parametrize("script, kind", [("sft.py", "text"), ("reward.py", "comparisons")])
def test_sharded_processes_take_the_step_of_one(folders, script, kind):
    one, two = folders["tmp"] / "one", folders["tmp"] / "two"
    alone = stage(folders, script, kind, "--out", one, processes=1)
    sharded = stage(folders, script, kind, "--shard", "--out", two)
    assert alone.returncode == sharded.returncode == 0, sharded.stderr
    same(one, two)


@needs_fsdp
@pytest.mark.slow
@pytest.mark.parametrize("more", [["--checkpoint_activations", "--micro_batch_size", 1], ["--dtype", "bfloat16"]])
def test_sharded_processes_of_ppo_do_what_whole_ones_do(folders, more):
    """Bit for bit the same answers; sums of gradients differ by rounding."""
    one, two = folders["tmp"] / "one", folders["tmp"] / "two"
    plain = stage(folders, "ppo.py", "prompts", *more, "--out", one)
    sharded = stage(folders, "ppo.py", "prompts", *more, "--shard", "--out", two)
    assert plain.returncode == sharded.returncode == 0, sharded.stderr
    same(one, two, 1e-5 if "bfloat16" not in more else 0.02)
    lines = [runs.read_metrics(folder) for folder in (one, two)]
    for mine, theirs in zip(*lines, strict=True):
        for name in ("objective/kl", "objective/scores", "policy/ratio", "loss/value_avg", "policy/grad_norm"):
            assert theirs[name] == pytest.approx(mine[name], rel=1e-4 if "bfloat16" not in more else 0.1, abs=1e-3)


@needs_fsdp
@pytest.mark.slow
def test_a_sharded_run_that_was_stopped_goes_on_to_the_same_weights(folders):
    tmp = folders["tmp"]
    (tmp / "judge.py").write_text(
        "import pathlib\ncalls = 0\n"
        "def judge(prompts, responses):\n"
        "    global calls\n    calls += 1\n"
        f"    assert calls < 2 or not pathlib.Path({str(tmp / 'stop')!r}).exists()\n"
        "    return [len(x) for x in responses]\n"
    )
    judge = ["--judge", f"{tmp / 'judge.py'}:judge", "--shard"]
    whole = stage(folders, "ppo.py", "prompts", *judge, "--out", tmp / "whole")
    (tmp / "stop").touch()
    stopped = stage(folders, "ppo.py", "prompts", *judge, "--out", tmp / "parts")
    assert whole.returncode == 0 and stopped.returncode != 0
    assert torch.load(tmp / "parts" / "state.pt", weights_only=True)["step"] == 1
    (tmp / "stop").unlink()
    resumed = stage(folders, "ppo.py", "prompts", *judge, "--out", tmp / "parts", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    for name in ("model.pt", "state.pt"):
        mine, theirs = (torch.load(tmp / folder / name, weights_only=True) for folder in ("whole", "parts"))
        assert all(torch.equal(x, theirs["model"][key]) for key, x in mine["model"].items())


def test_an_old_torch_is_refused_in_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(torch, "__version__", "2.5.1+cpu")
    with pytest.raises(SystemExit) as end:
        cli.run_main(lambda: None)
    assert end.value.code == 2 and "torch 2.5.1+cpu: needs 2.6 or newer; pip install" in capsys.readouterr().err
    monkeypatch.setattr(torch, "__version__", "2.10.0a0+git1")
    cli.run_main(lambda: None)


@needs_fsdp
def test_sharding_is_refused_where_it_cannot_be(monkeypatch):
    with pytest.raises(InputError, match="start several"):
        dist.check_shard(ppo.Config(shard=True))
    monkeypatch.setattr(dist, "WORLD", 2)
    with pytest.raises(InputError, match="multiple of the 2 processes"):
        dist.check_shard(ppo.Config(shard=True, batch_size=5))
    with pytest.raises(InputError, match="does not go with --compile"):
        dist.check_shard(ppo.Config(shard=True, compile=True))
    dist.check_shard(ppo.Config(shard=True, batch_size=6))


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the threads' names from /proc")
@pytest.mark.skipif(VERSION < (2, 13), reason="an older torch does not name its threads")
def test_every_process_starts_from_the_weights_of_the_first_and_no_thread_outlives_the_group(tmp_path):
    """One that lives on may want Python's lock while the interpreter ends, which aborts the process now and then."""
    script = tmp_path / "ends.py"
    script.write_text(
        "import pathlib, ppo, torch\nfrom common import cli, dist, runs\n"
        "def names(): return [t.read_text().strip() for t in pathlib.Path('/proc/self/task').glob('*/comm')]\n"
        "def main():\n"
        "    cfg = ppo.Config(device='cpu', out='x')\n"
        "    cli.setup(cfg)\n"
        "    net = torch.nn.Linear(3, 2)\n"
        "    torch.nn.init.constant_(net.weight, 1.0 + dist.RANK)\n"
        "    runs.Run(cfg).start(1, model=net)\n"
        "    assert (net.weight == 1).all(), net.weight\n"
        "    torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))]).step()\n"
        "    assert any('gloo' in name for name in names()), names()\n"
        "cli.run_main(main)\n"
        "assert not any('gloo' in name for name in names()), names()\n"
    )
    done = run(script, cwd=tmp_path, processes=2)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_process_that_fails_says_why_and_ends_the_others(tmp_path):
    script = tmp_path / "fails.py"
    script.write_text(
        "import ppo, torch\nfrom common import cli, dist, runs\n"
        "def main():\n"
        "    cli.setup(ppo.Config(device='cpu'))\n"
        "    if dist.RANK == 1: raise ArithmeticError('of one process')\n"
        "    dist.total(torch.ones(1))\n"
        "cli.run_main(main)\n"
    )
    done = run(script, processes=2)
    assert done.returncode == 1 and "ArithmeticError: of one process" in done.stderr


@pytest.mark.slow
def test_two_processes_share_an_evaluation_and_report_what_one_reports(folders):
    tmp = folders["tmp"]
    rows = [{"prompt": f"ask {a} {b} {c} {d}."} for a in "yn" for b in "yno" for c in "yesno" for d in "tale of a fox"]
    options = ["--data", tmp / "prompts.jsonl", "--eval_data", write(tmp / "eval.jsonl", rows), "--response_len", 8]
    options += ["--init", folders["sft"], "--reward", folders["reward"], "--best_of", "1,2"]
    one, two = (run("tools/evaluate.py", folders["sft"], *options, processes=n) for n in (1, 2))
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    said = re.sub(r"\[Gloo\].*\n", "", two.stdout)  # older torch tells of its connections
    n = len({row["prompt"] for row in rows})  # each once
    assert n > 128 and f"{n} held-out prompts" in one.stdout and said == one.stdout
