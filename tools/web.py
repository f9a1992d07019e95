"""The server of a page: its address holds a random token, and the page runs no code but its own."""

import base64
import hashlib
import json
import re
import secrets
import socket
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from data.files import InputError

EVERYWHERE = ("", "0.0.0.0", "::")  # hosts that mean every network of this machine
HEADERS = {"X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY", "Cache-Control": "no-store"}
HEADERS |= {"Referrer-Policy": "no-referrer"}
Reply = tuple[int, str, str]  # a code, a text, and the text's type
NOT_FOUND: Reply = (404, "not found; open the whole address that the terminal shows", "text/plain")


def secured(page: str, connect: bool) -> str:
    """Return the page with a policy for POLICY that allows its own <script> and <style>; `connect`: and its server."""
    policy = "default-src 'none'; base-uri 'none'; form-action 'none'" + ("; connect-src 'self'" if connect else "")
    for tag in ("script", "style"):
        text = re.search(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)[1]
        policy += f"; {tag}-src 'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
    return page.replace("POLICY", policy, 1)


class Handler(BaseHTTPRequestHandler):
    timeout = 30  # seconds without data from a client before the connection closes

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        token, _, action = path.removeprefix("/").partition("/")
        known = secrets.compare_digest(token.encode(), self.server.token.encode())
        code, text, kind = self.reply(action, query) if known else NOT_FOUND
        self.send_response(code)
        content = text.encode()
        about = {"Content-Type": f"{kind}; charset=utf-8", "Content-Length": str(len(content))}
        for name, value in (HEADERS | about).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    do_POST = do_GET

    def reply(self, action: str, query: str) -> Reply:
        try:
            if self.command == "GET":
                return self.server.respond(action, query)
            size = self.headers.get("Content-Length", "")
            if not re.fullmatch("[0-9]{1,5}", size):
                raise ValueError("a request needs a Content-Length below 100,000")
            return self.server.respond(action, json.loads(self.rfile.read(int(size))))
        except (ValueError, KeyError, TypeError, RecursionError) as error:  # the request is wrong
            return 400, str(error), "text/plain"
        except Exception as error:  # a file cannot be read or written, or the model has failed
            return 503, str(error), "text/plain"

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    """Answers /TOKEN/action?query with `respond(action, query)`, and a POST with `respond(action, its JSON)`."""

    daemon_threads, request_queue_size = True, 256

    def __init__(self, host: str, port: int, token: str):
        self.token, self.address_family = token, socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), Handler)
        except (OSError, OverflowError, UnicodeError) as error:
            raise InputError(f"{host}, --port {port}: {error}; give another, or --port 0 for any free one") from None
        name = "localhost" if host in EVERYWHERE else f"[{host}]" if ":" in host else host
        self.address = f"http://{name}:{self.server_port}/{token}/"

    def handle_error(self, *_: object) -> None:
        pass  # the client has left early; what `respond` raises is its answer
