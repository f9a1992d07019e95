"""The optimum of KL-regularised reward, listed exactly, and ppo.py run until it is there.

In a world of five letters and four positions there are 781 responses: those that end, and those that the length cuts.
The policy that maximises J(π) = E[s] − β KL(π ‖ π₀) is π* ∝ π₀ exp(s / β), with J* = β log Σ π₀ exp(s / β) (Ziegler et
al. 2019, section 2; Korbak et al. 2022). `python -m tests.test_optimum tests/optimum.svg` draws the figure.
"""

import itertools
import math
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch

import ppo
from common import cli, nets, runs
from model import GPT, GPTConfig

LETTERS, R, CAP, BATCH = "abcde", 4, -1.0, 1024
ENDED = ["".join(word) for n in range(R) for word in itertools.product(LETTERS, repeat=n)]
CUT = ["".join(word) for word in itertools.product(LETTERS, repeat=R)]
SCORE = dict(zip(ENDED + CUT, np.random.default_rng(0).normal(size=len(ENDED + CUT)).tolist()))
BETAS = (1.0, 0.6, 0.3)  # the optimum is 0.34, 0.56 and 0.86 from the start in total variation


def score(prompt: str, response: str) -> float:
    return SCORE[response]


def world(folder: Path) -> Path:
    """A run folder with the starting policy: a small random GPT over the letters and EOS, far from uniform."""
    encoding = tiktoken.Encoding(
        "letters",
        pat_str=".",
        mergeable_ranks={c.encode(): i for i, c in enumerate(LETTERS)},
        special_tokens={"<|endoftext|>": 5},
    )
    torch.manual_seed(0)
    policy = GPT(GPTConfig(vocab_size=6, block_size=1 + R, n_layer=2, n_head=2, n_embd=32, eos=5))
    for p in policy.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.1)
    (folder / "start").mkdir()
    nets.save_model(policy, encoding, folder / "start" / "model.pt")
    (folder / "prompts.jsonl").write_text('{"prompt": "a"}\n' * BATCH)
    return folder / "start"


@torch.no_grad()
def log_probabilities(folder: Path) -> np.ndarray:
    """log π (781,) in float64 of every response, ended ones first; they sum to 1."""
    policy, _ = nets.load_gpt(folder)
    policy.double()
    total = []
    for words, end in ((ENDED, [5]), (CUT, [])):
        for word in words:
            row = [0] + [LETTERS.index(c) for c in word] + end
            logp = policy(torch.tensor([row])).log_softmax(-1)[0]
            total.append(sum(logp[t - 1, row[t]].item() for t in range(1, len(row))))
    assert abs(np.exp(total).sum() - 1) < 1e-9
    return np.array(total)


RAW = np.array([SCORE[word] for word in ENDED + CUT])
PAID = np.where(np.arange(len(RAW)) < len(ENDED), RAW, np.minimum(RAW, CAP))  # what an unended response gets


def optimum(start: np.ndarray, beta: float) -> tuple[np.ndarray, float]:
    """log π* (781,) and J* = β log Z."""
    log_z = np.logaddexp.reduce(start + PAID / beta)
    return start + PAID / beta - log_z, beta * log_z


def objective(logp: np.ndarray, start: np.ndarray, beta: float) -> float:
    return float(np.exp(logp) @ (PAID - beta * (logp - start)))


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Total variation."""
    return float(np.abs(np.exp(a) - np.exp(b)).sum() / 2)


def settle(folder: Path, beta: float, seed: int, **options: object) -> tuple[np.ndarray, dict]:
    """ppo.py, as it stands, until its rate is 0: log π of every response, and its last line of metrics.

    The rate is low: of what π₀ says once in 2,000 answers, some must be heard before the policy says little else.
    """
    out = folder / f"{beta}-{seed}"
    options = {
        "init": folder / "start", "data": folder / "prompts.jsonl", "eval_data": folder / "prompts.jsonl", "out": out,
        "reward": f"{__file__}:score", "unended_cap": CAP, "response_len": R, "eval_prompts": 1, "device": "cpu",
        "batch_size": BATCH, "minibatch_size": 256, "iterations": 360, "epochs": 1, "lr": 5e-4, "kl_coef": beta,
        "value_lr": 5e-4, "value_warmup": 0,
        "seed": seed,
    } | options  # fmt: skip
    ppo.train(cli.parse(ppo.Config, [str(word) for name, value in options.items() for word in (f"--{name}", value)]))
    return log_probabilities(out), runs.read_metrics(out)[-1]


def test_a_ninth_of_the_iterations_goes_most_of_the_way_to_the_exact_optimum(tmp_path):
    """At a high rate and a quarter of the answers: 77% of the way to J*, total variation from 0.56 down to 0.21."""
    start = log_probabilities(world(tmp_path))
    best, most = optimum(start, 0.6)
    reached, _ = settle(tmp_path, 0.6, 0, iterations=40, batch_size=256, minibatch_size=128, lr=3e-3, value_lr=3e-3)
    before, after = objective(start, start, 0.6), objective(reached, start, 0.6)
    assert 0.6 <= (after - before) / (most - before) <= 1 and distance(reached, best) < 0.6 * distance(start, best)


@pytest.mark.slow
@pytest.mark.parametrize("beta, seed", [(beta, 0) for beta in BETAS])
def test_ppo_reaches_the_exact_optimum_of_kl_regularised_reward(tmp_path, beta, seed):
    """98% of the way from J(π₀) to J*, at a total variation of 0.05 from π* (0.10 where it is far from the start)."""
    start = log_probabilities(world(tmp_path))
    best, most = optimum(start, beta)
    reached, line = settle(tmp_path, beta, seed)
    before, after = objective(start, start, beta), objective(reached, start, beta)
    assert objective(best, start, beta) == pytest.approx(most, abs=1e-9)  # J* is what π* gets, and nothing gets more
    assert 0.98 <= (after - before) / (most - before) <= 1
    assert distance(reached, best) <= (0.10 if distance(start, best) > 0.75 else 0.05)
    for name, each in (("objective/kl", reached - start), ("objective/scores", RAW)):
        mean = float(np.exp(reached) @ each)
        error = math.sqrt(float(np.exp(reached) @ (each - mean) ** 2) / BATCH)
        assert abs(line[name] - mean) < 4 * error, name  # the last line, whose update was the smallest


def draw(target: str) -> None:
    """The exact frontier, expected score against KL for every β, and where ppo.py ends up on it."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4))
    with tempfile.TemporaryDirectory() as folder:
        start = log_probabilities(world(Path(folder)))
        place = lambda logp: (float(np.exp(logp) @ (logp - start)), float(np.exp(logp) @ PAID))  # noqa: E731
        curve = [place(optimum(start, beta)[0]) for beta in np.geomspace(0.1, 20, 200)]
        axis.plot(*zip(*curve), color="0.6", label="exact optimum, every β")
        for beta in BETAS:
            best, most = optimum(start, beta)
            axis.plot(*place(best), "o", color="0.85", markersize=11)
            for seed in range(3):
                reached, _ = settle(Path(folder), beta, seed)
                axis.plot(
                    *place(reached), "x", color="C3", label="ppo.py, three seeds" if (beta, seed) == (1.0, 0) else None
                )
                before, after = objective(start, start, beta), objective(reached, start, beta)
                print(
                    f"| {beta} | {seed} | {distance(start, best):.2f} | {(after - before) / (most - before):.3f} |"
                    f" {distance(reached, best):.3f} | {place(reached)[0]:.2f} | {place(best)[0]:.2f} |",
                    file=sys.stderr,
                )
            axis.annotate(f"β = {beta}", place(best), textcoords="offset points", xytext=(8, -14))
        axis.plot(*place(start), "ks", label="start")
    axis.set(xlabel="KL to the start (nats)", ylabel="expected score")
    axis.legend(loc="lower right", frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(target, bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    draw(sys.argv[1])
