"""Bias and noise of the policy gradient under GAE, and under the baselines of a group, from all 781 responses.

    OMP_NUM_THREADS=1 python -m experiments.gae         two minutes after the runs of `python -m experiments.critic`

The exact gradient of J has the advantages Q^π − V^π. Bias is how far an estimator's mean gradient is from it, noise the
deviation of its gradient from one answer; both in lengths of the exact gradient. It writes experiments/results/gae.json
and draws gae.svg beside this file. Group baselines have K = 4 answers; GRPO's are drawn 20,000 times.
"""

from pathlib import Path

import numpy as np

from experiments import letters
from experiments.critic import BETA, nets_at, read_values, runs
from experiments.harness import markdown, pyplot, save, write_results

K, LAMBDAS = 4, (0.0, 0.5, 0.8, 0.95, 1.0)
WHEN = [(way, step) for way in ("new head", "reward model") for step in (4, 60)]


def rewards(steps: np.ndarray, start: np.ndarray) -> np.ndarray:
    """What each step of each response earns (781, R): −β (log π − log π₀), and the score at its last."""
    found = -BETA * letters.along(steps - start)
    found[np.arange(len(found)), letters.TAKEN.sum(1) - 1] += letters.PAID
    return found


def gae(earned: np.ndarray, values: np.ndarray, lam: float) -> np.ndarray:
    """Advantages (781, R) from the values of the states (156,)."""
    v = np.where(letters.TAKEN, values[letters.STEPS // 6], 0.0)
    delta, found, after = earned - v, np.zeros_like(v), 0.0
    delta[:, :-1] += v[:, 1:]
    for t in reversed(range(letters.R)):
        found[:, t] = after = delta[:, t] + lam * after
    return found * letters.TAKEN


def bias_and_noise(mean: np.ndarray, variance: float, truth: np.ndarray, products: np.ndarray) -> tuple[float, float]:
    """In lengths of the exact gradient."""
    length, apart = np.sqrt(truth @ products @ truth), mean - truth
    return float(np.sqrt(max(0.0, apart @ products @ apart)) / length), float(np.sqrt(variance) / length)


def leave_one_out(total: np.ndarray, p: np.ndarray, products: np.ndarray) -> tuple[np.ndarray, float]:
    """As letters.moments, of (R_i − mean of the other K − 1) ∇ log π(y_i), per answer, from each response's R (781,).

    The others' mean adds σ² / (K − 1) to the square of R − J. Two answers of a group share each other, which adds a
    covariance of |∇J|² / (K − 1)² to each pair.
    """
    centred = total - p @ total
    spread = np.sqrt(centred**2 + p @ centred**2 / (K - 1))  # root of the mean square of an answer's advantage
    mean, _ = letters.moments(centred[:, None], p, products)
    other, variance = letters.moments(spread[:, None], p, products)
    square = variance + other @ products @ other
    return mean, square - mean @ products @ mean * (1 - 1 / (K - 1))


def group_relative(total: np.ndarray, p: np.ndarray, products: np.ndarray, n: int = 20_000) -> tuple[np.ndarray, float]:
    """As leave_one_out, of (R_i − mean) / deviation of the group, from n drawn groups."""
    rng = np.random.default_rng(0)
    drawn = rng.choice(len(p), size=(n, K), p=p / p.sum())
    relative = total[drawn] - total[drawn].mean(1, keepdims=True)
    relative /= total[drawn].std(1, ddof=1, keepdims=True) + 1e-4
    group = np.zeros((n, len(products) + 1))
    for i in range(K):
        for t in range(letters.R):
            group[np.arange(n), letters.STEPS[drawn[:, i], t]] += relative[:, i] / K  # −1 is the last column
    group = group[:, :-1]
    mean = group.mean(0)
    return mean, K * (np.einsum("gi,gi->", group @ products, group) / n - mean @ products @ mean)


def table(steps: np.ndarray, start: np.ndarray, net: np.ndarray, products: np.ndarray) -> dict[str, tuple]:
    p, earned = letters.probabilities(steps), rewards(steps, start)
    v, q = letters.values(steps, start, BETA)
    truth, variance = letters.moments(letters.along(q - v[:, None]), p, products)
    weights = {f"GAE, λ = {lam:g}, value net": gae(earned, net, lam) for lam in LAMBDAS}
    weights |= {f"GAE, λ = {lam:g}, exact V": gae(earned, v, lam) for lam in LAMBDAS}
    weights |= {"no baseline": gae(earned, 0 * v, 1.0), "mean of all answers": gae(earned, 0 * v + v[0], 1.0)}
    found = {who: letters.moments(weight, p, products) for who, weight in weights.items()}
    total = earned.sum(1)
    found |= {f"leave-one-out, K = {K}": leave_one_out(total, p, products)}
    mean, noise = group_relative(total, p, products)
    scale = (mean @ products @ truth) / (mean @ products @ mean)  # its unit is another: the best scale is taken
    found |= {f"GRPO, K = {K}": (scale * mean, scale**2 * noise), "exact Q − V": (truth, variance)}
    return {who: bias_and_noise(*each, truth, products) for who, each in found.items()}


def draw(found: dict[str, dict[str, tuple]], target: Path) -> None:
    figure, axes = pyplot().subplots(1, len(found), figsize=(9, 3.4), layout="constrained", sharey=True)
    for axis, (when, by_name) in zip(axes, found.items()):
        for who in ("value net", "exact V"):
            points = [by_name[f"GAE, λ = {lam:g}, {who}"] for lam in LAMBDAS]
            axis.plot(*zip(*points), "o-", linewidth=1, label=f"GAE with the {who}, λ = 0 … 1")
        for who, mark in ((f"leave-one-out, K = {K}", "s"), (f"GRPO, K = {K}", "^"), ("no baseline", "x")):
            axis.plot(*by_name[who], mark, color="0.3", label=who)
        axis.set(title=when, xlabel="bias (lengths of ∇J)", ylim=(0, None))
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("noise (lengths of ∇J)")
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, loc="outside upper center", ncols=3)
    save(figure, target)


def main() -> None:
    start, folders, found = letters.step_logp(letters.policy_in(letters.place() / "start")), runs(), {}
    for way, step in WHEN:
        policy, value = nets_at(folders[way], step)
        steps = letters.step_logp(policy)
        found[f"{way}, iteration {step}"] = table(steps, start, read_values(value), letters.gram(policy))
    write_results("gae", found)
    rows = [
        [who, *("{:.2f}, {:.2f}".format(*each[who]) for each in found.values())] for who in next(iter(found.values()))
    ]
    print(markdown(["bias, noise", *found], rows))
    draw(found, Path(__file__).with_suffix(".svg"))


if __name__ == "__main__":
    main()
