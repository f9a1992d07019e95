"""What each part of PPO's recipe is for: the default run, and the same run with one part changed, every seed.

    OMP_NUM_THREADS=1 python -m experiments.recipe                  seeds 30 to 39, after kl; half an hour each
    OMP_NUM_THREADS=1 python -m experiments.recipe --seeds 30,31    some of them

Variants of one seed share everything before PPO, so each is compared with the default run seed by seed. The placebo is
the default run with another seed of PPO: what chance alone changes. Intervals are Student's t, of 95%. The p-values are
of a sign-flip test, corrected for the ten variants by Holm's method. It prints the tables, writes
experiments/results/recipe.json and draws experiments/recipe.svg. A stopped run goes on.
"""

import argparse
import itertools
from pathlib import Path

from common import nets
from experiments import harness
from experiments.harness import DIVERGED, FOLDER, ROOT

LOADED = 'value, _ = nets.load_scalar(names[0], device, "--reward", trunks)'
FRESH = "value = ScalarModel(GPT(policy.config)).to(device)"
VARIANTS = {  # what changes → its run folder, its options, and what is changed in ppo.py
    "default": ("ppo", [], {}),
    "placebo: other seed of PPO": ("placebo", [], {}),
    "β: 0.05 → 0": ("no-kl", ["--kl_coef", 0], {}),
    "clip of the ratio: 0.2 → none": ("no-clip", ["--cliprange", 1e9], {}),
    "whitening of advantages → none": ("no-whitening", [], {"whiten(advantages, mask)": "advantages"}),
    "clip of the value: 0.2 → none": ("no-value-clip", ["--cliprange_value", 1e9], {}),
    "scores: mean 0, variance 1 → as they came": ("raw-scores", ["--reward", "out/raw-reward"], {}),
    "value net: the reward model's weights → new ones": ("new-value", [], {LOADED: FRESH}),
    "iterations of the value net alone: 2 → 0": ("no-value-warmup", ["--value_warmup", 0], {}),
    "epochs: 1 → 2": ("two-epochs", ["--epochs", 2], {}),
    "score without EOS: at most -1 → as it came": ("no-cap", ["--unended_cap", "inf"], {}),
    "Adam's ε: 1e-5 → 1e-8": ("small-eps", [], {"eps=1e-5": "eps=1e-8"}),
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


def run(what: str, seed: int) -> dict[str, float]:
    """How a variant ended; {} if it diverged."""
    name, options, changes = VARIANTS[what]
    folder, script = harness.start(seed), Path("ppo.py")
    if name == "raw-scores":
        raw_reward(folder)
    if changes:
        script = write_changed("ppo.py", changes, FOLDER / "recipe" / name)
    options = ["--seed", seed + 100] if name == "placebo" else ["--seed", seed, *options]
    out = [] if name == "ppo" else ["--out", f"out/{name}"]
    harness.stage(folder, name, script, *options, *out, may_fail=DIVERGED)
    return harness.ending(folder / "out" / name)


def sign_flip_test(differences: list[float]) -> float:
    """The p-value of paired differences, were each as likely to have the other sign (Fisher 1935), all 2ⁿ listed."""
    flipped = [abs(sum(signs)) for signs in itertools.product(*([x, -x] for x in differences))]
    return sum(each >= abs(sum(differences)) - 1e-12 for each in flipped) / len(flipped)


def holm(p_values: list[float]) -> list[float]:
    """The p-values, corrected for their number (Holm 1979)."""
    corrected, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = highest
    return corrected


def changed(source: str, changes: dict[str, str]) -> str:
    for old, new in changes.items():
        if old not in source:
            raise ValueError(f"the script has no {old!r}")
        source = source.replace(old, new)
    return source


def write_changed(script: str, changes: dict[str, str], folder: Path) -> Path:
    """Write a changed copy of a stage into a folder; return its whole path."""
    target = (folder / script).resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(changed((ROOT / script).read_text(), changes))
    return target


def draw(found: dict[str, dict[int, dict]], target: Path) -> None:
    """A row for each variant: the change in judge and in KL of every seed, and their mean."""
    figure, axes = harness.pyplot().subplots(1, 2, figsize=(9, 4.4), layout="constrained", sharey=True)
    names = [what for what in found if what != "default"]
    for axis, column, title in ((axes[0], 0, "change in judge"), (axes[1], 1, "change in KL (nats)")):
        for place, what in enumerate(names):
            apart = differences(found[what], found["default"])[column]
            colour = "0.5" if what.startswith("placebo") else "C0"
            axis.plot(apart, [-place] * len(apart), "o", color=colour, alpha=0.5, markersize=4)
            axis.plot(sum(apart) / len(apart), -place, "|", color="black", markersize=14)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set(xlabel=title)
        axis.set_yticks([-place for place in range(len(names))], names)
        axis.grid(alpha=0.25)
    axes[1].set_xscale("symlog", linthresh=1)
    axes[0].set_xscale("symlog", linthresh=0.02)
    for axis, ticks in zip(axes, ([-0.5, -0.1, -0.01, 0, 0.01, 0.1], [-1, 0, 1, 10, 100])):
        axis.xaxis.set_major_locator(harness.pyplot().FixedLocator(ticks))
        axis.xaxis.set_major_formatter("{x:g}")
    figure.suptitle("variant less default: a point for each seed, a bar for their mean", fontsize="medium")
    harness.save(figure, target)


def rows(found: dict[str, dict[int, dict]]) -> list[list[str]]:
    """For each variant: the change in judge and in KL over the seeds, and the judge's p-value; then the means."""
    default = found["default"]
    apart = {what: differences(runs, default) for what, runs in found.items() if what != "default"}
    tested = [what for what in apart if not what.startswith("placebo")]
    p_values = dict(zip(tested, holm([sign_flip_test(apart[what][0]) for what in tested])))
    table = []
    for what, runs in found.items():
        ended = [run for run in runs.values() if run]
        cells = [f"{len(ended)} of {len(runs)}", "", "", ""]
        if what in apart:
            judges, kls = apart[what]
            p_value = f"{p_values[what]:.3f}" if what in p_values else ""
            cells[1:] = [harness.t_interval(judges, 3), p_value, harness.t_interval(kls)]
        means = [harness.t_interval([run[column] for run in ended]) for column in ("after", "kl", "highest kl")]
        table.append([what, *cells, *means])
    return table


def differences(runs: dict[int, dict], default: dict[int, dict]) -> tuple[list[float], list[float]]:
    """By seed: how judge and KL differ from the default's, where both runs ended."""
    pairs = [(runs[seed], default[seed]) for seed in runs if runs[seed] and default[seed]]
    return tuple([run[column] - other[column] for run, other in pairs] for column in ("after", "kl"))


def tables(found: dict[str, dict[int, dict]]) -> list[str]:
    header = ["what changes", "ended", "change in judge", "p", "change in KL", "judge", "KL (nats)"]
    cells = lambda run: f"{run['after']:.3f} at {run['kl']:.1f}" if run else "diverged"  # noqa: E731
    lines = [[what, *map(cells, runs.values())] for what, runs in found.items()]
    return [
        harness.markdown([*header, "highest KL of an iteration"], rows(found)),
        harness.markdown(["judge at KL", *(f"seed {seed}" for seed in found["default"])], lines),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", default=",".join(map(str, range(30, 40))), help="comma-separated")
    parser.add_argument("--figure", type=Path, default=Path(__file__).with_name("recipe.svg"))
    options = parser.parse_args()
    found = {what: {} for what in VARIANTS}
    for seed in map(int, options.seeds.split(",")):
        for what in VARIANTS:
            found[what][seed] = run(what, seed)
    harness.write_results("recipe", found)
    print("\n\n".join(tables(found)))
    draw(found, options.figure)


if __name__ == "__main__":
    main()
