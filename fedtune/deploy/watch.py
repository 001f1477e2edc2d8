"""What watches a server's rounds: the connections, `/health` and `/metrics`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING

from fedtune.config import Config
from fedtune.deploy.keys import AUTHORITY, SERVER_CERTIFICATE, read_certificate
from fedtune.deploy.metrics import CONTENT_TYPE, Metrics
from fedtune.deploy.status import Status
from fedtune.deploy.status_server import Answer, StatusServer, health
from fedtune.deploy.superlink import SuperLinkProcess
from fedtune.report.progress import Progress
from fedtune.round.federation import epsilon_of_sums
from fedtune.round.journal import Journal

if TYPE_CHECKING:  # gRPC, which only a server of a base model needs
    from fedtune.split.server import SplitServer


class Connections:
    """Tells who is connected: the status at each look, the progress when it changes."""

    def __init__(self, clients: Iterable[str], progress: Progress, status: Status) -> None:
        self._clients, self._progress, self._status = sorted(clients), progress, status
        self._known: frozenset[str] | None = None

    def looked(self, names: frozenset[str]) -> None:
        """These clients are connected."""
        self._status.looked(names)
        if names != self._known:
            self._known = names
            absent = [name for name in self._clients if name not in names]
            self._progress.connected(absent, len(self._clients))


def make_status(config: Config, clients: Iterable[str], journal: Journal) -> Status:
    """The status of a run that begins, or goes on, with this journal."""
    records, patience = journal.records(), config.rounds.timeout
    return Status(
        list(clients),
        config.rounds.count,
        records,
        patience,
        partial(epsilon_of_sums, config, journal),
    )


@contextmanager
def watched(
    address: tuple[str, int] | None,
    keys: Path,
    status: Status,
    link: SuperLinkProcess,
    base: SplitServer | None,
) -> Iterator[list[str]]:
    """Answer `/health` and `/metrics` at `address`, if there is one; says so in words.

    `base` is the service of the base model, if this server hosts one.
    """
    if address is None:
        yield []
        return
    ends = {
        name: read_certificate(keys / name).not_valid_after_utc.timestamp()
        for name in (SERVER_CERTIFICATE, AUTHORITY)
    }
    metrics = Metrics(lambda: status.snapshot, ends, (lambda: base.status) if base else None)

    def answer_health() -> Answer:
        trouble = status.trouble()
        if not trouble and not link.answers():
            trouble = "Flower's SuperLink does not answer"
        return health(status.to_json(), trouble)

    routes = {
        "/health": answer_health,
        "/metrics": lambda: (HTTPStatus.OK, CONTENT_TYPE, metrics.text()),
    }
    with StatusServer(address, routes) as server:
        host = f"[{address[0]}]" if ":" in address[0] else address[0]
        yield [f"/health and /metrics at http://{host}:{server.port}"]
