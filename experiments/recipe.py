"""What each part of PPO's recipe is for: the default run, and the same run with one part taken out, every seed.

    python -m experiments.recipe                  seeds 1 to 5, from the first two stages of `python -m experiments.kl`
    python -m experiments.recipe --seeds 6,7      other seeds

It prints a table: by seed the final judge, the highest KL of an iteration, and its lowest judge.
"""

import argparse

import common
from experiments.harness import FOLDER, closing_table, markdown, road, stage
from experiments.kl import JUDGE

WITHOUT = {  # what is taken out → its options
    "nothing": [],
    "value net first (--value_warmup 0)": ["--value_warmup", 0],
    "rising rate (--lr_warmup 0)": ["--lr_warmup", 0],
    "rate of the value net (--value_lr 3e-4)": ["--value_lr", 3e-4],
    "two epochs (--epochs 4)": ["--epochs", 4],
}
FOLDERS = dict(zip(WITHOUT, ("ppo", "no-value-warmup", "no-lr-warmup", "one-lr", "four-epochs")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", default="1,2,3,4,5", help="comma-separated")
    seeds = [int(seed) for seed in parser.parse_args().seeds.split(",")]
    rows = []
    for what, options in WITHOUT.items():
        judges, highest, lowest = [], [], []
        for seed in seeds:
            folder, name = FOLDER / "kl" / f"seed-{seed}", FOLDERS[what]
            for script in ("sft", "reward"):
                stage(folder, script, f"{script}.py", "--seed", seed)
            out = [] if name == "ppo" else ["--out", f"out/{name}"]
            printed = stage(folder, name, "ppo.py", "--seed", seed, *options, *out)
            kl, _, judge, *_ = road(common.read_metrics(folder / "out" / name))
            judges.append(closing_table(printed)[JUDGE][1].split()[0])
            highest.append(kl)
            lowest.append(judge)
        rows.append([what, ", ".join(judges), ", ".join(highest), ", ".join(lowest)])
    print(markdown(["taken out", "final judge", "highest KL", "lowest judge"], rows))


if __name__ == "__main__":
    main()
