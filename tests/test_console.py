"""What a run says at the console and returns to Python, and how the options of a run are taken again."""

import json
import sys
from types import SimpleNamespace

import pytest

import ppo
import sft
from common import about, cli, dist, runs
from data import InputError
from data.rng import generator
from tests.conftest import make_gpt
from tools import sample


def test_steps_are_printed_two_seconds_apart_beside_the_first_the_last_and_those_evaluated(monkeypatch, capsys):
    now = SimpleNamespace(time=lambda: now.clock, clock=0.0)
    monkeypatch.setattr(runs, "time", now)
    logs = SimpleNamespace(step=0, steps=40, times={}, logged_at=0.0, shown_at=0.0, started=0.0)
    logs.cfg = SimpleNamespace(dtype="auto")
    logs.append = lambda name, line: None
    for step in range(40):
        now.clock += 0.25
        logs.times = {"time/evaluate": 0.1} if step == 20 else {}
        runs.Run.log(logs, step, {"loss": 1.0}, ["loss"], 9)
    shown = [int(line.split("/")[0].split()[1]) for line in capsys.readouterr().out.splitlines()]
    assert shown == [1, 9, 17, 21, 29, 37, 40]


def test_what_takes_over_five_seconds_says_how_far_it_is(monkeypatch, capsys):
    now = SimpleNamespace(time=lambda: now.clock, clock=0.0)
    monkeypatch.setattr(dist, "time", now)
    for part in dist.counted(range(8), "sampling"):
        now.clock = 2.0 * (part + 1)
    said = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert said == ["sampling: 37%, 0:00:10 left", "sampling: 75%, 0:00:04 left"]


@pytest.mark.parametrize(
    "stage, folders, said",
    [
        ("sft", {"init": "out/pretrain", "out": "out/sft"}, "python reward.py"),
        ("sft", {"init": "out/base", "out": "out/mine"}, "python reward.py --init out/mine"),
        ("sft", {"init": "", "out": "out/base", "data": "x.txt"}, "python sft.py --init out/base --data PAIRS.jsonl"),
        ("sft", {"init": "", "out": "out/base", "data": "out/data/tales/pretrain.jsonl"}, ""),
        ("reward", {"init": "out/sft", "out": "out/reward"}, "python ppo.py"),
        ("reward", {"init": "out/a b", "out": "out/r"}, "python ppo.py --init 'out/a b' --reward out/r"),
        ("ppo", {"init": "out/sft", "out": "out/ppo"}, "python -m tools.sample out/ppo --chat"),
    ],
)
def test_a_run_ends_with_the_command_that_goes_on_from_it(stage, folders, said):
    assert about.next_command(stage, SimpleNamespace(**folders)) == said


def test_the_last_lines_of_a_run_name_its_report_and_the_next_command(folders, monkeypatch, capsys):
    monkeypatch.chdir(folders["tmp"])
    settings = dict(data="prompts.jsonl", init="sft", reward="reward", iterations=2, batch_size=16, minibatch_size=8)
    ppo.train(ppo.Config(**settings, response_len=8, eval_prompts=8, out="out/two"))
    *_, report, next_command = capsys.readouterr().out.splitlines()
    assert report == "out/two/report.json: the report, with all its numbers"
    assert next_command == "next: python -m tools.sample out/two --chat"


def test_like_takes_the_options_of_a_run_and_the_command_line_goes_first(tmp_path):
    given = ["--kl_coef", "0", "--lr", "0.001", "--unended_cap", "inf", "--compile", "--out", "out/x", "--resume"]
    made = cli.parse(ppo.Config, given)
    write_config(tmp_path, made.__dict__)
    found = cli.parse(ppo.Config, ["--like", str(tmp_path), "--lr", "0.5"])
    assert found == ppo.Config(kl_coef=0.0, lr=0.5, unended_cap=float("inf"), compile=True)
    assert cli.parse(ppo.Config, ["--like", str(tmp_path), "--out", "y"]).out == "y"
    with pytest.raises(InputError, match="--like .*: has --.*, which is no option here"):
        cli.parse(sft.Config, ["--like", str(tmp_path)])
    with pytest.raises(InputError, match="--like .*: holds no config.json of a run"):
        cli.parse(ppo.Config, ["--like", str(tmp_path / "nowhere")])
    write_config(tmp_path, {"lr": "much"})
    with pytest.raises(InputError, match="--lr: invalid float value: 'much'"):
        cli.parse(ppo.Config, ["--like", str(tmp_path)])


def write_config(folder, options):
    (folder / "config.json").write_text(json.dumps({"options": options}))


def test_the_sampler_tells_the_score_and_the_kl_of_each_answer(folders, monkeypatch, capsys):
    write_config(folders["sft"], {"kl_coef": 0.1, "ref": "", "init": str(folders["sft"])})
    words = ["--prompt", "ask me", "--samples", "2", "--response_len", "9", "--reward", str(folders["reward"])]
    monkeypatch.setattr(sys, "argv", ["tools.sample", str(folders["sft"]), *words])
    sample.main()
    said = capsys.readouterr().out
    assert said.count("  score ") == 2 and said.count("  KL 0.00") == 2  # it is its own frozen copy


def test_the_kl_of_an_answer_is_the_sum_of_log_ratios_of_its_tokens(encoding):
    gpt, ref = (make_gpt(seed, encoding.n_vocab, encoding.eot_token) for seed in (0, 1))
    cfg = sample.Config(response_len=9)
    ((_, mark),) = sample.answers(gpt, encoding, "ask me", 1, cfg, generator("x"), ref=ref)
    ids = encoding.encode("ask me")
    how = {"temperature": cfg.temperature, "top_k": cfg.top_k, "top_p": cfg.top_p}
    tokens, _, _ = gpt.generate([ids], 9, **how, generator=generator("x"))
    logp, ref_logp = (net(tokens)[0].log_softmax(-1).double() for net in (gpt, ref))
    places = [(i - 1, tokens[0, i]) for i in range(len(ids), tokens.shape[1])]
    by_hand = sum((logp[place] - ref_logp[place]).item() for place in places)
    assert float(mark.split("KL ")[1]) == pytest.approx(by_hand, abs=6e-3) and abs(by_hand) > 0.1


def test_a_model_without_a_chat_template_goes_on_with_each_line(folders, encoding, gpt, monkeypatch, capsys):
    said = iter(["ask me", "yes", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(said))
    asked = []
    monkeypatch.setattr(sample, "answers", lambda model, encoding, prompt, *more: asked.append(prompt) or [("no", "")])
    sample.talk(gpt, encoding, sample.Config(), None)
    assert asked == ["ask me", "yes"] and capsys.readouterr().out.count("no chat template") == 1


def test_help_tells_the_default_of_every_number(capsys):
    with pytest.raises(SystemExit):
        cli.parse(ppo.Config, ["--help"])
    said = " ".join(capsys.readouterr().out.split())
    fields = {name: field.default for name, field in ppo.Config.__dataclass_fields__.items()}
    numbers = {name: x for name, x in fields.items() if isinstance(x, (int, float)) and not isinstance(x, bool)}
    shown = {name: said.partition(f" --{name} {type(x).__name__} ")[2] for name, x in numbers.items()}
    assert [name for name, x in numbers.items() if not shown[name].partition("(default: ")[2].startswith(f"{x})")] == []
    assert 0 in numbers.values()
