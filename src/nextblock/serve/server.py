"""The page's server: who may ask, how much may be sent, and how errors are answered."""

from __future__ import annotations

import ipaddress
import json
import logging
import os
import socket
import sys
import threading
import webbrowser
from collections.abc import Callable
from contextlib import nullcontext, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from inspect import signature
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from nextblock.errors import UsageError
from nextblock.look.settings import ServeSettings
from nextblock.report import run_page
from nextblock.report.page import asset
from nextblock.serve.session import Session
from nextblock.tables import finite

log = logging.getLogger(__name__)

CALLS = {
    "GET": ("about", "run", "picture", "thumbnail"),
    "POST": ("upload", "choose", "predict", "complete", "surprise", "features", "nearest"),
}
UNLOCKED = ("about", "run", "picture")
"""Calls that do not wait for the model."""
MAX_JSON_BYTES, CHUNK_BYTES = 1 << 20, 1 << 16
HEADERS = {
    "Content-Security-Policy": "default-src 'self' 'unsafe-inline' data: blob:; frame-ancestors 'none'; "
    "base-uri 'none'; form-action 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
FOLLOW = """
const back = document.createElement("a");
[back.href, back.textContent] = ["/", "Show it an image"];
document.body.prepend(back);
setInterval(async () => {
  const answer = document.hidden ? null : await fetch("/api/run").catch(() => null);
  if (!answer?.ok) return;
  const {header, values} = await answer.json();
  document.querySelector("header").outerHTML = header;
  nextblock.show(values);
}, 5000);
"""


class RefusedError(Exception):
    """A refused request: an HTTP status and a sentence."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


class Server(ThreadingHTTPServer):
    """Serves `session`, which is set later. Raises `UsageError` if it cannot listen on the address."""

    daemon_threads = True
    session: Session

    def __init__(self, host: str, port: int) -> None:
        try:
            self.address_family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            super().__init__((str(address[0]), port), Handler)
        except OSError as error:
            why = f"cannot listen on {host}:{port} ({error.strerror})"
            raise UsageError(f"{why}; choose another --port (0: any free one), or another --host") from error
        self.is_any = address[0] in ("0.0.0.0", "::")
        name = socket.gethostname() if self.is_any else host
        self.names = {name.lower(), "localhost"}
        self.url = f"http://{f'[{name}]' if ':' in name else name}:{self.server_port}/"

    def knows(self, host: str) -> bool:
        """Whether a Host header names this server. Another site's name may resolve to it (DNS rebinding)."""
        with suppress(ValueError):
            parts = urlsplit(f"//{host}")
            is_known = parts.hostname in self.names
            if self.is_any and not is_known:
                is_known = bool(ipaddress.ip_address(parts.hostname or ""))  # not a site's name
            return is_known and (parts.port or 80) == self.server_port
        return False

    def handle_error(self, *_: Any) -> None:  # type: ignore[override]
        """Log errors in one line, except of browsers that disconnected."""
        error = sys.exc_info()[1]
        if not isinstance(error, ConnectionError | TimeoutError):
            log.warning("%s: %s", type(error).__name__, error)


class Handler(BaseHTTPRequestHandler):
    """One request: refused, or answered by a method of the session."""

    server: Server  # type: ignore[assignment]
    server_version, sys_version, timeout = "nextblock", "", 60

    def do_GET(self) -> None:
        """Answer any request."""
        status, content = 200, b""
        try:
            content = self._answer()
        except RefusedError as error:
            status, content = error.status, {"error": str(error)}
        except Exception as error:
            # Our messages are meant for the user. Other errors may reveal paths, so the page only gets their
            # type, and the terminal the rest.
            is_ours = type(error).__module__.startswith("nextblock.")
            status = 400 if is_ours and isinstance(error, ValueError) else 500
            kind = type(error).__name__
            content = {"error": str(error) if is_ours else f"This failed ({kind}); the terminal says more."}
            if not is_ours:
                log.warning("%s: %s: %s", self.path.partition("?")[0], kind, error)
        kind = "application/json"
        if isinstance(content, bytes):
            kind = "image/png" if content.startswith(b"\x89PNG") else "text/html; charset=utf-8"
        else:
            content = json.dumps(finite(content), allow_nan=False).encode()
        self.send_response(status)
        for name, value in {**HEADERS, "Content-Type": kind, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    do_POST = do_GET  # noqa: N815 - http.server's name

    def _answer(self) -> Any:
        address, session = urlsplit(self.path), self.server.session
        is_page = self.command == "GET" and address.path in ("/", "/run")
        self._check_sender(is_page=is_page)
        body = self._body(is_upload=address.path == "/api/upload")
        if is_page and address.path == "/":
            page = (resources.files("nextblock.serve") / "page.html").read_text(encoding="utf-8")
            return page.replace("{{style}}", asset("style.html")).encode()
        if is_page:
            return run_page(session.summary(), script=FOLLOW).encode()
        name = address.path.removeprefix("/api/")
        if name not in CALLS[self.command] or name == address.path:
            raise RefusedError(404, "There is nothing here.")
        call, arguments = getattr(session, name), dict[str, Any](parse_qsl(address.query))
        try:
            if self.command == "POST":
                arguments = {"content": body} if name == "upload" else json.loads(body or b"{}")
            signature(call).bind(**arguments)
        except (ValueError, TypeError):
            raise RefusedError(400, f"{name} needs {', '.join(signature(call).parameters)}.") from None
        with nullcontext() if name in UNLOCKED else session.lock:
            return call(**arguments)

    def _check_sender(self, *, is_page: bool) -> None:
        """Refuse requests from other sites, which could read the user's images; they may link to the page."""
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        site = self.headers.get("Sec-Fetch-Site", "none")
        is_foreign = origin not in (None, f"http://{host}") or site not in ("none", "same-origin")
        if not self.server.knows(host) or (is_foreign and not (is_page and origin is None)):
            raise RefusedError(403, f"Refused. Open {self.server.url} at exactly this address and port.")

    def _body(self, *, is_upload: bool) -> bytes:
        length, most = self.headers.get("Content-Length", "0"), MAX_JSON_BYTES
        if is_upload:
            most = int(self.server.session.settings.max_upload_mb * 1e6)
        if not length.isdecimal() or "Transfer-Encoding" in self.headers:
            raise RefusedError(411, "The request does not state its length.")
        if int(length) > most:
            # Read on, within limits: a browser that is cut off while it sends does not see the answer.
            left = min(int(length), 8 * most)
            while left > 0 and (part := self.rfile.read(min(CHUNK_BYTES, left))):
                left -= len(part)
            what = f"{most / 1e6:g} MB, the limit; start nextblock serve with a larger --max_upload_mb"
            raise RefusedError(413, f"This is larger than {what}.")
        return self.rfile.read(int(length))

    def log_message(self, *_: Any) -> None:  # type: ignore[override]
        """Log no single requests."""


def serve(settings: ServeSettings, announce: Callable[[str], None]) -> None:
    """Serve the page until Ctrl-C, which raises KeyboardInterrupt; `announce` gets its address.

    Each request has its own thread; the main thread encodes the images of --data.
    """
    with Server(settings.host, settings.port) as server:  # first, because loading a model takes longer
        server.session = session = Session(settings)
        threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True).start()
        announce(server.url)
        if settings.open:
            webbrowser.open(server.url)
        try:
            session.index()
            threading.Event().wait()
        except KeyboardInterrupt:
            # No thread may be inside torch when the interpreter exits, so keep the lock.
            if not session.lock.acquire(timeout=1):
                os._exit(130)
            raise
        finally:
            server.shutdown()
