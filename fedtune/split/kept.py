"""Graphs that are kept because the second step of a client is awaited, where labels stay there.

Clients of one batch get their outputs at one moment, so their second steps come at about one
moment too, and are computed together.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fedtune.config import Limits
from fedtune.split.compute import Graph, Result
from fedtune.split.waiting import NotAnswered, refuse
from fedtune.wire.split import Reason

Key = tuple[int, int]  # client and number of the request


@dataclass(eq=False)
class Step:
    """A second step: the gradient of a loss by the outputs, `[n, size]`."""

    upstream: NDArray[np.float32]
    arrived: float
    result: Future[Result] = field(default_factory=Future)


@dataclass(eq=False)
class Kept:
    """A graph, at which places of its batch second steps are awaited, and those that came."""

    graph: Graph
    expires: float
    awaited: dict[Key, int]
    steps: dict[Key, Step] = field(default_factory=dict)


@dataclass(frozen=True)
class Taken:
    """Second steps to compute now; `last` if the graph is not needed afterwards."""

    graph: Graph
    steps: dict[int, Step]
    last: bool


class KeptGraphs:
    """Not for several threads."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._kept: list[Kept] = []

    @property
    def has_room(self) -> bool:
        """Whether the graph of one more batch may be kept, whatever its size."""
        rows = sum(kept.graph.rows for kept in self._kept)
        largest = max(self._limits.batch_examples, self._limits.examples)
        return rows + largest <= self._limits.kept_examples

    def keep(self, graph: Graph, awaited: dict[Key, int], now: float) -> None:
        """Keep a graph for those who still need it."""
        if awaited:
            self._kept.append(Kept(graph, now + self._limits.upstream, awaited))

    def of(self, client: int) -> int:
        """How many second steps of a client are awaited."""
        return sum(key[0] == client for kept in self._kept for key in kept.awaited)

    def step(self, key: Key, upstream: NDArray[np.float32], now: float) -> Future[Result]:
        """A second step came; raises `NotAnswered` if its graph is not there (any more).

        Raises `ValueError` if `upstream` (flat) is not of the size of the outputs.
        """
        for kept in self._kept:
            if key in kept.awaited and key not in kept.steps:
                shape = kept.graph.shape(kept.awaited[key])
                kept.steps[key] = step = Step(upstream.reshape(shape), now)
                return step.result
        raise NotAnswered(Reason.FORGOTTEN)

    def left(self, client: int) -> None:
        """A client is gone."""
        for kept in self._kept:
            self._forget(kept, [key for key in kept.awaited if key[0] == client])

    def sweep(self, now: float) -> None:
        """Give up second steps that did not come in time, and graphs that nobody needs."""
        for kept in self._kept:
            late = kept.expires <= now
            cancelled = (key for key, step in kept.steps.items() if step.result.cancelled())
            missing = (key for key in kept.awaited if late and key not in kept.steps)
            self._forget(kept, [*cancelled, *missing])
        self._kept = [kept for kept in self._kept if kept.awaited]

    def choose(self, now: float) -> tuple[Kept | None, float]:
        """The graph whose second steps are next, and when to compute them."""
        ready = [kept for kept in self._kept if kept.steps]
        if not ready:
            return None, now
        times = {}
        for place, kept in enumerate(ready):
            wait = self._limits.window if len(kept.steps) < len(kept.awaited) else 0.0
            times[place] = min(step.arrived for step in kept.steps.values()) + wait
        first = min(times, key=lambda place: times[place])
        return ready[first], times[first]

    def take(self, kept: Kept) -> Taken:
        """The second steps that came; the graph goes with the last of them."""
        steps = {}
        for key, step in kept.steps.items():
            place = kept.awaited.pop(key)
            if step.result.set_running_or_notify_cancel():
                steps[place] = step
        kept.steps = {}
        if not kept.awaited:
            self._kept.remove(kept)
        return Taken(kept.graph, steps, not kept.awaited)

    def next_deadline(self) -> float | None:
        """When the next graph is given up."""
        return min((kept.expires for kept in self._kept), default=None)

    def refuse_all(self, reason: Reason) -> None:
        """No second step is computed any more."""
        for kept in self._kept:
            for step in kept.steps.values():
                refuse(step.result, reason)
        self._kept = []

    def _forget(self, kept: Kept, keys: Iterable[Key]) -> None:
        for key in keys:
            kept.awaited.pop(key, None)
            step = kept.steps.pop(key, None)
            if step is not None:
                step.result.cancel()
