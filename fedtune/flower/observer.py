"""Those who watch a run: progress on a terminal, the audit log, the server's status."""

from __future__ import annotations

from collections.abc import Sequence

from fedtune.records import RoundRecord


class Observer:
    """Told what happens in a run; overrides what it wants to know."""

    def client_joined(self, name: str) -> None:
        """A client has connected and agrees with the server on what is trained."""

    def client_left(self, name: str) -> None:
        """A client is not connected any more."""

    def client_refused(self, node: int, reason: str) -> None:
        """A node could not be taken in."""

    def waiting(self, found: int, wanted: int) -> None:
        """A round waits: `found` of `wanted` clients are there."""

    def round_running(self, round_number: int, waiting_for: Sequence[str], total: int) -> None:
        """Of `total` clients that train, these have neither answered nor failed."""

    def round_lost(self, reason: str) -> None:
        """The round came to nothing; the next one begins from the same adapter."""

    def round_committed(self, record: RoundRecord) -> None:
        """The round is in the journal."""
