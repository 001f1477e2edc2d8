"""Flower's SuperLink as a process of its own beside the server.

Sites reach its Fleet API over TLS and nothing else of it; the server reaches its Runtime API on
the loopback, with a token. It ends with the server: its standard input is then closed.
"""

from __future__ import annotations

import asyncio
import base64
import fcntl
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import IO, Any, Self

import httpx

from fedtune.deploy.base_fetch import PREFIX
from fedtune.deploy.base_offer import BaseOffer
from fedtune.errors import ConfigError, JobError
from fedtune.flower.internals import is_harmless, take_over_log
from fedtune.flower.runtime import ASGI, RunTicket, Scope, SuperLink

START_SECONDS = 60.0
ALIVE_SECONDS = 5.0
END_SECONDS = 2.0
LAST_SECONDS, LAST_POLL = 30.0, 0.05  # that one of a killed server may take to end
LARGEST_LOG = 1 << 20  # bytes; there is one older file beside it


@dataclass(frozen=True)
class Doors:
    """Where a SuperLink listens, and what it shows there."""

    host: str
    port: int
    certificate: Path
    key: Path
    database: Path | None  # None: messages are held in memory
    log: Path
    base: Path | None = None  # folder of a base model that sites may fetch, and its digest
    base_digest: str = ""


class SuperLinkProcess:
    """A running SuperLink; leave the block to end it."""

    def __init__(self, doors: Doors, clients: Mapping[str, bytes]) -> None:
        """Start it; raises `ConfigError` if the port is taken or the certificate is unusable.

        That of an earlier server of this run, which was killed, has ended before.
        """
        settings = {
            "host": doors.host,
            "port": doors.port,
            "certificate": str(doors.certificate),
            "key": str(doors.key),
            "database": str(doors.database) if doors.database else "",
            "base": str(doors.base) if doors.base else "",
            "base_digest": doors.base_digest,
            "log": str(doors.log),
            "clients": {name: base64.b64encode(key).decode() for name, key in clients.items()},
        }
        with doors.log.open("ab") as log, _after_the_last(doors.log.with_suffix(".lock")) as lock:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "fedtune.deploy.superlink"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                pass_fds=[lock.fileno()],
            )
        self._tell(settings)
        answer = self._first_line()
        if "error" in answer:
            self.close()
            raise ConfigError(answer["error"])
        self.ticket = RunTicket(answer["run_id"], answer["token"])
        self.address = f"127.0.0.1:{answer['runtime_port']}"
        self.port: int = answer["port"]
        self._log = doors.log

    def check(self) -> None:
        """Raise `JobError` if it has ended."""
        with suppress(subprocess.TimeoutExpired):
            # Its connections are cut a little before its end can be seen.
            self._process.wait(END_SECONDS)
            raise JobError(f"Flower's SuperLink has ended; see {self._log}")

    def answers(self) -> bool:
        """Whether it answers at all, within two seconds."""
        try:
            httpx.get(f"http://{self.address}/", timeout=2.0, trust_env=False)
        except httpx.TransportError:
            return False
        return True

    def close(self) -> None:
        """End it."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def _tell(self, settings: dict[str, Any]) -> None:
        assert self._process.stdin is not None  # noqa: S101  # by Popen's arguments
        self._process.stdin.write(json.dumps(settings).encode() + b"\n")
        self._process.stdin.flush()

    def _first_line(self) -> dict[str, Any]:
        assert self._process.stdout is not None  # noqa: S101  # by Popen's arguments
        timer = threading.Timer(START_SECONDS, self._process.kill)
        timer.start()
        try:
            line = self._process.stdout.readline()
        finally:  # by a signal, too: the interpreter waits for its threads
            timer.cancel()
        if not line:
            return {"error": "Flower's SuperLink does not start; see its log"}
        found: dict[str, Any] = json.loads(line)
        return found


@contextmanager
def _after_the_last(path: Path) -> Iterator[IO[bytes]]:
    """A lock that a process holds for as long as it lives, if it inherits it; waits for its turn.

    A SuperLink ends with its server, but not at once: while it starts it keeps the port.
    """
    deadline = time.monotonic() + LAST_SECONDS
    with path.open("ab") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise ConfigError(
                        f"{path}: Flower's SuperLink of an earlier server still runs; end it"
                    ) from error
                time.sleep(LAST_POLL)
            else:
                break
        yield lock


def main() -> None:
    """What the process does: read the settings, listen, and end with the standard input."""
    # It ends with its standard input. A signal to all processes of a terminal or of a service is
    # for its parent, which may still need it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    settings = json.loads(sys.stdin.readline())
    _log_to(Path(settings["log"]))
    # What is printed by others must not be taken for the answer.
    answer, sys.stdout = sys.stdout, sys.stderr
    try:
        asyncio.run(_serve(settings, answer))
    except (OSError, ValueError) as error:
        reason = f"cannot listen at {settings['host']}:{settings['port']}: {error}"
        print(json.dumps({"error": reason}), file=answer, flush=True)
        sys.exit(2)


def _log_to(path: Path) -> None:
    """Whoever reaches the public port can cause warnings: they must not fill the disk."""
    handler = RotatingFileHandler(path, maxBytes=LARGEST_LOG, backupCount=1, encoding="utf-8")
    handler.addFilter(lambda record: not is_harmless(record))
    form = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    logging.basicConfig(level=logging.WARNING, format=form, handlers=[handler])


async def _serve(settings: dict[str, Any], answer: Any) -> None:
    import ssl

    import uvicorn

    take_over_log()
    outside = _listen(settings["host"], settings["port"])
    inside = _listen("127.0.0.1", 0)
    link = SuperLink(Path(settings["database"]) if settings["database"] else None)
    link.register({n: base64.b64decode(key) for n, key in settings["clients"].items()})
    ticket = link.begin_run()
    common: dict[str, Any] = {"lifespan": "off", "log_config": None, "access_log": False}
    for_sites = uvicorn.Config(
        _with_base(link, settings),
        ssl_certfile=settings["certificate"],
        ssl_keyfile=settings["key"],
        server_header=False,
        **common,
    )
    for_sites.load()
    if for_sites.ssl is not None:
        for_sites.ssl.minimum_version = ssl.TLSVersion.TLSv1_3
    servers = [uvicorn.Server(for_sites), uvicorn.Server(uvicorn.Config(link.for_server, **common))]
    for server in servers:
        # The process ends with its standard input, not by signals that its parent gets too.
        server.capture_signals = _no_signals  # type: ignore[method-assign]
    said = {
        "run_id": ticket.run_id,
        "token": ticket.token,
        "port": outside.getsockname()[1],
        "runtime_port": inside.getsockname()[1],
    }
    print(json.dumps(said), file=answer, flush=True)
    tasks = [
        asyncio.create_task(server.serve(sockets=[door]))
        for server, door in zip(servers, (outside, inside), strict=True)
    ]
    ended = asyncio.create_task(asyncio.to_thread(sys.stdin.read))
    while not ended.done():
        await asyncio.to_thread(link.alive)
        await asyncio.wait(
            [ended, *tasks], timeout=ALIVE_SECONDS, return_when=asyncio.FIRST_COMPLETED
        )
        if any(task.done() for task in tasks):
            break
    for server in servers:
        server.should_exit = True
    await asyncio.wait(tasks, timeout=1)
    # Not by the interpreter's own end, which waits for threads; there is nothing to be saved.
    os._exit(0)


def _with_base(link: SuperLink, settings: dict[str, Any]) -> ASGI:
    """What sites can reach: Flower's door, and the base model's files."""
    if not settings["base"]:
        return link.for_sites
    offer = BaseOffer(Path(settings["base"]), settings["base_digest"], link.knows)

    async def choose(scope: Scope, receive: Any, send: Any) -> None:
        http = scope["type"] == "http"
        door = offer.app if http and scope["path"].startswith(PREFIX) else link.for_sites
        await door(scope, receive, send)

    return choose


def _listen(host: str, port: int) -> socket.socket:
    [(family, kind, protocol, _, address), *_] = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP, flags=socket.AI_PASSIVE
    )
    # Named so, because asyncio switches Nagle's algorithm off only on sockets that say TCP; with
    # it, each answer would take 40 ms more.
    door = socket.socket(family, kind, protocol)
    door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        door.bind(address)
        door.listen(1024)
    except OSError:
        door.close()
        raise
    return door


def _no_signals() -> Any:
    from contextlib import nullcontext

    return nullcontext()


if __name__ == "__main__":
    main()
