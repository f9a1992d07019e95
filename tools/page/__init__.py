"""A run as one page: HTML that needs no network, no server and no build step.

python -m tools.page out/ppo                          write out/ppo/run.html
python -m tools.page --compare out/ppo,out/hacked     side by side, in out/ppo/compare.html
python -m tools.page out/ppo --watch                  serve the page on this machine, and follow the run
"""

import hashlib
import itertools
import json
import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import cli, runs
from data.files import InputError, read_object, replacing
from tools import web
from tools.page.likeliest import add_likeliest

FILES = [Path(__file__).with_name(name) for name in ("page.html", "page.js", "curves.js", "tokens.js")]
MOST_POINTS, MOST_SAMPLES, MOST_ANSWERS = 600, 40, 40  # of a curve, of samples.txt, of report.json


@dataclass
class Config:
    compare: str = ""  # run folders to put side by side, separated by commas; DIR, if given, comes first
    watch: bool = False  # serve the page on this machine instead of writing it, and follow the run
    port: int = 8001  # of --watch; 0: any free port


# A panel: its title, the unit of its y axis, and its metrics with their labels. The page draws those that a run has.
PANELS = [
    ("loss", "nats", {"loss/train": "training", "loss/held_out": "held out", "eval/loss": "held out"}),
    ("accuracy", "share", {"accuracy": "training", "eval/accuracy": "held out", "eval/accuracy_ceiling": "ceiling"}),
    ("score", "score", {"objective/scores": "mean", "objective/rlhf_reward": "minus β KL", "eval/score": "held out"}),
    ("disagreement of the reward models", "score", {"objective/disagreement": ""}),
    ("judge, never trained on", "judge", {"objective/judge": "rollouts", "eval/judge": "held out"}),
    ("KL to the frozen copy", "nats per response", {"objective/kl": "mean", "eval/kl": "held out"}),
    ("largest KL of a response", "nats", {"objective/kl_max": ""}),
    ("update", "share, or nats", {"policy/clipfrac_avg": "clipped tokens", "policy/approxkl": "KL per token"}),
    ("ratio of new to old policy", "mean ratio", {"policy/ratio": ""}),
    ("value net", "share of variance explained", {"value/explained_variance": ""}),
    ("gradient norm", "unclipped", {"grad_norm": "", "policy/grad_norm": "policy", "value/grad_norm": "value net"}),
    ("entropy of the next token", "nats", {"token_entropy": ""}),
    ("length of a response", "tokens", {"response_len": ""}),
    ("ended by EOS", "share of responses", {"ended": ""}),
    ("β", "reward per nat", {"kl_coef": ""}),
    ("learning rate", "rate", {"lr": ""}),
    ("speed", "tokens per second", {"tokens_per_s": ""}),
]
AT_LEAST = {"policy/ratio": (0.95, 1.05), "objective/kl": (0, 0.1), "objective/kl_max": (0, 0.1)}  # what an axis spans
EXACT = ("kl_coef", "lr")  # without noise, so not smoothed


def panels(lines: list[dict]) -> list[dict]:
    """Return the panels with their points, without those that never change. The last is the path of score and KL."""
    found = []
    for title, unit, metrics in PANELS:
        series, varies = [], False
        for name, label in metrics.items():
            points = [(line["step"] + 1, line[name]) for line in lines if name in line]
            each = {"label": label, "kind": "line", "points": thinned(points)}
            if name.startswith(("eval/", "loss/held_out")):  # measured now and then
                each["kind"] = "dots"
            elif name not in EXACT:
                each["smooth"] = evenly(smooth(points), MOST_POINTS)
            series += [each] * bool(points)
            varies |= len({y for _, y in points}) > 1
        at_least = AT_LEAST.get(next(iter(metrics)))
        found.append({"title": title, "unit": unit, "series": series * varies, "at_least": at_least})
    path = [
        (line["objective/kl"], line["objective/scores"])
        for line in lines
        if line.keys() >= {"objective/kl", "objective/scores"}
    ]
    series = [{"label": "", "kind": "path", "points": evenly(path, MOST_POINTS)}]
    path = {"title": "score against KL", "unit": "score, early iterations pale", "series": series}
    return [*found, path | {"x": "KL to the frozen copy, nats per response", "still": True}]


def smooth(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Return the running mean over a thirtieth of the points to either side."""
    reach, n = len(points) // 30, len(points)
    sums = [0.0, *itertools.accumulate(y for _, y in points)]
    ends = [(max(0, i - reach), min(n, i + reach + 1)) for i in range(n)]
    return [(x, (sums[b] - sums[a]) / (b - a)) for (x, _), (a, b) in zip(points, ends)]


def thinned(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Return at most MOST_POINTS of the points: the first, the last, and the lowest and highest of equal parts."""
    n, parts = len(points), MOST_POINTS // 2 - 1
    if n <= MOST_POINTS:
        return points
    kept = {0, n - 1}
    for i in range(parts):
        part = range(n * i // parts, n * (i + 1) // parts)
        kept |= {choose(part, key=lambda j: points[j][1]) for choose in (min, max)}
    return [points[i] for i in sorted(kept)]


def read_run(folder: str, watched: bool = False) -> dict[str, Any]:
    """Return a run folder as one JSON object. What the folder does not hold is None or empty."""
    path = Path(folder)
    lines = runs.read_metrics(path)
    if not lines and not watched:
        raise InputError(f"{folder}: no step in a metrics.jsonl there; name the folder of a run")
    last = lines[-1] if lines else {"step": -1}
    unit = "iteration" if "objective/kl" in last else "step"
    found = {"name": folder, "unit": unit, "steps": last["step"] + 1, "last": last, "panels": panels(lines)}
    for name in ("config", "report", "rollout"):
        file = path / f"{name}.json"
        found[name] = read_object(file) if file.exists() else None
    if found["rollout"]:
        add_likeliest(path, found["rollout"], {} if watched else found["config"] or {})  # the nets take seconds
    if lines and watched:
        found["since_start"] = (path / "metrics.jsonl").stat().st_mtime - (found["config"] or {}).get("started", 0)
    if found["report"]:
        answers = found["report"].get("answers", [])
        if not isinstance(answers, list):
            raise InputError(f'{path / "report.json"}: "answers" is no list; remove the file')
        found["report"]["answers"] = answers[:MOST_ANSWERS]
    return found | {"samples": samples(path / "samples.txt")}


def samples(path: Path) -> list[dict]:
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []
    found = [re.match(r"step (\d{1,18})  (.*)", line, re.DOTALL) for line in lines]
    return evenly([{"step": int(each[1]), "text": each[2]} for each in found if each], MOST_SAMPLES)


def evenly(items: list, most: int) -> list:
    """Return at most `most` of the items, evenly chosen, the first and the last among them."""
    if len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def dumps(folders: list[str], watched: bool, **more: Any) -> str:
    """Return the runs as JSON without a `<` or a line separator, so that it can stand in a script element."""
    content = {"runs": [read_run(folder, watched) for folder in folders], "watched": watched} | more
    try:
        return json.dumps(content, allow_nan=False).replace("<", "\\u003c")
    except ValueError:
        raise InputError(f"{', '.join(folders)}: a number there is not finite; remove the file that holds it") from None


def page(folders: list[str], watched: bool = False) -> str:
    """Return the page of some run folders. A watched page may ask the server that it came from, and nobody else."""
    template, *scripts = (path.read_text(encoding="utf-8") for path in FILES)
    whole = web.secured(template.replace("SCRIPT", "\n".join([*scripts, "start();\n"])), connect=watched)
    return whole.replace("CONTENT", dumps(folders, watched), 1)


class Server(web.Server):
    """/TOKEN/ is the page; /TOKEN/runs?VERSION is the runs as JSON, or 204 if they still have that version."""

    def __init__(self, folders: list[str], port: int):
        super().__init__("127.0.0.1", port, secrets.token_urlsafe(16))
        self.folders = folders

    def respond(self, action: str, query: str) -> web.Reply:
        if not action:
            return 200, page(self.folders, watched=True), "text/html"
        if action != "runs":
            return web.NOT_FOUND
        version = version_of(self.folders)
        code, text = (204, "") if query == version else (200, dumps(self.folders, True, version=version))
        return code, text, "application/json"


def version_of(folders: list[str]) -> str:
    """Return another text whenever a file that a page is made of has changed."""
    names = ("config.json", "metrics.jsonl", "samples.txt", "report.json", "rollout.json")
    paths = [Path(folder) / name for folder in folders for name in names]
    states = [(path.stat().st_mtime_ns, path.stat().st_size) for path in paths if path.exists()]
    return hashlib.sha256(repr(states).encode()).hexdigest()


def main() -> None:
    cfg, folder = cli.parse(Config, positional="[DIR]")
    folders = list(dict.fromkeys(name for name in [folder or "", *cfg.compare.split(",")] if name))
    if not folders:
        raise InputError("name a run folder, such as out/ppo")
    whole = page(folders, cfg.watch)
    if not cfg.watch:
        target = Path(folders[0]) / ("compare.html" if len(folders) > 1 else "run.html")
        with replacing(target) as file:
            file.write(whole)
        return print(f"{target}: open it in a browser ({len(whole) / 2**20:.1f} MiB)")
    with Server(folders, cfg.port) as server:
        print(f"Open {server.address}\nThe page follows the run. Ctrl-C stops.", flush=True)
        server.serve_forever()
