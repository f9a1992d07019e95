"""What runs on a GPU, on a pretended one (pretend.py): the numbers are the CPU's, and wrong code is seen to fail."""

import copy
import sys
import types

import pytest
import torch

import data
import fast
import model
import ppo
from common import agreement, cli, nets, runs
from model import ScalarModel
from tests.conftest import FAMILIES, ROOT, make_gpt
from tests.contenders import plain_model
from tests.pretend import pretended

DEVICES = ["cuda:0", "mps:0"]
PROMPTS = [[1], [2, 3, 4, 5, 6, 7], [], [8, 9, 10]]
OFF = torch.autocast("cpu", enabled=False)
CFG = ppo.Config(response_len=16, minibatch_size=3)


def small(family: str = "gpt2", n_layer: int = 1) -> model.GPT:
    """A tiny GPT that ends many of its responses."""
    made = make_gpt(block_size=64, n_layer=n_layer, **FAMILIES[family])
    made.config.eos = 7
    return made


def sample(gpt: model.GPT, n: int, prompts=PROMPTS, **how) -> list[list]:
    """What `generate` returns, as lists."""
    return [x.tolist() for x in gpt.generate(prompts, n, generator=torch.Generator().manual_seed(1), **how)]


@torch.no_grad()
def change(net: model.GPT) -> None:
    """An update of weights and biases, in place."""
    net.h[0].mlp.c_fc.weight.mul_(-1)
    net.h[0].attn.c_proj.bias.add_(0.5)
    net.wte.weight.mul_(0.9)


def bf16() -> torch.autocast:
    return torch.autocast("cuda", torch.bfloat16, cache_enabled=False)


OTHERS = [name for name in FAMILIES if name not in ("gpt2", "llama")]
LAYERS = [("gpt2", 1), ("llama", 1), *(pytest.param(name, 2, marks=pytest.mark.slow) for name in OTHERS)]


@pytest.mark.parametrize("family, n_layer", LAYERS)
@pytest.mark.parametrize("kind", DEVICES)
def test_a_device_samples_the_tokens_of_the_cpu(kind, family, n_layer):
    gpt = small(family, n_layer)
    expected = [sample(gpt, n) for n in (1, 18)]
    with pretended(kind):
        gpt.to(kind)
        assert [sample(gpt, n) for n in (1, 18)] == expected


@pytest.mark.parametrize("kind", DEVICES)
def test_the_plain_lines_run_on_a_device_too(kind):
    gpt = small("llama")
    plain = plain_model().GPT(plain_model().GPTConfig(**vars(gpt.config))).eval()
    plain.load_state_dict(gpt.state_dict())
    expected = sample(gpt, 17)
    with pretended(kind):
        assert sample(plain.to(kind), 17) == expected


def test_a_response_costs_one_wait_and_a_look_at_every_sixteenth_token():
    gpt = small()
    with pretended("cuda:0") as device:
        gpt.to("cuda:0")
        counts = []
        for n in (2, 8, 33):
            device.waits.clear()
            gpt.generate([[1]] * 20, n, generator=torch.Generator().manual_seed(1))
            looks = [line for line in device.waits if "done.all()" in line]
            counts.append((len(looks), len(device.waits) - len(looks)))
        (few, once), (_, more), (looked, most) = counts
        assert few <= 1 and looked <= 3  # of 33 tokens
        assert once == more == most  # what goes to the device at the start, and the lengths


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("kind", DEVICES)
def test_a_device_reads_what_the_cpu_reads(kind, family):
    policy, ref = small(family), small(family)
    torch.manual_seed(1)
    value, scorer = ScalarModel(copy.deepcopy(policy)).eval(), ScalarModel(copy.deepcopy(policy)).eval()
    with torch.no_grad():
        ref.h[0].mlp.c_fc.weight.mul_(0.5)
    groups = [data.Group([data.Row([1, 2, 3], 1), data.Row([1, 4], 1)], [(0, 1)], [1.0])]

    def everything(device: str) -> dict:
        nets = [net.to(device) for net in (policy, ref, value, scorer)]
        batch = ppo.rollout(nets[0], PROMPTS, CFG, torch.Generator().manual_seed(0))
        batch |= ppo.read(batch, *nets[:3], ppo.scorer(nets[3], None, 7, CFG), CFG)
        batch |= ppo.estimate(batch, 0.1, CFG)
        sequences = batch["tokens"], batch["prompt_len"], batch["length"]
        with torch.no_grad():
            logp = nets[0].logprobs(*sequences, 0.7), *nets[0].logprobs_and_entropy(*sequences, 0.7)
            scores = agreement.score_groups(nets[3], groups, torch.device(device))
        margins = agreement.margins(groups, scores)
        batch |= {f"logp {i}": x for i, x in enumerate(logp)} | {"scores": scores, "margins": margins}
        return {name: x.cpu() for name, x in batch.items()}

    expected = everything("cpu")
    with pretended(kind):
        found = everything(kind)
    for name, x in expected.items():
        torch.testing.assert_close(found[name], x, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("kind", DEVICES)
def test_the_options_of_a_run_find_the_device_and_its_precision(kind, tmp_path):
    cfg = ppo.Config(out=str(tmp_path / "run"), iterations=1, device=kind)
    with pretended(kind) as pretend:
        device, autocast = cli.setup(cfg)
        assert device.type == kind.partition(":")[0]
        assert cli.pick_device("auto").type == ("cuda" if kind == "cuda:0" else "cpu")
        assert autocast.device == device.type and autocast._enabled == (device.type == "cuda")
        frozen = nets.freeze(small().to(device), autocast)
        assert frozen.h[0].mlp.c_fc.weight.dtype == (torch.bfloat16 if device.type == "cuda" else torch.float32)
        assert frozen.wte.weight.dtype == torch.float32 and not frozen.wte.weight.requires_grad
        run = runs.Run(cfg)
        pretend.waits.clear()
        with run.timed("rollout"):
            pass
        assert len(pretend.waits) == 1 and run.times["time/rollout"] >= 0
        tokens, prompt_len, length = data.pad([data.Row([1, 2, 3], 1), data.Row([4], 1)], device)
        assert tokens.device.type == device.type and tokens.tolist() == [[1, 2, 3], [4, 0, 0]]
        assert prompt_len.device.type == length.device.type == "cpu"


def test_log_probabilities_under_autocast_are_summed_in_float32_by_either_product(monkeypatch):
    gpt = small()
    where = gpt.generate(PROMPTS, 9, generator=torch.Generator().manual_seed(1))
    found, calls, refusals, mm = [], [], [], torch.mm

    def older(*given, **options):
        calls.append(options)
        if refusals and options:
            raise refusals[0]
        return mm(*given, **options)

    monkeypatch.setattr(torch, "mm", older)
    with pretended("cuda:0"):
        where = where[0].to("cuda:0"), *where[1:]
        gpt.to("cuda:0")
        # torch 2.6 does not know the argument, another build has no kernel for it
        for error in (None, TypeError("unexpected keyword"), NotImplementedError("no kernel")):
            refusals[:] = [error] if error else []
            fast.sums_in_float32.cache_clear()
            with bf16(), torch.no_grad():
                found.append((gpt.logprobs(*where).cpu(), sample(gpt, 5)))
    fast.sums_in_float32.cache_clear()
    products = 1 + 5 if hasattr(torch.ops.aten.mm, "dtype") else 0  # of `logprobs`, and of five tokens
    assert calls.count({"out_dtype": torch.float32}) == products + 3  # each build is asked once
    assert found[0][1] == found[1][1] == found[2][1]
    for logp, _ in found:
        torch.testing.assert_close(logp, found[0][0], rtol=1e-5, atol=1e-5)


# --- mistakes: each must be seen --------------------------------------------------------------------------------------


def mistaken(changes: dict[str, str], monkeypatch) -> types.ModuleType:
    """model.py with a mistake in it, and a fast.py of its own."""
    for name in ("fast", "model"):
        text = (ROOT / f"{name}.py").read_text()
        for right, wrong in changes.items() if name == "model" else ():
            assert text.count(right) == 1, right
            text = text.replace(right, wrong)
        module = types.ModuleType(name)
        monkeypatch.setitem(sys.modules, name, module)
        exec(compile(text, str(ROOT / f"{name}.py"), "exec"), module.__dict__)
    return module


def check(module: types.ModuleType, kind: str) -> None:
    """Two calls, with weights that change in between, give the right tokens on a device."""
    right = small()
    gpt = module.GPT(module.GPTConfig(**vars(right.config))).eval()
    gpt.load_state_dict(right.state_dict())
    with pretended(kind):
        gpt.to(kind)
        for _ in range(2):
            assert sample(gpt, 7) == sample(right, 7), "other tokens"
            change(gpt), change(right)


PLACE, ENDS = "    place = torch.arange(P + N{})", "torch.tensor(config.ends{})\n"
HERE = ", device=device"
MISTAKES = {
    "places on the CPU": ("cuda:0", PLACE.format(HERE), PLACE.format(""), "cpu mix"),
    "an end token on the CPU": ("cuda:0", ENDS.format(HERE), ENDS.format(""), "cpu mix"),
    "an index on the CPU": ("mps:0", "index.flatten().to(x.device)", "index.flatten()", "cpu mix"),
    "float64 on MPS": ("mps:0", 'device.type != "mps"', 'device.type != "cpu"', "no float64"),
}


@pytest.mark.parametrize("kind", DEVICES)
def test_the_code_as_it_is_passes_the_check_of_mistakes(kind, monkeypatch):
    check(mistaken({}, monkeypatch), kind)


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_seen_on_the_pretended_device(name, monkeypatch):
    kind, right, wrong, seen = MISTAKES[name]
    with pytest.raises((AssertionError, IndexError, RuntimeError, TypeError), match=seen):
        check(mistaken({right: wrong}, monkeypatch), kind)


@pytest.mark.parametrize("present", [[], ["_linear_pointwise"]])
def test_a_build_that_lacks_private_operators_draws_the_same_tokens(present, monkeypatch):
    gpt = make_gpt(n_inner=2**15)  # 2**20 weights
    operators = types.SimpleNamespace(**{name: getattr(torch.ops.mkldnn, name) for name in present})
    monkeypatch.setattr(torch.ops, "mkldnn", operators)
    module = mistaken({}, monkeypatch)
    other = module.GPT(module.GPTConfig(**vars(gpt.config))).eval()
    other.load_state_dict(gpt.state_dict())
    found = sample(other, 9)
    monkeypatch.undo()
    assert found == sample(gpt, 9)
