"""What the metrics of an iteration of PPO cannot be while sampling, scoring and the frozen copy are right."""

from typing import Any

import torch


def impossible(metrics: dict[str, float], cfg: Any, first: bool) -> str:
    """One sentence on what cannot be, or "". Rounding is that of bfloat16 or TF32 on a GPU. At samples of π the sum of
    log π / π₀ over all answers is below −20 in e^−20 of all cases at most: the mean of π₀ / π is ≤ 1 (Markov)."""
    coarse = cfg.dtype == "bfloat16" or torch.cuda.is_available() or torch.backends.mps.is_available()
    rounding, still, length = 0.02 if coarse else 1e-4, metrics.get("lr") == 0, metrics.get("response_len", 0)
    kl, moved = metrics.get("objective/kl", 0.0), metrics.get("policy/approxkl", 0.0)
    if still and max(moved, abs(metrics.get("policy/ratio", 1.0) - 1)) > rounding:
        return "the ratio is not 1 though the policy stands still: compare how old and new log-probabilities are made"
    if (still or first) and length and cfg.ref in ("", cfg.init) and abs(kl) > rounding * length:
        return "the KL is not 0 though the policy is still the reference: compare how logp and ref_logp are made"
    if length and kl < -20 / cfg.batch_size - rounding * length:
        return "the KL is below 0 by more than chance: what is sampled has other probabilities than what is scored"
    return ""
