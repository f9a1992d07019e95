"""The forks of ppo.py and DPO beside PPO: judge, KL and score of each, every seed, and the judge at a like KL.

    python -m experiments.forks                   seeds 1 to 3, from the first two stages of `python -m experiments.kl`
    python -m experiments.forks --seeds 10 --only dpo --kl_coef 0.1               how DPO's β was chosen

Forks end at different KLs, and a policy that has gone further has a better judge for that alone. So the table has a
column "judge at PPO's KL": over the five iterations of a run whose KL is nearest to PPO's final one on that seed, the
mean judge of the 128 answers of each. DPO samples nothing in training; its β is the one at which its final KL was
nearest to PPO's on seed 10. What has run is kept in out/experiments/kl beside PPO's own runs; a stopped run goes on.
"""

import argparse
import os
from pathlib import Path

import common
from experiments.forks import HERE, patched
from experiments.harness import FOLDER, ROOT, closing_table, markdown, seconds, stage
from experiments.kl import JUDGE, KL

FORKS = {  # name → its diffs, and its β
    "ppo": ([], 0.05),
    "rloo": (["rloo"], 0.05),
    "grpo": (["grpo"], 0.05),
    "KL in the loss": (["kl_in_loss"], 0.05),
    "grpo, KL in the loss": (["grpo", "kl_in_loss"], 0.05),
    "clip-higher": (["clip_higher"], 0.05),
    "rule": (["rule"], 0.01),
    "dpo": ([], 0.15),
}


def run(fork: str, kl_coef: float, seed: int) -> list[str]:
    """Judge, KL and score of a run on the held-out prompts, the judge at PPO's KL, and its seconds."""
    folder = FOLDER / "kl" / f"seed-{seed}"
    for script in ("sft", "reward", "ppo"):
        text = stage(folder, script, f"{script}.py", "--seed", seed)
    target, took, name = number(text, KL), 0.0, "ppo"
    if fork != "ppo":
        name = f"{fork.replace(', ', '-').replace(' ', '-')}-{kl_coef:g}"
        options = ["--seed", seed, "--kl_coef", kl_coef, "--out", f"out/{name}"]
        os.environ["PYTHONPATH"] = str(ROOT)  # where a script in another folder finds common.py and the others
        script = Path(FOLDER / "forks" / name.rpartition("-")[0] / "ppo.py").resolve()
        script.parent.mkdir(parents=True, exist_ok=True)
        script.write_text(patched((ROOT / "ppo.py").read_text(), *FORKS[fork][0]))
        if fork == "dpo":
            took = seconds(stage(folder, f"{name}-training", HERE / "dpo.py", *options))
            options += ["--iterations", 0]
        text = stage(folder, name, script, *options)
    found = [f"{number(text, column):.3f}" for column in (JUDGE, KL, "score")]
    return [*found, judge_near(folder / "out" / name, target), f"{took + seconds(text):.0f}"]


def number(text: str, row: str) -> float:
    """What ppo.py's closing table says of the policy after the run."""
    return float(closing_table(text)[row][1].split()[0])


def judge_near(folder: Path, kl: float) -> str:
    """The mean judge over the five iterations whose KL is nearest to `kl`, and their mean KL."""
    lines = [line for line in common.read_metrics(folder) if "objective/kl" in line]
    if not lines:
        return "–"
    near = sorted(lines, key=lambda line: abs(line["objective/kl"] - kl))[:5]
    judge, reached = (sum(line[name] for line in near) / 5 for name in ("objective/judge", "objective/kl"))
    return f"{judge:.3f} ({reached:.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", default="1,2,3", help="comma-separated")
    parser.add_argument("--only", choices=FORKS, help="one fork alone")
    parser.add_argument("--kl_coef", type=float, help="another β than the fork's own")
    options = parser.parse_args()
    forks = [options.only] if options.only else list(FORKS)
    rows = {fork: [] for fork in forks}
    for seed in options.seeds.split(","):
        for fork in forks:
            own = FORKS[fork][1]
            rows[fork].append(run(fork, own if options.kl_coef is None else options.kl_coef, int(seed)))
    lines = [[fork, *(", ".join(column) for column in zip(*found))] for fork, found in rows.items()]
    print(markdown(["fork", "judge", "KL", "score", "judge at PPO's KL", "seconds"], lines))


if __name__ == "__main__":
    main()
