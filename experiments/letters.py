"""The world of letters: five letters, four positions, and so 781 responses, all of them listed, in float64.

The policy that maximises J(π) = E[s] − β KL(π ‖ π₀) is π* ∝ π₀ exp(s / β), with J* = β log Σ π₀ exp(s / β) (Ziegler et
al. 2019, section 2; Korbak et al. 2022). Those responses that end are `ENDED`; those that the length cuts are `CUT`.
A state is a prefix that can go on, so the 156 states are the words of `ENDED`. An action is a letter (0…4) or EOS (5).
"""

import hashlib
import itertools
import json
from pathlib import Path

import numpy as np
import tiktoken
import torch

from common import nets
from experiments.harness import FOLDER, seconds, stage
from model import GPT, GPTConfig, ScalarModel

LETTERS, R, CAP, BATCH = "abcde", 4, -1.0, 1024
ENDED = ["".join(word) for n in range(R) for word in itertools.product(LETTERS, repeat=n)]
CUT = ["".join(word) for word in itertools.product(LETTERS, repeat=R)]
WORDS = ENDED + CUT
PLACE = {word: i for i, word in enumerate(WORDS)}
SCORE = dict(zip(WORDS, np.random.default_rng(0).normal(size=len(WORDS)).tolist()))
RAW = np.array([SCORE[word] for word in WORDS])
PAID = np.where(np.arange(len(RAW)) < len(ENDED), RAW, np.minimum(RAW, CAP))  # what an unended response gets
BETAS = (1.0, 0.6, 0.3)  # the optimum is 0.34, 0.56 and 0.86 from the start in total variation


def path(word: str) -> list[int]:
    """The steps of a response, state · 6 + action each; −1 where it has ended."""
    steps = [PLACE[word[:t]] * 6 + LETTERS.index(letter) for t, letter in enumerate(word)]
    steps += [PLACE[word] * 6 + 5] if len(word) < R else []
    return steps + [-1] * (R - len(steps))


STEPS = np.array([path(word) for word in WORDS])  # (781, R)
TAKEN = STEPS >= 0


def score(prompt: str, response: str) -> float:
    return SCORE[response]


def world(folder: Path) -> Path:
    """A run folder with the starting policy, a small random GPT far from uniform; and prompts.jsonl beside it."""
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
    (folder / "start").mkdir(parents=True, exist_ok=True)
    nets.save_model(policy, encoding, folder / "start" / "model.pt")
    (folder / "prompts.jsonl").write_text('{"prompt": "a"}\n' * BATCH)
    return folder / "start"


def options(folder: Path, beta: float, seed: int, **changes: object) -> list[str]:
    """The command line of ppo.py with which it settles in the `world` of a folder.

    The rate is low: of what π₀ says once in 2,000 answers, some must be heard before the policy says little else.
    """
    found = {
        "init": folder / "start", "data": folder / "prompts.jsonl", "eval_data": folder / "prompts.jsonl",
        "out": folder / f"{beta}-{seed}", "reward": f"{__file__}:score", "unended_cap": CAP, "response_len": R,
        "eval_prompts": 1, "device": "cpu", "batch_size": BATCH, "minibatch_size": 256, "iterations": 360, "epochs": 1,
        "lr": 5e-4, "kl_coef": beta, "value_lr": 5e-4, "value_warmup": 0, "seed": seed,
    } | changes  # fmt: skip
    return [str(word) for name, value in found.items() for word in (f"--{name}", value)]


def prefixes() -> torch.Tensor:
    """Every state as tokens behind the prompt "a", right-padded: (156, R)."""
    rows = [[0, *map(LETTERS.index, word)] for word in ENDED]
    return torch.tensor([row + [0] * (R - len(row)) for row in rows])


def by_state(x: torch.Tensor) -> torch.Tensor:
    """What a net says at the last token of each prefix: (156, R, …) → (156, …)."""
    return x[torch.arange(len(ENDED)), torch.tensor([len(word) for word in ENDED])]


def policy_in(folder: Path) -> GPT:
    return nets.load_gpt(folder)[0].double()


@torch.no_grad()
def step_logp(policy: GPT) -> np.ndarray:
    """log π (156, 6) of every action in every state."""
    return by_state(policy(prefixes())).log_softmax(-1).numpy()


def probabilities(steps: np.ndarray) -> np.ndarray:
    """π (781,) of every response, from log π (156, 6)."""
    return np.exp(along(steps).sum(1))


def along(steps: np.ndarray) -> np.ndarray:
    """Numbers of steps (156, 6) along each response: (781, R), 0 after its end."""
    return np.append(steps.ravel(), 0.0)[STEPS]


def log_probabilities(folder: Path) -> np.ndarray:
    """log π (781,) in float64 of every response, ended ones first; they sum to 1."""
    total = along(step_logp(policy_in(folder))).sum(1)
    assert abs(np.exp(total).sum() - 1) < 1e-9
    return total


def optimum(start: np.ndarray, beta: float) -> tuple[np.ndarray, float]:
    """log π* (781,) and J* = β log Z."""
    log_z = np.logaddexp.reduce(start + PAID / beta)
    return start + PAID / beta - log_z, beta * log_z


def kl(p: np.ndarray, q: np.ndarray) -> float:
    """KL(p ‖ q) in nats."""
    return float(np.exp(p) @ (p - q))


def objective(logp: np.ndarray, start: np.ndarray, beta: float) -> float:
    return float(np.exp(logp) @ PAID - beta * kl(logp, start))


def win_rate(logp: np.ndarray, start: np.ndarray) -> float:
    """How often an answer of π has a higher score than one of π₀; ties count half."""
    return float(np.exp(logp) @ [np.exp(start) @ ((PAID < s) + 0.5 * (PAID == s)) for s in PAID])


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Total variation."""
    return float(np.abs(np.exp(a) - np.exp(b)).sum() / 2)


def landing(logp: np.ndarray, start: np.ndarray, beta: float) -> dict[str, float]:
    """Where a policy (781,) stands: J, its share of the way from J(π₀) to J*, TV to π*, win rate, KL to π₀ and to π*.

    What is missing to J* is β KL(π ‖ π*), whatever π is: that is asserted.
    """
    (best, most), reached = optimum(start, beta), objective(logp, start, beta)
    assert abs(most - reached - beta * kl(logp, best)) < 1e-9
    share = 1 - (most - reached) / (most - objective(start, start, beta))
    found = {"J": reached, "J*": most, "share": share, "TV": distance(logp, best), "win rate": win_rate(logp, start)}
    return found | {"KL": kl(logp, start), "KL of π*": kl(best, start), "KL to π*": kl(logp, best)}


def values(steps: np.ndarray, start: np.ndarray, beta: float) -> tuple[np.ndarray, np.ndarray]:
    """V^π (156,) and Q^π (156, 6) by dynamic programming, of log π and log π₀ (156, 6): score − β KL still to come."""
    v, q = np.zeros(len(ENDED)), -beta * (steps - start)
    for i, word in reversed(list(enumerate(ENDED))):  # the longest first
        after = [PLACE[word + letter] for letter in LETTERS]
        q[i, :5] += v[after] if len(word) + 1 < R else PAID[after]
        q[i, 5] += PAID[i]
        v[i] = np.exp(steps[i]) @ q[i]
    return v, q


def standstill(k: str, start: np.ndarray, beta: float) -> np.ndarray:
    """log π (156, 6) where the loss term of each token leaves a policy that can be anything: it stands still there.

    No token is charged for the KL of later ones. k2: π ∝ π₀ e^(Q / β). k3: π = β π₀ / (λ − Q), with λ such that it sums
    to 1. Q is the mean score still to come.
    """
    found, v = np.zeros_like(start), np.zeros(len(ENDED))
    for i, word in reversed(list(enumerate(ENDED))):
        after = [PLACE[word + letter] for letter in LETTERS]
        q = np.append(v[after] if len(word) + 1 < R else PAID[after], PAID[i])
        found[i] = start[i] + q / beta - np.logaddexp.reduce(start[i] + q / beta)
        if k == "k3":
            low, high = q.max(), q.max() + beta
            for _ in range(100):
                middle = (low + high) / 2
                low, high = (middle, high) if (beta * np.exp(start[i]) / (middle - q)).sum() > 1 else (low, middle)
            found[i] = np.log(beta) + start[i] - np.log(high - q)
        v[i] = np.exp(found[i]) @ q
    return found


def gram(policy: GPT) -> np.ndarray:
    """Inner products (936, 936) of the gradients of log π(action | state), with which any gradient here is made."""
    rows = []
    for word in ENDED:
        logp = policy(torch.tensor([[0, *map(LETTERS.index, word)]]))[0, -1].log_softmax(-1)
        for x in logp:
            found = torch.autograd.grad(x, list(policy.parameters()), retain_graph=True)
            rows.append(torch.cat([g.flatten() for g in found]))
    jacobian = torch.stack(rows)
    return (jacobian @ jacobian.T).numpy()


def moments(weight: np.ndarray, p: np.ndarray, products: np.ndarray) -> tuple[np.ndarray, float]:
    """Mean and total variance of Σ weight ∇ log π(token), of a response drawn from p (781,).

    weight: (781, R) or (781, 1). The mean is given as the weights (936,) of all ∇ log π(action | state).
    """
    weight, steps = weight * TAKEN, np.maximum(STEPS, 0)
    mean = np.bincount(steps.ravel(), (p[:, None] * weight).ravel(), products.shape[0])
    inside = products[steps[:, :, None], steps[:, None, :]]  # (781, R, R)
    square = p @ np.einsum("yr,yrs,ys->y", weight, inside, weight)
    return mean, square - mean @ products @ mean


def compared(start: np.ndarray, n: int, target: Path) -> Path:
    """`n` pairs of answers of π₀; the better is drawn from Bradley and Terry's model."""
    rng = np.random.default_rng(0)
    pairs = rng.choice(len(WORDS), size=(n, 2), p=np.exp(start) / np.exp(start).sum())
    first_wins = rng.random(n) < 1 / (1 + np.exp(PAID[pairs[:, 1]] - PAID[pairs[:, 0]]))
    with open(target, "w") as file:
        for pair, first in zip(pairs.tolist(), first_wins.tolist()):
            best, worst = pair if first else reversed(pair)
            row = {"prompt": "a", "chosen": WORDS[best], "rejected": WORDS[worst]}
            row |= {"chosen_ended": best < len(ENDED), "rejected_ended": worst < len(ENDED)}
            file.write(json.dumps(row) + "\n")
    return target


def place() -> Path:
    """The folder of the runs; the starting policy stands in it."""
    folder = (FOLDER / "exact").resolve()
    return folder if (folder / "start" / "model.pt").exists() else world(folder).parent


def run(source: str, beta: float, seed: int, **changes: object) -> tuple[Path, float]:
    """The run folder of a variant of ppo.py, given as its text, and its seconds. A text and its options run once."""
    folder = place()
    key = hashlib.sha256((source + repr(sorted(changes.items()))).encode()).hexdigest()[:10]
    name = f"{key}-{beta:g}-{seed}"
    script = folder / "scripts" / f"{name}.py"
    script.parent.mkdir(exist_ok=True)
    script.write_text(source)
    text = stage(folder, name, script, *options(folder, beta, seed, out=folder / name, **changes))
    return folder / name, seconds(text)


def settle(source: str, beta: float, seed: int, **changes: object) -> dict[str, float]:
    """Where a variant lands, and its seconds."""
    folder, took = run(source, beta, seed, **changes)
    return ended(folder, beta) | {"seconds": took}


def ended(run: Path, beta: float) -> dict[str, float]:
    return landing(log_probabilities(run), log_probabilities(place() / "start"), beta)


def reward_model() -> Path:
    """A run folder with a reward model that has learned the scores of whole answers, as often as π₀ gives them."""
    folder = place() / "reward"
    if not (folder / "model.pt").exists():
        policy, encoding = nets.load_gpt(place() / "start")
        p = torch.tensor(np.exp(log_probabilities(place() / "start"))).float()
        rows = [[0, *map(LETTERS.index, word)] + [5] * (len(word) < R) for word in WORDS]
        tokens = torch.tensor([row + [0] * (R + 1 - len(row)) for row in rows])
        length, paid = torch.tensor([len(row) for row in rows]), torch.tensor(PAID).float()
        torch.manual_seed(0)
        model = ScalarModel(policy)
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
        for _ in range(300):
            optimizer.zero_grad()
            (p * (model.scores(tokens, length) - paid).square()).sum().backward()
            optimizer.step()
        folder.mkdir(exist_ok=True)
        nets.save_model(model, encoding, folder / "model.pt")
    return folder
