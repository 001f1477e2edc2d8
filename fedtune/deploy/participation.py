"""When a site takes part: whether it joins, goes on, or leaves.

It leaves between two rounds. A round in which it has answered the invitation is gone through with,
so that the others need not do without it, unless the battery is nearly empty. For the others it
then is a site that was killed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Flag, auto
from pathlib import Path

from fedtune.config import Config
from fedtune.deploy.conditions import is_critical, judge, require_readable
from fedtune.deploy.readings import OwnLoad, Reader, Readings
from fedtune.deploy.site_files import SiteFiles
from fedtune.deploy.worker import Worker
from fedtune.errors import WireError
from fedtune.flower.envelope import CONVERSATION
from fedtune.wire.envelope import Kind, read_envelope

from flwr.app import MessageType  # isort: skip

LOOK_SECONDS = 30.0  # between two looks at the machine
NOT_NOW = "takes no part now"  # what the server hears; why is the owner's business


class NotNow(Exception):
    """The machine does not suit its owner's conditions any more."""


class _Place(Flag):
    """What a request is of a round."""

    OUTSIDE = 0
    INSIDE = auto()
    FIRST = auto()
    LAST = auto()


class Participation:
    """Whether this machine takes part now; without conditions it always does."""

    def __init__(self, files: SiteFiles, say: Callable[[str], None]) -> None:
        """Raises `ConfigError` if a condition cannot be judged on this machine."""
        self._conditions, self._federation = files.config.conditions, files.federation
        self._reader, self._say = Reader(Path(self._conditions.sysfs)), say
        self._own = OwnLoad(files.config.machine.threads)
        self._worker: Worker | None = None
        readings = self._reader.read()
        require_readable(files.path, self._conditions, readings)
        self._always = not judge(self._conditions, readings)
        rounds, masks = self._federation.rounds, self._federation.secagg
        # After this time without a request nobody waits for this site in the round.
        self._patience = max(rounds.timeout, masks.stage_timeout)
        self._begun_until = self._due = 0.0
        self._place = _Place.OUTSIDE

    def wait(self) -> None:
        """Return when all conditions are met."""
        self._worker, told = None, False
        while unmet := self._unmet(self._read()):
            if not told:
                told = True
                self._say(f"taking no part: {unmet}")
            time.sleep(LOOK_SECONDS)
        if told:
            self._say("taking part: all conditions are met")

    def join(self, worker: Worker) -> None:
        """This is the training process now: what it takes is not held against it."""
        self._worker = worker

    @contextmanager
    def working(self) -> Iterator[None]:
        """What happens within is this site's own load."""
        self._own.begin()
        try:
            yield
        finally:
            self._own.end()

    def look(self) -> None:
        """Raise `NotNow` if it is time to leave; looks at the machine every `LOOK_SECONDS`."""
        now = time.monotonic()
        if self._always or now < self._due:
            return
        self._due = now + LOOK_SECONDS
        readings = self._read()
        begun = now < self._begun_until
        if self._unmet(readings) and (not begun or is_critical(self._conditions, readings)):
            self._begun_until = self._due = 0.0
            raise NotNow

    def asked(self, kind: str, payload: bytes) -> None:
        """This is going to be answered; raises `NotNow` if it would begin a round."""
        if self._always:
            return
        self._place = _place(self._federation, kind, payload)
        if _Place.FIRST in self._place:
            self._begun_until = self._due = 0.0
            self.look()

    def answered(self, well: bool) -> None:
        """The answer has left; `well` is false if it said that there is none."""
        if self._place is _Place.OUTSIDE:
            return
        if _Place.LAST in self._place or not well:
            self._begun_until = self._due = 0.0  # the moment to leave
        else:
            self._begun_until = time.monotonic() + self._patience

    def _read(self) -> Readings:
        return self._reader.read(self._own.value, self._worker.pid if self._worker else None)

    def _unmet(self, readings: Readings) -> str:
        found = judge(self._conditions, readings)
        return "; ".join(judgement.text for judgement in found if not judgement.met)


def _place(federation: Config, kind: str, payload: bytes) -> _Place:
    if not federation.secagg.enabled:
        whole = _Place.INSIDE | _Place.FIRST | _Place.LAST
        return whole if kind == MessageType.TRAIN else _Place.OUTSIDE
    if kind == MessageType.TRAIN:
        return _Place.INSIDE
    if kind != CONVERSATION:
        return _Place.OUTSIDE
    try:
        # What the training process goes by too: no server can begin a round by another name.
        found = read_envelope(payload, len(payload)).kind
    except WireError:
        return _Place.INSIDE  # it is going to be refused
    ends = {Kind.INVITE: _Place.FIRST, Kind.UNMASKING: _Place.LAST}
    return _Place.INSIDE | ends.get(found, _Place.OUTSIDE)
