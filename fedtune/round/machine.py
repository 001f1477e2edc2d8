"""What answers a server's requests at a client."""

from __future__ import annotations

from typing import Protocol


class Machine(Protocol):
    """What answers: a `ClientMachine`, here or in another process of the site."""

    def hello(self, payload: bytes) -> bytes: ...

    def converse(self, payload: bytes) -> bytes: ...

    def train(self, payload: bytes) -> bytes: ...

    def evaluate(self, payload: bytes) -> bytes: ...
