"""sft.py and the plumbing under every stage, run as a user runs them."""

import dataclasses
import gzip
import importlib
import json
import sys

import pytest
import torch

import common
import ppo
import reward
import sft
from data import InputError
from tests.conftest import ROOT, flat, run, write

CPU = torch.device("cpu")


def train(folders, *more, kind="text"):
    shape = ["--block_size", 32, "--n_layer", 1, "--n_head", 2, "--n_embd", 16, "--vocab_size", 290, "--evals", 2]
    return run("sft.py", "--data", folders["tmp"] / f"{kind}.jsonl", *shape, *more)


def metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "tokens_per_s"} for line in lines]


def test_pretraining_then_fine_tuning_lowers_the_loss_and_repeats_bit_for_bit(folders):
    tmp = folders["tmp"]
    for name in ("a", "b"):
        done = train(folders, "--out", tmp / name, "--epochs", 6)
        assert done.returncode == 0, done.stderr
    assert metrics(tmp / "a") == metrics(tmp / "b")
    assert metrics(tmp / "a")[-1]["loss/train"] < 0.8 * metrics(tmp / "a")[0]["loss/train"]
    done = train(folders, "--out", tmp / "tuned", "--init", tmp / "a", "--epochs", 20, "--drop_long", kind="pairs")
    assert done.returncode == 0, done.stderr
    lines = metrics(tmp / "tuned")
    assert lines[-1]["loss/train"] < 0.7 * lines[0]["loss/train"]
    assert {"model.pt", "best.pt", "state.pt", "metrics.jsonl", "samples.txt"} <= {
        p.name for p in (tmp / "tuned").iterdir()
    }


@pytest.mark.parametrize("kind", ["text", "pairs"])
def test_a_gzipped_file_trains_as_the_plain_one_does(folders, kind):
    plain = folders["tmp"] / f"{kind}.jsonl"
    packed = folders["tmp"] / f"{kind}.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    losses = []
    for path in (plain, packed):
        options = ["--data", str(path), "--init", str(folders["sft"]), "--out", f"{path}.run", "--evals", "1"]
        sft.train(common.parse(sft.Config, options))
        losses.append([line["loss/train"] for line in common.read_metrics(f"{path}.run")])
    assert losses[0] == losses[1] and losses[0]


def test_a_run_that_was_stopped_and_resumed_is_the_run_that_was_not(folders, monkeypatch):
    tmp, save = folders["tmp"], common.Run.save
    given = ["--data", tmp / "pairs.jsonl", "--init", folders["sft"], "--evals", 2]
    options = lambda *more: common.parse(sft.Config, [str(word) for word in [*given, *more]])  # noqa: E731
    sft.train(options("--out", tmp / "whole"))

    def save_then_die(self, *args, **parts):
        save(self, *args, **parts)
        raise KeyboardInterrupt

    monkeypatch.setattr(common.Run, "save", save_then_die)
    with pytest.raises(KeyboardInterrupt):
        sft.train(options("--out", tmp / "cut"))
    monkeypatch.setattr(common.Run, "save", save)
    assert len(metrics(tmp / "cut")) < len(metrics(tmp / "whole"))
    sft.train(options("--out", tmp / "cut", "--resume"))
    assert metrics(tmp / "cut") == metrics(tmp / "whole")
    assert torch.equal(*(flat(common.load_gpt(tmp / name)[0]) for name in ("cut", "whole")))


def test_an_earlier_run_is_kept_and_a_foreign_folder_is_refused(folders):
    tmp = folders["tmp"]
    assert train(folders, "--out", tmp / "a").returncode == 0
    first = (tmp / "a" / "model.pt").read_bytes()
    assert train(folders, "--out", tmp / "a", "--seed", 1).returncode == 0
    assert (tmp / "a.1" / "model.pt").read_bytes() == first != (tmp / "a" / "model.pt").read_bytes()
    (tmp / "mine").mkdir()
    (tmp / "mine" / "thesis.txt").write_text("all I have")
    done = train(folders, "--out", tmp / "mine")
    assert done.returncode == 2 and "not a run folder" in done.stderr
    assert (tmp / "mine" / "thesis.txt").read_text() == "all I have"


MISSING = "mps" if torch.cuda.is_available() else "cuda"  # no machine has both
BAD = [
    ("sft.py", ["--colour", "red"], "--colour"),
    ("sft.py", ["--lr", "fast"], "--lr"),
    ("sft.py", ["--batch_size", "0"], "--batch_size 0"),
    ("sft.py", ["--data", "nowhere.jsonl"], "nowhere.jsonl"),
    ("sft.py", ["--data", "empty.txt", "--out", "x"], "empty.txt"),
    ("sft.py", ["--data", "broken.jsonl", "--out", "x"], "broken.jsonl:2"),
    ("sft.py", ["--data", "text.jsonl", "--vocab_size", "9", "--out", "x"], "--vocab_size 9"),
    ("sft.py", ["--data", "text.jsonl", "--n_head", "7", "--out", "x"], "--n_head 7"),
    ("sft.py", ["--data", "text.jsonl", "--evals", "0", "--out", "x"], "--evals 0"),
    ("sft.py", ["--data", "notes.md", "--out", "x"], "notes.md"),
    ("sft.py", ["--data", "null.jsonl", "--init", "sft", "--out", "x"], "null.jsonl: row 1"),
    ("sft.py", ["--data", "text.jsonl", "--device", MISSING], f"--device {MISSING}: there is none"),
    ("sft.py", ["--data", "text.jsonl", "--device", "toaster"], "--device toaster"),
    ("sft.py", ["--data", "text.jsonl", "--dtype", "int8"], "--dtype int8"),
    ("sft.py", ["--data", "pairs.jsonl", "--init", "reward", "--out", "x"], "reward"),
    ("sft.py", ["--data", "pairs.jsonl", "--init", "sft", "--out", "sft"], "--out sft"),
    ("reward.py", ["--init", "nowhere"], "--init nowhere"),
    ("reward.py", ["--init", "garbage"], "garbage"),
    ("reward.py", ["--init", "sft/state.pt"], "sft/state.pt: not a checkpoint"),
    ("reward.py", ["--init", "sft", "--data", "prompts.jsonl", "--judge", "x.py:f"], "x.py:f"),
    ("reward.py", ["--init", "sft", "--data", "bad_ranked.jsonl", "--out", "x"], "bad_ranked.jsonl"),
    ("ppo.py", ["--init", "nowhere"], "--init nowhere"),
    (
        "ppo.py",
        ["--init", "sft", "--data", "prompts.jsonl", "--response_len", "8", "--batch_size", "8", "--reward", "sft"],
        "--reward sft",
    ),
    ("ppo.py", ["--init", "sft", "--data", "text.jsonl", "--response_len", "8"], 'text.jsonl:1: no column "prompt"'),
    ("ppo.py", ["--init", "sft", "--data", "prompts.jsonl", "--response_len", "44"], "--drop_long"),
    ("ppo.py", ["--init", "sft", "--data", "prompts.jsonl", "--block_size", "49"], "--block_size 49"),
    ("model.py", ["nowhere", "--prompt", "a"], "nowhere"),
]


@pytest.mark.parametrize("script, options, named", BAD)
def test_bad_input_is_one_sentence_and_exit_code_2(folders, script, options, named, monkeypatch, capsys):
    tmp = folders["tmp"]
    write(tmp / "bad_ranked.jsonl", [{"prompt": "a", "ranked": ["only one"]}])
    (tmp / "empty.txt").write_text("")
    (tmp / "broken.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    (tmp / "notes.md").write_text("some text")
    write(tmp / "null.jsonl", [{"prompt": "a", "completion": "b", "completion_ended": "yes"}])
    torch.save({"model": {}, "step": 3}, tmp / "sft" / "state.pt")
    (tmp / "garbage").mkdir()
    (tmp / "garbage" / "model.pt").write_bytes(b"\x00garbage" * 99)
    before = {p: p.read_bytes() for p in tmp.rglob("*") if p.is_file()}
    if options == next(given for name, given, _ in BAD if name == script):  # of each script one as a user runs it
        done = run(script, *options, cwd=tmp)
        code, said = done.returncode, done.stderr
    else:
        monkeypatch.chdir(tmp)
        monkeypatch.setattr(sys, "argv", [script, *options])
        with pytest.raises(SystemExit) as stop:
            common.run_main(importlib.import_module(script.removesuffix(".py")).main)
        code, said = stop.value.code, capsys.readouterr().err
    assert code == 2 and named in said, said
    assert "Traceback" not in said and said.count("\n") == 1
    assert all(path.read_bytes() == content for path, content in before.items())
    assert not (tmp / "x").exists()


@pytest.mark.parametrize("stage", [sft, reward, ppo])
def test_the_help_shows_every_option_with_its_comment(stage):
    done = run(f"{stage.__name__}.py", "--help")
    shown = "".join(done.stdout.split())
    lines = (ROOT / f"{stage.__name__}.py").read_text().split("class Config:\n")[1].split("\n\n\n")[0].split("\n")
    headings = [line for line in lines if line.startswith("    # ")]
    assert done.returncode == 0 and len(lines) - len(headings) == len(dataclasses.fields(stage.Config))
    for line in lines:
        assert "".join(line.partition("# ")[2].split()) in shown, line
    for heading in headings:
        assert heading[6:] + ":" in done.stdout.splitlines()
    example = stage.__doc__.split("\n")[2]  # as it stands, with its blanks
    assert example in done.stdout.splitlines()
    assert "default: )" not in done.stdout and "default: None" not in done.stdout


def test_an_option_may_be_written_with_dashes_and_a_misspelt_one_is_told_the_nearest():
    cfg = common.parse(ppo.Config, ["--kl-coef", "0.3", "--no-drop-long", "--max-grad-norm=2", "--judge", "a-b.py:f"])
    assert (cfg.kl_coef, cfg.drop_long, cfg.max_grad_norm, cfg.judge) == (0.3, False, 2.0, "a-b.py:f")
    with pytest.raises(InputError, match=r"^--kl_cof: no such option; did you mean --kl_coef\?$"):
        common.parse(ppo.Config, ["--kl_cof", "0.3"])
    with pytest.raises(InputError, match="^--qqq: no such option; .* --help lists the options$"):
        common.parse(ppo.Config, ["--qqq=0.3"])
    done = run("ppo.py", "--kl-cof", 0.3)
    assert done.returncode == 2 and done.stderr == "ppo.py: --kl-cof: no such option; did you mean --kl_coef?\n"


def test_the_sampler_prints_two_models_side_by_side(folders):
    done = run(
        "model.py",
        folders["sft"],
        "--compare",
        folders["sft"],
        "--prompt",
        "ask me",
        "--samples",
        2,
        "--response_len",
        9,
    )
    assert done.returncode == 0 and done.stdout.count("  ·") == 4, done.stderr


def test_a_kill_while_writing_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    common.save_file({"a": 1}, tmp_path / "model.pt")

    def die(content, file):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", die)
    with pytest.raises(KeyboardInterrupt):
        common.save_file({"a": 2}, tmp_path / "model.pt")
    assert torch.load(tmp_path / "model.pt", weights_only=True) == {"a": 1}


def test_every_torch_load_takes_weights_only():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("data/*.py")]:
        text = path.read_text()
        assert text.count("torch.load(") == text.count("weights_only=True"), path


@pytest.mark.slow
def test_llamas_shape_is_trained_from_nothing(folders):
    tmp = folders["tmp"]
    given = [
        "--data",
        tmp / "text.jsonl",
        "--arch",
        "llama",
        "--n_layer",
        1,
        "--n_embd",
        32,
        "--n_head",
        2,
        "--evals",
        2,
    ]
    done = run("sft.py", *given, "--vocab_size", 300, "--block_size", 32, "--epochs", 20, "--out", tmp / "x")
    assert done.returncode == 0, done.stderr
    losses = [line["loss/held_out"] for line in metrics(tmp / "x") if "loss/held_out" in line]
    config = common.load_gpt(tmp / "x")[0].config
    assert losses[-1] < losses[0] and config.rope_theta and config.swiglu and config.rms_norm and not config.tied


def test_resuming_both_stages_keeps_a_run_that_started_from_another_model(folders, monkeypatch):
    monkeypatch.chdir(folders["tmp"])
    monkeypatch.setattr(sft.tales, "path", lambda kind: {"pretrain": "text.jsonl", "sft": "pairs.jsonl"}[kind])
    small = "--vocab_size 300 --n_layer 1 --n_embd 32 --n_head 2 --block_size 32 --evals 1 --batch_size 32".split()
    for seed, more in ((0, []), (1, ["--resume"])):
        if seed:  # as a Ctrl-C in the first stage of another run leaves it
            (folders["tmp"] / "out" / "pretrain").rename(folders["tmp"] / "out" / "before")
        monkeypatch.setattr(sys, "argv", ["sft.py", "--seed", str(seed), *small, *more])
        sft.main()
    seeds = [torch.load(f"out/{name}/state.pt", weights_only=True)["options"]["seed"] for name in ("sft", "sft.1")]
    assert seeds == [1, 0]
