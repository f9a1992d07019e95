"""The KL term settled: the estimators k1, k2 and k3, in the reward and in the loss, against the exact gradient.

    OMP_NUM_THREADS=1 python -m experiments.estimators              beside runs of three seeds at β = 0.6
    OMP_NUM_THREADS=1 python -m experiments.estimators --seeds ""   the exact tables alone, in a minute

With x = log π − log π₀ of a token: k1 = x, k2 = x² / 2, k3 = e^(−x) − 1 + x (Schulman 2020, joschu.net/blog/kl-approx).
Means and variances of value and gradient come from all 781 responses of the world of letters, in float64. "On policy"
is a policy amid a run; "four epochs" is four epochs later, on the same answers. Then ppo.py runs with each. It writes
experiments/results/estimators.json. Compare arXiv 2506.09477 and 2512.21852.
"""

import argparse
import itertools
import math
from collections.abc import Iterator

import numpy as np

from experiments import letters
from experiments.harness import ROOT, markdown, t_interval, write_results
from experiments.recipe import changed

BETA = 0.6
K = {"k1": lambda x: x, "k2": lambda x: x**2 / 2, "k3": lambda x: np.exp(-x) - 1 + x}
SLOPE = {"k1": np.ones_like, "k2": lambda x: x, "k3": lambda x: 1 - np.exp(-x)}  # dk / d log π
CASES = ("on policy", "four epochs", "four epochs, weighted")
WAYS = ("reward", "loss", "ratio × loss")  # the last is differentiated through the ratio too
ENDS = {"share": "share of the way to J\\*", "TV": "TV to π\\*", "KL": "KL to π₀"}


def name_of(k: str, way: str) -> str:
    return f"{k} × ratio in the loss" if way == "ratio × loss" else f"{k} in the {way}"


def term(k: str, way: str, whole: bool, steps: np.ndarray, old: np.ndarray, start: np.ndarray, weighted: bool):
    """Of each response: the estimator's value (781,), and the weight of each ∇ log π(token) in its gradient (781, R).

    whole: x is of the whole answer in place of a token. weighted: by π / π_old, where π_old has sampled. In the reward
    x is of π_old, as in ppo.py.
    """
    now, then, log_ratio = (letters.along(x) for x in (steps - start, old - start, steps - old))
    if whole:
        now, then, log_ratio = (x.sum(1, keepdims=True) for x in (now, then, log_ratio))
    ratio = np.exp(log_ratio) if weighted else np.ones_like(log_ratio)
    if way == "reward":
        to_come = np.cumsum(K[k](then)[:, ::-1], 1)[:, ::-1]  # a token is blamed for what comes after it
        weight = ratio * to_come
    else:
        weight = ratio * (SLOPE[k](now) + (K[k](now) if way == "ratio × loss" else 0))
    value = (ratio * K[k](now)).sum(1)
    return value, weight * letters.TAKEN


def exact_tables(steps: np.ndarray, old: np.ndarray, start: np.ndarray, products: np.ndarray) -> tuple[dict, dict]:
    """Mean and deviation of each value; bias and noise of each gradient, in lengths of the exact gradient."""
    _, weight = term("k1", "reward", True, steps, steps, start, False)
    truth, _ = letters.moments(weight, letters.probabilities(steps), products)
    length, values, gradients = np.sqrt(truth @ products @ truth), {}, {}
    for unit, k, case in itertools.product(("token", "answer"), K, CASES):
        sampler, weighted = (steps if case == CASES[0] else old), case == CASES[2]
        p = letters.probabilities(sampler)
        for way in WAYS:
            value, weight = term(k, way, unit == "answer", steps, sampler, start, weighted)
            mean, variance = letters.moments(weight, p, products)
            bias = math.sqrt(max(0, (mean - truth) @ products @ (mean - truth)))
            gradients.setdefault(f"{name_of(k, way)}, by {unit}", {})[case] = bias / length, variance**0.5 / length
        spread = math.sqrt(p @ (value - p @ value) ** 2)  # `value` is the same in every way
        values.setdefault(f"{k}, by {unit}", {})[case] = p @ value, spread
    return values, gradients


def changes(k: str, way: str) -> dict[str, str]:
    """What is changed in ppo.py. Advantages are not whitened, so that β in the loss weighs what it weighs in J."""
    reward, loss = 'rewards = -kl_coef * (batch["logp"] - batch["ref_logp"])', "loss = ((pg_losses + vf_losses) * mask)"
    term = {"k1": "x", "k2": "x.square() / 2", "k3": "((-x).exp() - 1 + x)"}[k]
    found, x = {"whiten(advantages, mask)": "advantages"}, '(logp - part["ref_logp"]) * mask'
    if way == "reward":
        return found | {reward: f'x = batch["logp"] - batch["ref_logp"]\n    rewards = -kl_coef * {term}'}
    if way == "ratio × loss":
        term = f"ratio * {term}"
    if way == "loss, by answer":
        x, term = f"({x}).sum(1, keepdim=True)", f"{term} / mask.sum(1, keepdim=True)"
    charged = f"x = {x}\n                loss = ((pg_losses + vf_losses + cfg.kl_coef * {term}) * mask)"
    return found | {reward: 'rewards = torch.zeros_like(batch["logp"])', loss: charged}


def landings(seeds: list[int]) -> Iterator[tuple[str, list[dict]]]:
    """Where ppo.py ends with each: 360 iterations of 256 answers and one epoch, or 90 of four: as many steps."""
    four = [("reward", "k1"), ("loss", "k2"), ("loss", "k3"), ("ratio × loss", "k3"), ("loss, by answer", "k2")]
    one = [*four, ("reward", "k2"), ("reward", "k3"), ("loss", "k1")]
    source = (ROOT / "ppo.py").read_text()
    for i, (way, k) in enumerate(one + four):
        many, name = ({}, "") if i < len(one) else ({"iterations": 90, "epochs": 4}, ", four epochs")
        script, options = changed(source, changes(k, way)), {"batch_size": 256, "minibatch_size": 64} | many
        yield f"{name_of(k, way)}{name}", [letters.settle(script, BETA, seed, **options) for seed in seeds]


def tables(found: dict) -> list[str]:
    """Bias and noise of each gradient; where each run ends, behind π* and the exact ends of two losses by token."""
    gradients, case = [], ["bias, noise", "four epochs: bias", "weighted: bias"]
    for way, k in itertools.product(WAYS, K):
        cells = []
        for unit in ("token", "answer"):
            first, *later = found["gradients"][f"{name_of(k, way)}, by {unit}"].values()
            cells += ["{:.2f}, {:.2f}".format(*first), *(f"{bias:.2f}" for bias, _ in later)]
        gradients.append([name_of(k, way), *cells])
    ends, still = [["π\\* itself", "1", "0", f"{found['standstill']['k2']['KL of π*']:.2f}"]], found["standstill"]
    ends += [[f"{k} in the loss, the exact end", *(f"{end[x]:.2f}" for x in ENDS)] for k, end in still.items()]
    ends += [[who, *(t_interval([end[x] for end in of]) for x in ENDS)] for who, of in found["landings"].items()]
    heads = ["gradient", f"by token: {case[0]}", *case[1:], f"by answer: {case[0]}", *case[1:]]
    return [markdown(heads, gradients), markdown(["in `ppo.py`", *ENDS.values()], ends)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated; empty: no runs")
    seeds = [int(seed) for seed in parser.parse_args().seeds.split(",") if seed]
    source, first = (ROOT / "ppo.py").read_text(), letters.place() / "start"
    before, _ = letters.run(source, BETA, 0, iterations=60)
    after, _ = letters.run(source, BETA, 0, iterations=1, epochs=4, init=before, ref=first)
    policies = [letters.policy_in(folder) for folder in (first, before, after)]
    start, old, steps = map(letters.step_logp, policies)
    values, gradients = exact_tables(steps, old, start, letters.gram(policies[-1]))
    whole, logp = lambda steps: letters.along(steps).sum(1), letters.along(start).sum(1)
    still = {k: letters.landing(whole(letters.standstill(k, start, BETA)), logp, BETA) for k in ("k2", "k3")}
    found = {"KL": [letters.kl(whole(x), logp) for x in (old, steps)], "values": values}
    found |= {"gradients": gradients, "standstill": still, "landings": {}}
    for name, ends in landings(seeds) if seeds else ():
        found["landings"][name] = ends
        write_results("estimators", found)
    spreads = [[who, *("{:.2f}, {:.2f}".format(*x) for x in by_case.values())] for who, by_case in values.items()]
    print(markdown(["value: mean, deviation", *CASES], spreads), *tables(found), sep="\n\n")


if __name__ == "__main__":
    main()
