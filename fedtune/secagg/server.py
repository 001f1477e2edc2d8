"""The server's side of a session: it collects, and in the end knows the sum and no more.

A client that does not answer, or whose answer is not acceptable, is not counted: whoever drops
out before its masked values arrive is left out, whoever drops out later is in the sum. A client
that seals something else than shares stops the session, for then the others refuse to go on.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from fedtune.errors import MalformedMessage, ProtocolViolation, TooFewClients, UnmaskingFailed
from fedtune.secagg import shamir
from fedtune.secagg.client import pairwise_seed
from fedtune.secagg.keys import SERVER, Roster, RoundKey
from fedtune.secagg.masks import add_mask, subtract_mask
from fedtune.secagg.messages import (
    Advert,
    Delivery,
    MaskedValues,
    Reveal,
    SealedShares,
    Survivors,
    Unmasking,
    cohort_digest,
    commitment_to,
    sharers_signed,
    survivors_signed,
)
from fedtune.secagg.ring import Ring, RingVector
from fedtune.secagg.session import Terms


class Phase(IntEnum):
    """What the server is collecting."""

    ADVERTS = 0
    SHARES = 1
    VALUES = 2
    SIGNATURES = 3
    REVEALS = 4
    DONE = 5


@dataclass(frozen=True)
class Sealed:
    """A session in which nothing more is added: all it takes to open the sum, also after a restart.

    `total` is the sum of the masked vectors, unsigned words `[slots]`.
    """

    session: bytes
    adverts: tuple[Advert, ...]
    sharers: tuple[int, ...]
    survivors: Survivors
    ring: Ring
    total: RingVector = field(repr=False)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the clients whose values are in the sum."""
        return tuple(self.adverts[place].client for place in self.survivors.places)


class Aggregation:
    """One session at the server.

    `receive_…` takes one client's answer and raises `WireError` if it is not acceptable;
    `close_…` ends the phase, gives what clients get next, and raises `TooFewClients` below
    what the terms ask for.
    """

    def __init__(self, session: bytes, roster: Roster, terms: Terms, slots: int) -> None:
        """For vectors of `slots` integers; `session` is the session's digest."""
        self._session = session
        self._roster = roster
        self._terms = terms
        self._slots = slots
        self._phase = Phase.ADVERTS
        self._answers: dict[str, Advert] = {}
        self._sealed_shares: dict[int, SealedShares] = {}
        self._vouchers: dict[int, bytes] = {}
        self._signatures: dict[int, bytes] = {}
        self._reveals: dict[int, Reveal] = {}

    @classmethod
    def resume(cls, sealed: Sealed, roster: Roster, terms: Terms) -> Aggregation:
        """Go on where the values had all arrived, after a restart of the server."""
        aggregation = cls(sealed.session, roster, terms, len(sealed.total))
        aggregation._phase = Phase.SIGNATURES
        aggregation._settle(sealed.adverts)
        aggregation._sealed = sealed
        return aggregation

    def receive_advert(self, client: str, advert: Advert) -> None:
        """A client's keys."""
        self._require(Phase.ADVERTS)
        advert.check()
        if advert.client != client or client == SERVER:
            raise ProtocolViolation(f"{client} sent the keys of {advert.client!r}")
        if client in self._answers:
            raise ProtocolViolation(f"{client} has sent its keys already")
        self._roster.verify(client, advert.signed(self._session), advert.signature)
        taken = {key for a in self._answers.values() for key in (a.sealing_key, a.masking_key)}
        own = {advert.sealing_key, advert.masking_key}
        if len(own) != 2 or own & taken:
            raise ProtocolViolation(f"{client} sent a key that is there already")
        probe = RoundKey.generate()
        for key in own:  # of a key that contributes nothing, its owner alone is to blame
            probe.secret_with(key, "probe", self._session)
        self._answers[client] = advert

    def close_adverts(self) -> tuple[Advert, ...]:
        """The cohort, in the order of names: the same for every client."""
        self._require(Phase.ADVERTS)
        self._settle(tuple(self._answers[name] for name in sorted(self._answers)))
        self._check_enough(len(self._adverts), "sent keys", self._terms.minimum)
        self._terms.check(len(self._adverts))
        self._phase = Phase.SHARES
        return self._adverts

    def receive_shares(self, client: str, shares: SealedShares) -> None:
        """A client's sealed shares; the server cannot open them."""
        self._require(Phase.SHARES)
        place = self._place(client)
        shares.check(len(self._adverts))
        if place in self._sealed_shares:
            raise ProtocolViolation(f"{client} has shared already")
        self._sealed_shares[place] = shares

    def close_shares(self) -> dict[str, Delivery]:
        """For each client that has shared: what the others sealed for it."""
        self._require(Phase.SHARES)
        self._sharers = tuple(sorted(self._sealed_shares))
        self._check_enough(len(self._sharers), "shared keys")
        # The ring was settled by the cohort, before anyone dropped out: clients know its size.
        self._phase = Phase.VALUES
        return {self._adverts[place].client: self._delivery(place) for place in self._sharers}

    def expect(self, ring: Ring) -> int:
        """Settle the ring of the cohort; the length of a packed vector in bytes."""
        self._require(Phase.VALUES)
        if self._vouchers:
            raise ProtocolViolation("values have arrived already")
        self._ring = ring
        self._total: RingVector = np.zeros(self._slots, ring.dtype)
        return ring.packed_bytes(self._slots)

    @property
    def clients(self) -> int:
        """Size of the cohort."""
        return len(self._adverts)

    def receive_values(self, client: str, masked: MaskedValues) -> None:
        """A client's masked vector; it is added at once and not kept."""
        self._require(Phase.VALUES)
        place = self._place(client)
        if place not in self._sharers:
            raise ProtocolViolation(f"{client} has not shared its keys")
        if place in self._vouchers:
            raise ProtocolViolation(f"{client} is in the sum already")
        message = sharers_signed(self._binding, self._sharers)
        self._roster.verify(client, message, masked.voucher)
        self._total += self._ring.unpack(masked.packed, self._slots)
        self._vouchers[place] = masked.voucher

    def close_values(self) -> Sealed:
        """End the adding. From here on the survivor set cannot change."""
        self._require(Phase.VALUES)
        places = tuple(sorted(self._vouchers))
        self._check_enough(len(places), "sent values")
        survivors = Survivors(places, tuple(self._vouchers[place] for place in places))
        total = self._ring.reduce(self._total)
        self._sealed = Sealed(
            self._session, self._adverts, self._sharers, survivors, self._ring, total
        )
        self._phase = Phase.SIGNATURES
        return self._sealed

    def receive_signature(self, client: str, signature: bytes) -> None:
        """A survivor's signature on the survivor set."""
        self._require(Phase.SIGNATURES)
        place = self._survivor(client)
        if place in self._signatures:
            raise ProtocolViolation(f"{client} has signed already")
        sealed = self._sealed
        message = survivors_signed(self._binding, sealed.sharers, sealed.survivors.places)
        self._roster.verify(client, message, signature)
        self._signatures[place] = signature

    def close_signatures(self) -> Unmasking:
        """The signatures, for every survivor that gave one."""
        self._require(Phase.SIGNATURES)
        self._check_enough(len(self._signatures), "signed the survivor set")
        signers = tuple(sorted(self._signatures))
        self._phase = Phase.REVEALS
        return Unmasking(signers, tuple(self._signatures[place] for place in signers))

    def receive_reveal(self, client: str, reveal: Reveal) -> None:
        """A survivor's shares."""
        self._require(Phase.REVEALS)
        place = self._survivor(client)
        if place in self._reveals:
            raise ProtocolViolation(f"{client} has revealed already")
        sealed = self._sealed
        survivors = len(sealed.survivors.places)
        reveal.check(survivors, len(sealed.sharers) - survivors)
        if not all(shamir.is_share(s) for s in (*reveal.self_masks, *reveal.masking_keys)):
            raise MalformedMessage(f"{client} revealed something that is not a share")
        self._reveals[place] = reveal

    def close_reveals(self) -> NDArray[np.int64]:
        """The sum of the survivors' values, signed, int64 `[slots]`.

        Raises `TooFewClients` below the threshold and `UnmaskingFailed` if more than one client
        revealed wrong shares.
        """
        self._require(Phase.REVEALS)
        threshold = self._terms.threshold_of(self.clients)
        self._check_enough(len(self._reveals), "revealed", threshold)
        seeds, keys = self._reconstruct(threshold)
        sealed = self._sealed
        total = sealed.total.copy()
        for seed in seeds.values():
            subtract_mask(total, seed)
        graph = self._terms.graph_of(self.clients)
        for place, key in keys.items():
            for other in graph.neighbours(place):
                if other in seeds:
                    # What the survivor did to its vector, the other way round.
                    undo = subtract_mask if other < place else add_mask
                    undo(total, pairwise_seed(key, self._adverts, self._binding, place, other))
        self._phase = Phase.DONE
        return sealed.ring.lift(sealed.ring.reduce(total))

    def _settle(self, adverts: tuple[Advert, ...]) -> None:
        self._adverts = adverts
        self._binding = cohort_digest(self._session, adverts)

    def _require(self, phase: Phase) -> None:
        if self._phase is not phase:
            raise ProtocolViolation(
                f"a message of the phase {phase.name.lower()} in {self._phase.name.lower()}"
            )

    def _place(self, client: str) -> int:
        for place, advert in enumerate(self._adverts):
            if advert.client == client:
                return place
        raise ProtocolViolation(f"{client} is not in this session's cohort")

    def _survivor(self, client: str) -> int:
        place = self._place(client)
        if place not in self._sealed.survivors.places:
            raise ProtocolViolation(f"{client} is not among the survivors")
        return place

    def _check_enough(self, found: int, what: str, needed: int | None = None) -> None:
        if needed is None:
            needed = self._terms.fewest_survivors(len(self._adverts))
        if found < needed:
            raise TooFewClients(f"{found} clients {what}, secure aggregation needs {needed}")

    def _delivery(self, receiver: int) -> Delivery:
        sealed = []
        for sender in self._sharers:
            if sender != receiver:
                column = receiver - (receiver > sender)  # a sender seals nothing for itself
                sealed.append(self._sealed_shares[sender].sealed[column])
        return Delivery(self._sharers, tuple(sealed))

    def _reconstruct(self, threshold: int) -> tuple[dict[int, bytes], dict[int, RoundKey]]:
        """Self-mask seeds of the survivors and masking keys of the dropped, by place.

        Each is checked against what its owner advertised. If shares of the first `threshold`
        clients do not fit, each of these is left out in turn, so one liar stops nothing.
        """
        revealed = sorted(self._reveals)
        wrong: set[str] = set()
        for left_out in (None, *revealed[:threshold]):
            chosen = [place for place in revealed if place != left_out][:threshold]
            if len(chosen) == threshold:
                found = self._open(chosen)
                if not isinstance(found, str):
                    return found
                wrong.add(found)
        # Whoever it is time and again has shared something else than it committed to.
        whose = wrong.pop() if len(wrong) == 1 else "several clients"
        raise UnmaskingFailed(
            f"the shares of the secrets of {whose}, which {len(revealed)} clients revealed, do not "
            "give back what was committed to"
        )

    def _open(self, chosen: Iterable[int]) -> tuple[dict[int, bytes], dict[int, RoundKey]] | str:
        """The secrets that shares of `chosen` give, or the first client whose do not fit."""
        at_zero = shamir.weights([place + 1 for place in chosen])
        sealed = self._sealed
        survivors = sealed.survivors.places
        dropped = [place for place in sealed.sharers if place not in survivors]
        seeds: dict[int, bytes] = {}
        keys: dict[int, RoundKey] = {}
        for index, place in enumerate(survivors):
            shares = {p: self._reveals[p - 1].self_masks[index] for p in at_zero}
            seed = shamir.combine(shares, at_zero)
            if seed is None or commitment_to(seed) != self._adverts[place].commitment:
                return self._adverts[place].client
            seeds[place] = seed
        for index, place in enumerate(dropped):
            shares = {p: self._reveals[p - 1].masking_keys[index] for p in at_zero}
            secret = shamir.combine(shares, at_zero)
            if secret is None or RoundKey(secret).public_key != self._adverts[place].masking_key:
                return self._adverts[place].client
            keys[place] = RoundKey(secret)
        return seeds, keys
