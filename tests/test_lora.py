"""common/lora.py: a net starts as its base, trains as the merged net would, and shares one frozen trunk with others."""

import json
import os
import re
import shutil
import signal
from dataclasses import replace

import pytest
import torch

import data
import ppo
import reward
import sft
from common import cli, dist, lora, nets, runs
from data import InputError
from fast import compile_blocks
from model import GPT, ScalarModel
from tests import memory
from tests.conftest import FAMILIES, LLAMA, make_gpt, run, uneven
from tests.pretend import pretended
from tests.shapes import config_of
from tests.test_bench import saved_bytes
from tests.test_faults import contents
from tests.test_faults import same as alike
from tests.test_processes import same
from tools import hf

CPU, OFF, BF16 = torch.device("cpu"), torch.autocast("cpu", enabled=False), torch.autocast("cpu", torch.bfloat16)
PROMPTS = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]
RANK = 4
STAGES = {"sft.py": sft, "reward.py": reward, "ppo.py": ppo}


def batch(rows=3, T=20):
    """Tokens (B, T), prompt_len and length (B,)."""
    tokens = torch.randint(0, 60, (rows, T), generator=torch.Generator().manual_seed(0))
    return tokens, torch.tensor([3, 5, 2])[:rows], torch.tensor([T, T - 4, T - 1])[:rows]


def moved(net):
    """The net with adapters that are far from zero."""
    with torch.no_grad():
        for layer in net.modules():
            if isinstance(layer, lora.Adapted):
                layer.B.normal_(std=0.05)
    return net


def adapted(folder, encoding, seed=0, trunks=None, autocast=OFF, rank=RANK):
    """A policy and a reward model of the base `folder`, their adapters far from zero, saved beside it."""
    trunks = trunks or lora.Trunks(rank, autocast)
    torch.manual_seed(seed)
    policy = moved(nets.load_gpt(folder, CPU, "", trunks)[0])
    scored = moved(ScalarModel(nets.load_gpt(folder, CPU, "", trunks)[0]).eval())
    scored.gain.fill_(1.5), scored.bias.fill_(-0.5)
    for name, net in (("policy", policy), ("scored", scored)):
        target = folder.parent / name
        target.mkdir(exist_ok=True)
        nets.save_model(net, encoding, target / "model.pt")
    return policy, scored


def base(folders, encoding, **shape):
    """The run folder of a whole net of a shape."""
    net = uneven(make_gpt(vocab_size=encoding.n_vocab, eos=encoding.eot_token, **shape))
    nets.save_model(net, encoding, folders["sft"] / "model.pt")
    return folders["sft"]


# --- the arithmetic ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("autocast", [OFF, BF16])
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_a_net_starts_as_its_base_bit_for_bit_and_all_layers_of_the_blocks_have_adapters(
    folders, encoding, family, autocast
):
    folder = base(folders, encoding, **FAMILIES[family])
    whole, _ = nets.load_gpt(folder)
    net, _ = nets.load_gpt(folder, CPU, "", lora.Trunks(RANK, autocast))
    with autocast, torch.no_grad():
        assert torch.equal(net.logprobs(*batch()), whole.logprobs(*batch()))
    linear = [name for name, layer in whole.h.named_modules() if isinstance(layer, torch.nn.Linear)]
    kind = {True: torch.bfloat16, False: torch.float32}[autocast is BF16]
    assert linear == [name for name, layer in net.h.named_modules() if isinstance(layer, lora.Adapted)]
    assert {name.rpartition(".")[0] for name, _ in net.named_parameters()} == {f"h.{name}" for name in linear}
    for name in linear:
        layer, (O, I) = net.h.get_submodule(name), whole.h.get_submodule(name).weight.shape
        assert layer.A.shape == (RANK, I) and layer.B.shape == (O, RANK) and not layer.B.any()
        assert layer.weight.dtype == kind and layer.A.dtype == torch.float32
        assert 0 < layer.A.abs().max() <= I**-0.5


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_gradients_are_those_of_the_merged_net_by_the_chain_rule(folders, encoding, family, checkpointed):
    """W' = W + s B A: the gradient of A is s Bᵀ dW', that of B is s dW' Aᵀ, s = 32 / r."""
    policy, scored = adapted(base(folders, encoding, **FAMILIES[family]), encoding)
    tmp, scale = folders["tmp"], 32 / RANK
    for net, name in ((policy, "policy"), (scored, "scored")):
        merged, _ = nets.load(tmp / name)
        getattr(net, "trunk", net).checkpoint_activations = checkpointed
        for each in (net, merged):
            found = each.logprobs(*batch()) if name == "policy" else each.values(*batch())
            found.square().sum().backward()
        layers = [(place, layer) for place, layer in net.named_modules() if isinstance(layer, lora.Adapted)]
        assert len(layers) == 8
        for place, layer in layers:
            wanted = merged.get_submodule(place).weight.grad
            for got, expected in (
                (layer.A.grad, scale * layer.B.T @ wanted),
                (layer.B.grad, scale * wanted @ layer.A.T),
            ):
                assert (got - expected).norm() <= 1e-5 * expected.norm() and expected.any(), place
    torch.testing.assert_close(scored.head.weight.grad, merged.head.weight.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_an_adapted_net_writes_what_its_merged_net_writes(folders, encoding, family):
    policy, _ = adapted(base(folders, encoding, **FAMILIES[family]), encoding)
    merged, whole = nets.load_gpt(folders["tmp"] / "policy")[0], nets.load_gpt(folders["sft"])[0]
    texts = []
    for net in (policy, merged, whole):
        rng = torch.Generator().manual_seed(1)
        texts.append([net.generate(PROMPTS, 20, temperature=t, generator=rng)[0] for t in (0, 1.0)])
    for mine, theirs, before in zip(*texts):
        assert torch.equal(mine, theirs) and not torch.equal(mine, before)


@pytest.mark.slow
@pytest.mark.parametrize("low", [False, True], ids=["float32", "bfloat16"])
def test_on_a_device_nets_share_one_trunk_and_generation_sees_adapters_as_they_change(folders, encoding, low):
    adapted(folders["sft"], encoding)
    with pretended("cuda:0"):
        autocast = torch.autocast("cuda", torch.bfloat16, enabled=low, cache_enabled=False)
        trunks = lora.Trunks(RANK, autocast)
        net, plain = (nets.load_gpt(folders["tmp"] / "policy", "cuda:0", "", trunks)[0] for _ in range(2))
        for name, x in net.named_buffers():
            assert x.device.type == "cuda" and x.data_ptr() == plain.get_buffer(name).data_ptr()
        assert all(p.device.type == "cuda" for p in net.parameters())
        for _ in range(3):
            found = []
            for each in (net, plain):
                rng = torch.Generator().manual_seed(1)
                with autocast:
                    tokens, _, length = each.generate(PROMPTS, 9, generator=rng)
                found.append([row[:n].tolist() for row, n in zip(tokens.cpu(), length)])
                with torch.no_grad():
                    for p in each.parameters():
                        p.mul_(1.5)
            assert found[0] == found[1]


def test_a_large_layer_writes_what_its_merged_net_writes(folders, encoding):
    """Of 2^20 weights and more, which generation packs."""
    folder = base(folders, encoding, n_embd=512, n_layer=1, n_inner=2048)
    policy, _ = adapted(folder, encoding)
    merged, _ = nets.load_gpt(folders["tmp"] / "policy")
    assert torch.equal(*(net.generate(PROMPTS, 9, temperature=0)[0] for net in (policy, merged)))
    tokens, prompt_len, length = batch()
    policy.logprobs(tokens, prompt_len, length).sum().backward()
    assert policy.h[0].mlp.c_fc.B.grad.any()


# --- one trunk --------------------------------------------------------------------------------------------------------


def storages(*found):
    """The storages of nets, with the bytes of each."""
    tensors = [x for net in found for x in (*net.parameters(), *net.buffers())]
    return {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}


def size(*found):
    """The bytes of nets, what they share once."""
    return sum(storages(*found).values())


@pytest.mark.parametrize("autocast", [OFF, BF16])
@pytest.mark.parametrize("untied", [False, True])
def test_four_nets_share_one_trunk_and_compute_what_four_copies_compute(folders, encoding, autocast, untied):
    adapted(base(folders, encoding, **(LLAMA if untied else {})), encoding, autocast=autocast)
    tmp = folders["tmp"]
    cfg = ppo.Config(init=str(tmp / "policy"), reward=str(tmp / "scored"), response_len=8, lora=RANK, device="cpu")
    four = {"one": [], "copies": []}
    trunks = lora.Trunks(RANK, autocast)
    for folder in ("policy", "policy", "scored", "scored"):
        four["one"].append(nets.load(tmp / folder, CPU, "", None, trunks)[0])
        four["copies"].append(nets.load(tmp / folder, CPU, "", None, lora.Trunks(RANK, autocast))[0])
    for found in four.values():
        for net in found[1:3]:
            nets.freeze(net, autocast)
    trains = [sum(x.nbytes for x in net.state_dict().values()) for net in four["one"]]
    trunk = size(four["one"][0]) - trains[0]
    assert size(*four["one"]) == trunk + sum(trains) and size(*four["copies"]) > 3 * trunk + sum(trains)
    for layer in ("h.0.attn.c_attn", "h.1.mlp.c_proj", "ln_f", "wte"):
        places = {getattr(net, "trunk", net).get_submodule(layer).weight.data_ptr() for net in four["one"]}
        assert len(places) == 1
    places = {getattr(net, "trunk", net).h[0].attn.c_attn.A.data_ptr() for net in four["one"]}
    assert len(places) == 4
    read = {}
    for name, (policy, ref, scored, value) in four.items():
        score = ppo.scorer(scored, encoding, policy.config.eos, cfg)
        with autocast:
            rows = ppo.rollout(policy, PROMPTS, cfg, torch.Generator().manual_seed(0))
            read[name] = rows | ppo.read(rows, policy, ref, value, score, cfg)
    assert all(torch.equal(x, read["copies"][name]) for name, x in read["one"].items())
    assert torch.equal(read["one"]["logp"], read["one"]["ref_logp"]) and read["one"]["logp"].any()


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [OFF, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", ["small", "llama-small"])
def test_the_memory_that_is_computed_is_that_of_the_nets_and_of_what_autograd_saves(
    tmp_path, shape, autocast, monkeypatch
):
    config, encoding = config_of(shape, 200), data.learn_bpe(["ask me. yes no."] * 9, 280)
    config = replace(config, eos=encoding.eot_token)
    nets.save_model(GPT(config), encoding, tmp_path / "model.pt")
    trunks, bf16 = lora.Trunks(RANK, autocast), autocast is BF16
    policy, ref = (nets.load_gpt(tmp_path, CPU, "", trunks)[0] for _ in range(2))
    value, scored = (ScalarModel(nets.load_gpt(tmp_path, CPU, "", trunks)[0]) for _ in range(2))
    for net in (ref, scored):
        nets.freeze(net, autocast)
    trained = sum(p.numel() for net in (policy, value) for p in net.parameters())
    held = size(policy, ref, value, scored) + 12 * trained  # gradients and Adam's moments
    monkeypatch.setattr(memory, "config_of", lambda name: config)
    memory.parameters.cache_clear()
    assert memory.lora_nets("", 3, bf16, RANK) == pytest.approx(held, rel=1e-3)
    memory.parameters.cache_clear()
    for checkpointed in (False, True):
        found, _ = saved_bytes(policy, torch.randint(0, 250, (2, 161)), checkpointed, bf16)
        assert memory.saved(config, 2, 160, bf16, checkpointed, True, RANK) == pytest.approx(found, rel=0.05)


def test_nets_of_other_bases_or_without_adapters_share_nothing(folders, encoding):
    other = folders["tmp"] / "other"
    other.mkdir()
    nets.save_model(make_gpt(3, vocab_size=encoding.n_vocab, eos=encoding.eot_token), encoding, other / "model.pt")
    trunks = lora.Trunks(RANK, OFF)
    one, two = (nets.load_gpt(folder, CPU, "", trunks)[0] for folder in (folders["sft"], other))
    assert not storages(one).keys() & storages(two).keys()
    trunks = lora.Trunks(0, OFF)
    one, two = (nets.load_gpt(folders["sft"], CPU, "", trunks)[0] for _ in range(2))
    assert not storages(one).keys() & storages(two).keys() and all(p.requires_grad for p in one.parameters())


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_folder_holds_what_trains_and_moves_together_with_its_base(folders, encoding, family):
    policy, scored = adapted(base(folders, encoding, **FAMILIES[family]), encoding)
    tmp = folders["tmp"]
    (tmp / "elsewhere").mkdir()
    for name in ("sft", "policy", "scored"):
        shutil.move(tmp / name, tmp / "elsewhere" / name)
    trunks = lora.Trunks(RANK, OFF)
    for net, name in ((policy, "policy"), (scored, "scored")):
        path = tmp / "elsewhere" / name / "model.pt"
        saved = torch.load(path, weights_only=True)
        kinds = {key.rpartition(".")[2] for key in saved["model"] if not key.startswith("head.")}
        assert kinds == ({"A", "B", "gain", "bias"} if name == "scored" else {"A", "B"})
        assert saved["base"]["path"] == "../sft/model.pt"
        back = nets.load(path.parent, CPU, "", type(net), trunks)[0]
        merged = nets.load(path.parent, CPU, "", type(net))[0]
        assert all(torch.equal(x, back.state_dict()[key]) for key, x in net.state_dict().items())
        read = (lambda n: n.logprobs(*batch())) if name == "policy" else lambda n: n.scores(*batch()[::2])  # noqa: E731
        assert torch.equal(read(back), read(net))
        torch.testing.assert_close(read(merged), read(net), rtol=1e-4, atol=1e-5)


def test_a_base_that_is_missing_or_has_changed_is_named_in_one_sentence(folders, encoding):
    adapted(folders["sft"], encoding)
    tmp = folders["tmp"]
    model = folders["sft"] / "model.pt"
    kept, both = model.read_bytes(), rf"{tmp}/policy/model.pt: its base, {re.escape(str(model))}, "
    for change, said in ((model.unlink, "is missing; bring it back"), (None, "has changed; bring back what it was")):
        if change:
            change()
        else:
            nets.save_model(make_gpt(5, encoding.n_vocab, encoding.eot_token), encoding, model)
        for trunks in (None, lora.Trunks(RANK, OFF)):
            with pytest.raises(InputError, match=both + said):
                nets.load_gpt(tmp / "policy", CPU, "--init", trunks)
    model.write_bytes(kept)
    nets.load_gpt(tmp / "policy")


def test_a_damaged_file_of_adapters_is_named(folders, encoding):
    adapted(folders["sft"], encoding)
    path = folders["tmp"] / "policy" / "model.pt"
    good = torch.load(path, weights_only=True)
    name = "h.0.attn.c_attn.B"
    for wrong in (
        {"base": 3}, {"base": {}}, {"base": {"path": 3, "sha256": ""}},
        *({"model": good["model"] | {name: x}} for x in (torch.ones(3), good["model"][name] / 0, "x")),
        {"model": {key: x for key, x in good["model"].items() if key != name}},
    ):  # fmt: skip
        torch.save(good | wrong, path)
        for trunks in (None, lora.Trunks(RANK, OFF)):
            with pytest.raises(InputError, match=f"{path}: damaged|base, .* is missing"):
                nets.load(path, CPU, "", None, trunks)


def test_what_adapters_cannot_do_is_refused_in_one_sentence(folders, encoding, monkeypatch):
    monkeypatch.chdir(folders["tmp"])
    adapted(folders["sft"], encoding)
    with pytest.raises(InputError, match="--lora: adapts a model that is trained already; name .* --init"):
        sft.train(sft.Config(data="pairs.jsonl", lora=2))
    with pytest.raises(InputError, match="policy/model.pt: has adapters of rank 4, not of --lora 2; give --lora 4, or"):
        sft.train(sft.Config(data="pairs.jsonl", init="policy", lora=2))
    monkeypatch.setattr(dist, "WORLD", 2)
    with pytest.raises(InputError, match="--shard: does not go with --lora; leave one of them out"):
        dist.check_shard(ppo.Config(shard=True, lora=2))
    net, _ = nets.load_gpt("policy", CPU, "", lora.Trunks(RANK, OFF))
    with pytest.raises(InputError, match="held the base of this run"):
        nets.save_model(net, encoding, folders["sft"] / "model.pt")
    (folders["tmp"] / "theirs").mkdir()
    (folders["tmp"] / "theirs" / "adapter_config.json").write_text("{}")
    for read in (lambda: nets.load_gpt("theirs", CPU, "--init"), lambda: hf.convert("theirs", folders["tmp"] / "x")):
        with pytest.raises(
            InputError, match=r"an adapter.*; merge it into its model first \(peft's merge_and_unload\)"
        ):
            read()


# --- the stages -------------------------------------------------------------------------------------------------------


def options(script, **more):
    """The options of a small run of a script in the folders' tmp, after the runs before it."""
    given = {
        "sft.py": dict(data="pairs.jsonl", init="sft", evals=2, epochs=0.5, out="out/sft"),
        "reward.py": dict(data="comparisons.jsonl", init="out/sft", response_len=8, batch_size=16, out="out/reward")
        | dict(save_every=2),
        "ppo.py": dict(data="prompts.jsonl", init="out/sft", reward="out/reward", iterations=3, out="out/ppo")
        | dict(batch_size=16, minibatch_size=8, response_len=8, eval_prompts=8, save_every=1, value_warmup=0, lr=0.01),
    }[script] | {"lora": RANK, "device": "cpu"}
    return [f"--{name}={value}" for name, value in (given | more).items()]


def train(script, **more):
    stage = STAGES[script]
    held = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    stage.train(cli.parse(stage.Config, options(script, **more)))
    for number, handler in held.items():
        signal.signal(number, handler)


@pytest.mark.slow
def test_three_stages_adapt_one_base_and_leave_it_as_it_was(folders, monkeypatch):
    tmp = folders["tmp"]
    monkeypatch.chdir(tmp)
    before = (tmp / "sft" / "model.pt").read_bytes()
    for script in STAGES:
        train(script)
    assert (tmp / "sft" / "model.pt").read_bytes() == before
    for name in ("sft", "reward", "ppo"):
        saved = torch.load(tmp / "out" / name / "model.pt", weights_only=True)
        assert saved["base"]["path"] == "../../sft/model.pt"  # one for all of them
        assert any(x.any() for key, x in saved["model"].items() if key.endswith(".B"))
    state = torch.load(tmp / "out" / "ppo" / "state.pt", weights_only=True)
    heads = {"head.weight", "head.bias", "gain", "bias"}
    for name in ("model", "value"):
        assert {key for key in state[name] if not key.endswith((".A", ".B"))} == (heads if name == "value" else set())
    first, *_, last = runs.read_metrics(tmp / "out" / "ppo")
    assert first["objective/kl"] == 0 < last["objective/kl"]
    assert first["policy/ratio"] == pytest.approx(1, abs=0.02)
    # At a rate of 0 the value net is the reward model, and the policy that of stage 1.
    train("ppo.py", lr=0, value_lr=0, iterations=1, out="out/still")
    state = torch.load(tmp / "out" / "still" / "state.pt", weights_only=True)
    for name, source in (("model", "sft"), ("value", "reward")):
        start = torch.load(tmp / "out" / source / "model.pt", weights_only=True)["model"]
        assert state[name].keys() == start.keys() and alike(state[name], start)
    # A function may be the reward: then the value net has a head of zeros at first.
    (tmp / "f.py").write_text("def f(prompt, response):\n    return len(response)\n")
    train("ppo.py", reward="f.py:f", out="out/function", iterations=1)
    state = torch.load(tmp / "out" / "function" / "state.pt", weights_only=True)
    assert state["value"].keys() == start.keys() and state["value"]["head.weight"].any()
    # Without --lora a stage trains all weights of the merged net.
    train("ppo.py", lora=0, out="out/whole", iterations=1)
    saved = torch.load(tmp / "out" / "whole" / "model.pt", weights_only=True)
    assert "base" not in saved and "wte.weight" in saved["model"]
    assert runs.read_metrics(tmp / "out" / "whole")[0]["objective/kl"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_that_was_stopped_and_resumed_is_the_run_that_was_not(folders, monkeypatch, dtype):
    monkeypatch.chdir(folders["tmp"])
    save = runs.Run.save

    def save_then_die(self, *args, **parts):
        save(self, *args, **parts)
        raise KeyboardInterrupt

    for script in STAGES:
        train(script, dtype=dtype)
        monkeypatch.setattr(runs.Run, "save", save_then_die)
        with pytest.raises(KeyboardInterrupt):
            train(script, out="out/cut", dtype=dtype)
        monkeypatch.setattr(runs.Run, "save", save)
        out = folders["tmp"] / "out"
        assert len(runs.read_metrics(out / "cut")) < len(runs.read_metrics(out / script.removesuffix(".py")))
        stage = STAGES[script]
        stage.train(cli.parse(stage.Config, [*options(script, out="out/cut", dtype=dtype), "--resume"]))
        assert alike(contents(out / "cut"), contents(out / script.removesuffix(".py"))), script
        shutil.rmtree(out / "cut")


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--checkpoint_activations"]])
def test_two_processes_train_as_one_does(folders, more):
    tmp = folders["tmp"]
    for script in STAGES:
        given = options(script, **{} if script == "ppo.py" else {"batch_size": 6}) + more
        out = tmp / "out" / script.removesuffix(".py")
        one, two = (run(script, *given, f"--out={out}{'' if n == 1 else '-2'}", cwd=tmp, processes=n) for n in (1, 2))
        assert one.returncode == two.returncode == 0, one.stderr + two.stderr
        if script != "ppo.py":  # whose two processes draw other answers
            same(out, out.with_name(f"{out.name}-2"))
    (first, *_) = runs.read_metrics(tmp / "out" / "ppo-2")
    assert first["objective/kl"] == 0


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("autocast", [OFF, BF16], ids=["float32", "bfloat16"])
def test_compiled_adapters_compute_and_learn_what_plain_ones_do(folders, encoding, autocast):
    adapted(folders["sft"], encoding, autocast=autocast)
    trunks = lora.Trunks(RANK, autocast)
    plain, compiled = (nets.load_gpt(folders["tmp"] / "policy", CPU, "", trunks)[0] for _ in range(2))
    compile_blocks(compiled)
    found = []
    for net in (plain, compiled):
        with autocast:
            logp = net.logprobs(*batch())
        logp.sum().backward()
        found.append([logp, *(p.grad for p in net.parameters())])
    for mine, theirs in zip(*found):
        assert (mine - theirs).norm() <= (1e-4 if autocast is OFF else 0.05) * mine.norm()
    if autocast is OFF:
        assert torch.equal(*(net.generate(PROMPTS, 9, temperature=0)[0] for net in (plain, compiled)))


# --- to other projects ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2"])
def test_an_export_is_merged_and_has_the_logits(folders, encoding, family):
    transformers = pytest.importorskip("transformers")
    policy, _ = adapted(base(folders, encoding, **FAMILIES[family]), encoding)
    hf.convert(str(folders["tmp"] / "policy"), folders["tmp"] / "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folders["tmp"] / "hf").eval()
    tokens, _, _ = batch()
    torch.testing.assert_close(theirs(tokens).logits, policy(tokens), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2"])
def test_peft_loads_the_adapters_onto_the_exported_base(folders, encoding, family):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    policy, _ = adapted(base(folders, encoding, **FAMILIES[family]), encoding)
    tmp = folders["tmp"]
    hf.convert(str(tmp / "sft"), tmp / "hf")
    hf.convert(str(tmp / "policy"), tmp / "adapter", adapter=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp / "hf").eval()
    tokens, _, _ = batch()
    before = theirs(tokens).logits
    theirs = peft.PeftModel.from_pretrained(theirs, tmp / "adapter").eval()
    about = json.loads((tmp / "adapter" / "adapter_config.json").read_text())
    assert about["fan_in_fan_out"] == (family == "gpt2") and about["lora_alpha"] == 32 and about["r"] == RANK
    torch.testing.assert_close(theirs(tokens).logits, policy(tokens), rtol=1e-5, atol=1e-4)
    assert (theirs(tokens).logits - before).abs().max() > 0.1
    for name, words in (("scored", "no adapters of a language model"), ("sft", "no adapters of a language model")):
        with pytest.raises(InputError, match=words):
            hf.convert(str(tmp / name), tmp / "none", adapter=True)
