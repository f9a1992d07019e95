"""The project's speed, beside other libraries' on the same shapes and random weights: JSON lines, then a table.

    python -m tests.bench                                         training, generation, a PPO iteration, on 2 shapes
    python -m tests.bench --vs transformers,trl                   interleaved with what is installed of them
    NANOGPT_DIR=… python -m tests.bench --vs nanogpt              nanoGPT's model.py from that folder
    python -m tests.bench --vs plainrlhf:plain                    without fast.py; plainrlhf:plain-draw: without a part
    python -m tests.bench --shapes gpt2 --what generate,ppo       GPT-2's 124M
    python -m tests.bench --shapes gpt2 --what checkpoint         what --checkpoint_activations saves and costs
    python -m tests.bench --what memory                           how much memory each stage takes, computed
    python -m tests.bench --what profile                          what training and PPO's update spend their time on
    python -m tests.bench --what growth --plot growth.svg         how time and memory grow with batch, length, …
    python -m tests.bench --device cuda --report gpu.md           checks and measures a GPU, and writes a page

Contenders take turns, in reverse order every other round, each in a process of its own, so that memory and its settings
are its own; figures are medians, ratios are of the same round. A busy neighbour makes a step several times slower: stop
other work first.

Two columns: as they come, and with freed memory kept for all, as ours is. Two shares stand beside each ratio, so that a
slow rival flatters nobody: of a plain decode loop (`plain_decoder`), and of the machine's fastest product of matrices.
"""

import argparse
import json
import os
import statistics
import sys

import torch

from common import cli
from tests import contenders, growth, memory, report
from tests.contenders import OURS, RIVALS
from tests.measure import alone, command, print_one
from tests.shapes import SHAPES

SIZES = {  # rows and tokens; batch, prompt and new tokens; batch, minibatches, prompt and response
    "train": {"small": (32, 64), "gpt2": (8, 64)},
    "generate": {"small": (64, 16, 48), "gpt2": (8, 16, 48)},
    "ppo": {"small": (64, 4, 16, 32), "gpt2": (8, 2, 16, 32)},
    "checkpoint": {"small": (8, 256), "gpt2": (4, 256)},
}


# --- contenders side by side ------------------------------------------------------------------------------------------


def compare(
    what: str, name: str, ours: str, rivals: list[str], rounds: int, sizes: tuple, device: torch.device, peak: float
) -> list[dict]:
    """A line for each contender; "ratio" is ours to it, round by round. Ends the program where a contender fails."""
    contestants = [ours] + [rival for rival in rivals if contenders.takes_part(rival, name)]
    found: dict[str, list[dict]] = {who: [] for who in contestants}
    for r in range(rounds):
        for who in contestants[:: 1 if r % 2 == 0 else -1]:
            found[who].append(alone(who, what, name, *sizes, device=device))
            if "error" in found[who][-1]:
                sys.exit(f"{command(who, what, name, *sizes, device=device)}: {found[who][-1]['error']}")
    key = "seconds" if what == "ppo" else "tokens_per_s"
    work, lines = contenders.flops("train" if what == "checkpoint" else what, name, *sizes), []
    for who, runs in found.items():
        ratios = [mine[key] / theirs[key] for mine, theirs in zip(found[ours], runs)]
        line = {"what": what, "shape": name, "sizes": sizes, "who": who, "rounds": rounds}
        line |= {"ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios)}
        line |= {each: statistics.median(run[each] for run in runs) for each in runs[0]}
        line["of_peak"] = (work / line[key] if what == "ppo" else work * line[key]) / peak
        floors = [run[key] for rival, floor in found.items() if rival.startswith("floor") for run in floor]
        if floors:
            line["of_floor"] = statistics.median(run[key] / floor for run, floor in zip(runs, floors))
        lines.append(line)
        print(json.dumps(line), flush=True)
    return lines


def rivals_of(what: str, wanted: list[str], device: torch.device) -> list[str]:
    """Who contends with us: on a CPU each rival as it comes and with its memory kept, the plain loop always."""
    if what == "checkpoint":
        return [f"{OURS}:checkpoint_activations"]
    variants = [each for each in wanted if each.startswith(OURS)]
    named = [rival for rival in RIVALS[what] if rival in wanted]
    if device.type != "cpu":
        return variants + named + ["floor"] * (what == "generate")
    kept = [f"{rival}{variant}" for rival in named for variant in ("", ":kept")]
    return variants + kept + ["floor:kept"] * (what == "generate")


def result_table(lines: list[dict]) -> str:
    """Lines of `compare` as Markdown: a row for each project, its variants side by side."""
    rows = [
        "| work | who | as it comes | memory kept | ratio | ratio, kept | of the plain loop | of the peak | GiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]

    def value(line: dict | None) -> str:
        if line is None:
            return "–"
        return f"{line['seconds']:.2f} s" if "seconds" in line else f"{line['tokens_per_s']:,.0f} tokens/s"

    def ratio(line: dict | None) -> str:
        if line is None:
            return "–"
        spread = f" ({line['ratio_min']:.2f}–{line['ratio_max']:.2f})" if line["rounds"] > 1 else ""
        return f"{line['ratio']:.2f}{spread}"

    by_name = {(line["what"], line["shape"], line["who"]): line for line in lines}
    for (what, shape, who), line in by_name.items():
        plain = who.removesuffix(":kept")
        if who != plain and (what, shape, plain) in by_name:
            continue  # it stands in the row of the other
        both = [by_name.get((what, shape, each)) for each in (plain, f"{plain}:kept")]
        if who.startswith(OURS):
            both = [line, line]  # whose memory is kept always
        floor = f"{line['of_floor']:.2f}" if "of_floor" in line else ""
        cells = [f"{what}, {shape}, {' × '.join(map(str, line['sizes']))}", plain, *map(value, both), *map(ratio, both)]
        rows.append(f"| {' | '.join(cells)} | {floor} | {line['of_peak']:.0%} | {line['peak_GiB']:.2f} |")
    return "\n".join(rows)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    works = ", ".join(SIZES)
    parser.add_argument("--what", default="train,generate,ppo", help=f"of {works}, growth, profile, memory")
    parser.add_argument("--shapes", default="small,wide", help=f"of {', '.join(SHAPES)}")
    parser.add_argument(
        "--vs", default="", help="of transformers, trl, nanogpt, plainrlhf:plain, plainrlhf:plain-attend …"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--plot", default="", help="an SVG to draw growth into")
    parser.add_argument("--compile", action="store_true", help="plainrlhf's stages with --compile")
    parser.add_argument("--report", default="", help="a file to write a page about this device into")
    parser.add_argument("--one", default="", help="one measurement, here: contender,what,shape,sizes…; or limits")
    parser.add_argument("--seconds", type=float, default=3.0, help="how long a rate is measured")
    options = parser.parse_args(argv)
    device = cli.pick_device(options.device)
    if options.one:
        return print_one(options.one.split(","), device, options.seconds)
    if options.report:
        sys.exit(0 if report.write(options.report, device) else 1)
    whats, lines = options.what.split(","), []
    wanted = options.vs.split(",") + ["nanogpt"] * ("NANOGPT_DIR" in os.environ)
    ours = f"{OURS}:compile" if options.compile else OURS
    works = [what for what in SIZES if what in whats]
    peak = alone("limits", device=device)["products"] if works else 0.0
    for name in options.shapes.split(","):
        for what in works:
            rounds = max(1, options.rounds // 2) if what == "ppo" else options.rounds
            sizes = SIZES[what]["gpt2" if "gpt2" in name else "small"]
            rivals = rivals_of(what, wanted, device)
            lines += compare(what, name, ours, rivals, rounds, sizes, device, peak)
    if "memory" in whats:
        print(memory.table())
    if "profile" in whats:
        for name in options.shapes.split(","):
            growth.profile(name, device)
    if "growth" in whats:
        growth.growth(device, options.plot)
    if lines:
        print(f"\n{result_table(lines)}")


if __name__ == "__main__":
    main()
