"""sft.py and the plumbing under every stage, run as a user runs them."""

import dataclasses
import gzip
import importlib
import inspect
import sys
from pathlib import Path

import pytest
import torch

import data
import ppo
import reward
import sft
from common import cli, dist, nets, runs
from data import InputError
from model import GPT
from tests.conftest import ROOT, flat, run, write

CPU = torch.device("cpu")


def train(folders, out, *more, kind="text"):
    """sft.py on a tiny file; the rows of its metrics.jsonl, without times."""
    given = ["--data", folders["tmp"] / f"{kind}.jsonl", "--out", folders["tmp"] / out, "--evals", 2, *more]
    if "--init" not in more:
        given += ["--block_size", 32, "--n_layer", 1, "--n_head", 2, "--n_embd", 16, "--vocab_size", 290]
    sft.train(cli.parse(sft.Config, [str(word) for word in given]))
    return metrics(folders["tmp"] / out)


def metrics(folder):
    lines = runs.read_metrics(folder)
    return [{k: v for k, v in line.items() if not k.startswith("time/") and k != "tokens_per_s"} for line in lines]


def test_pretraining_then_fine_tuning_lowers_the_loss_and_repeats_bit_for_bit(folders):
    tmp = folders["tmp"]
    first, again = (train(folders, name, "--epochs", 4, "--lr", 0.01) for name in "ab")
    assert first == again and first[-1]["loss/train"] < 0.8 * first[0]["loss/train"]
    tuned = train(folders, "tuned", "--init", tmp / "a", "--epochs", 10, kind="pairs")
    assert tuned[-1]["loss/train"] < 0.7 * tuned[0]["loss/train"]
    names = {path.name for path in (tmp / "tuned").iterdir()}
    assert {"model.pt", "best.pt", "state.pt", "metrics.jsonl", "samples.txt"} <= names


@pytest.mark.parametrize("kind", ["text", "pairs"])
def test_a_gzipped_file_trains_as_the_plain_one_does(folders, kind):
    plain = folders["tmp"] / f"{kind}.jsonl"
    packed = folders["tmp"] / f"{kind}.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes(), mtime=0))
    losses = []
    for path in (plain, packed):
        lines = train(folders, f"{path.name}.run", "--init", folders["sft"], "--data", path)
        losses.append([line["loss/train"] for line in lines])
    assert losses[0] == losses[1] and losses[0]


def test_a_run_that_was_stopped_and_resumed_is_the_run_that_was_not(folders, monkeypatch):
    tmp, save = folders["tmp"], runs.Run.save
    more = {"kind": "pairs"}
    train(folders, "whole", "--init", folders["sft"], **more)

    def save_then_die(self, *args, **parts):
        save(self, *args, **parts)
        raise KeyboardInterrupt

    monkeypatch.setattr(runs.Run, "save", save_then_die)
    with pytest.raises(KeyboardInterrupt):
        train(folders, "cut", "--init", folders["sft"], **more)
    monkeypatch.setattr(runs.Run, "save", save)
    assert len(metrics(tmp / "cut")) < len(metrics(tmp / "whole"))
    train(folders, "cut", "--init", folders["sft"], "--resume", **more)
    assert metrics(tmp / "cut") == metrics(tmp / "whole")
    assert torch.equal(*(flat(nets.load_gpt(tmp / name)[0]) for name in ("cut", "whole")))


def test_an_earlier_run_is_kept_and_a_foreign_folder_is_refused(folders):
    tmp = folders["tmp"]
    train(folders, "a")
    first = (tmp / "a" / "model.pt").read_bytes()
    train(folders, "a", "--seed", 1)
    assert (tmp / "a.1" / "model.pt").read_bytes() == first != (tmp / "a" / "model.pt").read_bytes()
    (tmp / "mine").mkdir()
    (tmp / "mine" / "thesis.txt").write_text("all I have")
    with pytest.raises(InputError, match="not a run folder"):
        train(folders, "mine")
    assert (tmp / "mine" / "thesis.txt").read_text() == "all I have"


MISSING = "mps" if torch.cuda.is_available() else "cuda"  # no machine has both
GIVEN = ["--init", "sft", "--reward", "reward"]
BAD = [
    ("sft.py", ["--colour", "red"], "--colour"),
    ("sft.py", ["--lr", "fast"], "--lr"),
    ("sft.py", ["--batch_size", "0"], "--batch_size 0: give a number from 1 to 1e+09"),
    ("sft.py", ["--lr", "nan"], "--lr nan: give a number"),
    ("ppo.py", ["--gamma", "1.5"], "--gamma 1.5: give a number from 0 to 1"),
    ("sft.py", ["--data", "nowhere.jsonl"], "nowhere.jsonl"),
    ("sft.py", ["--data", "empty.txt", "--out", "x"], "empty.txt"),
    ("sft.py", ["--data", "broken.jsonl", "--out", "x"], "broken.jsonl:2"),
    ("sft.py", ["--data", "text.jsonl", "--vocab_size", "9", "--out", "x"], "--vocab_size 9"),
    ("sft.py", ["--data", "text.jsonl", "--n_head", "7", "--out", "x"], "--n_head 7"),
    ("sft.py", ["--data", "text.jsonl", "--evals", "0", "--out", "x"], "--evals 0"),
    ("sft.py", ["--data", "text.jsonl", "--arch", "llama", "--n_embd", "30", "--n_head", "2"], "give a multiple of 4"),
    ("sft.py", ["--data", "pairs.jsonl", "--init", "sft", "--dropout", "0.5"], "--dropout: the model of --init"),
    ("reward.py", ["--init", "sft", "--data", "comparisons.jsonl", "--judge", "x.py:f"], "--judge: comparisons.jsonl"),
    ("sft.py", ["--data", "notes.md", "--out", "x"], "notes.md"),
    ("sft.py", ["--data", "null.jsonl", "--init", "sft", "--out", "x"], "null.jsonl: row 1"),
    ("sft.py", ["--data", "text.jsonl", "--device", MISSING], f"--device {MISSING}: "),
    ("sft.py", ["--data", "text.jsonl", "--device", "toaster"], "--device toaster"),
    ("sft.py", ["--data", "text.jsonl", "--dtype", "int8"], "--dtype int8"),
    ("sft.py", ["--data", "pairs.jsonl", "--init", "reward", "--out", "x"], "reward"),
    ("sft.py", ["--data", "pairs.jsonl", "--init", "sft", "--out", "sft"], "--out sft"),
    ("reward.py", ["--init", "nowhere"], "--init nowhere"),
    ("reward.py", ["--init", "garbage"], "garbage"),
    ("reward.py", ["--init", "sft/state.pt"], "sft/state.pt: damaged"),
    ("reward.py", ["--init", "sft", "--data", "prompts.jsonl", "--judge", "x.py:f", "--response_len", "8"], "x.py:f"),
    ("reward.py", ["--init", "sft", "--data", "bad_ranked.jsonl", "--out", "x"], "bad_ranked.jsonl"),
    ("ppo.py", ["--init", "nowhere"], "--init nowhere"),
    (
        "ppo.py",
        ["--init", "sft", "--data", "prompts.jsonl", "--response_len", "8", "--batch_size", "8", "--reward", "sft"],
        "--reward sft",
    ),
    ("ppo.py", [*GIVEN, "--data", "text.jsonl", "--response_len", "8"], 'text.jsonl:1: no column "prompt"'),
    ("ppo.py", [*GIVEN, "--data", "prompts.jsonl", "--response_len", "44"], "are longer than 4 tokens"),
    ("ppo.py", [*GIVEN, "--data", "prompts.jsonl", "--block_size", "49"], "--init sft has a context of 48 tokens"),
    ("ppo.py", [*GIVEN, "--unended_cap=-inf"], "--unended_cap -inf: give a number"),
    ("sft.py", ["--data", "text.jsonl", "--device", "cpu:x"], "--device cpu:x"),
    ("sft.py", ["--data", "text.jsonl", "--block_size", f"{2**63 - 1}", "--out", "x"], "out of memory"),
    ("tools/evaluate.py", ["reward", "--data", "comparisons.jsonl", "--block_size", "49"], "the reward model has a"),
    ("tools/sample.py", ["nowhere", "--prompt", "a"], "nowhere"),
    ("tools/evaluate.py", ["nowhere"], "nowhere"),
    ("tools/evaluate.py", ["sft", "--best_of", "2,x"], "--best_of 2,x"),
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
    if options == next(given for name, given, _ in BAD if name == script) and "/" not in script:  # as a user runs it
        done = run(script, *options, cwd=tmp)
        code, said = done.returncode, done.stderr
    else:
        monkeypatch.chdir(tmp)
        monkeypatch.setattr(sys, "argv", [script, *options])
        with pytest.raises(SystemExit) as stop:
            cli.run_main(importlib.import_module(script.removesuffix(".py").replace("/", ".")).main)
        code, said = stop.value.code, capsys.readouterr().err
    assert code == 2 and named in said, said
    assert "Traceback" not in said and said.count("\n") == 1
    assert all(path.read_bytes() == content for path, content in before.items())
    assert not (tmp / "x").exists()


@pytest.mark.parametrize("stage", [sft, reward, ppo])
def test_the_help_shows_every_option_with_its_comment(stage):
    done = run(f"{stage.__name__}.py", "--help")
    shown = "".join(done.stdout.split())
    sources = [inspect.getsource(each).split("class ")[1] for each in (stage.Config, cli.Shared)]
    lines = [line for source in sources for line in source.splitlines()[1:] if "#" in line or ": " in line]
    headings = [line for line in lines if line.startswith("    # ")]
    assert done.returncode == 0 and len(lines) - len(headings) == len(dataclasses.fields(stage.Config))
    for line in lines:
        assert "".join(line.partition("# ")[2].split()) in shown, line
    for heading in headings:
        assert heading[6:] + ":" in done.stdout.splitlines()
    example = stage.__doc__.split("\n")[2]  # as it stands, with its blanks
    assert example in done.stdout.splitlines()
    assert "default: )" not in done.stdout and "default: None" not in done.stdout


def test_an_option_may_be_written_with_dashes_and_a_misspelt_one_is_named():
    cfg = cli.parse(
        ppo.Config, ["--kl-coef", "0.3", "--checkpoint-activations", "--max-grad-norm=2", "--judge", "a-b.py:f"]
    )
    assert (cfg.kl_coef, cfg.checkpoint_activations, cfg.max_grad_norm, cfg.judge) == (0.3, True, 2.0, "a-b.py:f")
    assert not cfg.resume and cli.parse(ppo.Config, ["--out=~/x"]).out == str(Path.home() / "x")
    with pytest.raises(InputError, match="^unrecognized arguments: --kl_cof 0.3; .* --help lists the options$"):
        cli.parse(ppo.Config, ["--kl_cof", "0.3"])


def test_an_option_of_another_project_is_answered_with_ours_if_the_program_has_it():
    for config, given, said in (
        (ppo.Config, "--beta 0.1", "see --kl_coef; "),
        (ppo.Config, "--max-length=9", "see --response_len, --block_size; "),
        (sft.Config, "--learning_rate 1 --bf16", "see --lr, --dtype bfloat16; "),
        (sft.Config, "--beta 0.1", ""),
        (reward.Config, "--reward_model x", ""),
    ):
        words = given.replace("--max-length", "--max_length")
        with pytest.raises(InputError, match=rf"^unrecognized arguments: {words}; {said}\S+ --help lists the options$"):
            cli.parse(config, given.split())


@dataclasses.dataclass
class Fork(ppo.Config):
    # of a fork, whose options have plain types
    shift: float = 0.5  # of its rewards
    turns: int = 1  # of its dialogue


def test_a_plain_option_of_a_fork_takes_numbers_of_up_to_a_thousand_million_and_inf():
    cfg = cli.parse(Fork, ["--shift", "-1", "--turns=-3", "--kl_coef", "0"])
    assert (cfg.shift, cfg.turns, cfg.kl_coef) == (-1.0, -3, 0.0) and isinstance(cfg.shift, float)
    assert cli.parse(Fork, ["--shift", "inf"]).shift == float("inf")
    for given, said in (
        (["--shift", "nan"], "^--shift nan: give a number from -1e"),
        (["--shift=-inf"], "^--shift -inf: give a number from -1e"),
        (["--unended_cap", "1e308"], r"^--unended_cap 1e\+308: give a number from -1e"),
        (["--turns", "1.5"], "--turns: invalid int value"),
        (["--kl_coef", "-1"], "^--kl_coef -1.0: give a number from 0 to 1e"),
    ):
        with pytest.raises(InputError, match=said):
            cli.parse(Fork, given)


def test_the_sampler_prints_two_models_side_by_side(folders):
    done = run(
        "tools/sample.py",
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
    nets.save_file({"a": 1}, tmp_path / "model.pt")

    def die(content, file):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", die)
    with pytest.raises(KeyboardInterrupt):
        nets.save_file({"a": 2}, tmp_path / "model.pt")
    assert torch.load(tmp_path / "model.pt", weights_only=True) == {"a": 1}


def test_every_torch_load_takes_weights_only():
    for path in [
        *ROOT.glob("*.py"),
        *(p for place in ("common", "data", "tools") for p in ROOT.glob(f"{place}/**/*.py")),
    ]:
        text = path.read_text()
        assert text.count("torch.load(") == text.count("weights_only=True"), path


def test_llamas_shape_is_trained_from_nothing(folders):
    lines = train(folders, "x", "--arch", "llama", "--epochs", 4)
    losses = [line["loss/held_out"] for line in lines if "loss/held_out" in line]
    config = nets.load_gpt(folders["tmp"] / "x")[0].config
    assert losses[-1] < losses[0] and config.rope_theta and config.swiglu and config.rms_norm and not config.tied


def test_a_model_that_an_older_version_wrote_without_the_newer_fields_is_loaded(folders, gpt):
    path = folders["sft"] / "model.pt"
    saved = torch.load(path, weights_only=True)
    first = ("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "dropout", "eos")
    torch.save(saved | {"config": {name: saved["config"][name] for name in first}}, path)
    model, _ = nets.load_gpt(folders["sft"])
    assert model.config == gpt.config and torch.equal(flat(model), flat(gpt))


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


@pytest.mark.parametrize("batch_size, epochs, steps", [(400, 10, 10), (50, 3, 6), (400, 0.1, 1)])
def test_an_epoch_is_as_many_steps_as_it_has_whole_batches_and_one_at_least(folders, batch_size, epochs, steps):
    """Of 125 rows of 25 prompts, those of one are held out. A batch that is larger than the data is all rows."""
    more = ["--batch_size", batch_size, "--epochs", epochs, "--evals", 1]
    assert len(train(folders, "x", "--init", folders["sft"], *more, kind="pairs")) == steps


def test_a_sample_goes_on_from_the_prompt_of_a_row_or_the_first_tokens_of_plain_text(folders, encoding, monkeypatch):
    """Also where the prompt is one token, and where the context holds no more than two."""
    asked, generate = [], GPT.generate
    monkeypatch.setattr(GPT, "generate", lambda *given, **more: asked.extend(given[1]) or generate(*given, **more))
    rows = [{"prompt": letter, "completion": " yes."} for letter in "abcdefghijklmnopqrstuvwxyz"]
    write(folders["tmp"] / "short.jsonl", rows)
    more = ["--init", folders["sft"], "--epochs", 0.001]
    train(folders, "x", *more, kind="short")
    assert [len(prompt) for prompt in asked] == [1] and encoding.decode(asked.pop()) in "abcdefghijklmnopqrstuvwxyz"
    for width in (2, 8, 9, 32):
        train(folders, "x", *more, "--block_size", width)
    assert [len(prompt) for prompt in asked] == [1, 7, 8, 8]


def test_without_shard_no_process_computes_a_held_out_loss_that_another_computes(gpt, monkeypatch):
    rows = [data.Row([1, 2, 3, 4 + i], 1) for i in range(3)]
    lone = [sft.next_token_loss(gpt, [row], CPU).item() for row in rows]
    computed, loss = [], sft.next_token_loss
    monkeypatch.setattr(sft, "next_token_loss", lambda *given: computed.append(given) or loss(*given))
    monkeypatch.setattr(dist, "WORLD", 2)
    monkeypatch.setattr(dist, "RANK", 1)
    others = {0: lone[0], 2: lone[2]}
    monkeypatch.setattr(dist, "gather_objects", lambda x: [2, x] if isinstance(x, int) else [others, x])
    off = torch.autocast("cpu", enabled=False)
    assert sft.held_out_loss(gpt, rows, 1, CPU, off) == pytest.approx(sum(lone) / 9)
    assert len(computed) == 1
