"""A federation whose server is the adversary: it sees every message and may write any."""

from __future__ import annotations

import base64
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from vectors import simple_secagg as simple

from fedtune.errors import TooFewClients, WireError
from fedtune.secagg.client import ClientSession
from fedtune.secagg.keys import SERVER, Identity, Roster
from fedtune.secagg.messages import (
    Advert,
    Delivery,
    MaskedValues,
    Reveal,
    SealedShares,
    Survivors,
    Unmasking,
)
from fedtune.secagg.ring import Ring
from fedtune.secagg.server import Aggregation
from fedtune.secagg.session import Session, Terms
from fedtune.types import RoundContext

DIGESTS = ("11" * 32, "22" * 32, "33" * 32)  # base model, manifest, configuration
ADAPTER = "44" * 32
RING = Ring(20)
SPARSE = Terms(neighbours=6, colluding=0.1)


def session_of(roster: Roster, **changes: Any) -> Session:
    """The session that the honest clients believe in, but for `changes`."""
    names = ("run_id", "round", "base_digest", "manifest_digest", "config_digest")
    context = RoundContext("run", 1, *DIGESTS)
    context = replace(context, **{name: changes.pop(name) for name in names if name in changes})
    return replace(Session(context, 1, ADAPTER, roster.digest), **changes)


class Federation:
    """Clients c00, c01 … at places 0, 1 …; all that any of them has ever known or sent."""

    def __init__(self, clients: int = 7, terms: Terms | None = None, slots: int = 6) -> None:
        self.terms = terms or Terms()
        self.names = [f"c{place:02d}" for place in range(clients)]
        self.identities = {name: Identity.generate(name) for name in (SERVER, *self.names)}
        self.roster = Roster({name: key.public_key for name, key in self.identities.items()})
        self.session = session_of(self.roster)
        rng = np.random.default_rng(clients)
        self.values = {name: rng.integers(-999, 1000, slots) for name in self.names}
        self.ring = RING
        self.state: dict[str, ClientSession] = {}
        self.history: list[ClientSession] = []
        self.advert: dict[str, Advert] = {}
        self.shares: dict[str, SealedShares] = {}
        self.masked: dict[str, MaskedValues] = {}
        self.signature: dict[str, bytes] = {}
        self.revealed: dict[str, Reveal] = {}

    @property
    def cohort(self) -> tuple[Advert, ...]:
        """All adverts in their order."""
        return tuple(self.advert[name] for name in sorted(self.advert))

    @property
    def everyone(self) -> tuple[int, ...]:
        """Places of the whole cohort."""
        return tuple(range(len(self.names)))

    def keep(self, name: str, state: ClientSession) -> ClientSession:
        """Make `state` the one that the client goes on with."""
        self.history.append(state)
        self.state[name] = state
        return state

    # What one honest client does; the arguments are what the server tells it.

    def begin(self, name: str, session: Session | None = None) -> Advert:
        state, advert = ClientSession.begin(self.identities[name], session or self.session)
        self.keep(name, state)
        self.advert[name] = advert
        return advert

    def share(self, name: str, adverts: tuple[Advert, ...] | None = None) -> SealedShares:
        told = self.cohort if adverts is None else adverts
        state, shares = self.state[name].share(told, self.roster, self.terms)
        self.keep(name, state)
        self.shares[name] = shares
        return shares

    def accept(self, name: str, delivery: Delivery | None = None) -> None:
        told = delivery or self.delivery(name)
        self.keep(name, self.state[name].accept(told, self.terms))

    def mask(self, name: str) -> MaskedValues:
        identity = self.identities[name]
        state, masked = self.state[name].mask(self.values[name], self.ring, identity, self.terms)
        self.keep(name, state)
        self.masked[name] = masked
        return masked

    def sign(self, name: str, survivors: Survivors | Iterable[int] | None = None) -> bytes:
        told = self.everyone if survivors is None else survivors
        if not isinstance(told, Survivors):
            told = self.survivors(told)
        state, signature = self.state[name].sign(
            told, self.identities[name], self.roster, self.terms
        )
        self.keep(name, state)
        self.signature[name] = signature
        return signature

    def reveal(self, name: str, unmasking: Unmasking | None = None) -> Reveal:
        told = unmasking or self.unmasking()
        state, reveal = self.state[name].reveal(told, self.roster, self.terms)
        self.keep(name, state)
        self.revealed[name] = reveal
        return reveal

    def secretive(self, name: str) -> ClientSession:
        """The client's state when it knew the most: a colluder forgets nothing."""
        return next(
            (s for s in reversed(self.history) if s.name == name and s.self_mask and s.shares),
            self.state[name],
        )

    # What the server makes of what it has.

    def sealed_for(self, receiver: str, sender: str) -> bytes:
        """What `sender` sealed for `receiver` in the cohort that it was told."""
        cohort = [advert.client for advert in self.state[sender].adverts]
        return self.shares[sender].sealed[
            [name for name in cohort if name != sender].index(receiver)
        ]

    def delivery(self, receiver: str, sharers: Iterable[int] | None = None) -> Delivery:
        """A genuine delivery from `sharers`."""
        places = self.everyone if sharers is None else tuple(sharers)
        others = [self.names[place] for place in places if self.names[place] != receiver]
        return Delivery(places, tuple(self.sealed_for(receiver, sender) for sender in others))

    def survivors(self, places: Iterable[int]) -> Survivors:
        """These survivors, each with what it signed of the sharers, if it ever did."""
        found = tuple(places)
        silent = MaskedValues(b"", bytes(64))
        names = [self.names[p] if 0 <= p < len(self.names) else "" for p in found]
        return Survivors(found, tuple(self.masked.get(name, silent).voucher for name in names))

    def unmasking(self, signers: Iterable[int] | None = None) -> Unmasking:
        """The signatures that `signers` have given."""
        places = self.everyone if signers is None else tuple(signers)
        return Unmasking(places, tuple(self.signature[self.names[place]] for place in places))

    def until(self, *steps: str, but: Sequence[str] = ()) -> Federation:
        """Everyone but `but` goes through `steps` in turn, undisturbed."""
        for step in steps:
            for name in self.names:
                if name not in but:
                    getattr(self, step)(name)
        return self

    def until_masked(self, but: Sequence[str] = ()) -> Federation:
        """Everyone has sent its vector; `but` have only shared keys."""
        return self.until("begin", "share").until("accept", "mask", but=but)

    # What the server, with or without some clients, can find out.

    def uncovered(self, victim: str, colluders: Sequence[str] = ()) -> list[int]:
        """The victim's vector less all masks that server and `colluders` can compute.

        These are the victim's values if they know all its masks, and noise otherwise.
        """
        cohort = self.state[victim].adverts
        place_of = {advert.client: place for place, advert in enumerate(cohort)}
        place = place_of[victim]
        seeds = self._opened(1, colluders, place_of)
        keys = self._opened(0, colluders, place_of)
        bits = self.ring.bits
        vector = simple.unpack(self.masked[victim].packed, len(self.values[victim]), bits)
        if victim in seeds:
            vector = simple.add(vector, simple.expand(seeds[victim], len(vector), bits), bits, -1)
        graph = self.terms.graph_of(len(cohort))
        for other in graph.neighbours(place):
            if other in self.state[victim].sharers:
                names = [cohort[p].client for p in sorted((place, other))]
                pair = (victim, cohort[other].client)
                known = next(((a, b) for a, b in (pair, pair[::-1]) if a in keys), None)
                if known:
                    public = self.advert[known[1]].masking_key
                    seed = simple.derived_secret(
                        keys[known[0]], public, "pairwise mask", self.state[victim].binding, names
                    )
                    mask = simple.expand(seed, len(vector), bits)
                    vector = simple.add(vector, mask, bits, -1 if place < other else 1)
        return simple.signed(vector, bits)

    def _opened(
        self, half: int, colluders: Sequence[str], place_of: Mapping[str, int]
    ) -> dict[str, bytes]:
        """Masking keys (half 0) or self-mask seeds (half 1) by client."""
        found: dict[str, dict[int, bytes]] = defaultdict(dict)
        for name, reveal in self.revealed.items():
            state = self.state[name]
            dropped = [p for p in state.sharers if p not in state.survivors]
            owners = state.survivors if half else dropped
            shares = reveal.self_masks if half else reveal.masking_keys
            for owner, share in zip(owners, shares, strict=True):
                found[self.names[owner]][place_of[name] + 1] = share
        secrets = {}
        for name in colluders:
            state = self.secretive(name)
            secrets[name] = state.self_mask if half else state.masking.private_key
            for owner, pair in zip(state.sharers, state.shares, strict=True):
                share = pair[33:] if half else pair[:33]
                found[self.names[owner]][place_of[name] + 1] = share
        threshold = self.terms.threshold_of(len(place_of))
        for owner, shares in found.items():
            if len(shares) >= threshold:
                secret = simple.combine(dict(sorted(shares.items())[:threshold]))
                assert secret < 2**256
                secrets[owner] = secret.to_bytes(32, "little")
        return secrets

    def assert_safe(self, victim: str, colluders: Sequence[str] = ()) -> None:
        """The victim has revealed nothing, and its values stay hidden."""
        assert self.state[victim].stage != "revealed"
        assert victim not in self.revealed
        if victim in self.masked:
            assert self.uncovered(victim, colluders) != self.values[victim].tolist()

    # What must never be seen.

    def secrets(self) -> set[bytes]:
        """Private keys, seeds and shares of every state that there has been."""
        found = {identity.private_key for identity in self.identities.values()}
        for state in self.history:
            own = {state.sealing.private_key, state.masking.private_key, state.self_mask}
            found |= own - {b""}
            for pair in (*state.shares, state.own_shares):
                found |= {pair, pair[:33], pair[33:]} if pair else set()
        return found

    def assert_no_secret_in(self, text: str) -> None:
        """None of the secrets is in `text` in any of the usual spellings."""
        lower = text.lower()
        for secret in self.secrets():
            assert secret.hex() not in lower
            assert base64.b64encode(secret).decode().rstrip("=") not in text
            assert base64.urlsafe_b64encode(secret).decode().rstrip("=") not in text
            assert repr(secret)[2:-1] not in text
            assert str(list(secret))[1:-1] not in text
            assert str(int.from_bytes(secret, "little")) not in text
            assert str(int.from_bytes(secret, "big")) not in text


def refused(
    federation: Federation,
    error: type[Exception],
    because: str,
    action: Callable[..., object],
    *arguments: object,
) -> None:
    """`action` raises exactly `error`, for this reason, and says no secret."""
    with pytest.raises(error, match=because) as caught:
        action(*arguments)
    assert type(caught.value) is error
    cause: BaseException | None = caught.value
    while cause:
        federation.assert_no_secret_in(f"{cause!r} {cause} {cause.args}")
        cause = cause.__cause__ or cause.__context__


STEPS = ("advert", "shares", "values", "signature", "reveal")


def aggregate(
    federation: Federation, ring: Ring, gone: Mapping[str, int], slots: int
) -> tuple[Aggregation, tuple[str, ...], np.ndarray | None]:
    """An honest session; client `name` is silent from step `gone[name]` of `STEPS` on.

    Gives the server, the names in the sum and the sum; None where too few clients were left.
    """

    def here(step: str) -> list[str]:
        limit = STEPS.index(step)
        return [n for n in federation.names if gone.get(n, len(STEPS)) > limit]

    federation.ring = ring
    server = Aggregation(federation.session.digest, federation.roster, federation.terms, slots)
    names: tuple[str, ...] = ()
    try:
        for name in here("advert"):
            server.receive_advert(name, federation.begin(name))
        cohort = server.close_adverts()
        for name in here("shares"):
            server.receive_shares(name, federation.share(name, cohort))
        deliveries = server.close_shares()
        server.expect(ring)
        for name in here("values"):
            federation.accept(name, deliveries[name])
            server.receive_values(name, federation.mask(name))
        sealed = server.close_values()
        names = sealed.names
        for name in here("signature"):
            # In a sparse graph a client refuses to sign what could be torn apart.
            try:
                signature = federation.sign(name, sealed.survivors)
            except WireError:
                continue
            server.receive_signature(name, signature)
        unmasking = server.close_signatures()
        for name in here("reveal"):
            server.receive_reveal(name, federation.reveal(name, unmasking))
        return server, names, server.close_reveals()
    except TooFewClients:
        return server, names, None
