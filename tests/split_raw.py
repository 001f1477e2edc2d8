"""A client of the base model's service that says whatever it likes, and hears what comes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any

import grpc
import numpy as np
from split_service import HOST, Parties, some_examples

from fedtune.secagg.keys import Identity, Roster
from fedtune.split.address import SERVICE
from fedtune.split.introduction import introduce
from fedtune.train.activations import encode
from fedtune.wire.split import (
    Challenge,
    FromClient,
    FromServer,
    Kind,
    Request,
    Terms,
    Welcome,
    decode_from_server,
    encode_from_client,
)

WAIT = 30.0


class Ended(Exception):
    """The stream has ended, with this status."""

    def __init__(self, error: Any) -> None:
        super().__init__(f"{error.code().name}: {error.details()}")
        self.code: grpc.StatusCode = error.code()


class RawClient:
    """One stream."""

    def __init__(self, port: int, authority: bytes | None = None, **options: int) -> None:
        chosen = [(f"grpc.{name}", value) for name, value in options.items()]
        chosen += [("grpc.use_local_subchannel_pool", 1), ("grpc.max_send_message_length", -1)]
        self.channel = (
            grpc.insecure_channel(f"{HOST}:{port}", chosen)
            if authority is None
            else grpc.secure_channel(
                f"{HOST}:{port}", grpc.ssl_channel_credentials(authority), chosen
            )
        )
        self._sent: SimpleQueue[bytes | None] = SimpleQueue()
        self._call: Any = None

    def open(self, **more: Any) -> Challenge:
        """Open the stream; what comes first."""
        exchange: Any = self.channel.stream_stream(f"/{SERVICE}/Exchange")
        self._call = exchange(iter(self._sent.get, None), **more)
        challenge = self.hear()
        assert isinstance(challenge, Challenge)
        return challenge

    def introduced(
        self, identity: Identity, roster: Roster, terms: Terms, **more: Any
    ) -> RawClient:
        """Open the stream and get in."""
        self.say(introduce(identity, roster, terms, self.open(**more)))
        assert isinstance(self.hear(), Welcome)
        return self

    def say(self, said: FromClient | bytes) -> None:
        """Say it, or these bytes."""
        self._sent.put(said if isinstance(said, bytes) else encode_from_client(said))

    def done(self) -> None:
        """There is nothing more to say."""
        self._sent.put(None)

    def hear(self) -> FromServer:
        """What comes next; raises `Ended`."""
        timer = threading.Timer(WAIT, self._call.cancel)
        timer.start()
        try:
            return decode_from_server(next(self._call), 1 << 30)
        except grpc.RpcError as error:
            raise Ended(error) from error
        finally:
            timer.cancel()

    def end(self) -> Ended:
        """How the stream ends, whatever comes before."""
        try:
            while True:
                self.hear()
        except Ended as ended:
            return ended

    def close(self) -> None:
        """Break it off."""
        if self._call is not None:
            self._call.cancel()
        self._sent.put(None)
        self.channel.close()


@contextmanager
def raw_client(port: int, **options: Any) -> Iterator[RawClient]:
    """A client that is closed at the end."""
    client = RawClient(port, **options)
    try:
        yield client
    finally:
        client.close()


@contextmanager
def member(port: int, parties: Parties, name: str, terms: Terms, **options: Any) -> Iterator[Any]:
    """One that is let in."""
    with raw_client(port, **options) as client:
        yield client.introduced(parties.identities[name], parties.roster, terms)


def a_request(terms: Terms, number: int = 1, kind: Kind = Kind.OUTPUTS, count: int = 3) -> Request:
    """A request that there is nothing wrong with."""
    embeddings, lengths, labels = some_examples(number, count, terms.width)
    counted = np.arange(embeddings.shape[1]) < lengths[:, None]
    labels = labels if kind == Kind.DIFFERENTIATE else labels[:0]
    data = encode(embeddings[counted], terms.encoding)  # type: ignore[arg-type]
    return Request(number, kind, 30_000, lengths, labels, data)
