"""The forks of ppo.py and DPO beside PPO: judge, KL and score of each, every seed.

    python -m experiments.forks                   seeds 1 to 3, from the first two stages of `python -m experiments.kl`
    python -m experiments.forks --seeds 10 --only dpo --kl_coef 0.1               how DPO's β was chosen

A policy that has gone further from the start has a better judge for that alone, up to a point: compare forks at a
like KL. A β in the loss weighs the KL in another way than PPO's, so several are run and all are shown. DPO's is the one
of 0.1 and 0.15 whose final KL was nearer to PPO's on seed 10. What has run is kept in out/experiments/kl beside PPO's
own runs; a stopped run goes on.
"""

import argparse
from pathlib import Path

from experiments.forks import HERE, patched
from experiments.harness import EVAL, FOLDER, JUDGE, KL, ROOT, closing_table, markdown, seconds, stage, start

FORKS = {  # name → its diffs, and each β that is run
    "ppo": ([], [0.05]),
    "rloo": (["rloo"], [0.05]),
    "grpo": (["grpo"], [0.05]),
    "grpo, KL in the loss": (["grpo", "kl_in_loss"], [0.05, 0.2]),
    "KL in the loss": (["kl_in_loss"], [0.05, 0.1, 0.4]),
    "clip-higher": (["clip_higher"], [0.05]),
    "rule": (["rule"], [0.01]),
    "dpo": ([], [0.15]),
}


def run(fork: str, kl_coef: float, seed: int) -> list[str]:
    """Judge, KL and score of a run on the held-out prompts, and its seconds without the stages before it."""
    folder, took = start(seed), 0.0
    if (fork, kl_coef) == ("ppo", 0.05):  # the default run
        text = stage(folder, "ppo", "ppo.py", "--seed", seed)
    else:
        name = f"{fork.replace(', ', '-').replace(' ', '-')}-{kl_coef:g}"
        options = ["--seed", seed, "--kl_coef", kl_coef, "--out", f"out/{name}"]
        if fork == "dpo":
            took = seconds(stage(folder, f"{name}-training", HERE / "dpo.py", *options))
            text = stage(folder, name, EVAL, f"out/{name}", "--seed", seed)
        else:
            script = Path(FOLDER / "forks" / name.rpartition("-")[0] / "ppo.py").resolve()
            script.parent.mkdir(parents=True, exist_ok=True)
            script.write_text(patched((ROOT / "ppo.py").read_text(), *FORKS[fork][0]))
            text = stage(folder, name, script, *options)
    rows = closing_table(text)
    found = [rows[name][1].split()[0] for name in (JUDGE, KL, "score")]
    return [*found, f"{took + seconds(text):.0f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", default="1,2,3", help="comma-separated")
    parser.add_argument("--only", choices=FORKS, help="one fork alone")
    parser.add_argument("--kl_coef", type=float, help="another β than the fork's own")
    options = parser.parse_args()
    runs = [(fork, kl_coef) for fork, (_, kl_coefs) in FORKS.items() for kl_coef in kl_coefs]
    if options.only:
        runs = [(fork, kl_coef) for fork, kl_coef in runs if fork == options.only]
    if options.kl_coef is not None:
        runs = list(dict.fromkeys((fork, options.kl_coef) for fork, _ in runs))
    found: dict[tuple[str, float], list[list[str]]] = {each: [] for each in runs}
    for seed in options.seeds.split(","):
        for fork, kl_coef in runs:
            found[fork, kl_coef].append(run(fork, kl_coef, int(seed)))
    lines = [[*each, *map(", ".join, zip(*found[each]))] for each in runs]
    print(markdown(["fork", "β", "judge", "KL", "score", "seconds"], lines))


if __name__ == "__main__":
    main()
