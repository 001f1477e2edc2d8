"""A small federation under secure aggregation, driven exchange by exchange by hand.

Everything is real: a torch trainer, sites with their stores in a file, the server's journal. What
a test adds is the network between them: who answers, what is changed on the way, when a side is
killed and comes back.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fedtune.adapter.parts import parts_of
from fedtune.config import OPEN_POLICY, Policy
from fedtune.errors import FedtuneError, RoundLost
from fedtune.records import RoundRecord
from fedtune.round.client import ClientMachine
from fedtune.round.federation import Federation
from fedtune.round.journal import Journal
from fedtune.round.masked import Authority
from fedtune.round.server import Exchange, GlobalState, ServerRound
from fedtune.secagg.client import ClientSession
from fedtune.secagg.saved import load
from fedtune.secagg.session import Session
from fedtune.simulation.sites import Sites
from fedtune.update import make_pipeline
from fedtune.wire import aggregation, codec
from fedtune.wire.envelope import read_envelope

STAGES = ("advertise", "share", "train", "sign", "reveal")
UPDATE = ("update.clip=0.6", "update.bits=16")
MASKED = (*UPDATE, "secagg.enabled=true")
CLIENT_UNIT = (
    *MASKED,
    "privacy.unit=client",
    "aggregate.weighting=uniform",
    "privacy.noise-multiplier=1.0",
)
RECORD_UNIT = ("privacy.unit=record", "privacy.noise-multiplier=1.0")
SIZES = (7, 12, 5, 9, 4, 8)
BIG = 1 << 20

# What happens to a request on its way to a client, or to an answer on its way back.
Before = Callable[[str, str, bytes], None]
Tamper = Callable[[str, str, bytes], bytes]


@dataclass(frozen=True)
class Kept:
    """A client's row in its site's store."""

    round: int
    attempt: int
    stage: str
    state: bytes

    @property
    def session(self) -> ClientSession:
        """The state as the client has it."""
        return load(self.state)


class MaskedFederation:
    """A server and its clients; `gone` says from which stage of a round on who is not there."""

    def __init__(
        self,
        small: Any,
        folder: Path,
        policy: Policy = OPEN_POLICY,
        policies: Mapping[str, Policy] | None = None,
        run_id: str = "run",
        sites: str = "sites.db",
        membership: bool = True,
    ) -> None:
        self.small, self.config, self.run_id = small, small.config, run_id
        self.folder = folder
        self.names = [machine.name for machine in small.machines]
        self._policy, self._policies = policy, policies or {}
        self._with_membership = membership
        self._sites_path = folder / sites
        start = np.random.default_rng(0).normal(size=small.attached.manifest.size) / 4
        start = start.astype(np.float32)
        self.parts = parts_of(self.config.adapter.private, small.attached.manifest, start)
        self.manifest = self.parts.shared if self.parts else small.attached.manifest
        self.start = self.parts.shared_of(start) if self.parts else start
        self.trained: list[tuple[int, str]] = []
        self.lost: list[str] = []
        self.replies: dict[tuple[str, str], bytes] = {}
        self.restart_sites()
        self.journal_path = folder / f"{run_id}.journal"
        if not self.journal_path.exists():
            state = GlobalState(self.start, {})
            Journal.create(self.journal_path, {"run_id": run_id}, state).close()
        self.journal: Journal | None = None
        self.restart_server()

    # Both sides come back from what is on their disks.

    def restart_sites(self) -> None:
        """The clients' processes end and start again."""
        self.sites = Sites(self._sites_path, self.names)
        self.machines = {
            machine.name: ClientMachine(
                machine.name,
                self.config,
                self.small.trainer,
                machine._local.train_data,
                machine._local.test_data,
                make_pipeline(self.config.update, self.config.values_sent(self.manifest.size)),
                self.membership(machine.name) if self._with_membership else None,
                self.parts,
            )
            for machine in self.small.machines
        }

    def stop_sites(self) -> None:
        """The clients' processes end; before a fork, so that no connection is on both sides."""
        self.sites._opened().close()
        self.machines = {}

    def obey(self, name: str, policy: Policy) -> None:
        """From now on the site of `name` has this policy."""
        self._policies = {**self._policies, name: policy}
        self.restart_sites()

    def membership(self, name: str) -> Any:
        """A site's part, under its own policy."""
        policy = self._policies.get(name, self._policy)
        return replace(self.sites.membership(name), policy=policy)

    def restart_server(self, hello: bool = True) -> None:
        """The server's process ends, whatever it was at, and starts again."""
        self.close()
        self.journal = Journal.open(self.journal_path)
        self.federation = Federation(
            self.config,
            self.manifest,
            "ab" * 32,
            self.journal,
            self.authority if self.config.secagg.enabled else None,
        )
        if hello:
            for name in self.names:
                self.say_hello(name)

    def say_hello(self, name: str) -> None:
        """One client is taken in."""
        question = codec.encode_hello_request(self.run_id)
        self.federation.admit(self.machines[name].hello(question))

    def close(self) -> None:
        """Let go of the journal."""
        if self.journal is not None:
            self.journal.close()

    @property
    def authority(self) -> Authority:
        """The server's key and the roster."""
        return self.sites.authority

    @property
    def adapter(self) -> bytes:
        """The global adapter."""
        return self.federation.adapter.tobytes()

    # One round.

    def answer(self, name: str, stage: str, request: bytes) -> bytes:
        """What a client's machine answers."""
        machine = self.machines[name]
        if stage == "train":
            self.trained.append((self.federation.round + 1, name))
        reply = machine.train(request) if stage == "train" else machine.converse(request)
        self.replies[name, stage] = reply
        return reply

    def hold(
        self,
        opened: ServerRound,
        exchange: Exchange,
        gone: Mapping[str, str] | None = None,
        before: Before | None = None,
        tamper: Tamper | None = None,
    ) -> None:
        """One exchange: each client is asked, and what it answers is taken in or it has failed."""
        stage = exchange.stage
        for name, request in exchange.requests.items():
            left = (gone or {}).get(name)
            if left is not None and STAGES.index(left) <= STAGES.index(stage):
                opened.fail(name, "gone")
                continue
            if before is not None:
                before(name, stage, request)
            try:
                reply = self.answer(name, stage, request)
                opened.receive(name, tamper(name, stage, reply) if tamper else reply)
            except FedtuneError as error:
                opened.fail(name, f"{type(error).__name__}: {error}")

    def open_until(
        self, stage: str, gone: Mapping[str, str] | None = None, after: bool = False
    ) -> tuple[ServerRound, Exchange]:
        """A round up to the exchange `stage`, which nobody has got yet.

        With `after` all have answered it, and nothing has been made of the answers.
        """
        opened, exchange = self.federation.open_round()
        while exchange.stage != stage:
            self.hold(opened, exchange, gone)
            following = opened.proceed()
            assert following, f"the round has no stage {stage}"
            exchange = following
        if after:
            self.hold(opened, exchange, gone)
        return opened, exchange

    def finish(
        self,
        opened: ServerRound,
        exchange: Exchange | None,
        gone: Mapping[str, str] | None = None,
        before: Before | None = None,
        tamper: Tamper | None = None,
    ) -> RoundRecord:
        """What is left of a round, and its commit; a round that is lost comes to nothing."""
        try:
            while exchange is not None:
                self.hold(opened, exchange, gone, before, tamper)
                exchange = opened.proceed()
            self.federation.close_round(opened)
        except RoundLost as error:
            self.lost.append(str(error))
            self.federation.give_up(str(error))
        return self.federation.commit(opened, None, 0, 0.0)

    def round(
        self,
        gone: Mapping[str, str] | None = None,
        before: Before | None = None,
        tamper: Tamper | None = None,
    ) -> RoundRecord:
        """A whole round."""
        return self.finish(*self.federation.open_round(), gone, before, tamper)

    # What is on the disks.

    def kept(self, name: str) -> Kept | None:
        """What the client remembers of its last session of this run."""
        database = sqlite3.connect(self._sites_path)
        row = database.execute(
            "SELECT round, attempt, stage, state FROM sessions WHERE client = ? AND run_id = ?",
            (name, self.run_id),
        ).fetchone()
        database.close()
        return None if row is None else Kept(*row)

    def stages(self) -> dict[str, str]:
        """The stage in which each client's last session is."""
        return {name: kept.stage for name in self.names if (kept := self.kept(name))}

    def charged(self, name: str) -> int:
        """How many releases are in a site's ledger for this run."""
        return len(self.membership(name).store.ledger(name, self.run_id).releases)


def session_of(exchange: Exchange) -> Session:
    """The session that the invitations of an exchange are for."""
    invite = next(iter(exchange.requests.values()))
    return aggregation.decode_invite(read_envelope(invite, BIG).body)
