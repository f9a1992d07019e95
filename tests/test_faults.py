"""Runs that are killed, stopped, starved and fed nonsense: nothing is lost, and one sentence says what happened."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import data
import ppo
import reward
import sft
from common import cli, judges, nets, runs
from data import InputError
from tests.conftest import ROOT, TORCHRUN, locked, run, write
from tests.fuzz import sweep


@pytest.fixture(autouse=True)
def signals_and_pages(monkeypatch):
    """Runs in this process write no page; afterwards signals do what they did."""
    monkeypatch.setattr(runs, "write_page", lambda folder: None)
    held = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in held.items():
        signal.signal(number, handler)


def options(folders, script, **more):
    """The options of a small run of a script."""
    given = {
        "sft.py": dict(data="pairs.jsonl", init="sft", evals=3),
        "reward.py": dict(data="prompts.jsonl", init="sft", judge="judge.py:judge", samples=2, response_len=8),
        "ppo.py": dict(data="prompts.jsonl", init="sft", reward="reward", judge="judge.py:judge", iterations=4)
        | dict(batch_size=16, minibatch_size=8, epochs=1, response_len=8, eval_prompts=8, save_every=1, kl_target=0.5),
    }[script] | more
    judge = folders["tmp"] / "judge.py"
    judge.write_text("def judge(prompt, response):\n    return response.count('e') / (1 + len(response))\n")
    return [str(word) for name, value in given.items() for word in (f"--{name}", value)]


def contents(folder):
    """What a run has left, without times: checkpoints, metrics, samples, comparisons."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.suffix == ".pt":
            found[path.name] = torch.load(path, weights_only=True)
            found[path.name].get("options", {}).clear()
        elif path.name == "metrics.jsonl":
            lines = runs.read_metrics(folder)
            found[path.name] = [
                {k: v for k, v in line.items() if "time/" not in k and "tokens" not in k} for line in lines
            ]
        elif path.name == "config.json":
            found[path.name] = json.loads(path.read_text())
            of_this_start = {"seconds", "started", "first_step", "command", "options"}
            for name in of_this_start | {"commit", "clean"}:  # the checkout may change meanwhile
                found[path.name].pop(name)
        else:
            found[path.name] = path.read_bytes()
    return found


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def killed_anywhere(folders, script, chosen):
    tmp = folders["tmp"]
    given = options(folders, script)
    whole = run("tests/faulty.py", "count", ROOT / script, *given, "--out", "out/whole", cwd=tmp)
    assert whole.returncode == 0, whole.stderr
    n = int(re.search(r"changes: (\d+)", whole.stdout)[1])
    assert n > 15
    for event in chosen(n):
        out = f"out/cut-{event}"
        done = run("tests/faulty.py", f"kill={event}", ROOT / script, *given, "--out", out, cwd=tmp)
        assert done.returncode == -signal.SIGKILL, done.stderr
        done = run("tests/faulty.py", "count", ROOT / script, *given, "--out", out, "--resume", cwd=tmp)
        assert done.returncode == 0, (event, done.stderr)
        assert same(contents(tmp / out), contents(tmp / "out/whole")), event


def test_a_run_that_is_killed_and_resumed_is_the_run_that_was_not(folders):
    killed_anywhere(folders, "ppo.py", lambda n: (n // 2,))


@pytest.mark.slow
@pytest.mark.parametrize("script", ["sft.py", "reward.py", "ppo.py"])
def test_a_run_may_be_killed_before_any_change_of_a_file(folders, script):
    """The first changes, before there is a checkpoint, and every ninth, to save time."""
    killed_anywhere(folders, script, lambda n: sorted({1, 3, 5, *range(8, n + 1, 9)}))


def started(folders, script, *more, processes=1, steps=3):
    """A long run in a process of its own, once it has taken three steps."""
    tmp = folders["tmp"]
    torchrun = TORCHRUN if processes > 1 else []
    command = [sys.executable, *torchrun, str(ROOT / script), *options(folders, script), *more, "--out", "out/x"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, cwd=tmp, env=environment, stdout=pipe, stderr=pipe, text=True)
    until = time.time() + 120
    while len(runs.read_metrics(tmp / "out/x")) < steps and time.time() < until:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    return process


LONG = {"sft.py": ["--epochs", "90"], "reward.py": ["--batch_size", "1"], "ppo.py": ["--iterations", "400"]}


@pytest.mark.slow
@pytest.mark.parametrize(
    "script, number", [("sft.py", signal.SIGINT), ("reward.py", signal.SIGTERM), ("ppo.py", signal.SIGINT)]
)
def test_a_signal_lets_the_step_end_saves_it_and_says_how_to_go_on(folders, script, number):
    long = ["--save_every", "1000"] if script == "ppo.py" else []
    process = started(folders, script, *LONG[script], *long)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    state = torch.load(folders["tmp"] / "out/x/state.pt", weights_only=True)
    assert process.returncode == 128 + number
    assert re.fullmatch(rf"{script}: stopped after step {state['step']} of .* --resume go on\n", said), said
    assert state["step"] == len(runs.read_metrics(folders["tmp"] / "out/x"))


@pytest.mark.parametrize("number, at", [(signal.SIGINT, 2), (signal.SIGTERM, 4)])
def test_a_signal_in_any_step_ends_the_process_once_it_is_saved(folders, monkeypatch, capsys, number, at):
    """Also in the last of four."""
    monkeypatch.chdir(folders["tmp"])
    logged = runs.Run.log

    def log(run, step, *given, **more):
        logged(run, step, *given, **more)
        if step + 1 == at:
            os.kill(os.getpid(), number)
            time.sleep(0.01)

    monkeypatch.setattr(runs.Run, "log", log)
    monkeypatch.setattr(sys, "argv", ["ppo.py", *options(folders, "ppo.py", save_every=1000)])
    with pytest.raises(SystemExit) as end:
        cli.run_main(ppo.main)
    assert end.value.code == 128 + number and torch.load("out/ppo/state.pt", weights_only=True)["step"] == at
    assert len(runs.read_metrics("out/ppo")) == at
    said = f"ppo.py: stopped after step {at} of 4; the same command and --resume go on\n"
    assert capsys.readouterr().err == said


def test_a_run_is_saved_once_a_minute_but_not_for_more_than_a_twentieth_of_its_time(folders, monkeypatch):
    monkeypatch.chdir(folders["tmp"])
    run_of = runs.Run(cli.parse(sft.Config, ["--out", "out/x"]))
    run_of.steps = 1000
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    for since, took, due in ((59, 0.1, False), (61, 0.1, True), (61, 4.0, False), (81, 4.0, True)):
        run_of.saved_at, run_of.save_took = now - since, took
        assert run_of.due(3, 1000) == due
    assert run_of.due(3, 2) and run_of.due(999, 10**6)
    run_of.saved_at, run_of.signal = now, signal.SIGINT
    assert run_of.due(3, 1000)


def test_after_a_first_signal_a_second_one_ends_a_run_at_once(tmp_path):
    run_of = runs.Run(sft.Config(out=str(tmp_path / "x")))
    run_of.hear()
    os.kill(os.getpid(), signal.SIGTERM)
    assert run_of.signal == signal.SIGTERM and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_signal_before_the_first_step_ends_a_run_with_a_sentence(capsys):
    with pytest.raises(SystemExit) as end:
        cli.run_main(lambda: os.kill(os.getpid(), signal.SIGINT) or time.sleep(5))
    assert end.value.code == 130 and capsys.readouterr().err.count("\n") == 1


@pytest.mark.slow
def test_a_process_that_dies_ends_the_others_and_the_run_can_go_on(folders, monkeypatch):
    monkeypatch.chdir(folders["tmp"])
    process = started(folders, "ppo.py", *LONG["ppo.py"], processes=2)
    listing = subprocess.run(["pgrep", "-f", "out/x"], capture_output=True, text=True).stdout.split()
    listing = [pid for pid in listing if os.path.realpath(f"/proc/{pid}/cwd") == os.getcwd()]
    ranks = {pid: open(f"/proc/{pid}/environ").read() for pid in listing if pid != str(process.pid)}
    (second,) = [pid for pid, environment in ranks.items() if "\0RANK=1\0" in environment]
    began = time.time()
    os.kill(int(second), signal.SIGKILL)
    _, said = process.communicate(timeout=60)
    assert process.returncode and time.time() - began < 60
    assert "another process has ended; start all of them again with --resume" in said or "stopped" in said, said
    step = torch.load(folders["tmp"] / "out/x/state.pt", weights_only=True)["step"]
    given = options(folders, "ppo.py", iterations=400)
    cfg = cli.parse(ppo.Config, [*given, "--out", "out/x", "--resume"])
    with pytest.raises(InputError, match="made by 2 processes; start as many"):
        ppo.train(cfg)
    process = started(folders, "ppo.py", *LONG["ppo.py"], "--resume", processes=2, steps=step + 5)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert torch.load(folders["tmp"] / "out/x/state.pt", weights_only=True)["step"] > step


# --- one folder, one run ----------------------------------------------------------------------------------------------


def test_a_second_run_in_a_folder_is_refused_and_a_dead_run_is_no_obstacle(folders, monkeypatch):
    monkeypatch.chdir(folders["tmp"])
    cfg = cli.parse(sft.Config, [*options(folders, "sft.py"), "--out", "out/x"])
    with locked(Path("out/x")), pytest.raises(InputError, match="--out out/x: another run writes to it"):
        sft.train(cfg)
    Path("out/x").mkdir()
    Path("out/x/metrics.jsonl").write_text('{"step": 0}\n{"ste')  # of the dead run
    sft.train(cfg)
    assert Path("out/x.1/metrics.jsonl").exists()
    assert len(runs.read_metrics("out/x")) == len({line["step"] for line in runs.read_metrics("out/x")})


def test_a_run_folder_may_be_moved_and_spelled_in_another_way(folders, monkeypatch):
    monkeypatch.chdir(folders["tmp"])
    given = options(folders, "sft.py", data=folders["tmp"] / "pairs.jsonl")
    sft.train(cli.parse(sft.Config, [*given, "--out", "out/x"]))
    (folders["tmp"] / "out/x").rename(folders["tmp"] / "moved")
    given = options(folders, "sft.py", data="./pairs.jsonl", init="sft/")
    sft.train(cli.parse(sft.Config, [*given, "--out", "moved/", "--resume"]))
    with pytest.raises(InputError, match="--resume: .* made with --lr 0.002"):
        sft.train(cli.parse(sft.Config, [*given, "--out", "moved", "--resume", "--lr", "1e-3"]))


def test_one_flipped_bit_of_a_model_or_a_state_is_refused_in_a_sentence(folders, monkeypatch):
    """torch.load does not see it: the weight would only be another number."""
    monkeypatch.chdir(folders["tmp"])
    cfg = cli.parse(ppo.Config, [*options(folders, "ppo.py", iterations=1), "--out", "out/x"])
    ppo.train(cfg)
    cfg.resume = True
    for path, read in (("out/x/model.pt", nets.load), ("out/x/state.pt", lambda path: runs.Run(cfg))):
        good = Path(path).read_bytes()
        weights = torch.load(path, weights_only=True)["model"]["h.0.mlp.c_fc.weight"]
        place = good.index(weights.numpy().tobytes()) + 5
        Path(path).write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        assert not torch.equal(torch.load(path, weights_only=True)["model"]["h.0.mlp.c_fc.weight"], weights)
        with pytest.raises(InputError, match=f"{path}: not a checkpoint of this project"):
            read(path)
        Path(path).write_bytes(good)


def test_a_state_of_another_version_or_with_other_options_is_refused_in_a_sentence(folders, monkeypatch):
    monkeypatch.chdir(folders["tmp"])
    cfg = cli.parse(ppo.Config, [*options(folders, "ppo.py", iterations=1), "--out", "out/x"])
    ppo.train(cfg)
    cfg.resume = True
    good = torch.load("out/x/state.pt", weights_only=True)
    for change, words in (
        ({"version": 2}, "is of another version"),
        ({"options": good["options"] | {"n_layer": 2}}, "made with --n_layer 2; give the same options"),
    ):
        torch.save(good | change, "out/x/state.pt")
        with pytest.raises(InputError, match=words):
            runs.Run(cfg)
    torch.save(good | {"inputs": {}, "options": {}}, "out/x/state.pt")  # all of them are newer
    assert runs.Run(cfg).state["step"] == 1


def test_metrics_are_read_up_to_the_first_line_that_is_not_of_numbers(tmp_path):
    for bad in ('{"step": 1, "lr": [0.1]}', '{"step": 1, "lr": null}', '{"step": "1"}', "[" * 9999, '{"step": 1'):
        (tmp_path / "metrics.jsonl").write_text('{"step": 0, "lr": 0.1}\n' + bad + '\n{"step": 2, "lr": 0.1}\n')
        assert runs.read_metrics(tmp_path) == [{"step": 0, "lr": 0.1}]
    assert runs.sampled_at("step " + "9" * 5000 + "  a tale") == 0 and runs.sampled_at("step 40  a tale") == 40


# --- disks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", [pytest.param("reward.py", marks=pytest.mark.slow), "ppo.py"])
def test_a_full_disk_is_one_sentence_and_leaves_the_last_checkpoint_whole(folders, script):
    tmp = folders["tmp"]
    warmup = {"value_warmup": 0} if script == "ppo.py" else {}  # the first checkpoint is as large as the last
    given = [*options(folders, script, **warmup), "--out", "out/x"]
    assert run("tests/faulty.py", "count", ROOT / script, *given, cwd=tmp).returncode == 0
    before = contents(tmp / "out/x")
    size = (tmp / "out/x/state.pt").stat().st_size
    (tmp / "out/x").rename(tmp / "kept")
    for limit, there in ((size - 2000, {"model.pt"}), (50_000, set())):
        done = run("tests/faulty.py", f"full={limit}", ROOT / script, *given, cwd=tmp)
        assert done.returncode == 2 and re.fullmatch(rf"{script}: \S+: cannot be written \(.*\n", done.stderr), (
            done.stderr
        )
        names = {path.name for path in (tmp / "out").rglob("*")}
        assert there <= names and "state.pt" not in names and not [name for name in names if name.endswith(".tmp")]
    assert same(contents(tmp / "kept"), before)


def test_an_out_that_cannot_be_written_is_found_before_any_work(folders, monkeypatch):
    monkeypatch.chdir(folders["tmp"])
    (folders["tmp"] / "file").write_text("x")
    monkeypatch.setattr(nets, "load_gpt", lambda *given: pytest.fail("the model was read"))
    for out in ("file/x", "file", "/proc/x", "x" * 300, ".", ""):
        for script, stage in (("sft.py", sft), ("reward.py", reward), ("ppo.py", ppo)):
            cfg = cli.parse(stage.Config, options(folders, script, out=out))
            with pytest.raises(InputError, match="--out"):
                stage.train(cfg)


# --- what comes from outside ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed, each", [(0, 20), pytest.param(1, 500, marks=pytest.mark.slow)])
def test_bad_inputs_give_one_sentence_each_and_change_no_file(seed, each):
    counts, faults = sweep(seed, each)
    assert not faults, faults
    assert counts["at fault"] == 0 and counts["read"] > each / 4 and counts["refused"] > 2 * each


FUNCTIONS = {
    "return None": "returned None",
    "return 'good'": "returned 'good'",
    "return [1.0]": r"returned \[1.0\]",
    "return float('inf')": "returned inf",
    "return 1e39": "returned 1e\\+39",
    "return 10**400": "returned 1000",
    "raise ValueError('of the user')": r"ValueError: of the user",
    "exit()": "SystemExit",
    "return response[10**6]": "IndexError",
}


@pytest.mark.parametrize("body", FUNCTIONS)
def test_a_function_that_gives_no_number_is_named_with_its_prompt(tmp_path, body, capsys):
    file = tmp_path / "mine.py"
    file.write_text(f"def f(prompt, response):\n    {body}\n")
    function = judges.load_function(f"{file}:f")
    with pytest.raises(InputError, match=f"mine.py:f: .*{FUNCTIONS[body]}") as error:
        function([{"prompt": "a prompt", "response": "a response"}])
    raises = "raise" in body or "exit" in body or "10**6" in body
    assert ("line 2, in f" in capsys.readouterr().err) == raises
    assert raises or "a prompt" in str(error.value)


def test_a_function_of_lists_is_asked_once_a_batch_and_gives_what_one_of_pairs_gives(tmp_path):
    (tmp_path / "lists.py").write_text(
        "calls = []\n"
        "def pair(prompt, response):\n    return len(response) - len(prompt)\n"
        "def lists(prompts, responses):\n    calls.append(len(prompts))\n"
        "    return [len(r) - len(p) for p, r in zip(prompts, responses)]\n"
        "def short(prompts, responses):\n    return [1.0]\n"
        "def nan(prompts, responses):\n    return [float('nan')] * len(prompts)\n"
    )
    pair, lists, short, nan = (
        judges.load_function(f"{tmp_path}/lists.py:{name}") for name in ("pair", "lists", "short", "nan")
    )
    rows = [{"prompt": "p" * (i % 7), "response": "r" * (i % 5)} for i in range(600)]
    assert lists(rows) == pair(rows) == [len(row["response"]) - len(row["prompt"]) for row in rows]
    assert sys.modules["lists"].calls == [600]
    with pytest.raises(InputError, match="returned 1 numbers for 600 answers; return as many"):
        short(rows)
    with pytest.raises(InputError, match="returned nan for the prompt"):
        nan(rows)


def test_the_file_of_a_function_is_a_module_with_neighbours(tmp_path):
    (tmp_path / "neighbour_of_mine.py").write_text("def half(x):\n    return x / 2\n")
    (tmp_path / "mine.py").write_text(
        "from __future__ import annotations\nimport pickle\nfrom dataclasses import dataclass\n"
        "from neighbour_of_mine import half\n\n@dataclass\nclass Weight:\n    x: float = 3.0\n\n"
        "def f(prompt, response):\n    return half(pickle.loads(pickle.dumps(Weight())).x)\n"
    )
    assert judges.load_function(f"{tmp_path}/mine.py:f")([{"prompt": "", "response": ""}]) == [1.5]
    (tmp_path / "broken.py").write_text("import no_such_module\n")
    with pytest.raises(InputError, match="broken.py: cannot be imported .*no_such_module"):
        judges.load_function(f"{tmp_path}/broken.py:f")


def test_a_column_that_is_null_is_absent(folders, encoding):
    rows = [{"prompt": "a", "chosen": " yes", "rejected": " no", "verdict": None, "ranked": None, "p_chosen": None}] * 9
    path = write(folders["tmp"] / "x.jsonl", rows)
    said = []
    (group,) = data.comparisons(path, encoding, encoding.eot_token, said.append)
    assert len(group.pairs) == 9 and said == [f"{path}: preferences, 9 rows"]
    rows[3] = {"prompt": "a", "verdict": "tie", "responses": ["b", "c"]}
    (group,) = data.comparisons(write(path, rows), encoding, encoding.eot_token, said.append)
    assert len(group.pairs) == 8 and "1 left out (ties and skips)" in said[-1]
    with pytest.raises(InputError, match='row 1: "verdict" is none of tie, bad, skip; fix the row, or rename'):
        data.comparisons(write(path, [rows[0] | {"verdict": "both_bad"}]), encoding, 299)


def test_rows_of_unknown_columns_are_not_taken_for_prompts(folders, monkeypatch):
    monkeypatch.chdir(folders["tmp"])
    write(folders["tmp"] / "x.jsonl", [{"prompt": "a", "winner": "b", "loser": "c"}] * 30)
    with pytest.raises(InputError, match="has prompt, winner, loser, which are no comparisons"):
        reward.train(reward.Config(data="x.jsonl", init="sft"))


def test_a_run_that_left_the_language_is_ended_by_kl_stop(folders, monkeypatch):
    monkeypatch.chdir(folders["tmp"])
    cfg = cli.parse(ppo.Config, options(folders, "ppo.py", kl_stop=1e-6, value_warmup=0, lr=0.01))
    with pytest.raises(InputError, match="step 2: the KL to the reference is above --kl_stop 1e-06, so the run stops"):
        ppo.train(cfg)
    assert torch.load("out/ppo/state.pt", weights_only=True)["step"] == 1


@pytest.mark.slow
def test_memory_stays_flat_over_a_thousand_iterations(folders):
    """Resident memory of a tiny run after its first fifty iterations, within 2%."""
    tmp = folders["tmp"]
    (tmp / "watched.py").write_text(
        "import json, pathlib, re, ppo\nfrom common import cli, runs\n"
        "log, seen = runs.Run.log, []\n"
        "def watched(self, *given, **more):\n"
        "    text = pathlib.Path('/proc/self/status').read_text()\n"
        "    seen.append(int(re.search(r'VmRSS:\\s+(\\d+)', text)[1]))\n"
        "    log(self, *given, **more)\n"
        "runs.Run.log = watched\n"
        "cli.run_main(ppo.main)\n"
        "pathlib.Path('seen.json').write_text(json.dumps(seen))\n"
    )
    given = options(folders, "ppo.py", iterations=1000, save_every=100, lr=1e-5)
    done = run(tmp / "watched.py", *given, cwd=tmp)
    assert done.returncode == 0, done.stderr
    seen = json.loads((tmp / "seen.json").read_text())
    assert len(seen) == 1000 and max(seen[50:]) < 1.02 * seen[50]
