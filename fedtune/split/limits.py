"""How much a server of a base model takes at a time, and for how long it waits."""

from __future__ import annotations

from dataclasses import dataclass, fields

from fedtune.errors import ConfigError


@dataclass(frozen=True)
class Limits:
    """What the server bounds; sizes in bytes, times in seconds."""

    examples: int = 64
    """Most examples of a request."""
    tokens: int = 256
    """Most tokens of an example, its image's among them."""
    message_bytes: int = 16 << 20
    """Largest message of a client; larger ones are refused before they are read."""
    requests: int = 2
    """Requests of one client that wait, are computed, or whose second step is awaited."""
    queue_bytes: int = 256 << 20
    """Embeddings of all clients that wait, decoded."""
    batch_examples: int = 64
    """Most examples of a batch, unless one request has more."""
    batch_tokens: int = 16_384
    """Most tokens of a batch, filled up to its longest example, unless one request has more."""
    kept_examples: int = 256
    """Examples of batches whose graph is kept because a client's second step is awaited."""
    window: float = 0.003
    """How long a batch waits for clients that have asked within `busy`."""
    busy: float = 1.0
    """How long a client counts as busy after it has asked."""
    upstream: float = 10.0
    """For how long a client's second step is awaited."""
    patience: float = 300.0
    """For how long a request may wait at most, whatever its client says."""
    handshake: float = 10.0
    """How long a new connection may take to say who it is."""
    write: float = 30.0
    """How long a client may take to take an answer."""
    strangers: int = 32
    """Connections at a time that have not said yet who they are."""

    def __post_init__(self) -> None:
        for field in fields(self):
            if not getattr(self, field.name) > 0 and field.name != "window":
                raise ConfigError(f"limit {field.name} must be more than 0")
        if self.window < 0:
            raise ConfigError("limit window must be at least 0")
        if self.kept_examples < max(self.batch_examples, self.examples):
            raise ConfigError("limit kept_examples must be at least as large as one batch")
