"""A small HTTP server beside the rounds: `GET /health` and `GET /metrics`.

Whoever reaches it can read names of sites, so it belongs on the loopback, or behind something
that asks for a password. It takes no input but a path, and at most a few requests at a time.
"""

from __future__ import annotations

import io
import json
import logging
import socket
import threading
import time
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from fedtune.errors import ConfigError

LARGEST_REQUEST = 8 << 10  # bytes of a request's head; nobody needs a body
REQUEST_SECONDS = 5.0  # until all of it must have come
MOST_REQUESTS = 8  # at a time
Answer = tuple[HTTPStatus, str, bytes]  # status, content type, content
Routes = dict[str, Callable[[], Answer]]
logger = logging.getLogger(__name__)


class StatusServer:
    """Answers at `address` (host and port) until the block is left."""

    def __init__(self, address: tuple[str, int], routes: Routes) -> None:
        """Listen; raises `ConfigError` if that is not possible there."""
        host, port = address
        try:
            self._server = _Server(address, routes)
        except (OSError, OverflowError, UnicodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise ConfigError(
                f"server.status: cannot listen at {host}:{port}: {reason}; name another address in "
                'server.toml, or status = "" for none'
            ) from error
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._serve, name="status", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _serve(self) -> None:
        try:
            self._server.serve_forever(poll_interval=0.1)
        except Exception as error:
            logger.error("/health and /metrics answer no more (%s); the run goes on", error)


def health(status: dict[str, Any], trouble: str) -> Answer:
    """The answer to `/health`; without `trouble` all is well."""
    said = {"status": "failing", "reason": trouble} if trouble else {"status": "ok"}
    code = HTTPStatus.SERVICE_UNAVAILABLE if trouble else HTTPStatus.OK
    text = json.dumps({**said, **status}, ensure_ascii=False, indent=2) + "\n"
    return code, "application/json", text.encode()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 32

    def __init__(self, address: tuple[str, int], routes: Routes) -> None:
        self.routes = routes
        self._free = threading.Semaphore(MOST_REQUESTS)
        [(self.address_family, *_), *_] = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        # As `TCPServer` does; `HTTPServer` would ask the name service who this is.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        logger.warning("a request for /health or /metrics was not answered", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    server_version, sys_version = "fedtune", ""

    def setup(self) -> None:
        super().setup()
        # All of the head before any of it is read: its size and its time are bounded here.
        self.rfile = io.BytesIO(_head(self.connection))
        self.connection.settimeout(REQUEST_SECONDS)  # for the answer, if it is not taken

    def __getattr__(self, name: str) -> Callable[[], None]:
        if name.startswith("do_"):
            return self._refuse
        raise AttributeError(name)

    def do_GET(self) -> None:  # the name that the standard library looks for
        route = self.server.routes.get(self.path.partition("?")[0])
        if route is None:
            self._say(HTTPStatus.NOT_FOUND, "text/plain", b"here are /health and /metrics\n")
        else:
            self._say(*route())

    def log_message(self, format: str, *args: Any) -> None:
        logger.debug(format, *args)

    def _refuse(self) -> None:
        self._say(HTTPStatus.METHOD_NOT_ALLOWED, "text/plain", b"only GET\n")

    def _say(self, code: HTTPStatus, kind: str, content: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        if code == HTTPStatus.METHOD_NOT_ALLOWED:
            self.send_header("Allow", "GET")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _head(connection: socket.socket) -> bytes:
    """What comes until the empty line; nothing if it is too long or too slow."""
    deadline, found = time.monotonic() + REQUEST_SECONDS, b""
    while b"\r\n\r\n" not in found:
        if len(found) > LARGEST_REQUEST or (left := deadline - time.monotonic()) <= 0:
            return b""
        connection.settimeout(left)
        try:
            piece = connection.recv(LARGEST_REQUEST)
        except OSError:
            return b""
        if not piece:
            return b""
        found += piece
    return found
