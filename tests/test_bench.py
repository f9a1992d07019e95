"""The bench runs to its end, and what it computes is what is so."""

import functools
import json
import re

import pytest
import torch

import fast
import model
from model import GPT, ScalarModel
from tests import bench, checks, contenders, measure, memory, report
from tests.conftest import ROOT, run
from tests.contenders import OURS
from tests.shapes import config_of

CPU = torch.device("cpu")


@pytest.fixture
def forked(monkeypatch):
    """Each process of the bench is forked from one that has loaded torch. Holds their command lines."""
    started = []

    def python(flag: str, module: str, *argv: str):
        assert flag == "-m"
        started.append([module, *argv])
        return run(f"{module.replace('.', '/')}.py", *argv)

    monkeypatch.setattr(measure, "python", python)
    return started


def saved_bytes(model, tokens, checkpointed: bool, bf16: bool) -> tuple[int, torch.Tensor]:
    """Bytes of all storages that autograd saves in one forward, without the net's own; what the forward returns."""
    own = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())}
    found = {}

    def keep(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage  # alive, so that no address comes twice
        return x

    prompt_len = torch.ones(len(tokens), dtype=torch.long)
    trunk = model if isinstance(model, GPT) else model.trunk
    trunk.checkpoint_activations = checkpointed
    forward = model.logprobs if isinstance(model, GPT) else model.values
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), torch.autocast("cpu", enabled=bf16):
        out = forward(tokens, prompt_len, prompt_len + tokens.shape[1] - 1)
    return sum(storage.nbytes() for storage in found.values()), out


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("net", ["logprobs", "values"])
@pytest.mark.parametrize("name", ["small", "llama-small"])
def test_the_activations_that_are_computed_are_those_that_autograd_saves(name, net, checkpointed, bf16):
    if config_of(name).rms_norm and tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13):
        pytest.skip("the RMSNorm of an older torch saves more")
    config = config_of(name, 200)
    model = GPT(config) if net == "logprobs" else ScalarModel(GPT(config))
    tokens = torch.randint(0, 1000, (2, 161))
    found, _ = saved_bytes(model, tokens, checkpointed, bf16)
    computed = memory.saved(config, 2, 160, bf16, checkpointed, net == "logprobs")
    assert computed == pytest.approx(found, rel=0.03)


def test_the_logits_that_are_computed_are_those_that_wait_for_the_backward(monkeypatch):
    config = config_of("small", 200)
    for chunk in (1024 * 15, 1024 * 500):  # of which only the last sixteen are kept, and all
        monkeypatch.setattr(fast, "CHUNK", chunk)
        _, logp = saved_bytes(GPT(config), torch.randint(0, 1000, (2, 161)), False, False)
        nodes, kept = [logp.grad_fn], 0
        while nodes:
            node = nodes.pop()
            kept += sum(exp.nbytes for exp, _ in getattr(node, "kept", []))
            nodes += [each for each, _ in node.next_functions if each]
            if kept:
                break
        assert memory.logits(config, 320, "cpu") == pytest.approx(kept, rel=0.3 if chunk == 1024 * 15 else 0.01)


def test_a_trained_net_takes_16_bytes_a_parameter_and_a_frozen_one_4_or_2():
    assert memory.parameters("gpt2") == (124_439_808, 85_017_600)
    assert memory.parameters("llama-1b")[0] == 1_235_814_400
    assert memory.parameters("llama-8b")[0] == 8_030_261_248
    gpt, scalar = (memory.parameters("llama-8b", scalar)[0] for scalar in (False, True))
    assert gpt - scalar == 128_256 * 4096 - 4097  # no output layer, but a head
    assert memory.largest(80, 1, 0) == "gpt2-xl"  # 1.56 billion in 55 GiB; llama-1b has 1.24 billion
    assert memory.nets("gpt2", 1, False) == 16 * 124_439_808
    assert memory.nets("gpt2", 3, False) - memory.nets("gpt2", 3, True) == 2 * 2 * 85_017_600


def test_the_tables_of_memory_in_the_readme_are_those_that_are_computed():
    page = (ROOT / "tests" / "README.md").read_text()
    assert memory.table() in page


def test_the_plain_loop_draws_the_tokens_of_generate():
    model = contenders.make_gpt("small", 24, CPU)
    prompts = contenders.random_tokens("small", 5, 16)
    uniform = torch.rand(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).T  # row after row
    tokens, _, _ = model.generate(prompts.tolist(), 8, generator=torch.Generator().manual_seed(3))
    assert torch.equal(contenders.plain_decoder(model)(prompts, uniform), tokens[:, 16:])


def test_operations_are_counted_as_six_a_weight_and_token():
    """N of GPT-2's 124M without positions, biases and norms."""
    weights = 12 * 12 * 768**2 + 50257 * 768
    assert contenders.flops("train", "gpt2", 8, 1024) == 6 * weights + 12 * 12 * 768 * 1024
    assert contenders.matrices("llama-1b") == (973_078_528, 128_256 * 2048)
    cache = 2 * 16 * 8 * 64 * (64 + 96)
    assert contenders.bytes_read("llama-1b", 3, 64, 192, CPU) == 4 * (973_078_528 + 128_256 * 2048 + 3 * cache)


WORKS = [("train", "small", 2, 16), ("generate", "llama-small", 3, 4, 4), ("ppo", "llama-small", 4, 2, 4, 4)]


@pytest.mark.slow
def test_the_report_checks_and_measures_a_device_and_writes_a_page(forked, tmp_path):
    works = [*WORKS, ("train", "small", 2**40, 16)]
    page = tmp_path / "cpu.md"
    assert report.write(str(page), CPU, works, ["llama-small"], rivals=[], seconds=0.01)
    text = page.read_text()
    assert len(re.findall(r"^\| greedy decode .* \| yes \|", text, re.MULTILINE)) == 2
    assert "a resumed run of PPO = the run that was not stopped | bit for bit | yes" in text
    assert "**no**" not in text
    assert re.search(r"at \d+\.\d+ TFLOP/s \(float32\) and copies \d+ GB/s", text)
    assert re.search(r"training, small, 2 × 16 \| plainrlhf \| [\d,]+ tokens/s \| \d+% of the products", text)
    assert re.search(r"generation, llama-small, 3 × 4 × 4 \| plainrlhf \| [\d,]+ tokens/s \| \d+% of the bandw", text)
    assert re.search(r"4 × 2 × 4 × 4 \| plainrlhf \| [\d.]+ s \(rollout [\d.]+, score [\d.]+, update [\d.]+\)", text)
    assert re.search(r"training, small, 1099511627776 × 16 \| plainrlhf \| out of memory", text)
    commands = re.findall(r"`python -m (tests\.\S+ [^`]*)`", text)
    assert [" ".join(argv).split(" --seconds")[0] for argv in forked] == list(dict.fromkeys(commands))[1:]


def test_a_failed_check_is_a_row_and_an_exit_code(monkeypatch, tmp_path):
    def broken(*argv):
        return type("Done", (), dict(returncode=-11, stdout="", stderr="Segmentation fault"))

    monkeypatch.setattr(measure, "python", broken)
    monkeypatch.setattr(report, "write", functools.partial(report.write, works=[], rivals=[]))
    with pytest.raises(SystemExit) as end:
        bench.main(["--device", "cpu", "--report", str(tmp_path / "x.md")])
    assert end.value.code == 1
    assert "| decoding | Segmentation fault | **no** |" in (tmp_path / "x.md").read_text()


def test_a_check_sees_a_decode_that_reads_what_it_must_not(monkeypatch):
    def without_mask(q, k, v, mask, dropout=0.0):
        return fast.attend(q, k, v, None if mask is None else mask.clamp(min=0), dropout)

    monkeypatch.setattr(model, "attend", lambda *given: 1 / 0)
    broken = [("decoding, small", "ZeroDivisionError: division by zero", False)]
    assert checks.run("decoding", ["small"], CPU) == broken
    monkeypatch.setattr(model, "attend", without_mask)
    findings = checks.run("decoding", ["llama-small"], CPU)
    assert not any(right for _, _, right in findings)


def test_ratios_are_of_the_same_round_and_stand_beside_the_shares_of_a_plain_loop_and_of_the_peak(monkeypatch, capsys):
    rates = {OURS: [100.0, 60.0, 90.0], "transformers": [50.0, 40.0, 30.0], "transformers:kept": [80.0, 60.0, 60.0]}
    rates["floor:kept"] = [200.0, 80.0, 100.0]
    work, asked = contenders.flops("generate", "small", 64, 16, 48), []

    def alone(who, *words, device, seconds=3.0):
        asked.append(who)
        if who == "limits":
            return {"products": 1000 * work, "copy": 1.0}
        return {"tokens_per_s": rates[who][asked.count(who) - 1], "peak_GiB": 0.5}

    monkeypatch.setattr(bench, "alone", alone)
    options = ["--what", "generate", "--shapes", "small", "--vs", "transformers", "--rounds", "3", "--device", "cpu"]
    bench.main(options)
    assert asked == ["limits", *rates, *reversed(rates), *rates]
    printed, table = capsys.readouterr().out.split("\n\n")
    ours, theirs, kept, floor = map(json.loads, printed.splitlines())
    assert (theirs["ratio"], theirs["ratio_min"], theirs["ratio_max"]) == (2.0, 1.5, 3.0)
    assert (kept["ratio"], ours["of_floor"], theirs["of_floor"]) == (1.25, 0.75, 0.3)
    assert ours["of_peak"] == pytest.approx(0.09) and floor["of_floor"] == 1.0
    assert table.splitlines()[2:] == [
        "| generate, small, 64 × 16 × 48 | plainrlhf | 90 tokens/s | 90 tokens/s | 1.00 (1.00–1.00) | 1.00 (1.00–1.00)"
        " | 0.75 | 9% | 0.50 |",
        "| generate, small, 64 × 16 × 48 | transformers | 40 tokens/s | 60 tokens/s | 2.00 (1.50–3.00)"
        " | 1.25 (1.00–1.50) | 0.30 | 4% | 0.50 |",
        "| generate, small, 64 × 16 × 48 | floor | – | 100 tokens/s | – | 0.75 (0.50–0.90) | 1.00 | 10% | 0.50 |",
    ]
