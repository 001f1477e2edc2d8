"""Does federating pay? The comparison that table, charts and headline share."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedtune.records import ClientSummary, Summary

# How the references are called where people read; the linear head is the cheapest of all models.
REFERENCE_WORDS = {
    "base": "base model (before any training)",
    "emulator": "federated adapter, in the emulator",
    "emulator-base": "emulator (before any training)",
    "centralized": "centralized (all data in one place)",
    "local-only": "alone (mean over all)",
    "linear-head": "linear head (frozen base)",
}


@dataclass(frozen=True)
class Pair:
    """One client's accuracy with what it has of the federation, and with what it trained alone."""

    client: ClientSummary
    federated: float | None
    alone: float | None

    @property
    def gain(self) -> float | None:
        """Federated minus alone; None where either is unknown."""
        return _difference(self.federated, self.alone)

    @property
    def plain_gain(self) -> float | None:
        """The same on all cases alike, not on the client's own mix."""
        return _difference(_known(self.client.reached), _known(self.client.local_accuracy))


@dataclass(frozen=True)
class Comparison:
    """All clients, measured the same way."""

    pairs: tuple[Pair, ...]
    own_mix: bool  # on the client's own case mix; otherwise on the plain accuracies
    personal: bool = False  # with each client's private part of the adapter

    @property
    def gains(self) -> tuple[float, ...]:
        """The known gains."""
        return tuple(pair.gain for pair in self.pairs if pair.gain is not None)

    @property
    def plain_gains(self) -> tuple[float, ...]:
        """The known gains on all cases alike."""
        return tuple(pair.plain_gain for pair in self.pairs if pair.plain_gain is not None)


def compare(summary: Summary) -> Comparison:
    """Each client's federated and lonely accuracy; federated with its private part, if any.

    One measure for all clients, own case mix where it exists: gains on different test
    distributions could not be set side by side.
    """
    own_mix = any(client.own_mix_accuracy is not None for client in summary.per_client)
    return Comparison(
        tuple(
            Pair(client, _known(client.reached_own_mix), _known(client.local_own_mix_accuracy))
            if own_mix
            else Pair(client, _known(client.reached), _known(client.local_accuracy))
            for client in summary.per_client
        ),
        own_mix,
        any(client.personal_accuracy is not None for client in summary.per_client),
    )


def largest(clients: tuple[ClientSummary, ...], limit: int) -> tuple[ClientSummary, ...]:
    """At most `limit` clients, those with most examples, in their given order."""
    if len(clients) <= limit:
        return clients
    ranked = sorted(range(len(clients)), key=lambda index: -clients[index].examples)
    return tuple(clients[index] for index in sorted(ranked[:limit]))


def _difference(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


def _known(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
