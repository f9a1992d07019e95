"""A small HTTP server that shows a sitting as a page in the browser."""

import html
import ipaddress
import json
import os
import re
import secrets
import socket
import sys
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from data.files import InputError, cannot_write
from tools.label.sitting import Question, Sitting, question_of

PAGE = Path(__file__).with_name("page.html")
LONGEST_BODY = 2**14  # bytes, of the largest request body
REQUEST_SECONDS = 60  # from the connection to the whole request
CONNECTIONS = 512  # at once
HINT = "open the whole address that the terminal shows"


class Handler(BaseHTTPRequestHandler):
    """GET /TOKEN/ returns the page; POST /TOKEN/next, answer, earlier, revise take and return JSON. The rest is 404."""

    timeout = 30  # seconds without data from a client before the connection closes
    server: "Server"

    def setup(self) -> None:
        super().setup()
        self.deadline = threading.Timer(REQUEST_SECONDS, self._hang_up)
        self.deadline.daemon = True
        self.deadline.start()

    def finish(self) -> None:
        self.deadline.cancel()
        super().finish()

    def _hang_up(self) -> None:
        """End a connection whose request has not arrived, however slowly its bytes come."""
        try:
            self.connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # it has ended meanwhile

    def _reply(self, code: int, content: bytes, kind: str = "text/plain; charset=utf-8") -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("X-Frame-Options", "DENY")
        policy = f"default-src 'none'; connect-src 'self'; script-src 'nonce-{self.server.nonce}'; "
        policy += f"style-src 'nonce-{self.server.nonce}'; base-uri 'none'; form-action 'none'"
        self.send_header("Content-Security-Policy", policy)
        self.end_headers()
        self.wfile.write(content)

    def _refused(self) -> bool:
        """Refuse a request with a wrong token, a foreign origin or a wrong host name. Returns True if it refused."""
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        token = (self._path().split("/") + [""])[1]
        if not secrets.compare_digest(token.encode("utf-8", "replace"), self.server.token.encode()):
            self._reply(404, f"not found; {HINT}".encode())
        elif not self.server.known(host) or not self._same_origin(host, origin):
            name = hostname(host if not self.server.known(host) else origin or "")
            self._reply(403, f"forbidden under the name {name}; start the server with --allow_host {name}".encode())
        else:
            return False
        return True

    def _path(self) -> str:
        return self.path.partition("?")[0]

    def _same_origin(self, host: str, origin: str | None) -> bool:
        """Return True if a page of this server sent the request, perhaps through a proxy that rewrites the host."""
        return origin in (None, f"http://{host}", f"https://{host}") or hostname(origin) in self.server.names

    def do_GET(self) -> None:
        self.deadline.cancel()
        if self._refused():
            return
        if self._path() == f"/{self.server.token}":
            self.send_response(301)
            self.send_header("Location", f"{self.server.token}/")  # relative: a proxy may add a folder
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif self._path() != f"/{self.server.token}/":
            self._reply(404, f"not found; {HINT}".encode())
        else:
            self._reply(200, self.server.page, "text/html; charset=utf-8")

    def do_POST(self) -> None:
        if self._refused():
            return
        action = self.path.removeprefix(f"/{self.server.token}/")
        if action not in ("next", "answer", "earlier", "revise"):
            return self._reply(404, f"not found; {HINT}".encode())
        size = self.headers.get("Content-Length", "")
        if not size.isascii() or not size.isdigit():
            return self._reply(411, b"length required")
        if len(size) > 9 or int(size) > LONGEST_BODY:
            return self._reply(413, b"too large")
        try:
            body = self.rfile.read(int(size))
            self.deadline.cancel()  # an answer may wait for a question
            asked = json.loads(body)
            annotator = asked["annotator"]
            if not isinstance(annotator, str) or not 0 < len(annotator.strip()) <= 40:
                raise ValueError("a name has 1 to 40 characters")
            self._reply(200, json.dumps(self._do(action, annotator.strip(), asked)).encode(), "application/json")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            self._reply(400, str(error).encode())
        except (OSError, InputError) as error:  # the answer could not be written, or sampling failed
            self._reply(500, str(error).encode())

    def _do(self, action: str, annotator: str, asked: dict) -> dict:
        sitting = self.server.sitting
        if action == "earlier":
            return self._earlier(annotator, asked.get("index"))
        if action in ("answer", "revise"):
            do, key = (sitting.answer, "number") if action == "answer" else (sitting.revise, "index")
            do(annotator, asked[key], asked["verdict"], asked.get("comment", ""), asked.get("sure", 0))
        question = sitting.next(annotator)
        return sitting.progress(annotator) | (self._shown(question, annotator) if question else {"prompt": None})

    def _shown(self, question: Question, annotator: str) -> dict:
        answers = [question.answers[i] for i in self.server.sitting.order(question, annotator)]
        shown = {"prompt": question.prompt, "number": question.number}
        shown["responses"] = [answer.text for answer in answers]
        return shown | {"cut": [not answer.ended for answer in answers]}

    def _earlier(self, annotator: str, index: int | None) -> dict:
        """Return the list of the annotator's earlier answers, or one of them as a question that can be changed."""
        sitting = self.server.sitting
        rows = sitting.earlier(annotator)
        if index is None:
            return {"earlier": [{"prompt": row["prompt"][:200], "said": sitting.said(row)} for row in rows]}
        if type(index) is not int or not 0 <= index < len(rows):
            raise ValueError("there is no such earlier answer")
        row = rows[index]
        shown = sitting.progress(annotator) | self._shown(question_of(row), annotator)
        shown |= {"index": index, "said": sitting.said(row)}
        return shown | {"comment": row.get("comment", ""), "sure": row.get("sure", 0)}

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    """`allow_host` are further names of this machine, comma-separated, as a proxy or a browser gives them."""

    request_queue_size = 256
    daemon_threads = True

    def __init__(self, sitting: Sitting, host: str, port: int, allow_host: str = "", instructions: str = ""):
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), Handler)
        self.sitting, self.token, self.nonce = sitting, lasting_token(sitting.out), secrets.token_urlsafe(16)
        self.names = {name.strip().lower() for name in allow_host.split(",") if name.strip()}
        self.own = {"localhost", host.lower(), socket.gethostname().lower(), socket.getfqdn().lower()}
        page = PAGE.read_text(encoding="utf-8").replace("NONCE", self.nonce)
        self.page = page.replace("INSTRUCTIONS", html.escape(instructions)).encode()
        self.addresses = [f"http://{name}:{self.server_port}/{self.token}/" for name in reachable(host)]
        self.free = threading.Semaphore(CONNECTIONS)

    def known(self, host: str) -> bool:
        """Return True if a Host header names this server. Refuse other names that point here (DNS rebinding).

        Any port is accepted, because a tunnel may use another port.
        """
        name = hostname(host)
        return name in self.own | self.names or is_number(name)

    def process_request(self, request: socket.socket, client_address: tuple) -> None:
        if not self.free.acquire(blocking=False):
            return self.shutdown_request(request)
        super().process_request(request, client_address)

    def process_request_thread(self, request: socket.socket, client_address: tuple) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.free.release()

    def handle_error(self, request: socket.socket, client_address: tuple) -> None:
        """Say nothing if a client has left early, and one line if there is another fault."""
        error = sys.exception()
        if not isinstance(error, OSError):
            print(f"a request failed: {error!r}", file=sys.stderr)


def hostname(address: str) -> str:
    """Return the name in a Host or Origin header, in lower case and without a port."""
    try:
        return urllib.parse.urlsplit(address if "//" in address else f"//{address}").hostname or ""
    except ValueError:
        return ""


def is_number(name: str) -> bool:
    """Return True for an address in numbers, which no foreign name server can have given out."""
    try:
        return bool(ipaddress.ip_address(name))
    except ValueError:
        return False


def reachable(host: str) -> list[str]:
    """Return names under which a browser reaches `host`: first from this machine, then from others."""
    if host not in ("", "0.0.0.0", "::"):
        return [f"[{host}]" if ":" in host else host]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing; tells the address of this machine in its network
            return ["localhost", probe.getsockname()[0]]
        except OSError:  # without a network
            return ["localhost"]


def lasting_token(out: Path) -> str:
    """Return the token kept beside the answers, so that an address that people have outlives a restart."""
    path = Path(f"{out}.token")
    token = path.read_text(errors="replace").strip() if path.exists() else ""
    if not re.fullmatch(r"[\w-]{22}", token, re.ASCII):
        token = secrets.token_urlsafe(16)
        try:
            path.unlink(missing_ok=True)
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(token)
        except OSError as error:
            raise cannot_write(path, error) from None
    return token
