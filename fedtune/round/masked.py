"""The server's half of a masked round: five exchanges, and at their end the sum."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256

import numpy as np
from safetensors.numpy import load, save

from fedtune.aggregate import Rule
from fedtune.config import Config
from fedtune.errors import (
    ConfigError,
    MalformedMessage,
    RoundLost,
    TooFewClients,
    UnmaskingFailed,
    WireError,
)
from fedtune.round.server import Exchange, GlobalState, Member, next_state, reasons
from fedtune.round.terms import make_quantizer, make_ring, make_terms
from fedtune.secagg.keys import Identity, Roster
from fedtune.secagg.messages import Survivors
from fedtune.secagg.ring import Ring
from fedtune.secagg.saved import dump_adverts, load_adverts
from fedtune.secagg.server import Aggregation, Sealed
from fedtune.secagg.session import Session, Terms
from fedtune.types import Float32Vector, RoundContext
from fedtune.update.quantize import QuantizedSum, Quantizer
from fedtune.wire import aggregation as codec
from fedtune.wire.envelope import Kind, read_envelope, seal_envelope

# By stage: what the server sends and what it takes for an answer.
_STAGES = {
    "advertise": (Kind.INVITE, Kind.ADVERT),
    "share": (Kind.COHORT, Kind.SEALED_SHARES),
    "train": (Kind.TRAIN_REQUEST, Kind.UPDATE),
    "sign": (Kind.SURVIVORS, Kind.SIGNATURE),
    "reveal": (Kind.UNMASKING, Kind.REVEAL),
}


@dataclass(frozen=True)
class Authority:
    """The server's key, and the roster that it shares with its clients."""

    identity: Identity
    roster: Roster


@dataclass
class MaskedRound:
    """See `server.ServerRound`.

    `size` is how many values a client sends. `ask` makes durable that clients are going to be asked
    for them, `seal` what it takes to open the sum. In a round that is `repeated`, clients
    may have sent values before.
    """

    context: RoundContext
    cohort: Sequence[Member]
    config: Config
    size: int
    attempt: int
    authority: Authority
    ask: Callable[[], None]
    seal: Callable[[bytes], None]
    repeated: bool = False
    failed: dict[str, str] = field(default_factory=dict)
    bytes_up: int = 0
    bytes_down: int = 0
    train_seconds: float = 0.0
    _pending: list[str] = field(default_factory=list)
    _stage: str = ""
    _counted: tuple[str, ...] = ()
    _result: QuantizedSum | None = None

    def begin(self, adapter: Float32Vector) -> Exchange:
        """See `server.ServerRound.begin`."""
        self._adapter = adapter.astype("<f4").tobytes()
        session = Session(
            self.context,
            self.attempt,
            sha256(self._adapter).hexdigest(),
            self.authority.roster.digest,
        )
        self._session = session.digest
        roster = self.authority.roster
        slots = self._quantizer(len(self.cohort)).slots
        self._aggregation = Aggregation(session.digest, roster, self._terms, slots)
        everyone = [member.name for member in self.cohort]
        return self._ask("advertise", codec.encode_invite(session), everyone)

    def resume(self, sealed: bytes) -> Exchange:
        """Go on, after a restart, with a round whose values had all arrived."""
        tensors = load(sealed)
        notes = json.loads(tensors["notes"].tobytes())
        total = Sealed(
            bytes.fromhex(notes["session"]),
            load_adverts(notes["adverts"]),
            tuple(notes["sharers"]),
            Survivors(
                tuple(notes["survivors"]), tuple(bytes.fromhex(v) for v in notes["vouchers"])
            ),
            Ring(notes["ring"]),
            tensors["total"],
        )
        self.failed = notes["failed"]
        self.bytes_up, self.bytes_down = notes["bytes_up"], notes["bytes_down"]
        self.train_seconds = notes["train_seconds"]
        self._session = total.session
        self._aggregation = Aggregation.resume(total, self.authority.roster, self._terms)
        return self._ask_survivors(total)

    def proceed(self) -> Exchange | None:
        """See `server.ServerRound.proceed`."""
        if self._pending:
            raise ValueError(f"clients are still pending: {', '.join(self._pending)}")
        try:
            return self._next()
        except TooFewClients as error:
            why = f"round {self.context.round}: {error} ({reasons(self.failed)})"
            if self.repeated and self._stage in ("advertise", "share", "train"):
                # Those who sent values insist on the cohort of then, and it is not there.
                raise self._lost(why) from error
            raise TooFewClients(why) from error
        except UnmaskingFailed as error:
            # Whoever signed the survivors takes no other attempt at the round.
            raise self._lost(f"round {self.context.round}: {error}") from error

    def receive(self, client: str, payload: bytes) -> None:
        """See `server.ServerRound.receive`."""
        if client not in self._pending:
            raise MalformedMessage(f"{client} has answered already, or was not asked")
        clients, kind = len(self.cohort), _STAGES[self._stage][1]
        limit = codec.list_limit(clients)
        if self._stage == "train":
            limit += self._packed_bytes
        envelope = read_envelope(payload, limit)
        body = envelope.open(self.authority.roster, client, self._session, (kind,))
        aggregation = self._aggregation
        if kind is Kind.ADVERT:
            aggregation.receive_advert(client, codec.decode_advert(body))
        elif kind is Kind.SEALED_SHARES:
            aggregation.receive_shares(client, codec.decode_sealed_shares(body, clients))
        elif kind is Kind.UPDATE:
            values, seconds = codec.decode_update(body, self._packed_bytes)
            aggregation.receive_values(client, values)
            self.train_seconds += seconds
        elif kind is Kind.SIGNATURE:
            aggregation.receive_signature(client, codec.decode_signature(body))
        else:
            aggregation.receive_reveal(client, codec.decode_reveal(body, clients))
        self._pending.remove(client)
        self.bytes_up += len(payload)

    def fail(self, client: str, reason: str) -> None:
        """See `server.ServerRound.fail`. After its values have arrived a client stays counted."""
        self._pending.remove(client)
        at = "" if self._stage == "train" else f"asked to {self._stage}: "
        self.failed[client] = f"{at}{reason}"

    @property
    def pending(self) -> list[str]:
        """See `server.ServerRound.pending`."""
        return list(self._pending)

    @property
    def counted(self) -> tuple[str, ...]:
        """See `server.ServerRound.counted`."""
        return self._counted

    @property
    def train_loss(self) -> float | None:
        """See `server.ServerRound.train_loss`."""
        return self._result.loss if self._result else None

    def close(self, rule: Rule, state: GlobalState, minimum: int) -> GlobalState:
        """See `server.ServerRound.close`; the minimum is among the terms already."""
        if self._result is None:
            raise ValueError("the sum is not open yet")
        found = self._result
        return next_state(rule, state, found.total, found.weight, self.context.round)

    def _next(self) -> Exchange | None:
        aggregation = self._aggregation
        if self._stage == "advertise":
            try:
                adverts = aggregation.close_adverts()
            except ConfigError as error:
                # The configuration suits the cohort that was invited, not what came of it.
                raise TooFewClients(str(error)) from error
            names = [advert.client for advert in adverts]
            return self._ask("share", codec.encode_cohort(adverts), names)
        if self._stage == "share":
            deliveries = aggregation.close_shares()
            quantizer = self._quantizer(aggregation.clients)
            self._packed_bytes = aggregation.expect(make_ring(quantizer, aggregation.clients))
            requests = {
                name: self._seal(
                    Kind.TRAIN_REQUEST, codec.encode_train_request(self._adapter, delivery)
                )
                for name, delivery in deliveries.items()
            }
            self.ask()
            return self._open("train", requests)
        if self._stage == "train":
            sealed = aggregation.close_values()
            self.seal(self._notes(sealed))
            return self._ask_survivors(sealed)
        if self._stage == "sign":
            unmasking = aggregation.close_signatures()
            names = [self._names[place] for place in unmasking.signers]
            return self._ask("reveal", codec.encode_unmasking(unmasking), names)
        total = aggregation.close_reveals()
        quantizer = self._quantizer(aggregation.clients)
        try:
            self._result = quantizer.decode(total, len(self._counted))
        except WireError as error:
            raise UnmaskingFailed(f"the sum is not one that clients can give: {error}") from error
        return None

    def _lost(self, why: str) -> RoundLost:
        self._counted, self._result = (), None
        return RoundLost(why)

    @property
    def _terms(self) -> Terms:
        return make_terms(self.config, self.authority.roster.clients)

    def _quantizer(self, cohort: int) -> Quantizer:
        return make_quantizer(self.config, self.size, cohort, self._terms)

    def _ask_survivors(self, sealed: Sealed) -> Exchange:
        self._counted = tuple(sorted(sealed.names))
        self._names = [advert.client for advert in sealed.adverts]
        body = codec.encode_survivors(sealed.survivors)
        return self._ask("sign", body, list(sealed.names))

    def _ask(self, stage: str, body: bytes, names: Sequence[str]) -> Exchange:
        return self._open(stage, dict.fromkeys(names, self._seal(_STAGES[stage][0], body)))

    def _open(self, stage: str, requests: dict[str, bytes]) -> Exchange:
        self._stage, self._pending = stage, list(requests)
        return Exchange(stage, requests)

    def _seal(self, kind: Kind, body: bytes) -> bytes:
        return seal_envelope(self.authority.identity, kind, self._session, body)

    def _notes(self, sealed: Sealed) -> bytes:
        notes = {
            "session": sealed.session.hex(),
            "adverts": dump_adverts(sealed.adverts),
            "sharers": sealed.sharers,
            "survivors": sealed.survivors.places,
            "vouchers": [voucher.hex() for voucher in sealed.survivors.vouchers],
            "ring": sealed.ring.bits,
            "failed": self.failed,
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
            "train_seconds": self.train_seconds,
        }
        text = np.frombuffer(json.dumps(notes).encode(), np.uint8)
        return save({"total": sealed.total, "notes": text})
