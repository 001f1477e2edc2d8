"""The base model for a client that holds none: a `RemoteBase` over gRPC.

What is asked depends on nothing that was asked before, so whatever goes wrong on the way, asking
again is safe: at worst the server computes something that nobody takes.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self, TypeVar, cast

import numpy as np

from fedtune.errors import BaseRefused, BaseUnreachable, MalformedMessage, TrainingError
from fedtune.secagg.keys import Identity, Roster
from fedtune.split.connection import Broken, Connection, check_address
from fedtune.train.activations import Encoding, OutputCoding, decode
from fedtune.train.channel import Channel, Int64Array, Meter
from fedtune.train.remote import Float32Array
from fedtune.wire.split import (
    Answer,
    Kind,
    Reason,
    Refusal,
    Request,
    Terms,
    Upstream,
)

NO_LABELS = np.zeros(0, np.int64)
_PASSING = {
    Reason.BUSY: "it has too much to do; let fewer clients train at a time, or raise its limits",
    Reason.LATE: "it did not come to it in time; let fewer clients train at a time",
    Reason.FORGOTTEN: "it did not keep the first step of a request for the second",
    Reason.STOPPING: "it is being stopped",
}
Found = TypeVar("Found")


@dataclass(frozen=True)
class Patience:
    """For how long a client tries, in seconds."""

    total: float = 300.0
    """For one request, with all that goes wrong on the way."""
    connect: float = 15.0
    """For each step of connecting."""
    first_pause: float = 0.05
    """Before the second try; each pause is twice as long as the one before, about."""
    longest_pause: float = 5.0


class GrpcBase(Channel):
    """A `RemoteBase` at `address`, which connects when it is used and again when need be.

    Its methods raise `BaseUnreachable` if `patience.total` was not enough, and `BaseRefused` if
    more would not help; both are `TrainingError`. It may be shared by threads, which take turns,
    but not by processes: use it only after they were forked.
    """

    def __init__(
        self,
        address: str,
        authority: bytes | None,
        identity: Identity,
        roster: Roster,
        terms: Terms,
        meter: Meter,
        patience: Patience = Patience(),  # frozen
    ) -> None:
        """`address` is HOST:PORT; `authority` the PEM certificate that vouches for the server.

        `identity` is this client's in `roster`, `terms` what the server must be working on.
        Without `authority` there is no TLS, on a loopback address. Raises `ConfigError` or
        `KeyFileError`.
        """
        check_address(address, authority)

        def connect(seconds: float) -> Connection:
            return Connection(address, authority, identity, roster, terms, seconds)

        self._network = _Network(address, connect, terms, patience)
        super().__init__(self._network, cast(Encoding, terms.encoding), meter, terms.rungs)

    def close(self) -> None:
        """End the connection; who waits for an answer is told so."""
        self._network.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()


class _Again(Exception):
    """Asking again may help."""


class _Network:
    """A `Carrier` that asks until it is answered or refused, or its patience ends."""

    def __init__(
        self,
        address: str,
        connect: Callable[[float], Connection],
        terms: Terms,
        patience: Patience,
    ) -> None:
        self._address, self._connect, self._terms = address, connect, terms
        self._outputs = OutputCoding(terms.rungs, cast(Encoding, terms.encoding))
        self._patience = patience
        self._turn = threading.Lock()
        self._connection: Connection | None = None
        self._number = 0
        self._closed = threading.Event()

    def differentiate(
        self, tokens: bytes, lengths: Int64Array, labels: Int64Array
    ) -> tuple[Float32Array, bytes]:
        """See `Carrier.differentiate`."""

        def attempt(deadline: float) -> tuple[Float32Array, bytes]:
            answer = self._ask(Kind.DIFFERENTIATE, tokens, lengths, labels, deadline)
            return self._losses(answer, len(lengths)), answer.gradient

        return self._persist(attempt)

    def outputs(self, tokens: bytes, lengths: Int64Array) -> bytes:
        """See `Carrier.outputs`."""
        return self._persist(lambda left: self._found(Kind.OUTPUTS, tokens, lengths, left))

    def activations(self, tokens: bytes, lengths: Int64Array) -> bytes:
        """See `Carrier.activations`."""
        return self._persist(lambda left: self._found(Kind.ACTIVATIONS, tokens, lengths, left))

    def pull_back(
        self, tokens: bytes, lengths: Int64Array, upstream: Callable[[bytes], bytes]
    ) -> tuple[bytes, bytes]:
        """See `Carrier.pull_back`."""

        def attempt(deadline: float) -> tuple[bytes, bytes]:
            outputs = self._found(Kind.OPEN, tokens, lengths, deadline)
            step = Upstream(self._number, _left(deadline), upstream(outputs))
            return outputs, self._answered(step, deadline).gradient

        return self._persist(attempt)

    def close(self) -> None:
        """See `GrpcBase.close`."""
        self._closed.set()
        connection = self._connection
        if connection is not None:
            connection.close()

    def _persist(self, attempt: Callable[[float], Found]) -> Found:
        patience = self._patience
        deadline = time.monotonic() + patience.total
        pause, why = patience.first_pause, "another thread keeps it busy"
        if not self._turn.acquire(timeout=patience.total):
            raise self._given_up(why)
        try:
            while not self._closed.is_set():
                try:
                    return attempt(deadline)
                except _Again as again:
                    why = str(again)
                # Not all clients at one moment, when a server is there again.
                jittered = pause * random.uniform(0.5, 1.5)  # noqa: S311
                if time.monotonic() + jittered >= deadline:
                    raise self._given_up(why)
                self._closed.wait(jittered)
                pause = min(2 * pause, patience.longest_pause)
            raise BaseUnreachable(f"the connection to the base model at {self._address} was closed")
        except BaseException:
            # What was asked and is not taken must not be taken for the answer to something else.
            self._drop()
            raise
        finally:
            if self._closed.is_set():  # meanwhile
                self._drop()
            self._turn.release()

    def _ask(
        self, kind: Kind, tokens: bytes, lengths: Int64Array, labels: Int64Array, deadline: float
    ) -> Answer:
        try:
            if self._connection is None:
                seconds = min(self._patience.connect, max(0.0, deadline - time.monotonic()))
                self._connection, self._number = self._connect(seconds), 0
        except Broken as error:
            raise _Again(str(error)) from error
        here = self._connection.description
        if len(lengths) > here.examples or lengths.max() > here.tokens:
            raise BaseRefused(
                f"{self._address}: a request of {len(lengths)} examples with up to "
                f"{lengths.max()} tokens, and the server takes {here.examples} with up to "
                f"{here.tokens}; lower train.batch-size or base.max-length, or raise its limits"
            )
        self._number += 1
        return self._answered(
            Request(self._number, kind, _left(deadline), lengths, labels, tokens), deadline
        )

    def _answered(self, said: Request | Upstream, deadline: float) -> Answer:
        assert self._connection is not None  # noqa: S101  # `_ask` has connected
        try:
            found = self._connection.ask(said, max(0.0, deadline - time.monotonic()))
        except Broken as error:
            self._drop()
            raise _Again(str(error)) from error
        if found.number != said.number:
            raise self._strange(f"request {said.number}, and an answer to {found.number}")
        if isinstance(found, Answer):
            return found
        raise self._refused(found)

    def _refused(self, refusal: Refusal) -> Exception:
        if refusal.reason.passes:
            return _Again(_PASSING[refusal.reason])
        if refusal.reason == Reason.NOT_FINITE:
            return TrainingError(
                "the loss or its gradient is not finite: training has diverged; lower train.lr"
            )
        return BaseRefused(f"{self._address}: the server failed at a request; see its log")

    def _found(self, kind: Kind, tokens: bytes, lengths: Int64Array, deadline: float) -> bytes:
        """The outputs that a request is answered with, of the agreed kind and size."""
        answer = self._ask(kind, tokens, lengths, NO_LABELS, deadline)
        try:
            self._outputs.decode(answer.values, len(lengths), self._terms.output_values)
        except MalformedMessage as error:
            raise self._strange(str(error)) from error
        return answer.values

    def _losses(self, answer: Answer, examples: int) -> Float32Array:
        try:
            return decode(answer.values, 1, examples, "float32").reshape(examples)
        except MalformedMessage as error:
            raise self._strange(str(error)) from error

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _strange(self, what: str) -> BaseRefused:
        return BaseRefused(
            f"{self._address}: the server's answers cannot be understood ({what}); install the "
            "same fedtune on both sides"
        )

    def _given_up(self, why: str) -> BaseUnreachable:
        return BaseUnreachable(
            f"the server of the base model at {self._address} has not answered within "
            f"{self._patience.total:g} s: {why or 'no reason known'}; is it running, and can this "
            "machine reach it?"
        )


def _left(deadline: float) -> int:
    """Milliseconds, as they are sent."""
    return max(0, min(2**32 - 1, round((deadline - time.monotonic()) * 1000)))
