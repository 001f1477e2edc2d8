"""What a server of a base model has done: numbers, and nothing of what clients sent."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fedtune.train.channel import CutTraffic
from fedtune.wire.split import Reason


@dataclass(frozen=True)
class SplitStatus:
    """Since the start. `traffic` is by client, counted as clients count it (`CutTraffic`)."""

    batches: int = 0
    requests: int = 0
    examples: int = 0
    largest_batch: int = 0
    """Most examples of one batch."""
    queue_seconds: float = 0.0
    """How long all requests together have waited for their batch."""
    longest_wait: float = 0.0
    not_answered: Mapping[Reason, int] = field(default_factory=dict)
    traffic: Mapping[str, CutTraffic] = field(default_factory=dict)

    @property
    def examples_per_batch(self) -> float:
        """The mean; 0 before the first batch."""
        return self.examples / self.batches if self.batches else 0.0

    @property
    def mean_wait(self) -> float:
        """Seconds of a request in the queue; 0 before the first."""
        return self.queue_seconds / self.requests if self.requests else 0.0


class Counters:
    """Counts, from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._batches = self._requests = self._examples = self._largest = 0
        self._seconds = self._longest = 0.0
        self._not_answered: Counter[Reason] = Counter()
        self._traffic: dict[str, CutTraffic] = {}

    def batch(self, examples: int, waits: Sequence[float]) -> None:
        """A batch of so many examples, of requests that had waited for so long."""
        with self._lock:
            self._batches += 1
            self._requests += len(waits)
            self._examples += examples
            self._largest = max(self._largest, examples)
            self._seconds += sum(waits)
            self._longest = max(self._longest, *waits)

    def not_answered(self, reason: Reason) -> None:
        """A request that got no answer."""
        with self._lock:
            self._not_answered[reason] += 1

    def passed(self, client: str, traffic: CutTraffic) -> None:
        """What an answered request of a client has carried."""
        with self._lock:
            self._traffic[client] = self._traffic.get(client, CutTraffic()) + traffic

    @property
    def status(self) -> SplitStatus:
        """All of it, at this moment."""
        with self._lock:
            return SplitStatus(
                self._batches,
                self._requests,
                self._examples,
                self._largest,
                self._seconds,
                self._longest,
                dict(self._not_answered),
                dict(self._traffic),
            )
