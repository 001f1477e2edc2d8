"""The simulated sites: each has a policy, a key and a memory as a real one has."""

from __future__ import annotations

import os
from pathlib import Path

from fedtune.config import OPEN_POLICY, Config, Policy
from fedtune.round.masked import Authority
from fedtune.round.membership import Membership
from fedtune.round.site import SiteStore
from fedtune.secagg.keys import SERVER, Roster
from fedtune.types import Float32Vector


class Sites:
    """All sites of a simulation; their memories share one file."""

    def __init__(self, path: Path, names: list[str], policy: Policy = OPEN_POLICY) -> None:
        """Make keys for `names` and the server, unless they are there already."""
        self._path = path
        self._policy = policy
        self._store: tuple[int, SiteStore] | None = None
        self._identities = self._opened().enrol([SERVER, *names])
        keys = {name: identity.public_key for name, identity in self._identities.items()}
        self._roster = Roster(keys)

    @property
    def authority(self) -> Authority:
        """The server's part."""
        return Authority(self._identities[SERVER], self._roster)

    def membership(self, name: str) -> Membership:
        """The part of the site `name`."""
        return Membership(self._policy, self._opened(), self._identities[name], self._roster)

    def epsilon(self, run_id: str, delta: float) -> float:
        """Unit "record": the most that any site has spent in a run."""
        store = self._opened()
        names = [name for name in self._identities if name != SERVER]
        return max(store.ledger(name, run_id).epsilon(delta) for name in names)

    def private_part(self, name: str, run_id: str, rounds: int) -> Float32Vector | None:
        """What the site `name` has after so many rounds; None if it never trained."""
        return self._opened().private_part(name, run_id, rounds + 1)

    def close(self) -> None:
        """Close the file; whoever does so last makes one file of it and its log."""
        self._opened().close()
        self._store = None

    def _opened(self) -> SiteStore:
        # A connection must not be used on both sides of a fork.
        if self._store is None or self._store[0] != os.getpid():
            self._store = (os.getpid(), SiteStore(self._path, synchronous="NORMAL"))
        return self._store[1]


def needs_sites(config: Config) -> bool:
    """Whether clients must remember anything between rounds."""
    return config.secagg.enabled or config.privacy.unit != "none" or bool(config.adapter.private)
