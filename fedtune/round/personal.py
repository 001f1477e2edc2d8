"""A client's private part of the adapter: put before training, taken out after it.

Both parts are trained together, the private one from where the client's last round left it: FedSim
(Pillutla et al. 2022, arXiv 2204.03809, algorithm 2 with simultaneous updates).
"""

from __future__ import annotations

from dataclasses import replace

from fedtune.adapter.parts import Parts
from fedtune.errors import ClientFailure
from fedtune.round.site import PrivatePart, SiteStore
from fedtune.train.trainer import LocalResult
from fedtune.types import Float32Vector


class Personal:
    """The private part of one client, in its site's memory."""

    def __init__(self, parts: Parts, store: SiteStore, client: str) -> None:
        self.parts = parts
        self._store, self._client = store, client

    def before(self, run_id: str, round_number: int) -> Float32Vector:
        """What the client has when a round begins, float32 `[parts.private_size]`.

        Raises `ProtocolViolation` for a round of which it is not known any more.
        """
        found = self._store.private_part(self._client, run_id, round_number)
        if found is None:
            return self.parts.private_of(self.parts.start)
        if len(found) != self.parts.private_size:
            raise ClientFailure(
                f"the private part kept here has {len(found)} values, this adapter's "
                f"{self.parts.private_size}"
            )
        return found

    def divide(
        self, result: LocalResult, run_id: str, round_number: int, before: Float32Vector
    ) -> tuple[LocalResult, PrivatePart]:
        """What may travel of the training of a round that began with `before`, and what may not."""
        parts = self.parts
        shared = replace(
            result,
            adapter=parts.shared_of(result.adapter),
            fisher=None if result.fisher is None else parts.shared_of(result.fisher),
        )
        after = parts.private_of(result.adapter)
        return shared, PrivatePart(run_id, round_number, before, after)
