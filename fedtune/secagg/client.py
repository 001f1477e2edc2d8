"""A client's side of a session: one state after the other, each from a message.

Every method returns a new state; the caller makes it durable before it sends the answer, so
that a client that is killed and started again says nothing twice. What a client refuses here
it refuses whatever the server says; see docs/threat-model.md.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from fedtune.errors import ConfigError, MalformedMessage, ProtocolViolation
from fedtune.secagg import shamir
from fedtune.secagg.keys import SERVER, Identity, Roster, RoundKey, seal, unseal
from fedtune.secagg.masks import SEED_BYTES, add_mask, subtract_mask
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
from fedtune.secagg.ring import Ring
from fedtune.secagg.session import Session, Terms
from fedtune.secagg.transcript import transcript

PAIRWISE = "pairwise mask"
SPENT_KEY = RoundKey(b"")
SHARES = "sealed shares"


class Stage(StrEnum):
    """What a client has done last in a session."""

    ADVERTISED = "advertised"
    SHARED = "shared"
    ACCEPTED = "accepted"  # others' shares are in; it may train
    MASKED = "masked"
    SIGNED = "signed"
    REVEALED = "revealed"


@dataclass(frozen=True)
class ClientSession:
    """One client in one session. Secrets are in no repr; tuples are in the order of places.

    A secret is gone from the state as soon as the protocol has no more use for it: own keys and
    the self-mask when the values are masked, the others' shares when they are revealed. Who
    copies a site's disk later, and has recorded the traffic, opens nothing with it.
    """

    stage: Stage
    name: str
    session: bytes
    sealing: RoundKey = field(repr=False)
    masking: RoundKey = field(repr=False)
    self_mask: bytes = field(repr=False)
    adverts: tuple[Advert, ...] = field(default=(), repr=False)
    own_shares: bytes = field(default=b"", repr=False)
    sharers: tuple[int, ...] = ()
    shares: tuple[bytes, ...] = field(default=(), repr=False)  # of each sharer: key, then self-mask
    survivors: tuple[int, ...] = ()
    revealed: Reveal | None = None

    @classmethod
    def begin(cls, identity: Identity, session: Session) -> tuple[ClientSession, Advert]:
        """Fresh keys for `session`, and the advert that makes them known."""
        state = cls(
            Stage.ADVERTISED,
            identity.name,
            session.digest,
            RoundKey.generate(),
            RoundKey.generate(),
            secrets.token_bytes(SEED_BYTES),
        )
        bare = Advert(
            identity.name,
            state.sealing.public_key,
            state.masking.public_key,
            commitment_to(state.self_mask),
        )
        advert = replace(bare, signature=identity.sign(bare.signed(session.digest)))
        return replace(state, adverts=(advert,)), advert

    def share(
        self, adverts: tuple[Advert, ...], roster: Roster, terms: Terms
    ) -> tuple[ClientSession, SealedShares]:
        """Seal a share of both own secrets for each other client of the cohort.

        Raises `WireError` unless `adverts` is a cohort that the terms protect, with this client
        in it, each advert signed for this session by who it names.
        """
        self._require(Stage.ADVERTISED)
        self._check_cohort(adverts, roster, terms)
        state = replace(self, stage=Stage.SHARED, adverts=adverts)
        clients = len(adverts)
        threshold = terms.threshold_of(clients)
        key_shares = shamir.split(self.masking.private_key, threshold, clients)
        mask_shares = shamir.split(self.self_mask, threshold, clients)
        pairs = [key + mask for key, mask in zip(key_shares, mask_shares, strict=True)]
        sealed = []
        for place, advert in enumerate(adverts):
            if place != state.place:
                key, associated = state._seal_of(self.name, advert.client, advert.sealing_key)
                sealed.append(seal(key, pairs[place], associated))
        return replace(state, own_shares=pairs[state.place]), SealedShares(tuple(sealed))

    def accept(self, delivery: Delivery, terms: Terms) -> ClientSession:
        """Open the others' shares; raises `WireError` unless all are genuine and enough."""
        self._require(Stage.SHARED)
        sharers = self._check_places(delivery.sharers, "sharers")
        others = [place for place in sharers if place != self.place]
        if len(others) != len(sharers) - 1 or len(delivery.sealed) != len(others):
            raise ProtocolViolation("the sharers must be this client and those whose shares came")
        self._check_enough(len(sharers), terms, "have shared keys")
        opened = {self.place: self.own_shares}
        for place, item in zip(others, delivery.sealed, strict=True):
            sender = self.adverts[place]
            key, associated = self._seal_of(sender.client, self.name, sender.sealing_key)
            pair = unseal(key, item, associated)
            halves = (pair[: shamir.SHARE_BYTES], pair[shamir.SHARE_BYTES :])
            if not all(shamir.is_share(half) for half in halves):
                raise MalformedMessage(f"{sender.client} sealed something that is not a share")
            opened[place] = pair
        shares = tuple(opened[place] for place in sharers)
        return replace(self, stage=Stage.ACCEPTED, sharers=sharers, shares=shares)

    def mask(
        self, values: NDArray[np.int64], ring: Ring, identity: Identity, terms: Terms
    ) -> tuple[ClientSession, MaskedValues]:
        """`values` (signed, int64 `[slots]`) under all masks, packed into `ring.bits` bits each."""
        self._require(Stage.ACCEPTED)
        vector = ring.lower(values)
        add_mask(vector, self.self_mask)
        for place in terms.graph_of(len(self.adverts)).neighbours(self.place):
            if place in self.sharers:
                seed = pairwise_seed(self.masking, self.adverts, self.binding, self.place, place)
                (add_mask if self.place < place else subtract_mask)(vector, seed)
        voucher = identity.sign(sharers_signed(self.binding, self.sharers))
        masked = MaskedValues(ring.pack(ring.reduce(vector)), voucher)
        state = replace(
            self,
            stage=Stage.MASKED,
            sealing=SPENT_KEY,
            masking=SPENT_KEY,
            self_mask=b"",
            own_shares=b"",
        )
        return state, masked

    def sign(
        self, told: Survivors, identity: Identity, roster: Roster, terms: Terms
    ) -> tuple[ClientSession, bytes]:
        """Sign the set whose updates are to be added up; the same set gets the same signature.

        Raises `ProtocolViolation` for a second set, a set that this client is not in, one below
        the threshold, or one that too few colluders could tear apart; `BadSignature` unless
        every survivor vouches for the very sharers that this client masked with.
        """
        if self.stage in {Stage.SIGNED, Stage.REVEALED}:
            if told.places != self.survivors:
                raise ProtocolViolation("this client has signed another survivor set already")
            return self, self._sign(identity)
        self._require(Stage.MASKED)
        survivors = self._check_places(told.places, "survivors")
        if len(told.vouchers) != len(survivors):
            raise MalformedMessage("every survivor must vouch for the sharers")
        if not set(survivors) <= set(self.sharers):
            raise ProtocolViolation("a survivor is not among those who shared keys")
        if self.place not in survivors:
            raise ProtocolViolation("this client is asked to open a sum that it is not in")
        self._check_enough(len(survivors), terms, "survive")
        clients = len(self.adverts)
        withstood = terms.graph_of(clients).colluders_withstood(survivors)
        if withstood < terms.colluders_of(clients):
            raise ProtocolViolation(
                f"the survivors' masks withstand {withstood} colluders, "
                f"the terms ask for {terms.colluders_of(clients)}"
            )
        message = sharers_signed(self.binding, self.sharers)
        for place, voucher in zip(survivors, told.vouchers, strict=True):
            roster.verify(self.adverts[place].client, message, voucher)
        state = replace(self, stage=Stage.SIGNED, survivors=survivors)
        return state, state._sign(identity)

    def reveal(
        self, unmasking: Unmasking, roster: Roster, terms: Terms
    ) -> tuple[ClientSession, Reveal]:
        """One kind of share for each sharer: the self-mask's if it survived, else the key's.

        The answer depends on the signed survivor set alone, so being asked again tells nothing
        new. Raises `WireError` unless enough survivors signed the very set that this one did.
        """
        if self.stage not in {Stage.SIGNED, Stage.REVEALED}:
            raise ProtocolViolation(f"a request to reveal when {self.stage}")
        signers = self._check_places(unmasking.signers, "signers")
        if len(unmasking.signatures) != len(signers):
            raise MalformedMessage("as many signatures as signers are needed")
        if not set(signers) <= set(self.survivors):
            raise ProtocolViolation("a signer is not among the survivors")
        self._check_enough(len(signers), terms, "signed the survivor set")
        message = survivors_signed(self.binding, self.sharers, self.survivors)
        for place, signature in zip(signers, unmasking.signatures, strict=True):
            roster.verify(self.adverts[place].client, message, signature)
        if self.revealed is not None:
            return self, self.revealed
        self_masks, masking_keys = [], []
        for place, pair in zip(self.sharers, self.shares, strict=True):
            if place in self.survivors:
                self_masks.append(pair[shamir.SHARE_BYTES :])
            else:
                masking_keys.append(pair[: shamir.SHARE_BYTES])
        answer = Reveal(tuple(self_masks), tuple(masking_keys))
        return replace(self, stage=Stage.REVEALED, shares=(), revealed=answer), answer

    @cached_property
    def place(self) -> int:
        """This client's place in the cohort."""
        return [advert.client for advert in self.adverts].index(self.name)

    @cached_property
    def binding(self) -> bytes:
        """The digest of session and cohort."""
        return cohort_digest(self.session, self.adverts)

    def _require(self, stage: Stage) -> None:
        if self.stage is not stage:
            raise ProtocolViolation(f"this client has {self.stage} in this session already")

    def _check_cohort(self, adverts: tuple[Advert, ...], roster: Roster, terms: Terms) -> None:
        names = [advert.client for advert in adverts]
        if names != sorted(set(names)):
            raise ProtocolViolation("the cohort is not in the order of its names, each once")
        if SERVER in names:
            raise ProtocolViolation("the server is no client")
        if self.adverts[0] not in adverts:
            raise ProtocolViolation("this client's own keys are not in the cohort as it sent them")
        keys = [key for advert in adverts for key in (advert.sealing_key, advert.masking_key)]
        if len(set(keys)) != len(keys):
            raise ProtocolViolation("two keys in the cohort are the same")
        try:
            terms.check(len(adverts))
        except ConfigError as error:
            raise ProtocolViolation(str(error)) from error
        for advert in adverts:
            advert.check()
            roster.verify(advert.client, advert.signed(self.session), advert.signature)

    def _check_places(self, places: Iterable[int], what: str) -> tuple[int, ...]:
        found = tuple(places)
        inside = all(0 <= place < len(self.adverts) for place in found)
        if found != tuple(sorted(set(found))) or not inside:
            raise MalformedMessage(f"the {what} are not places of the cohort in ascending order")
        return found

    def _check_enough(self, found: int, terms: Terms, what: str) -> None:
        needed = terms.fewest_survivors(len(self.adverts))
        if found < needed:
            raise ProtocolViolation(f"{found} clients {what}, at least {needed} must")

    def _seal_of(self, sender: str, receiver: str, other_key: bytes) -> tuple[bytes, bytes]:
        """Key and associated data of the one message from `sender` to `receiver`."""
        binding = self.binding
        key = self.sealing.secret_with(other_key, SHARES, binding, sender, receiver)
        return key, transcript(SHARES, [binding, sender.encode(), receiver.encode()])

    def _sign(self, identity: Identity) -> bytes:
        return identity.sign(survivors_signed(self.binding, self.sharers, self.survivors))


def pairwise_seed(
    key: RoundKey, adverts: tuple[Advert, ...], binding: bytes, own: int, other: int
) -> bytes:
    """The seed that two clients of a cohort share; `key` is the masking key of `own`."""
    low, high = sorted((own, other))
    names = (adverts[low].client, adverts[high].client)
    return key.secret_with(adverts[other].masking_key, PAIRWISE, binding, *names)
