"""Requests that wait for the decoder: which of them make the next batch, and when."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field

from fedtune.config import Limits
from fedtune.split.compute import Result, Work
from fedtune.wire.split import Kind, Reason


class NotAnswered(Exception):
    """A request gets no answer, for this reason."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason.name.lower())
        self.reason = reason


def refuse(result: Future[Result], reason: Reason) -> bool:
    """Say why there is no result; False if nobody waits for it any more."""
    wanted = result.set_running_or_notify_cancel()
    if wanted:
        result.set_exception(NotAnswered(reason))
    return wanted


@dataclass(eq=False)
class Waiting:
    """A request of a client; times as of `time.monotonic`."""

    client: int
    number: int
    work: Work
    arrived: float
    deadline: float
    result: Future[Result] = field(default_factory=Future)


class Queue:
    """In the order in which they came; not for several threads."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._requests: list[Waiting] = []
        self._asked: dict[int, float] = {}  # by client that is there, when it asked last

    def __len__(self) -> int:
        return len(self._requests)

    @property
    def size(self) -> int:
        """Bytes of embeddings that wait."""
        return sum(waiting.work.tokens.nbytes for waiting in self._requests)

    def add(self, waiting: Waiting) -> None:
        """One more."""
        self._requests.append(waiting)
        self.asked(waiting.client, waiting.arrived)

    def asked(self, client: int, now: float) -> None:
        """A client is at work: others may wait for it."""
        self._asked[client] = now

    def has(self, client: int) -> bool:
        """Whether a client has asked and is still there."""
        return client in self._asked

    def left(self, client: int) -> None:
        """A client is gone."""
        self._asked.pop(client, None)
        for waiting in self._requests:
            if waiting.client == client:
                waiting.result.cancel()

    def sweep(self, now: float) -> int:
        """Drop what nobody waits for and what is too late; how many it was."""
        kept = []
        for waiting in self._requests:
            if waiting.result.cancelled():
                continue
            if waiting.deadline <= now:
                refuse(waiting.result, Reason.LATE)
                continue
            kept.append(waiting)
        dropped = len(self._requests) - len(kept)
        self._requests = kept
        return dropped

    def choose(self, now: float, may_open: bool) -> tuple[list[Waiting], float]:
        """The next batch, and when to compute it: not before `now` if it is not worth waiting.

        Unless `may_open`, those whose graph would have to be kept stay where they are.
        """
        chosen: list[Waiting] = []
        examples = longest = 0
        full = False
        for waiting in self._requests:
            work = waiting.work
            if work.kind == Kind.OPEN and not may_open:
                continue
            rows, tokens = examples + len(work.lengths), max(longest, work.longest)
            limits = self._limits
            if chosen and (rows > limits.batch_examples or rows * tokens > limits.batch_tokens):
                full = True
                break
            chosen.append(waiting)
            examples, longest = rows, tokens
        if not chosen:
            return [], now
        there = {waiting.client for waiting in chosen}
        awaited = any(
            client not in there and now - last < self._limits.busy
            for client, last in self._asked.items()
        )
        wait = self._limits.window if awaited and not full else 0.0
        return chosen, min(waiting.arrived for waiting in chosen) + wait

    def take(self, chosen: list[Waiting]) -> list[Waiting]:
        """Take them out; those that somebody still waits for."""
        self._requests = [waiting for waiting in self._requests if waiting not in chosen]
        return [waiting for waiting in chosen if waiting.result.set_running_or_notify_cancel()]

    def next_deadline(self) -> float | None:
        """When the next request is too late."""
        return min((waiting.deadline for waiting in self._requests), default=None)

    def refuse_all(self, reason: Reason) -> None:
        """None of them is computed."""
        for waiting in self._requests:
            refuse(waiting.result, reason)
        self._requests = []
