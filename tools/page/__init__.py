"""A run as one page: HTML that needs no network, no server and no build step.

    python -m tools.page out/ppo                          write out/ppo/run.html
    python -m tools.page --compare out/ppo,out/hacked     side by side, in out/ppo/compare.html
    python -m tools.page out/ppo --watch                  serve the page on this machine, and follow the run

The page shows what a run folder holds: options, curves, samples, the report, and of stage 3 the last rollout, token by
token. page.js draws everything from one JSON object; page.html is the frame. Nothing in that object can become markup
or code: `<` is escaped, the script writes text alone, and the page's own policy lets no other script run.
"""

import hashlib
import json
import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import cli, runs
from data.files import InputError, replacing
from tools import web

FILES = [Path(__file__).with_name(name) for name in ("page.html", "page.js", "curves.js", "tokens.js")]
READ = ("config.json", "metrics.jsonl", "samples.txt", "report.json", "rollout.json")  # a page is made of these
MOST_POINTS, MOST_SAMPLES, MOST_ANSWERS = 600, 40, 40  # of a curve, of samples.txt, of report.json


@dataclass
class Config:
    compare: str = ""  # run folders to put side by side, separated by commas; DIR, if given, comes first
    out: str = ""  # file to write; empty: run.html, or compare.html, in the first folder
    watch: bool = False  # serve the page on this machine instead of writing it, and follow the run
    port: int = 8001  # of --watch; 0: any free port


# A panel: its title, the unit of its y axis, and its metrics with their labels.
SFT = [
    ("loss", "nats a token", {"loss/train": "training", "loss/held_out": "held out"}),
    ("gradient norm before clipping", "norm", {"grad_norm": ""}),
    ("learning rate", "rate", {"lr": ""}),
    ("speed", "tokens a second", {"tokens_per_s": ""}),
]
ACCURACY = {"accuracy": "training", "eval/accuracy": "held out", "eval/accuracy_ceiling": "ceiling"}
REWARD = [
    ("loss", "nats a pair", {"loss/train": "training", "eval/loss": "held out"}),
    ("accuracy", "share of pairs", ACCURACY),
    ("gradient norm before clipping", "norm", {"grad_norm": ""}),
]
SCORE = {"objective/scores": "score", "objective/rlhf_reward": "score − β KL", "eval/score": "score, held out"}
UPDATE = {"policy/clipfrac_avg": "share of clipped tokens", "policy/approxkl_avg": "KL to before (nats a token)"}
PPO = [
    ("score and reward", "score", SCORE),
    ("judge, never trained on", "judge", {"objective/judge": "rollouts", "eval/judge": "held out"}),
    ("KL to the frozen copy", "nats a response", {"objective/kl": "mean", "eval/kl": "held out"}),
    ("score against KL", "score, early iterations pale", {}),
    ("largest KL of a response", "nats", {"objective/kl_max": ""}),
    ("how far an update goes", "share, or nats", UPDATE),
    ("ratio of new to old policy", "mean ratio", {"val/ratio": ""}),
    ("value net", "share of variance explained", {"value/explained_variance": ""}),
    ("gradient norms before clipping", "norm", {"policy/grad_norm": "policy", "value/grad_norm": "value net"}),
    ("entropy of the next token", "nats", {"token_entropy": ""}),
    ("length of a response", "tokens", {"response_len": ""}),
    ("ended by EOS", "share of responses", {"val/num_eos_tokens": ""}),
    ("β", "reward a nat", {"kl_coef": ""}),
]
DOTS = ("eval/", "loss/held_out")  # these metrics are measured now and then, and drawn as dots


def kind_of(lines: list[dict]) -> list[tuple]:
    """Return the panels of the stage that wrote these metrics."""
    names = set().union(*lines)
    return PPO if "objective/kl" in names else REWARD if "accuracy" in names else SFT


def values(lines: list[dict], name: str) -> list[tuple[int, float]]:
    return [(line["step"] + 1, line[name]) for line in lines if name in line]


def varies(lines: list[dict], name: str) -> bool:
    return len({x for _, x in values(lines, name)}) > 1


def panel(lines: list[dict], title: str, unit: str, metrics: dict[str, str]) -> dict:
    """Return a panel with its points, without metrics that never change. With no metrics: the path of score and KL."""
    series = []
    for name, label in metrics.items():
        if varies(lines, name):
            kind = "dots" if name.startswith(DOTS) else "line"
            series.append({"label": label, "kind": kind, "points": evenly(values(lines, name), MOST_POINTS)})
    if not metrics:
        path = [(line.get("objective/kl"), line.get("objective/scores")) for line in lines]
        series = [{"label": "", "kind": "path", "points": evenly(path, MOST_POINTS)}]
    return {"title": title, "unit": unit, "series": series}


def read_run(folder: str) -> dict[str, Any]:
    """Return a run folder as one JSON object. What the folder does not hold is None or empty.

    Raises InputError if it is no run folder, or if a file in it is damaged.
    """
    path = Path(folder)
    lines = runs.read_metrics(path)
    if not lines:
        raise InputError(f"{folder}: no step in a metrics.jsonl there; name the folder of a run")
    report = read_object(path / "report.json")
    if report:
        report["answers"] = report.get("answers", [])[:MOST_ANSWERS]
    kind = kind_of(lines)
    return {
        "name": folder,
        "unit": "iteration" if kind is PPO else "step",
        "steps": lines[-1]["step"] + 1,
        "last": lines[-1],
        "config": read_object(path / "config.json"),
        "panels": [panel(lines, *each) for each in kind],
        "samples": samples(path / "samples.txt"),
        "report": report,
        "rollout": read_object(path / "rollout.json"),
    }


def read_object(path: Path) -> dict | None:
    """Return a JSON object, or None if there is no such file. NaN and Infinity become None, as JSON has neither."""
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda name: None)
        if isinstance(found, dict):
            return found
        raise ValueError(f"a {type(found).__name__}")
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as a JSON object ({error}); remove the file") from None


def samples(path: Path) -> list[dict]:
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []
    found = [re.match(r"step (\d+)  (.*)", line, re.DOTALL) for line in lines]
    return evenly([{"step": int(each[1]), "text": each[2]} for each in found if each], MOST_SAMPLES)


def evenly(items: list, most: int) -> list:
    """Return at most `most` of the items, evenly chosen, the first and the last among them."""
    if len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def dumps(folders: list[str], **more: Any) -> str:
    """Return the runs as JSON without a `<` or a line separator, so that it can stand in a script element."""
    content = {"runs": [read_run(folder) for folder in folders]} | more
    try:
        return json.dumps(content, allow_nan=False).replace("<", "\\u003c")
    except ValueError:
        raise InputError(f"{', '.join(folders)}: a number there is not finite; remove the file that holds it") from None


def page(folders: list[str], watched: bool = False) -> str:
    """Return the page of some run folders. A watched page may ask the server that it came from, and nobody else."""
    template, *scripts = (path.read_text(encoding="utf-8") for path in FILES)
    whole = web.secured(template.replace("SCRIPT", "\n".join([*scripts, "start();\n"])), connect=watched)
    return whole.replace("CONTENT", dumps(folders, watched=watched), 1)


class Handler(web.Handler):
    """GET /TOKEN/ is the page; GET /TOKEN/runs?VERSION is the runs as JSON, or 204 if they still have that version."""

    def respond(self, action: str, query: str) -> tuple[int, str, str]:
        folders = self.server.folders
        try:
            version = version_of(folders)
            if action == "runs" and query == version:
                return 204, "", "application/json"
            if action == "runs":
                return 200, dumps(folders, version=version), "application/json"
            return web.NOT_FOUND if action else (200, page(folders, watched=True), "text/html")
        except InputError as error:  # a run has just begun anew, or a file is damaged
            return 503, str(error), "text/plain"


class Server(web.Server):
    def __init__(self, folders: list[str], port: int):
        super().__init__(Handler, "127.0.0.1", port, secrets.token_urlsafe(16))
        self.folders, self.address = folders, f"http://127.0.0.1:{self.server_port}/{self.token}/"


def version_of(folders: list[str]) -> str:
    """Return another text whenever a file that the page shows has changed."""
    paths = [Path(folder) / name for folder in folders for name in READ]
    states = [(path.stat().st_mtime_ns, path.stat().st_size) for path in paths if path.exists()]
    return hashlib.sha256(repr(states).encode()).hexdigest()


def main() -> None:
    cfg, folder = cli.parse(Config, positional="[DIR]")
    folders = list(dict.fromkeys(name for name in [folder or "", *cfg.compare.split(",")] if name))
    if not folders:
        raise InputError("name a run folder, such as out/ppo")
    whole = page(folders)
    if not cfg.watch:
        target = Path(cfg.out or Path(folders[0]) / ("compare.html" if len(folders) > 1 else "run.html"))
        with replacing(target) as file:
            file.write(whole)
        return print(f"{target}: open it in a browser ({len(whole) / 2**20:.1f} MiB)")
    with Server(folders, cfg.port) as server:
        print(f"Open {server.address}\nThe page follows the run. Ctrl-C stops.", flush=True)
        server.serve_forever()
