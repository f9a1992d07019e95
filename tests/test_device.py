"""What runs on a GPU, on a pretended one (pretend.py): the numbers are the CPU's, and wrong code is seen to fail."""

import copy
import gc
import sys
import types

import pytest
import torch

import data
import fast
import model
import ppo
import reward
from common import cli, measure, nets, runs
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
@pytest.mark.parametrize("kind, static", [("cuda:0", False), ("cuda:0", True), ("mps:0", False)])
def test_a_device_samples_the_tokens_of_the_cpu(kind, static, family, n_layer):
    gpt = small(family, n_layer)
    expected = [sample(gpt, n) for n in (1, 18)]
    with pretended(kind) as device:
        gpt.to(kind).decoder = fast.static_decode if static else None
        assert [sample(gpt, n) for n in (1, 18)] == expected
        assert len(device.graphs) == (1 if static else 0)


@pytest.mark.parametrize("kind", DEVICES)
def test_the_plain_lines_run_on_a_device_too(kind):
    gpt = small("llama")
    plain = plain_model().GPT(plain_model().GPTConfig(**vars(gpt.config))).eval()
    plain.load_state_dict(gpt.state_dict())
    expected = sample(gpt, 17)
    with pretended(kind):
        assert sample(plain.to(kind), 17) == expected


def test_compiled_blocks_bring_the_decode_of_a_graph_on_cuda_alone(monkeypatch):
    monkeypatch.setattr(model.Block, "compile", lambda block, **how: None)
    cpu, gpt = small(), small()
    with pretended("cuda:0"):
        fast.compile_blocks(cpu, gpt.to("cuda:0"))
    assert cpu.decoder is None and gpt.decoder is fast.static_decode


def test_a_response_costs_one_wait_and_a_look_at_every_sixteenth_token():
    gpt = small()
    with pretended("cuda:0") as device:
        gpt.to("cuda:0")
        for gpt.decoder in (None, fast.static_decode):
            counts = []
            for n in (2, 8, 33):
                device.waits.clear()
                gpt.generate([[1]] * 20, n, generator=torch.Generator().manual_seed(1))
                looks = [line for line in device.waits if "done.all()" in line]
                counts.append((len(looks), len(device.waits) - len(looks)))
            (few, once), (_, more), (looked, most) = counts
            assert few <= 1 and looked <= 3  # of 33 tokens
            assert once == more == most  # what goes to the device at the start, and the lengths


def test_a_graph_serves_every_later_call_of_its_shapes_and_sees_new_weights():
    gpt = small()
    with pretended("cuda:0") as device:
        gpt.to("cuda:0").decoder = fast.static_decode
        plain = copy.deepcopy(gpt)
        plain.decoder = None
        for autocast in (OFF, bf16()):
            device.graphs.clear()
            for prompts in (PROMPTS, [[5] * 9] * 4, PROMPTS):
                with autocast:
                    assert sample(gpt, 7, prompts) == sample(plain, 7, prompts)
                for net in (gpt, plain):
                    change(net)
            assert len(device.graphs) == 1


def test_another_temperature_or_moved_weights_get_another_graph_and_the_last_is_kept():
    gpt = small()
    with pretended("cuda:0") as device:
        gpt.to("cuda:0").decoder = fast.static_decode
        for temperature in (1.0, 0.5, 0.0):
            gpt.decoder = None
            plain = sample(gpt, 5, temperature=temperature)
            gpt.decoder = fast.static_decode
            assert sample(gpt, 5, temperature=temperature) == plain
        gpt.wpe.weight = torch.nn.Parameter(gpt.wpe.weight * 2)
        for n in (5, 5, 6, 7):
            sample(gpt, n)
        assert len(device.graphs) == 6 and len(fast.DECODES[gpt]) == 1
        copy.deepcopy(gpt)
        before = len(fast.DECODES)
        del gpt
        gc.collect()
        assert len(fast.DECODES) == before - 1


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
            scores = reward.score_groups(nets[3], groups, torch.device(device))
        margins = measure.margins(groups, scores)
        batch |= {f"logp {i}": x for i, x in enumerate(logp)} | {"scores": scores, "margins": margins}
        return {name: x.cpu() for name, x in batch.items()}

    expected = everything("cpu")
    with pretended(kind):
        found = everything(kind)
    for name, x in expected.items():
        torch.testing.assert_close(found[name], x, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("kind", DEVICES)
def test_the_options_of_a_run_find_the_device_and_its_precision(kind, tmp_path):
    cfg = ppo.Config(out=str(tmp_path / "run"), iterations=1)
    with pretended(kind) as pretend:
        device, autocast = cli.setup(cfg)
        assert device.type == kind.partition(":")[0] == cli.pick_device("auto").type
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


def mistaken(file: str, changes: dict[str, str], monkeypatch) -> types.ModuleType:
    """model.py with a mistake in it or in the fast.py that it imports."""
    for name in ("fast", "model"):
        text = (ROOT / f"{name}.py").read_text()
        for right, wrong in changes.items() if f"{name}.py" == file else ():
            assert text.count(right) == 1, right
            text = text.replace(right, wrong)
        module = types.ModuleType(name)
        monkeypatch.setitem(sys.modules, name, module)
        exec(compile(text, str(ROOT / f"{name}.py"), "exec"), module.__dict__)
    return module


def check(module: types.ModuleType, how: str) -> None:
    """Two calls of like shapes, with weights that change in between, give the right tokens on a device."""
    right, kind = small(), "mps" if how == "mps" else "cuda"
    gpt = module.GPT(module.GPTConfig(**vars(right.config))).eval()
    gpt.load_state_dict(right.state_dict())
    with pretended(f"{kind}:0"):
        gpt.to(kind).decoder = sys.modules["fast"].static_decode if kind == "cuda" else None
        right.to(kind if how == "bfloat16" else "cpu")  # which rounds elsewhere
        for temperature in (1.0, 0.5 if how == "temperature" else 1.0):
            with torch.autocast(kind, torch.bfloat16, enabled=how == "bfloat16", cache_enabled=False):
                found, expected = (sample(net, 7, temperature=temperature) for net in (gpt, right))
            assert found == expected, "other tokens"
            change(gpt), change(right)
            if how == "moved":
                gpt.wpe.weight = torch.nn.Parameter(gpt.wpe.weight.clone())


STEP = "        add_token(hidden[:, 0], t)\n        t.add_(1)\n"  # in the graph
DRAW = "u * cdf[:, -1:], right=True)[:, 0].clamp"
ADD = "    def add_token(hidden: Tensor, t: Tensor) -> None:\n"
MISTAKES = {
    "a step that is not counted": ("float32", "fast.py", {STEP: STEP.partition("\n")[0] + "\n"}, "other tokens"),
    "a Python number in the graph": (
        "float32", "fast.py", {STEP: STEP.replace(", t)", ", torch.full_like(t, i))")}, "other tokens"
    ),
    "a rebound buffer": (
        "float32",
        "fast.py",
        {ADD: f"{ADD}        nonlocal done\n", "done.logical_or_(": "done = done.logical_or("},
        "has been freed|other tokens",
    ),
    "an item() in the draw": (
        "float32", "fast.py", {DRAW: DRAW.replace("],", "].max().item(),")}, "while a graph is captured"
    ),
    "places on the CPU": ("float32", "fast.py", {"arange(P + N, device=device), p": "arange(P + N), p"}, "cpu mix"),
    "places that the graph outlives": ("float32", "fast.py", {'"place": place, ': ""}, "has been freed"),
    "an index on the CPU": ("mps", "model.py", {"index.flatten().to(x.device)": "index.flatten()"}, "cpu mix"),
    "float64 on MPS": ("mps", "model.py", {'device.type != "mps"': 'device.type != "cpu"'}, "no float64"),
    "a cache read beyond its end": ("float32", "fast.py", {"place > P + t - 1": "place > P + t"}, "other tokens"),
    "rounded weights that stay as they were": (
        "bfloat16", "fast.py", {"(weight, copy).copy_(copy)": "(weight, copy)"}, "other tokens"
    ),
    "buffers that a later call does not fill": (
        "float32", "fast.py", {"        state[name].copy_(x)\n": "        pass\n"}, "out of bounds|other tokens"
    ),
    "a temperature that the graph keeps": (
        "temperature", "fast.py", {"(config, choose.keywords, ": "(config, "}, "other tokens"
    ),
    "weights that the graph outlives": (
        "moved", "fast.py", {"pointers = [x.data_ptr() for x in model.parameters()]": "pointers = []"}, "has been freed"
    ),
}  # fmt: skip


@pytest.mark.parametrize("how", ["float32", "temperature", "bfloat16", "moved", "mps"])
def test_the_code_as_it_is_passes_the_check_of_mistakes(how, monkeypatch):
    check(mistaken("", {}, monkeypatch), how)


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_seen_on_the_pretended_device(name, monkeypatch):
    how, file, changes, seen = MISTAKES[name]
    with pytest.raises((AssertionError, IndexError, RuntimeError, TypeError), match=seen):
        check(mistaken(file, changes, monkeypatch), how)


@pytest.mark.parametrize("present", [[], ["_linear_pointwise"]])
def test_a_build_that_lacks_private_operators_draws_the_same_tokens(present, monkeypatch):
    gpt = make_gpt(n_inner=2**15)  # 2**20 weights
    operators = types.SimpleNamespace(**{name: getattr(torch.ops.mkldnn, name) for name in present})
    monkeypatch.setattr(torch.ops, "mkldnn", operators)
    module = mistaken("", {}, monkeypatch)
    other = module.GPT(module.GPTConfig(**vars(gpt.config))).eval()
    other.load_state_dict(gpt.state_dict())
    found = sample(other, 9)
    monkeypatch.undo()
    assert found == sample(gpt, 9)
