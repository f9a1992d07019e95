"""The critic against the truth: the value net beside V^π, which dynamic programming finds.

    OMP_NUM_THREADS=1 python -m experiments.critic      three runs of 120 iterations of 256 answers

How far is the value net from V^π, by iteration and position, and what do iterations of its own and a reward model's
weights buy (compare VinePPO, arXiv 2410.01679)? It writes experiments/results/critic.json and draws critic.svg beside
this file. gae.py goes on from here.
"""

import copy
from pathlib import Path

import numpy as np
import torch

from experiments import letters
from experiments.harness import ROOT, markdown, pyplot, save, write_results
from experiments.recipe import changed
from model import GPT, ScalarModel

BETA = 0.6
QUARTER = {"batch_size": 256, "minibatch_size": 64}  # of the answers that letters.options asks for
SEEN = (0, 1, 2, 4, 8, 16, 30, 60, 119)  # iterations whose nets are kept, as they were before their update
FRESH = """value = ScalarModel(nets.load_gpt(cfg.init, device, "--init", trunks)[0]).to(device)
        torch.nn.init.zeros_(value.head.weight)"""
RATES = "lr, value_lr = rates(step, cfg)"
KEEP = f"""{RATES}
        if step in {SEEN}:
            torch.save({{"policy": policy.state_dict(), "value": value.state_dict()}}, f"{{cfg.out}}/{{step}}.snap")"""
# How the value net starts → its iterations alone, and whether it has a reward model's weights.
WAYS = {"new head": (0, False), "new head, 20 iterations alone": (20, False), "reward model": (0, True)}


def nets_at(run: Path, step: int) -> tuple[GPT, ScalarModel]:
    policy = letters.policy_in(letters.place() / "start")
    value = ScalarModel(copy.deepcopy(policy)).double()
    found = torch.load(run / f"{step}.snap", weights_only=True)
    policy.load_state_dict(found["policy"])
    value.load_state_dict(found["value"])
    return policy, value


@torch.no_grad()
def read_values(value: ScalarModel) -> np.ndarray:
    """What the value net says of each state (156,)."""
    return letters.by_state(value.scalar(value.trunk.hidden(letters.prefixes()))).numpy()


def visits(steps: np.ndarray) -> np.ndarray:
    """How likely an answer passes each state (156,)."""
    p = letters.probabilities(steps)
    return np.bincount(letters.STEPS[letters.TAKEN] // 6, np.repeat(p, letters.TAKEN.sum(1)), len(letters.ENDED))


def rank_correlation(a: np.ndarray, b: np.ndarray, weight: np.ndarray) -> float:
    """Spearman's of a and b, where each value counts as its weight; the weights sum to 1. 0 where one is constant."""
    ranks = [np.array([weight @ ((x < y) + 0.5 * (x == y)) for y in x]) - 0.5 for x in (a, b)]
    both, *squares = (weight @ (x * y) for x, y in (ranks, ranks[:1] * 2, ranks[1:] * 2))
    return float(both / np.sqrt(squares[0] * squares[1])) if min(squares) > 1e-12 else 0.0


def against_truth(net: np.ndarray, truth: np.ndarray, visited: np.ndarray) -> dict[str, list]:
    """By position: the root mean square error of a value net, the deviation of V^π, and the rank correlation."""
    found: dict[str, list] = {"error": [], "deviation": [], "correlation": []}
    position = np.array([len(word) for word in letters.ENDED])
    for t in range(letters.R):
        at = position == t
        weight = visited[at] / visited[at].sum()
        spread = truth[at] - weight @ truth[at]
        found["error"].append(float(np.sqrt(weight @ (net[at] - truth[at]) ** 2)))
        found["deviation"].append(float(np.sqrt(weight @ spread**2)))
        found["correlation"].append(rank_correlation(net[at], truth[at], weight) if t else None)
    return found


def runs() -> dict[str, Path]:
    """The run folder of each of WAYS, with its nets in files of their own."""
    source, found = (ROOT / "ppo.py").read_text(), {}
    started = f'value, _ = nets.load_scalar("{letters.reward_model()}", device)'
    for name, (alone, is_reward) in WAYS.items():
        script = changed(source, {RATES: KEEP} | ({FRESH: started} if is_reward else {}))
        found[name], _ = letters.run(script, BETA, 0, iterations=120, value_warmup=alone, **QUARTER)
    return found


def draw(found: dict[str, dict[int, dict]], target: Path) -> None:
    """Error of the value net over the iterations, a panel a position."""
    figure, axes = pyplot().subplots(1, letters.R, figsize=(9, 2.8), layout="constrained", sharex=True)
    for t, axis in enumerate(axes):
        for name, by_step in found.items():
            axis.plot(list(by_step), [each["error"][t] for each in by_step.values()], ".-", linewidth=1, label=name)
        axis.set(title=f"after {t} letters", xlabel="iteration", xscale="symlog", ylim=(0, None))
        axis.set_xticks([0, 1, 10, 100], ["0", "1", "10", "100"])
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("error of the value net\n(root mean square, units of score)")
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, loc="outside upper center", ncols=4)
    save(figure, target)


def main() -> None:
    start, found = letters.step_logp(letters.policy_in(letters.place() / "start")), {}
    for name, run in runs().items():
        found[name] = {}
        for step in SEEN:
            policy, value = nets_at(run, step)
            steps = letters.step_logp(policy)
            truth, _ = letters.values(steps, start, BETA)
            found[name][step] = against_truth(read_values(value), truth, visits(steps))
    write_results("critic", found)
    rows = []
    for name, by_step in found.items():
        for step in (0, 8, 30, 119):
            each = by_step[step]
            errors = [f"{e:.2f} of {d:.2f}" for e, d in zip(each["error"], each["deviation"])]
            rows.append([name, step, *errors, *(f"{c:.2f}" for c in each["correlation"][1:])])
    header = [f"error after {t}" for t in range(letters.R)] + [f"correlation after {t}" for t in range(1, letters.R)]
    print(markdown(["value net starts from", "iteration", *header], rows))
    draw(found, Path(__file__).with_suffix(".svg"))


if __name__ == "__main__":
    main()
