"""One thread that computes: it takes what waits, as one batch, and gives each request its result.

A request whose deadline has passed, or whose client is gone, costs nothing.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

import numpy as np
from numpy.typing import NDArray

from fedtune.base.answering import AnsweringDecoder
from fedtune.config import Limits
from fedtune.split.compute import Result, Work, compute
from fedtune.split.counters import Counters
from fedtune.split.kept import KeptGraphs, Taken
from fedtune.split.waiting import NotAnswered, Queue, Waiting
from fedtune.wire.split import Kind, Reason

logger = logging.getLogger(__name__)


class Batcher:
    """Takes requests from any thread. A client is a number that no other client has."""

    def __init__(self, decoder: AnsweringDecoder, limits: Limits, counters: Counters) -> None:
        """Starts the thread; `close` ends it."""
        self._decoder, self._limits, self._counters = decoder, limits, counters
        self._changed = threading.Condition()
        self._queue, self._kept = Queue(limits), KeptGraphs(limits)
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="base-model", daemon=True)
        self._thread.start()

    def has_room(self, size: int) -> bool:
        """Whether so many bytes of embeddings may wait too; one request always may."""
        with self._changed:
            return not len(self._queue) or self._queue.size + size <= self._limits.queue_bytes

    def submit(self, client: int, number: int, work: Work, seconds: float) -> Future[Result]:
        """The result of a request that waits for at most `seconds`; cancel it to drop it.

        It, or this, fails with `NotAnswered`.
        """
        now = time.monotonic()
        until = now + min(seconds, self._limits.patience)
        waiting = Waiting(client, number, work, now, until)
        with self._changed:
            if self._closing:
                raise NotAnswered(Reason.STOPPING)
            self._queue.add(waiting)
            self._changed.notify()
        return waiting.result

    def pull_back(self, client: int, number: int, upstream: NDArray[np.float32]) -> Future[Result]:
        """The gradient of a request of kind `OPEN`; `upstream` is by its outputs.

        Raises `NotAnswered` if its graph is not kept, `ValueError` for another size than that of
        the outputs.
        """
        now = time.monotonic()
        with self._changed:
            result = self._kept.step((client, number), upstream, now)
            self._queue.asked(client, now)
            self._changed.notify()
        return result

    def kept(self, client: int) -> int:
        """How many second steps of a client are awaited."""
        with self._changed:
            return self._kept.of(client)

    def left(self, client: int) -> None:
        """A client is gone: what it asked for is dropped."""
        with self._changed:
            self._queue.left(client)
            self._kept.left(client)
            self._changed.notify()

    def close(self) -> None:
        """Compute no more; what waits is refused. Returns when the thread has ended."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                task = self._next()
            if task is None:
                return
            task()
            del task  # and what it holds: the next one may be a long time coming

    def _next(self) -> Callable[[], None] | None:
        """Wait for something to do; None when there will be nothing any more."""
        while not self._closing:
            now = time.monotonic()
            self._queue.sweep(now)
            self._kept.sweep(now)
            # Second steps first: each gives memory back.
            kept, at = self._kept.choose(now)
            if kept is not None and at <= now:
                taken = self._kept.take(kept)
                return lambda: self._steps(taken)
            chosen, ready = self._queue.choose(now, self._kept.has_room)
            if chosen and ready <= now:
                batch = self._queue.take(chosen)
                return lambda: self._batch(batch)
            times = [self._queue.next_deadline(), self._kept.next_deadline()]
            times += [at if kept is not None else None, ready if chosen else None]
            known = [time for time in times if time is not None]
            self._changed.wait(min(known) - now if known else None)
        self._queue.refuse_all(Reason.STOPPING)
        self._kept.refuse_all(Reason.STOPPING)
        return None

    def _batch(self, batch: list[Waiting]) -> None:
        if not batch:
            return
        now = time.monotonic()
        self._counters.batch(
            sum(len(waiting.work.lengths) for waiting in batch),
            [now - waiting.arrived for waiting in batch],
        )
        try:
            found, graph = compute(self._decoder, [waiting.work for waiting in batch])
        except Exception:  # of torch, such as memory; the next batch may fare better
            logger.exception("a batch was not computed")
            for waiting in batch:
                waiting.result.set_exception(NotAnswered(Reason.FAILED))
            return
        with self._changed:
            if graph is not None:
                awaited = {
                    (waiting.client, waiting.number): place
                    for place, waiting in enumerate(batch)
                    if waiting.work.kind == Kind.OPEN
                    and found[place].finite
                    and self._queue.has(waiting.client)
                }
                self._kept.keep(graph, awaited, time.monotonic())
        for waiting, result in zip(batch, found, strict=True):
            _settle(waiting.result, result)

    def _steps(self, taken: Taken) -> None:
        if not taken.steps:
            return
        upstreams = {place: step.upstream for place, step in taken.steps.items()}
        try:
            found = taken.graph.pull_back(upstreams, taken.last)
        except Exception:  # as above
            logger.exception("second steps were not computed")
            for step in taken.steps.values():
                step.result.set_exception(NotAnswered(Reason.FAILED))
            return
        for place, step in taken.steps.items():
            _settle(step.result, found[place])


def _settle(future: Future[Result], result: Result) -> None:
    if result.finite:
        future.set_result(result)
    else:
        future.set_exception(NotAnswered(Reason.NOT_FINITE))
