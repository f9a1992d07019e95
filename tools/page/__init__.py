"""A run as one page: HTML that needs no network, no server and no build step.

    python -m tools.page out/ppo                          write out/ppo/run.html
    python -m tools.page --compare out/ppo,out/hacked     side by side, in out/ppo/compare.html
    python -m tools.page out/ppo --watch                  serve the page on this machine, and follow the run

It shows what a run folder holds: options, curves, samples, the report, and of stage 3 the last rollout, token by token.
page.js draws everything from one JSON object; page.html is what stands around it. Nothing in that object can become
markup or code: `<` is escaped, the script writes text alone, and the page's own policy lets no other script run.
"""

import base64
import hashlib
import json
import re
import secrets
import sys
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import common
from data.files import InputError, replacing
from tools import plots

FILES = [Path(__file__).with_name(name) for name in ("page.html", "page.js", "curves.js", "tokens.js")]
READ = ("config.json", "metrics.jsonl", "samples.txt", "report.json", "rollout.json")  # what a page is made of
MOST_POINTS, MOST_SAMPLES, MOST_ANSWERS = 600, 40, 40  # of a curve, of samples.txt, of report.json


@dataclass
class Config:
    compare: str = ""  # run folders to put side by side, separated by commas; DIR, if given, comes first
    out: str = ""  # file to write; empty: run.html, or compare.html, in the first folder
    watch: bool = False  # serve the page on this machine in place of writing it, and follow the run
    port: int = 8001  # of --watch; 0: any free port


# --- what a page shows ------------------------------------------------------------------------------------------------


def read_run(folder: str) -> dict[str, Any]:
    """A run folder as one JSON object. What the folder does not hold is None or empty.

    Raises InputError if it is no run folder, or if a file in it is damaged.
    """
    path = Path(folder)
    lines = common.read_metrics(path)
    if not lines:
        raise InputError(f"{folder}: no step in a metrics.jsonl there; name the folder of a run")
    report = read_object(path / "report.json")
    if report:
        report["answers"] = report.get("answers", [])[:MOST_ANSWERS]
    kind = plots.kind_of(lines)
    return {
        "name": folder,
        "unit": "iteration" if kind is plots.PPO else "step",
        "steps": lines[-1]["step"] + 1,
        "last": lines[-1],
        "config": read_object(path / "config.json"),
        "panels": [panel(lines, *each) for each in kind],
        "samples": samples(path / "samples.txt"),
        "report": report,
        "rollout": read_object(path / "rollout.json"),
    }


def read_object(path: Path) -> dict | None:
    """A JSON object; None if there is no such file. NaN and Infinity, which JSON does not know, become None."""
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda name: None)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read ({error}); remove it, and the page does without") from None
    if not isinstance(found, dict):
        raise InputError(f"{path}: not a JSON object; remove it, and the page does without")
    return found


def panel(lines: list[dict], title: str, unit: str, metrics: dict[str, str]) -> dict:
    """A panel of plots.py with its points. Without metrics it is the path of score against KL."""
    if not metrics:
        path = [[line.get(name) for name in ("objective/kl", "objective/scores")] for line in lines]
        series = [{"label": "", "kind": "path", "points": evenly(path, MOST_POINTS)}]
        return {"title": title, "unit": unit, "series": series}
    series = []
    for name, label in metrics.items():
        points = plots.values(lines, name) if plots.varies(lines, name) else []
        kind = "dots" if name.startswith(plots.POINTS) else "line"
        series.append({"label": label, "kind": kind, "points": evenly(points, MOST_POINTS)})
    return {"title": title, "unit": unit, "series": [each for each in series if each["points"]]}


def samples(path: Path) -> list[dict]:
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []
    found = [re.match(r"step (\d+)  (.*)", line, re.DOTALL) for line in lines]
    return evenly([{"step": int(each[1]), "text": each[2]} for each in found if each], MOST_SAMPLES)


def evenly(items: list, most: int) -> list:
    """At most `most` of the items, evenly chosen, the first and the last among them."""
    if len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


# --- the page ---------------------------------------------------------------------------------------------------------


def dumps(content: Any, source: str) -> str:
    """JSON without a `<` or a line separator, so that it can stand in a script element."""
    try:
        return json.dumps(content, allow_nan=False).replace("<", "\\u003c")
    except ValueError:
        raise InputError(f"{source}: holds a number that is not finite; remove the file that holds it") from None


def page(folders: list[str], watched: bool = False) -> str:
    """The page of some run folders. A page that is watched may ask the server that it came from, and nobody else."""
    template, *scripts = (path.read_text(encoding="utf-8") for path in FILES)
    script = "\n".join([*scripts, "start();\n"])
    style = re.search("<style>(.*?)</style>", template, re.DOTALL)[1]
    policy = f"default-src 'none'; script-src {source_hash(script)}; style-src {source_hash(style)}"
    policy += "; base-uri 'none'; form-action 'none'" + ("; connect-src 'self'" if watched else "")
    content = dumps({"runs": [read_run(folder) for folder in folders], "watched": watched}, folders[0])
    before, after = template.replace("POLICY", policy).replace("SCRIPT", script).split("CONTENT")
    return before + content + after


def source_hash(text: str) -> str:
    """The name by which a Content-Security-Policy allows a script or a style of this text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


# --- serving ----------------------------------------------------------------------------------------------------------


class Handler(BaseHTTPRequestHandler):
    """GET /TOKEN/ is the page; GET /TOKEN/runs?VERSION is the runs as JSON, or 204 if that is the version still."""

    server: "Server"

    def do_GET(self) -> None:
        path, _, seen = self.path.partition("?")
        host = self.headers.get("Host", "").partition(":")[0]
        known = secrets.compare_digest(path.encode().rpartition(b"/")[0], f"/{self.server.token}".encode())
        if not known or host not in ("127.0.0.1", "localhost"):  # another name that points here: DNS rebinding
            return self.reply(404, "not found; open the whole address that the terminal shows", "text/plain")
        try:
            if path.endswith("/runs"):
                version = self.server.version()
                if seen == version:
                    return self.reply(204, "", "application/json")
                runs = [read_run(folder) for folder in self.server.folders]
                return self.reply(200, dumps({"runs": runs, "version": version}, "runs"), "application/json")
            self.reply(200, page(self.server.folders, watched=True), "text/html")
        except InputError as error:  # a run has just begun anew, or a file is damaged
            self.reply(503, str(error), "text/plain")

    def reply(self, code: int, text: str, kind: str) -> None:
        content = text.encode()
        self.send_response(code)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    """Serves the page of some run folders to this machine. Its address holds a random token."""

    daemon_threads = True

    def __init__(self, folders: list[str], port: int):
        super().__init__(("127.0.0.1", port), Handler)
        self.folders, self.token = folders, secrets.token_urlsafe(16)
        self.address = f"http://127.0.0.1:{self.server_port}/{self.token}/"

    def version(self) -> str:
        """Another text whenever a file that the page shows has changed."""
        files = [Path(folder) / name for folder in self.folders for name in READ]
        states = [(path.stat().st_mtime_ns, path.stat().st_size) for path in files if path.exists()]
        return hashlib.sha256(repr(states).encode()).hexdigest()

    def handle_error(self, request: Any, client_address: tuple) -> None:
        """Say nothing if a browser has left early, and one line if there is another fault."""
        if not isinstance(error := sys.exception(), OSError):
            print(f"a request failed: {error!r}", file=sys.stderr)


# --- the command ------------------------------------------------------------------------------------------------------


def main() -> None:
    cfg, folder = common.parse(Config, positional="[DIR]")
    folders = list(dict.fromkeys(name for name in [folder or "", *cfg.compare.split(",")] if name))
    if not folders:
        raise InputError("name a run folder, such as out/ppo")
    whole = page(folders)
    if not cfg.watch:
        target = Path(cfg.out or Path(folders[0]) / ("compare.html" if len(folders) > 1 else "run.html"))
        with replacing(target) as file:
            file.write(whole)
        return print(f"{target}: open it in a browser ({len(whole) / 2**20:.1f} MiB)")
    try:
        server = Server(folders, cfg.port)
    except OSError as error:
        raise InputError(f"--port {cfg.port}: {error.strerror}; give another, or 0 for any free port") from None
    print(f"Open {server.address}\nThe page follows the run. Ctrl-C stops.", flush=True)
    with server:
        server.serve_forever()
