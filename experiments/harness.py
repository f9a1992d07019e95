"""What the experiments share: a stage run once, its closing table read, figures drawn alike."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = Path("out/experiments")


def stage(folder: Path, name: str, *command: object) -> str:
    """What `python command` prints, run in `folder`. Kept in folder/name.log once it has ended, and not run again.

    A run that was stopped goes on from its last checkpoint. Raises SystemExit with the last line where it fails.
    """
    log = folder / f"{name}.log"
    if log.exists():
        return log.read_text()
    folder.mkdir(parents=True, exist_ok=True)
    script, *options = map(str, command)
    print(f"{folder}: {script} {' '.join(options)}", flush=True)
    began = time.time()
    argv = [sys.executable, str(ROOT / script), *options, "--resume"]
    done = subprocess.run(argv, cwd=folder, env=os.environ, capture_output=True, text=True)
    if done.returncode:
        sys.exit((done.stderr or done.stdout).strip().splitlines()[-1])
    text = f"{done.stdout}took {time.time() - began:.0f} s\n"
    temporary = log.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.replace(log)
    return text


def seconds(text: str) -> float:
    return float(re.search(r"^took (\d+) s$", text, re.MULTILINE)[1])


def closing_table(text: str) -> dict[str, tuple[str, str]]:
    """The rows of ppo.py's closing table: name → (before, after), each as "mean ± standard error"."""
    cell = r"\s+(-?\d+\.\d+ ± \S+)"
    rows = re.findall(rf"^(\S.*?)\s{cell}{cell}{cell}$", text, re.MULTILINE)
    return {name: (before, after) for name, before, after, _ in rows}


def road(lines: list[dict]) -> list[str]:
    """How a run of PPO went: highest and last KL, lowest and first judge, ratio from to, highest approxkl."""
    column = lambda name: [line[name] for line in lines]  # noqa: E731
    kl, judge, ratio = (column(name) for name in ("objective/kl", "objective/judge", "val/ratio"))
    approxkl = max(column("policy/approxkl_avg"))
    spread = f"{min(ratio):.3f}–{max(ratio):.3f}"
    return [f"{max(kl):.1f}", f"{kl[-1]:.1f}", f"{min(judge):.2f}", f"{judge[0]:.2f}", spread, f"{approxkl:.3f}"]


def markdown(header: list[str], rows: list[list]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def pyplot():
    """matplotlib.pyplot, set so that a figure is the same file each time. Raises SystemExit where it is missing."""
    try:
        import matplotlib
    except ImportError:
        sys.exit("figures need matplotlib: pip install matplotlib")
    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "plainrlhf", "svg.fonttype": "none", "font.size": 9}
    matplotlib.rcParams |= {"axes.spines.top": False, "axes.spines.right": False, "font.family": "sans-serif"}
    from matplotlib import pyplot

    return pyplot


def save(figure, target: Path) -> None:
    figure.savefig(target, metadata={"Date": None}, facecolor="white")
    print(target)
