"""Serve a sitting as a page in the browser."""

import html
import json
import os
import re
import secrets
from pathlib import Path

from data.files import InputError
from tools import web
from tools.label.sitting import Question, Sitting, question_of

PAGE = Path(__file__).with_name("page.html")
LONGEST_BODY = 2**14  # bytes of a request
EVERYWHERE = ("", "0.0.0.0", "::")  # hosts that mean every network of this machine


class Handler(web.Handler):
    """GET /TOKEN/ returns the page. POST /TOKEN/next, answer, earlier and revise take and return JSON."""

    def respond(self, action: str, query: str) -> tuple[int, str, str]:
        if self.command == "GET" and not action:
            return 200, self.server.page, "text/html"
        if self.command == "GET" or action not in ("next", "answer", "earlier", "revise"):
            return web.NOT_FOUND
        try:
            size = self.headers.get("Content-Length", "")
            if not re.fullmatch("[0-9]{1,9}", size) or int(size) > LONGEST_BODY:
                raise ValueError(f"a request needs a Content-Length of at most {LONGEST_BODY}")
            asked = json.loads(self.rfile.read(int(size)))
            annotator = asked["annotator"]
            if not isinstance(annotator, str) or not 0 < len(annotator.strip()) <= 40:
                raise ValueError("a name has 1 to 40 characters")
            return 200, json.dumps(self.act(action, annotator.strip(), asked)), "application/json"
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            return 400, str(error), "text/plain"
        except (OSError, InputError) as error:  # the answer could not be written, or sampling failed
            return 500, str(error), "text/plain"

    def act(self, action: str, annotator: str, asked: dict) -> dict:
        """Do what is asked. Returns the annotator's next question, or what was asked for of the earlier answers."""
        sitting = self.server.sitting
        if action == "earlier" and asked.get("index") is None:
            rows = sitting.earlier(annotator)
            return {"earlier": [{"prompt": row["prompt"][:200], "said": sitting.said(row)} for row in rows]}
        if action == "earlier":
            row = sitting.earlier_row(annotator, asked["index"])
            shown = self.shown(question_of(row), annotator) | {"index": asked["index"], "said": sitting.said(row)}
            return shown | {"comment": row.get("comment", ""), "sure": row.get("sure", 0)}
        if action in ("answer", "revise"):
            save, key = (sitting.answer, "number") if action == "answer" else (sitting.revise, "index")
            save(annotator, asked[key], asked["verdict"], asked.get("comment", ""), asked.get("sure", 0))
        return self.shown(sitting.next(annotator), annotator)

    def shown(self, question: Question | None, annotator: str) -> dict:
        """Return what the page shows: the answers in the annotator's order, without their models, and the progress."""
        sitting = self.server.sitting
        if question is None:
            return sitting.progress(annotator) | {"prompt": None}
        answers = [question.answers[i] for i in sitting.order(question, annotator)]
        texts, cut = [answer.text for answer in answers], [not answer.ended for answer in answers]
        shown = {"prompt": question.prompt, "number": question.number, "responses": texts, "cut": cut}
        return sitting.progress(annotator) | shown


class Server(web.Server):
    def __init__(self, sitting: Sitting, host: str, port: int, instructions: str = ""):
        super().__init__(Handler, host, port, lasting_token(sitting.out))
        page = web.secured(PAGE.read_text(encoding="utf-8"), connect=True)
        self.sitting, self.page = sitting, page.replace("INSTRUCTIONS", html.escape(instructions))
        name = "localhost" if host in EVERYWHERE else f"[{host}]" if ":" in host else host
        self.address = f"http://{name}:{self.server_port}/{self.token}/"


def lasting_token(out: Path) -> str:
    """Return the token kept beside the answers, so that an address that people have outlives a restart."""
    path = Path(f"{out}.token")
    token = path.read_text(errors="replace").strip() if path.exists() else ""
    if not re.fullmatch(r"[\w-]{22}", token, re.ASCII):
        token = secrets.token_urlsafe(16)
        path.unlink(missing_ok=True)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(token)
    return token
