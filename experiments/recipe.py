"""What each part of PPO's recipe is for: the default run, and the same run with one part taken out, every seed.

    python -m experiments.recipe                  seeds 1 to 5, from the first two stages of `python -m experiments.kl`
    python -m experiments.recipe --seeds 6,7      other seeds

It prints a table and draws experiments/recipe.svg. Variants of one seed share everything before PPO, so the difference
to the default is taken seed by seed. What has run is kept in out/experiments/kl; a stopped run goes on.
"""

import argparse
import re
import statistics
from pathlib import Path

from common import nets
from common.runs import read_metrics
from experiments.harness import (
    FOLDER,
    JUDGE,
    KL,
    ROOT,
    closing_table,
    course,
    markdown,
    number,
    pyplot,
    save,
    stage,
    start,
)

LOADED = 'value, _ = nets.load_scalar(cfg.reward, device, "--reward", trunks)'
FRESH = "value = ScalarModel(GPT(policy.config)).to(device)"
WITHOUT = {  # what is taken out → its run folder, its options, and what is changed in ppo.py
    "nothing": ("ppo", [], {}),
    "KL term (--kl_coef 0)": ("no-kl", ["--kl_coef", 0], {}),
    "clip of the ratio (--cliprange 1e9)": ("no-clip", ["--cliprange", 1e9], {}),
    "whitening": ("no-whitening", [], {"whiten(advantages, mask)": "advantages"}),
    "clip of the value (--cliprange_value 1e9)": ("no-value-clip", ["--cliprange_value", 1e9], {}),
    "unit scores (the reward model's as they came)": ("raw-scores", ["--reward", "out/raw-reward"], {}),
    "value net from the reward model (new weights)": ("new-value", [], {LOADED: FRESH}),
    "value net first (--value_warmup 0)": ("no-value-warmup", ["--value_warmup", 0], {}),
    "single epoch (--epochs 2)": ("two-epochs", ["--epochs", 2], {}),
    "cap without EOS (--unended_cap inf)": ("no-cap", ["--unended_cap", "inf"], {}),
    "Adam's ε of 1e-5 (1e-8)": ("small-eps", [], {"eps=1e-5": "eps=1e-8"}),
}


def raw_reward(folder: Path) -> None:
    """Write out/raw-reward: the reward model before reward.py gave its scores mean 0 and variance 1."""
    target = folder / "out" / "raw-reward" / "model.pt"
    if not target.exists():
        net, encoding = nets.load_scalar(folder / "out" / "reward")
        net.gain.fill_(1)
        net.bias.fill_(0)
        target.parent.mkdir(exist_ok=True)
        nets.save_model(net, encoding, target)


def run(what: str, seed: int) -> tuple[Path, str]:
    """The run folder of a variant, and what it printed."""
    name, options, changes = WITHOUT[what]
    folder, script = start(seed), Path("ppo.py")
    if name == "raw-scores":
        raw_reward(folder)
    if changes:
        script = (FOLDER / "recipe" / name / "ppo.py").resolve()
        script.parent.mkdir(parents=True, exist_ok=True)
        script.write_text(changed((ROOT / "ppo.py").read_text(), changes))
    out = [] if name == "ppo" else ["--out", f"out/{name}"]
    return folder / "out" / name, stage(folder, name, script, "--seed", seed, *options, *out, may_diverge=True)


def numbers(printed: str, lines: list[dict]) -> list[str] | None:
    """Judge and KL at the end, the highest KL and the lowest judge of an iteration. None for a run that failed."""
    table = closing_table(printed)
    if not table:
        return None
    highest, _, lowest, *_ = course(lines)
    return [table[JUDGE][1].split()[0], table[KL][1].split()[0], highest, lowest]


def changed(source: str, changes: dict[str, str]) -> str:
    for old, new in changes.items():
        if old not in source:
            raise ValueError(f"ppo.py has no {old!r}")
        source = source.replace(old, new)
    return source


def draw(folders: dict[str, list[Path]], target: Path) -> None:
    """For each variant the judge over the iterations, and below it the KL; a line a seed."""
    n, columns = len(folders), 6
    bands = -(-n // columns)
    figure, axes = pyplot().subplots(2 * bands, columns, figsize=(12, 3 * bands), layout="constrained", sharex=True)
    for i, (what, runs) in enumerate(folders.items()):
        band, column = divmod(i, columns)
        judge, kl = axes[2 * band][column], axes[2 * band + 1][column]
        for folder in runs:
            lines = read_metrics(folder)
            steps = [line["step"] + 1 for line in lines]
            judge.plot(steps, [line["objective/judge"] for line in lines], linewidth=0.9)
            kl.plot(steps, [line["objective/kl"] for line in lines], linewidth=0.9)
        judge.set(ylim=(0, 1))
        judge.set_title(re.sub(r" \(.*", "", what), fontsize=7)
        for axis in (judge, kl):
            axis.grid(alpha=0.25)
            axis.tick_params(labelsize=6)
    for empty in range(n, bands * columns):
        band, column = divmod(empty, columns)
        axes[2 * band][column].axis("off")
        axes[2 * band + 1][column].axis("off")
    for band in range(bands):
        axes[2 * band][0].set_ylabel("judge", fontsize=7)
        axes[2 * band + 1][0].set_ylabel("KL (nats)", fontsize=7)
    save(figure, target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", default="1,2,3,4,5", help="comma-separated")
    parser.add_argument("--figure", type=Path, default=Path(__file__).with_name("recipe.svg"))
    options = parser.parse_args()
    found, folders = {what: [] for what in WITHOUT}, {what: [] for what in WITHOUT}
    for seed in map(int, options.seeds.split(",")):
        for what in WITHOUT:
            folder, printed = run(what, seed)
            folders[what].append(folder)
            found[what].append(numbers(printed, read_metrics(folder)))
    rows = []
    for what, runs in found.items():
        pairs = [(mine[0], default[0]) for mine, default in zip(runs, found["nothing"]) if mine and default]
        change = [number(mine) - number(default) for mine, default in pairs]
        error = f" ± {statistics.stdev(change) / len(change) ** 0.5:.3f}" if len(change) > 1 else ""
        mean = f"{statistics.mean(change):+.3f}{error}" if change and what != "nothing" else ""
        columns = zip(*(each or ["failed"] * 4 for each in runs))
        rows.append([what, mean, *map(", ".join, columns)])
    header = ["taken out", "judge less the default's", "judge", "KL", "highest KL of an iteration"]
    print(markdown([*header, "lowest judge of one"], rows))
    draw(folders, options.figure)


if __name__ == "__main__":
    main()
