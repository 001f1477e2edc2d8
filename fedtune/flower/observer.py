"""Those who watch a run: progress on a terminal, the audit log, the server's status."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from fedtune.records import RoundRecord

# How a client failed: it did not answer in time, was not connected, said that it failed, refused
# what it was asked, or answered something that cannot be accepted.
Failure = Literal["late", "disconnected", "failed", "refused", "invalid"]


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

    def round_running(
        self, round_number: int, stage: str, waiting_for: Sequence[str], total: int
    ) -> None:
        """Of `total` clients that were asked, these have neither answered nor failed.

        `stage` is that of an `Exchange`, or "evaluate". Nobody is asked where the server evaluates.
        """

    def client_failed(self, name: str, failure: Failure) -> None:
        """A client does not answer what it was asked in a round."""

    def round_lost(self, reason: str) -> None:
        """The round came to nothing; the next one begins from the same adapter."""

    def round_committed(self, record: RoundRecord) -> None:
        """The round is in the journal."""
