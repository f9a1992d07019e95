"""What the experiments share: a stage run once, the tables that it printed, figures drawn alike."""

import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy
import torch
from torch import Tensor

import ppo
from common import cli, judges, measure, nets
from common.about import git
from common.runs import read_metrics
from data import Prompt
from data.files import replacing
from model import GPT
from tools import evaluate
from tools.evaluate import best_of_kl

ROOT = Path(__file__).resolve().parent.parent
FOLDER = Path("out/experiments")
EVAL = "tools/evaluate.py"  # a stage that measures a run folder and writes none
DIVERGED = "so the run stops"  # as `runs.Run.diverged` says
JUDGE, GRAMMAR, KL = "data/tales.py:judge", "data/tales.py:grammar", "KL to the reference (nats)"  # rows of the tables


# --- running ----------------------------------------------------------------------------------------------------------


def stage(folder: Path, name: str, *command: object, may_fail: str | None = None) -> str:
    """What `python command` prints, run in `folder`. Kept in folder/name.log once it has ended, and not run again.

    A run that was stopped goes on from its last checkpoint. Raises SystemExit if it fails, or if the log is of another
    command. A failure whose last line has the expression `may_fail` is kept too: the text has a line "failed: …".
    """
    log, words = folder / f"{name}.log", list(map(str, command))
    first = f"$ python {' '.join(words)}\n"
    if log.exists():
        text = log.read_text()
        if not text.startswith(first):
            sys.exit(f"{log}: is of another command; remove it and its run folder to run {first[2:-1]}")
        return text
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{folder}: {' '.join(words)}", flush=True)
    began = time.time()
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]  # for scripts that do not stand in ROOT
    process = subprocess.Popen(
        [sys.executable, str(ROOT / words[0]), *words[1:], "--resume"],
        cwd=folder, env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        text, said = process.communicate()
    except KeyboardInterrupt:
        process.communicate()  # it has heard Ctrl-C as well, and saves
        raise
    if process.returncode:
        failure = (said.strip() or f"exit code {process.returncode}").splitlines()[-1]
        if may_fail is None or not re.search(may_fail, failure):
            sys.exit(f"{folder}: {words[0]}: {failure}")
        text += f"failed: {failure}\n"
    text = f"{first}{text}took {run_seconds(folder / run_folder(words), began):.0f} s\n"
    temporary = log.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.replace(log)
    return text


def run_folder(words: list[str]) -> str:
    return words[words.index("--out") + 1] if "--out" in words else f"out/{Path(words[0]).stem}"


def run_seconds(out: Path, began: float) -> float:
    """Seconds of the run in `out`, with those before a stop; where it has not said them, those since `began`.

    Without --data sft.py writes out/pretrain too, in the same command.
    """
    total = 0.0
    for config in (out / "config.json", out.with_name("pretrain") / "config.json"):
        if config.exists() and config.stat().st_mtime > began:
            total += json.loads(config.read_text()).get("seconds", 0.0)  # a Hugging Face folder has none
    return total or time.time() - began


def start(seed: int) -> Path:
    """The folder of a seed, in which sft.py and reward.py have run; PPO and its variants run there too."""
    folder = FOLDER / "kl" / f"seed-{seed}"
    for script in ("sft", "reward"):
        stage(folder, script, f"{script}.py", "--seed", seed)
    return folder


def start_answers(
    folder: Path, rewards: list[str], n_prompts: int, n: int, seed: int, *options: object
) -> dict[str, Tensor]:
    """The start's answers, `n` to each of the first held-out prompts, drawn once and kept in `folder`.

    (n_prompts, n) each: "judge", and by the name of each reward model its final score.
    """
    kept = folder / f"start-{n_prompts}x{n}-{'-'.join(rewards)}.pt"
    if kept.exists():
        return torch.load(kept, weights_only=True)
    print(f"{folder}: {n} answers of the start to each of {n_prompts} prompts", flush=True)
    words = ["--init", folder / "out" / "sft", "--reward", folder / "out" / rewards[0], "--seed", seed]
    words += ["--eval_prompts", n_prompts, "--judge", JUDGE, "--device", "cpu", *options]
    cfg = cli.parse(ppo.Config, [str(word) for word in words])
    device, autocast = cli.setup(cfg)
    start, *nets_and_score, encoding = ppo.build(cfg, device, autocast)
    _, held_out = ppo.load_prompts(cfg, start, encoding)
    others = {name: nets.load_scalar(folder / "out" / name)[0] for name in rewards}
    scores = {name: ppo.scorer(net.eval(), encoding, start.config.eos, cfg) for name, net in others.items()}
    found: dict[str, list[float]] = {name: [] for name in rewards}

    def answer(policy: GPT, prompts: list[Prompt], rng: torch.Generator) -> dict[str, Tensor]:
        batch = ppo.answer(cfg, autocast, tuple(nets_and_score), policy, prompts, rng)
        for name, score in scores.items():
            found[name] += ppo.final_scores(batch | {"score": score(batch)}, cfg).tolist()
        return batch

    prompts = [prompt for prompt in held_out for _ in range(n)]
    measured = measure.held_out(answer, encoding, judges.load_functions(cfg.judge), start, prompts, "best of", seed)
    columns = found | {"judge": measured[cfg.judge]}
    columns = {name: torch.tensor(column, dtype=torch.float64).view(-1, n) for name, column in columns.items()}
    torch.save(columns, kept)
    return columns


def best_of(score: Tensor, judge: Tensor, n: int) -> tuple[float, float, float]:
    """KL (at most), judge and score of the best of n answers by the score, from (P, N) of each."""
    return best_of_kl(n), *(evaluate.expected_at_best(score, x, n).mean().item() for x in (judge, score))


def on_its_way(lines: list[dict], kl: float) -> float:
    """PPO's judge at a KL: the mean of those five iterations in a row whose mean KL is nearest. On training prompts."""
    windows = [lines[i : i + 5] for i in range(len(lines) - 4)]
    means = [
        [statistics.mean(line[f"objective/{name}"] for line in five) for name in ("kl", "judge")] for five in windows
    ]
    return min(means, key=lambda each: abs(each[0] - kl))[1]


def beside(drawn: dict[str, Tensor], lines: list[dict], sizes: tuple[int, ...]) -> list[dict]:
    """For each n of `sizes`: KL (at most) and judge of the best of n of what `start_answers` drew, and PPO's judge."""
    ends = [(n, *best_of(drawn["reward"], drawn["judge"], n)) for n in sizes]
    return [{"n": n, "KL": kl, "best of n": judge, "PPO": on_its_way(lines, kl)} for n, kl, judge, _ in ends]


def tilted(score: Tensor, judge: Tensor, beta: float) -> tuple[float, float, float, float]:
    """KL, judge and score of π* ∝ π₀ exp(score / β), from π₀'s answers (P, N), and how many of the N count.

    Each answer weighs exp(score / β); the last number is the mean of 1 / Σ w² over the prompts. Where it is small, the
    answers that π* would give have hardly been drawn, and its KL is underestimated (it cannot exceed log N).
    """
    weight = (score / beta).softmax(1)
    kl = (weight * (weight * score.shape[1]).log()).nansum(1).mean()
    judged, scored = ((weight * x).sum(1).mean() for x in (judge, score))
    return kl.item(), judged.item(), scored.item(), (1 / weight.square().sum(1)).mean().item()


def agreement(score: Tensor, judge: Tensor) -> float:
    """Share of a prompt's pairs of answers that the score orders as the judge, from (P, N) of each.

    Pairs of equal judge are left out; those of equal score count half.
    """
    scored, judged = ((x[:, :, None] - x[:, None, :]).sign() for x in (score, judge))
    return ((scored * judged)[judged != 0].mean().item() + 1) / 2


# --- reading what runs have written -----------------------------------------------------------------------------------


def report(run: Path) -> dict:
    return json.loads((run / "report.json").read_text())


def ending(run: Path, judge: str = JUDGE) -> dict:
    """How a run of PPO ended; {} if it diverged. It fell if the paired interval of 95% of the judge is below 0."""
    if not (run / "report.json").exists():
        return {}
    table = report(run)["table"]
    change, error = table[judge]["change"]
    highest = max(line["objective/kl"] for line in read_metrics(run))
    ends = {"before": table[judge]["before"][0], "after": table[judge]["after"][0], "error": error}
    ends |= {"score": table["score"]["after"][0], "kl": table[KL]["after"][0], "highest kl": highest}
    return ends | {"fell": change + 1.96 * error < 0}


CELL = r"-?\d+\.\d+ (?:± \S+|\[\S+ \S+\]|\(n \d+\))"  # what `measure.cell` writes


def seconds(text: str) -> float:
    return float(re.search(r"^took (\d+) s$", text, re.MULTILINE)[1])


def closing_table(text: str) -> dict[str, tuple[str, str]]:
    """The rows of the table that ppo.py and EVAL print: name → (before, after), each as a `measure.cell`."""
    rows = re.findall(rf"^(\S.*?)\s\s+({CELL})\s+({CELL})\s+{CELL}$", text, re.MULTILINE)
    return {name: (before, after) for name, before, after in rows}


def cell_after(text: str, words: str) -> str:
    """The cell that stands behind some words."""
    return re.search(rf"{words}\s+({CELL})", text)[1]


def number(cell: str) -> float:
    """The mean in a cell."""
    return float(cell.split()[0])


# --- showing ----------------------------------------------------------------------------------------------------------


def markdown(header: list[str], rows: list[list]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


# Student's t of 97.5%, by degrees of freedom.
T = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131]


def t_interval(numbers: list[float], digits: int = 2, least: float = -math.inf, most: float = math.inf) -> str:
    """The mean over seeds, with its interval of 95% by Student's t. Of one or two seeds: the numbers themselves.

    The interval is cut at the bounds of what is measured.
    """
    mean, n = statistics.mean(numbers), len(numbers)
    if n < 3:
        return f"{', '.join(f'{x:.{digits}f}' for x in numbers)} (n {n})"
    half = T[n - 2] * statistics.stdev(numbers) / n**0.5
    low, high = max(least, mean - half), min(most, mean + half)
    return f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def bootstrap(curves: numpy.ndarray, of: Callable, draws: int = 2000) -> list[list[float]]:
    """What `of` makes of the mean curve, k numbers, each with its interval of 95%: k times [number, low, high].

    `curves` (seeds, prompts, points) are of the same prompts for every seed. Seeds and prompts are drawn again; `of`
    gets curves (…, points) and gives (…, k). With few seeds such an interval is too narrow: with five, by a third.
    """
    rng, (seeds, prompts, _) = numpy.random.default_rng(0), curves.shape
    seed, prompt = rng.integers(seeds, size=(draws, seeds, 1)), rng.integers(prompts, size=(draws, 1, prompts))
    drawn = of(curves[seed, prompt].mean((1, 2)))
    return numpy.stack([of(curves.mean((0, 1))), *numpy.quantile(drawn, (0.025, 0.975), axis=0)], 1).tolist()


def cell(ends: list[float], digits: int = 2) -> str:
    """A number with its interval, as text."""
    return "{:.{d}f} [{:.{d}f}, {:.{d}f}]".format(*ends, d=digits)


def before_and_after(runs: list[dict]) -> list[str]:
    """Two tables of means over seeds, for runs that each have "sides" (side → measure → number) and further numbers."""
    about = [[name, t_interval([run[name] for run in runs])] for name in runs[0] if name not in ("sides", "best of n")]
    sides = {side: [run["sides"][side] for run in runs] for side in runs[0]["sides"]}
    names = next(iter(sides.values()))[0]
    rows = [[name, *(t_interval([x[name] for x in each]) for each in sides.values())] for name in names]
    return [markdown([f"mean over {len(runs)} seeds", *sides], rows), markdown(["of the runs", "mean"], about)]


def beside_table(runs: list[dict]) -> str:
    """A table of best of n, and of PPO on its way at the same KL, for runs that each have "best of n"."""
    rows = []
    for same in zip(*(run["best of n"] for run in runs)):
        cells = [t_interval([row[name] for row in same]) for name in ("best of n", "PPO")]
        rows.append([same[0]["n"], f"{same[0]['KL']:.2f}", *cells])
    return markdown(["n", "KL at most", "best of n", "PPO at that KL"], rows)


def write_results(name: str, content: dict) -> None:
    """Keep what an experiment found as experiments/results/NAME.json, with the code and the command that made it.

    What stands behind a hyphen in NAME tells results of one experiment apart.
    """
    about = {
        "commit": git("rev-parse", "HEAD"),
        "command": " ".join(["python", "-m", f"experiments.{name.split('-')[0]}", *sys.argv[1:]]),
    }
    with replacing(Path(__file__).parent / "results" / f"{name}.json") as file:
        json.dump(about | {"found": content}, file, indent=1)


def read_results(name: str) -> dict:
    """What `write_results` kept. Seeds are text there, as all keys of JSON are."""
    return json.loads((Path(__file__).parent / "results" / f"{name}.json").read_text())["found"]


def interval(mean: float, error: float) -> str:
    """A mean with its 95% interval, from its standard error."""
    return f"{mean:.3f} [{mean - 1.96 * error:.3f}, {mean + 1.96 * error:.3f}]"


def first_answers(folder: Path, title: str, shown: Callable[[str], str] = str, n: int = 8) -> str:
    """The first n held-out prompts, as `shown` shows them, with the answers before and after, as a table."""
    answers = report(folder)["answers"][:n]
    texts = [(shown(answer["prompt"]), answer["before"]["text"], answer["after"]["text"]) for answer in answers]
    rows = [[" ".join(text.split()).replace("|", "\\|") for text in each] for each in texts]
    return markdown([title, "before", "after"], rows)


def pyplot():
    """matplotlib.pyplot, set so that a figure is the same file each time. Raises SystemExit if it is missing."""
    try:
        import matplotlib
    except ImportError:
        sys.exit("figures need matplotlib: pip install matplotlib")
    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "plainrlhf", "svg.fonttype": "none"}
    matplotlib.rcParams |= {"font.size": 10, "axes.titlesize": 10}  # of a figure 9 inches wide
    matplotlib.rcParams |= {"axes.spines.top": False, "axes.spines.right": False, "font.sans-serif": ["DejaVu Sans"]}
    from matplotlib import pyplot

    return pyplot


def label_ends(axis, ends: dict[str, tuple[float, float, str]]) -> None:
    """Write each label beside the end of its line, apart from the others: label → (x, y, colour)."""
    axis.figure.draw_without_rendering()  # fixes the axis's size
    free = -math.inf  # lowest height at which a label fits, in points
    for label, (x, y, colour) in sorted(ends.items(), key=lambda item: item[1][1]):
        height = axis.transData.transform((x, y))[1] * 72 / axis.figure.dpi
        place = max(height, free)
        offset = dict(xytext=(4, place - height), textcoords="offset points", annotation_clip=False)
        axis.annotate(label, (x, y), color=colour, va="center", **offset)
        free = place + 12


def save(figure, target: Path) -> None:
    figure.savefig(target, metadata={"Date": None}, facecolor="white")
    target.write_text(re.sub(r"(\d\.\d\d)\d+", r"\1", target.read_text()))  # nobody sees a hundredth of a point
    print(target)
