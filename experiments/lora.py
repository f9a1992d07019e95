"""How much of a net has to train? Adapters of rank 1, 4 and 16 against all weights, at three rates, every seed.

    OMP_NUM_THREADS=1 python -m experiments.lora               the tales, seeds 30 to 32: 63 runs of 3 minutes
    OMP_NUM_THREADS=1 python -m experiments.lora --seeds 30    one of them
    python -m experiments.lora --init RUN --data PROMPTS.jsonl --judge FILE.py:function     a model of your own

Schulman et al. 2025 ("LoRA Without Regret") say that rank 1 suffices for reinforcement learning, at ten times the rate
of full training, and that adapters on attention alone do not suffice. On the tales policy and value net have adapters
on all layers of the blocks, or on those of the MLP. It prints judge and KL at the end, writes
experiments/results/lora.json and draws experiments/lora.svg. With --init the judge is the reward: it prints seconds per
iteration, GiB, and the judge before and after, and writes experiments/results/lora-own.json. What has run is kept in
out/experiments; a stopped run goes on.
"""

import argparse
import math
import re
import sys
from pathlib import Path
from statistics import mean, median

import ppo
from common import cli, lora
from common.runs import read_metrics
from experiments import harness
from experiments.harness import DIVERGED, FOLDER

RANKS, RATES = (1, 4, 16), (1, 3, 10)
LAYERS = {"all": lora.LAYERS, "MLP": ("mlp.c_fc", "mlp.c_proj")}
ARMS = [(0, "all", rate) for rate in RATES]
ARMS += [(rank, layers, rate) for layers in LAYERS for rank in RANKS for rate in RATES]
OWN = [(0, "all", 1), (16, "all", 3)]  # of a model of your own
OWN_OPTIONS = ["--batch_size", 32, "--minibatch_size", 32, "--response_len", 24, "--eval_prompts", 64]
MLP = "--mlp"  # the first word of a run of PPO with adapters on the MLP alone


def ppo_run(folder: Path, rank: int, layers: str, rate: float, lr: float, options: list) -> tuple[Path, str]:
    """The run folder of an arm, and what it printed."""
    name = f"lora-{rank}-{layers}-{rate}"
    script = ["ppo.py"] if layers == "all" else ["experiments/lora.py", MLP]
    rates = ["--lora", rank, "--lr", f"{lr * rate:g}", "--value_lr", f"{1e-3 * rate * lr / 4e-4:g}"]
    text = harness.stage(folder, name, *script, *options, *rates, "--out", f"out/{name}", may_fail=DIVERGED)
    return folder / "out" / name, text


def tales(seeds: list[int], iterations: int) -> None:
    """Every arm on every seed: the table, the figure and the result file."""
    found = {}
    for arm in ARMS:
        for seed in seeds:
            folder, _ = ppo_run(harness.start(seed), *arm, 4e-4, ["--seed", seed, "--iterations", iterations])
            found.setdefault(named(arm), {})[seed] = harness.ending(folder)
    harness.write_results("lora", found)
    print(*tables(found))
    draw(found, Path(__file__).with_name("lora.svg"))


def named(arm: tuple) -> str:
    return " ".join(map(str, arm))


def tables(found: dict[str, dict[int, dict]]) -> list[str]:
    """One table: judge over the seeds, less that of all weights at their own rate, and each seed's judge and KL."""
    rows = []
    whole = found[named(ARMS[0])]
    for arm in ARMS:
        ends = found[named(arm)]
        judges = {seed: end["after"] for seed, end in ends.items() if end}
        less = [judge - whole[seed]["after"] for seed, judge in judges.items() if whole[seed]]
        cells = ["", ""]
        if less:
            cells = [harness.t_interval([*judges.values()], 2, 0, 1), harness.t_interval(less, 2, -1, 1)]
        shown = [f"{end['after']:.2f} at {end['kl']:.1f}" if end else "diverged" for end in ends.values()]
        highest = max((end["highest kl"] for end in ends.values() if end), default=math.nan)
        rows.append([arm[0] or "all weights", arm[1], arm[2], *cells, *shown, f"{highest:.1f}"])
    rows[0][4] = ""
    header = ["rank", "layers", "rate ×", "judge", "less all weights × 1", *(f"seed {seed}" for seed in whole)]
    return [harness.markdown([*header, "highest KL"], rows)]


def draw(found: dict[str, dict[int, dict]], target: Path) -> None:
    """Judge and KL by rate, a line for each rank: the mean of the seeds, and their range."""
    figure, axes = harness.pyplot().subplots(2, 2, figsize=(9, 5), layout="constrained", sharex=True, sharey="row")
    for column, layers in zip(axes.T, LAYERS):
        for i, rank in enumerate((0, *RANKS)):
            arms = [(rank, layers if rank else "all", rate) for rate in RATES]
            for axis, name in zip(column, ("after", "kl")):
                ends = [[end.get(name, math.nan) for end in found[named(arm)].values()] for arm in arms]
                label, colour = (f"rank {rank}", f"C{i}") if rank else ("all weights", "black")
                axis.plot(RATES, [mean(each) for each in ends], color=colour, label=label)
                axis.fill_between(RATES, [min(x) for x in ends], [max(x) for x in ends], color=colour, alpha=0.12)
        column[0].set_title("adapters on all layers" if layers == "all" else "adapters on the MLP alone")
        column[1].set_xlabel("learning rate, as a multiple of the default")
    limits = ("judge at the end", 0.7, 1), ("KL at the end (nats)", 0, 7)  # all weights × 10 lie far outside
    for axis, (title, low, high) in zip(axes[:, 0], limits):
        axis.set(ylabel=title, ylim=(low, high))
        axis.set_xscale("log")
        axis.set_xticks(RATES, [f"× {rate}" for rate in RATES])
        axis.minorticks_off()
    figure.legend(*axes[0][0].get_legend_handles_labels(), frameon=False, loc="outside upper center", ncols=4)
    harness.save(figure, target)


def own(init: str, data: str, judge: str, lr: float, iterations: int) -> None:
    """A model of your own with its judge as the reward: seconds per iteration, GiB and the judge, by rank."""
    found = {}
    paths = [str(Path(path).resolve()) for path in (init, data)]
    file, _, function = judge.rpartition(":")
    judge = f"{Path(file).resolve()}:{function}"
    options = ["--init", paths[0], "--data", paths[1], "--reward", judge, "--judge", judge, *OWN_OPTIONS]
    for arm in OWN:
        where = FOLDER / "lora" / Path(init).name
        folder, text = ppo_run(where, *arm, lr, [*options, "--iterations", iterations, "--checkpoint_activations"])
        times = [line["time/rollout"] + line["time/score"] + line["time/update"] for line in read_metrics(folder)]
        about = {"seconds": median(times), "megabytes": (folder / "model.pt").stat().st_size / 1e6}
        if memory := re.search(r"peak memory: (\S+) GiB", text):
            about["GiB"] = float(memory[1])
        found[named(arm)] = about | harness.ending(folder, judge)
    harness.write_results("lora-own", found)
    print(*own_tables(found))


def own_tables(found: dict[str, dict]) -> list[str]:
    rows = []
    for arm in OWN:
        end = found[named(arm)]
        cells = ["diverged"] * 3
        if "after" in end:
            cells = [f"{end['before']:.2f}", f"{end['after']:.2f} ± {1.96 * end['error']:.2f}", f"{end['kl']:.1f}"]
        cost = [f"{end['seconds']:.0f}", f"{end.get('GiB', math.nan):.1f}", f"{end['megabytes']:.1f}"]
        rows.append([arm[0] or "all weights", arm[2], *cost, *cells])
    header = ["rank", "rate ×", "seconds per iteration (median)", "GiB", "model.pt (MB)"]
    return [harness.markdown([*header, "judge before", "after", "KL (nats)"], rows)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", default="30,31,32", help="comma-separated")
    parser.add_argument("--iterations", type=int, default=64)
    parser.add_argument("--init", default="", help="a run folder of your own, such as of SmolLM2-135M by tools.hf")
    parser.add_argument("--data", default="", help="its prompts")
    parser.add_argument("--judge", default="", help="what trains it, FILE.py:function")
    parser.add_argument("--lr", type=float, default=1e-5, help="of all weights of your own model")
    options = parser.parse_args()
    if options.init:
        return own(options.init, options.data, options.judge, options.lr, options.iterations)
    tales([int(seed) for seed in options.seeds.split(",")], options.iterations)


if __name__ == "__main__":
    if sys.argv[1:2] == [MLP]:
        del sys.argv[1]
        lora.LAYERS = LAYERS["MLP"]
        cli.run_main(ppo.main)
    else:
        main()
