"""The server of a page: its address holds a random token, and the page runs no code but its own."""

import base64
import hashlib
import re
import secrets
import socket
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from data.files import InputError

HEADERS = [("X-Content-Type-Options", "nosniff"), ("X-Frame-Options", "DENY")]
HEADERS += [("Cache-Control", "no-store"), ("Referrer-Policy", "no-referrer")]
NOT_FOUND = 404, "not found; open the whole address that the terminal shows", "text/plain"


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
        """Send what `respond(action, query)` returns for /TOKEN/action?query: a code, a text and the text's type."""
        path, _, query = self.path.partition("?")
        token, _, action = path.removeprefix("/").partition("/")
        known = secrets.compare_digest(token.encode(), self.server.token.encode())
        code, text, kind = self.respond(action, query) if known else NOT_FOUND
        self.send_response(code)
        length = str(len(text.encode()))
        for name, value in [*HEADERS, ("Content-Type", f"{kind}; charset=utf-8"), ("Content-Length", length)]:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text.encode())

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads, request_queue_size = True, 256

    def __init__(self, handler: type[Handler], host: str, port: int, token: str):
        self.token, self.address_family = token, socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), handler)
        except (OSError, OverflowError, UnicodeError) as error:
            raise InputError(f"{host}, --port {port}: {error}; give another, or --port 0 for any free one") from None

    def handle_error(self, *_: object) -> None:
        if not isinstance(error := sys.exception(), OSError):  # an OSError: the client has left early
            print(f"a request failed: {error!r}", file=sys.stderr)
