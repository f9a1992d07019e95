"""What the metrics of an iteration of PPO cannot be while sampling, scoring and the frozen copy are right."""

from typing import Any


def impossible(metrics: dict[str, float], cfg: Any, first: bool) -> str:
    """One sentence on what is impossible; "" if nothing is, or if another stage wrote the metrics.

    Rounding may cost 0.01 nats a token. At samples of π the sum of log π / π₀ over all answers is below −20 in e^−20 of
    all cases at most, since the mean of π₀ / π is 1 at most (Markov).
    """
    kl, rounding = metrics.get("objective/kl", 0.0), 0.01 * metrics.get("response_len", 0)
    apart, still = abs(metrics.get("policy/ratio", 1.0) - 1), metrics.get("lr") == 0
    if still and max(apart, metrics.get("policy/approxkl", 0.0)) > 0.02:
        return "the ratio is not 1 though the policy stands still: compare how old and new log-probabilities are made"
    if (still or first) and rounding and cfg.ref in ("", cfg.init) and abs(kl) > rounding:
        return "the KL is not 0 though the policy is still the reference: compare how logp and ref_logp are made"
    if rounding and kl < -20 / cfg.batch_size - rounding:
        return "the KL is below 0 by more than chance: what is sampled has other probabilities than what is scored"
    return ""
