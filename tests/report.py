"""A page about one device: is what it computes right, how fast is it, and how much memory does it take.

`python -m tests.bench --device cuda --report gpu.md` writes it. Each row carries its command, which can be run alone.
"""

import importlib.util
import json
import platform
import re
from pathlib import Path

import torch

from tests import checks, contenders, measure, memory
from tests.contenders import OURS, dtype_of
from tests.measure import OUT_OF_MEMORY, alone, command

# rows and tokens; batch, prompt and new tokens; batch, minibatches, prompt and response
WORKS = [("train", "gpt2", 16, 1024)]
WORKS += [("generate", "gpt2", batch, 64, 192) for batch in (1, 64, 512)]
WORKS += [("ppo", "gpt2", 64, 4, 128, 128), ("ppo", "llama-1b", 64, 8, 128, 128)]
NAMES = {"train": "training", "generate": "generation", "ppo": "PPO iteration"}


def name_of(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    about = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", about.read_text()) if about.exists() else None
    return f"{found[1] if found else platform.processor()}, {torch.get_num_threads()} threads"


def check_rows(names: list[str], device: torch.device) -> tuple[list[str], bool]:
    """A row for each finding, and whether all are right. Each check has a process of its own."""
    rows, all_right = [], True
    for check in checks.CHECKS:
        words = f"python -m tests.checks {check} --device {device} --shapes {','.join(names)}"
        done = measure.python(*words.split()[1:])
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        if done.returncode not in (0, 1) or not lines:
            why = (done.stderr.strip().splitlines() or [f"it ended with code {done.returncode}"])[-1]
            lines.append({"asked": check, "found": why, "right": False})
        for line in lines:
            rows.append(row(line["asked"], line["found"], "yes" if line["right"] else "**no**", f"`{words}`"))
            all_right = all_right and line["right"]
    return rows, all_right


def row(*cells: object) -> str:
    """A row of a table, in which no cell can end early."""
    return f"| {' | '.join(str(cell).replace('|', '/') for cell in cells)} |"


def speed_cells(what: str, name: str, sizes: tuple, found: dict, limits: dict, device: torch.device) -> list[str]:
    """What was found, and its share of what the machine can do."""
    work, share = contenders.flops(what, name, *sizes), ""
    if what == "ppo":
        phases = ", ".join(f"{phase} {found[phase]:.2f}" for phase in ("rollout", "score", "update") if phase in found)
        value, operations = f"{found['seconds']:.2f} s" + f" ({phases})" * bool(phases), work / found["seconds"]
    else:
        value, operations = f"{found['tokens_per_s']:,.0f} tokens/s", work * found["tokens_per_s"]
    if what == "generate" and "copy" in limits:
        moved = contenders.bytes_read(name, *sizes, device) * found["tokens_per_s"] / sizes[0]
        share = f"{moved / limits['copy']:.0%} of the bandwidth"
    elif "products" in limits:
        share = f"{operations / limits['products']:.0%} of the products"
    return [value, share]


def work_rows(
    works: list[tuple], rivals: list[str], limits: dict, device: torch.device, seconds: float
) -> tuple[list[str], bool]:
    """A row for each work and contender, and whether ours ran, or lacked nothing but memory."""
    rows, all_ran = [], True
    ours = [OURS, f"{OURS}:compile"] if device.type == "cuda" else [OURS]
    for what, name, *sizes in works:
        asked = f"{NAMES[what]}, {name}, {' × '.join(map(str, sizes))}"
        for who in ours + [rival for rival in rivals if rival in contenders.RIVALS[what]]:
            found = alone(who, what, name, *sizes, device=device, seconds=seconds)
            if "error" in found:
                cells = [found["error"], "", ""]
                all_ran = all_ran and (found["error"] == OUT_OF_MEMORY or who not in ours)
            else:
                cells = speed_cells(what, name, sizes, found, limits, device) + [f"{found['own_GiB']:.2f}"]
            cells.append(computed(what, name, sizes, device) if who == OURS else "")
            rows.append(row(asked, who, *cells, f"`{command(who, what, name, *sizes, device=device)}`"))
    return rows, all_ran


def computed(what: str, name: str, sizes: tuple, device: torch.device) -> str:
    """GiB that `memory.py` computes for training; of sampling it knows nothing."""
    bf16 = dtype_of(device) == torch.bfloat16
    if what == "generate":
        return ""
    if what == "train":
        return f"{memory.stage(name, 1, *sizes, bf16, False, device.type):.2f}"
    batch, minibatches, prompt, response = sizes
    return f"{memory.stage(name, 3, batch // minibatches, prompt + response, bf16, False, device.type):.2f}"


def write(
    path: str,
    device: torch.device,
    works: list[tuple] = WORKS,
    names: list[str] = checks.SHAPES,
    rivals: list[str] | None = None,
    seconds: float = 3.0,
) -> bool:
    """Write the page to `path`. Returns whether every check was right and every measurement of ours ran.

    `rivals` are by default those that are installed.
    """
    if rivals is None:
        rivals = [rival for rival in ("transformers", "trl") if importlib.util.find_spec(rival)]
    checked, all_right = check_rows(names, device)
    limits = alone("limits", device=device, seconds=seconds)
    if "error" in limits:
        told, limits = f"The limits of the machine are not known: {limits['error']}.", {}
    else:
        told = (
            f"The machine multiplies matrices at {limits['products'] / 1e12:,.2f} TFLOP/s "
            f"({str(dtype_of(device)).removeprefix('torch.')}) and copies {limits['copy'] / 1e9:,.0f} GB/s, read and "
            f"written: `{command('limits', device=device)}`."
        )
    measured, all_ran = work_rows(works, rivals, limits, device, seconds)
    page = [
        f"### {name_of(device)}, torch {torch.__version__}",
        "",
        f"`python -m tests.bench --device {device} --report FILE` wrote this. Weights are random.",
        "",
        "| check | found | right | command |",
        "|---|---|---|---|",
        *checked,
        "",
        told,
        "",
        "Sizes are rows × tokens in training, rows × prompt × new tokens in generation, and rows × minibatches × "
        "prompt × response in an iteration of PPO, of 4 epochs. Memory is in GiB, at its peak; computed as if each "
        "token were a response token, without the work space of kernels.",
        "",
        "| work | who | found | share of the machine's | memory | computed | command |",
        "|---|---|---|---|---|---|---|",
        *measured,
    ]
    Path(path).write_text("\n".join(page) + "\n", encoding="utf-8")
    return all_right and all_ran
