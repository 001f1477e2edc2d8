"""What a server writes into its audit log."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Self

from fedtune.audit.entry import Event, Head, Value
from fedtune.audit.log import AuditLog
from fedtune.deploy.audit_details import agreement, reason_of
from fedtune.errors import FedtuneError
from fedtune.flower.observer import Observer
from fedtune.records import RoundRecord, Summary
from fedtune.round.federation import epsilon_of_sums
from fedtune.round.masked import Authority
from fedtune.simulation.folder import RunFolder
from fedtune.simulation.job import Job
from fedtune.types import sha256_hex

AUDIT = "audit.jsonl"


class ServerAudit(Observer):
    """Writes down who came and what became of each round, before the next thing is done."""

    def __init__(self, authority: Authority, job: Job, run: RunFolder) -> None:
        """Say that the server has started, and what it goes on with.

        Raises `AuditLogError` and, as all that is told here, `AuditWriteError`.
        """
        self._job, self._run = job, run
        self._log = AuditLog(run.path / AUDIT, authority.identity)
        written = self._last_round_written()
        records = run.journal.records()
        self._log.append(
            Event.SERVER_STARTED,
            {
                **agreement(job.config, job.base_digest, job.manifest, authority.roster),
                "run": run.journal.identity()["run_id"],
                "sites": tuple(client.name for client in job.clients),
                "resumed-after-round": len(records),
            },
        )
        for record in records[written:]:
            # The server ended between the round and its entry, or the log was removed.
            self._committed(record, {"from-journal": True})

    @property
    def head(self) -> Head:
        """The last entry."""
        return self._log.head

    def ended(self, summary: Summary) -> None:
        """The run is over, whether or not it reached its last round."""
        details = {"status": summary.status, "rounds": summary.rounds}
        self._log.append(Event.RUN_ENDED, details)

    def client_joined(self, name: str) -> None:
        """See `Observer`."""
        self._log.append(Event.CLIENT_JOINED, {"client": name})

    def client_left(self, name: str) -> None:
        """See `Observer`."""
        self._log.append(Event.CLIENT_LEFT, {"client": name})

    def client_refused(self, node: int, reason: str) -> None:
        """See `Observer`."""
        details: dict[str, Value] = {"node": node, "reason": reason_of(reason)}
        self._log.append(Event.CLIENT_REFUSED, details)

    def round_lost(self, reason: str) -> None:
        """See `Observer`."""
        number, _ = self._run.journal.last_state()
        self._log.append(Event.ROUND_LOST, {"round": number + 1, "reason": reason_of(reason)})

    def round_committed(self, record: RoundRecord) -> None:
        """See `Observer`."""
        self._committed(record, {})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            # Closed: what ended the server is that the log cannot be written.
            if kind is not None and not self._log.closed:
                told = isinstance(error, FedtuneError)
                reason = reason_of(error) if told else kind.__name__
                self._log.append(Event.SERVER_STOPPED, {"reason": reason})
        finally:
            self._log.close()

    def _committed(self, record: RoundRecord, more: Mapping[str, Value]) -> None:
        number, state = self._run.journal.last_state()
        details: dict[str, Value] = {
            "round": record.round,
            "counted": record.clients,
            "failed": tuple(
                f"{name}: {reason_of(reason)}" for name, reason in record.failed.items()
            ),
            **more,
        }
        if record.round == number:  # of earlier rounds the journal keeps no adapter
            adapter = self._job.adapter_at(state.adapter)
            details["adapter"] = sha256_hex(adapter.astype("<f4").tobytes())
            config = self._job.config
            if (spent := epsilon_of_sums(config, self._run.journal)) is not None:
                details |= {"epsilon": spent, "delta": config.privacy.delta}
        self._log.append(Event.ROUND_COMMITTED, details)

    def _last_round_written(self) -> int:
        for entry in self._log.entries_backwards():
            number = entry.details.get("round")
            if entry.event is Event.ROUND_COMMITTED and isinstance(number, int):
                return number
        return 0
