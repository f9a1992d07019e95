"""What the gradients of stage 3 must equal: any split of the batch, two processes, REINFORCE, finite differences."""

import contextlib
import copy

import pytest
import torch

import ppo
from common import nets
from model import ScalarModel
from tests.conftest import FAMILIES, flat, make_gpt, run

OFF = torch.autocast("cpu", enabled=False)
PROMPTS = [[1], [2, 3, 4, 5], [6, 7], [8, 9, 10], [11], [12, 13], [14, 15, 16], [17]]


def prepared(cfg):
    """Policy, value net, and a batch of answers as `update` takes it, from a policy that has moved off its start."""
    policy, ref = make_gpt(), nets.freeze(make_gpt(seed=3), OFF)
    torch.manual_seed(1)
    value, scorer = ScalarModel(copy.deepcopy(policy)).eval(), ScalarModel(copy.deepcopy(ref)).eval()
    batch = ppo.rollout(policy, PROMPTS, cfg, torch.Generator().manual_seed(0))
    batch |= ppo.read(batch, policy, ref, value, ppo.scorer(scorer, None, 60, cfg), cfg)
    return policy, value, batch | ppo.estimate(batch, 0.1, cfg)


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3, 5])
def test_gradients_of_micro_batches_of_any_size_equal_the_whole_batchs(micro_batch_size):
    steps = []
    for size in (0, micro_batch_size):
        cfg = ppo.Config(response_len=16, minibatch_size=8, epochs=1, micro_batch_size=size, max_grad_norm=0.0)
        policy, value, batch = prepared(cfg)
        before = [flat(policy), flat(value)]
        optimizers = [torch.optim.SGD(net.parameters(), lr=1.0) for net in (policy, value)]
        ppo.update(policy, value, *optimizers, batch, 1.0, 1.0, cfg, OFF, seed=0)
        steps.append([flat(net) - start for net, start in zip((policy, value), before)])
    for one, other in zip(*steps):
        assert (one - other).norm() <= 1e-6 * one.norm()


TWO = """
import copy
import sys
import torch
import ppo
from common import cli, measure, nets
from common.dist import RANK, WORLD
from tests.conftest import flat
from tests.test_gradients import OFF, prepared

cli.setup(ppo.Config(device="cpu"))
cfg = ppo.Config(response_len=16, minibatch_size=8, epochs=2)
policy, value, batch = prepared(cfg)
mine = {name: x[RANK::WORLD] for name, x in batch.items() if name not in ("advantages", "returns")}
mine |= ppo.estimate(mine, 0.1, cfg)
metrics = measure.rollout_metrics(mine, [], 0.1)
sums = []
sgd = lambda net: torch.optim.SGD(net.parameters(), lr=0.01)
adam = lambda net: nets.adamw(net, 0.01, 0.0, eps=1e-5)
for kind in (sgd, adam):
    moved = copy.deepcopy(policy), copy.deepcopy(value)
    optimizers = [kind(net) for net in moved]
    found = ppo.update(*moved, *optimizers, mine, 0.01, 0.01, cfg, OFF, 0)
    metrics |= {f"{name} {len(sums)}": x for name, x in found.items()}
    sums += [flat(net) for net in moved]
if RANK == 0:
    torch.save({"steps": sums, "start": [flat(policy), flat(value)], "metrics": metrics}, sys.argv[1])
torch.distributed.is_initialized() and torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_take_the_step_of_one_on_the_same_answers(tmp_path):
    """Whitening, losses, clipping and metrics are over the answers of both; parameters agree to 1e-5 in norm."""
    (tmp_path / "two.py").write_text(TWO)
    found = []
    for processes in (1, 2):
        done = run(tmp_path / "two.py", tmp_path / f"{processes}.pt", processes=processes)
        assert done.returncode == 0, done.stderr
        found.append(torch.load(tmp_path / f"{processes}.pt", weights_only=True))
    one, two = found
    for a, b, start in zip(one["steps"], two["steps"], one["start"] * 2):
        assert (a - start).norm() > 1e-3 and (a - b).norm() <= 1e-5 * a.norm()
    sgd = zip(one["steps"][:2], two["steps"], one["start"])
    assert all((a - b).norm() <= 1e-5 * (a - start).norm() for a, b, start in sgd)  # the gradients themselves
    assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-4, abs=1e-6)


def test_policy_gradient_at_ratio_one_is_reinforce():
    cfg = ppo.Config(response_len=16)
    policy, _, batch = prepared(cfg)
    n = batch["mask"].sum()
    logp = policy.logprobs(batch["tokens"], batch["prompt_len"], batch["length"])
    parameters = list(policy.parameters())
    losses, _ = ppo.policy_loss(logp, batch["logp"], batch["advantages"], 0.2)
    mine = torch.autograd.grad((losses * batch["mask"]).sum() / n, parameters, retain_graph=True)
    reinforce = torch.autograd.grad(-(logp * batch["advantages"]).sum() / n, parameters)
    for a, b in zip(mine, reinforce):
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-8


def test_finite_differences_of_the_whole_loss_agree_with_autograd_in_float64():
    """Of the policy's loss plus the value's, along random directions, with ratios on both sides of the clip range."""
    cfg = ppo.Config(response_len=16)
    policy, value, batch = prepared(cfg)
    policy, value = policy.double(), value.double()
    batch = {name: x.double() if x.is_floating_point() else x for name, x in batch.items()}
    where = batch["tokens"], batch["prompt_len"], batch["length"]
    noise = torch.randn(batch["logp"].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    old_logp, old_values = (batch["logp"] + 0.3 * noise) * batch["mask"], (batch["values"] + noise) * batch["mask"]

    def loss():
        policy_losses, ratio = ppo.policy_loss(policy.logprobs(*where), old_logp, batch["advantages"], cfg.cliprange)
        value_losses = ppo.value_loss(value.values(*where), old_values, batch["returns"], cfg.cliprange_value)
        clipped = ((ratio - 1).abs() > cfg.cliprange)[batch["mask"]].double().mean()
        assert 0.1 < clipped < 0.9
        return ((policy_losses + value_losses) * batch["mask"]).sum() / batch["mask"].sum()

    parameters = [*policy.parameters(), *value.parameters()]
    gradients = torch.autograd.grad(loss(), parameters)
    generator, h = torch.Generator().manual_seed(3), 1e-6
    for _ in range(5):
        direction = [torch.randn(p.shape, dtype=torch.float64, generator=generator) for p in parameters]
        expected = sum((g * d).sum() for g, d in zip(gradients, direction)).item()
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                for p, d in zip(parameters, direction):
                    p.add_(d, alpha=sign * h)
                ends.append(loss().item())
                for p, d in zip(parameters, direction):
                    p.sub_(d, alpha=sign * h)
        assert (ends[0] - ends[1]) / (2 * h) == pytest.approx(expected, rel=1e-5)


def test_an_update_never_waits_for_the_device_to_tell_a_number(monkeypatch):
    """The meta device has none to tell: int(x.max()), x[mask] or x.nonzero() there would raise."""
    cfg = ppo.Config(response_len=16, minibatch_size=4, micro_batch_size=3, epochs=2)
    policy, value, batch = prepared(cfg)
    meta = {name: x if name in ("prompt_len", "length") else x.to("meta") for name, x in batch.items()}
    steps, step = [], nets.step_optimizer
    optimizers = [torch.optim.SGD(net.to("meta").parameters(), lr=1.0) for net in (policy, value)]
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)  # autocast does not know the meta device
    monkeypatch.setattr(torch, "autocast", lambda kind, enabled: contextlib.nullcontext())
    monkeypatch.setattr(nets, "step_optimizer", lambda *given: steps.append(norm := step(*given)) or norm)
    with pytest.raises(RuntimeError, match="meta"):  # the metrics, once all is done
        ppo.update(policy, value, *optimizers, meta, 1.0, 1.0, cfg, OFF, seed=0)
    assert len(steps) == 2 * 2 * 2  # nets, minibatches, epochs


@pytest.mark.parametrize("family", ["gpt2", "smollm3"])
def test_checkpointed_activations_give_the_same_gradients(family):
    grads = []
    for on in (False, True):
        model = make_gpt(n_layer=3, **FAMILIES[family])
        model.checkpoint_activations = on
        tokens = torch.randint(0, 61, (4, 20), generator=torch.Generator().manual_seed(0))
        model.logprobs(tokens, torch.full((4,), 5), torch.tensor([20, 17, 9, 12])).sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.equal(*grads) and grads[0].norm() > 0
