"""A deployed federation of real processes, and what must hold of it whatever happens to it.

Each site's memory gets a trigger that copies every state of a session into a table of its own, in
the transaction that stores it: what a site has ever said can be read afterwards, and nothing in
between is missed. The product knows nothing of that table.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import sqlite3
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

import httpx
import tomli_w
from e2e_helpers import DEADLINE, Command, Launcher, read_journal, read_metrics, wait_until
from process_changes import fork_training

from fedtune.deploy.keys import make_roster, make_server_keys, make_site_keys
from fedtune.deploy.site_files import CLIENT_TEMPLATE
from fedtune.round.site import SiteStore
from fedtune.secagg.keys import SERVER

SITES = ("clinic-0", "clinic-1", "clinic-2")
# What a site has done last, in the order of a round.
ADVERTISED, SHARED, MASKED, SIGNED, REVEALED = (
    "advertised",
    "shared",
    "masked",
    "signed",
    "revealed",
)
STAGES = (ADVERTISED, SHARED, MASKED, SIGNED, REVEALED)
HISTORY_POLL = 0.005
# What an audit log calls the request that leads to each.
_REQUESTS = dict(zip(STAGES, ("invite", "cohort", "train", "survivors", "unmasking"), strict=True))

_HISTORY = """
CREATE TABLE history (
    number INTEGER PRIMARY KEY, round INTEGER, attempt INTEGER, session BLOB, stage TEXT,
    state BLOB, answer BLOB
);
CREATE TRIGGER begun AFTER INSERT ON sessions BEGIN
    INSERT INTO history VALUES
        (NULL, NEW.round, NEW.attempt, NEW.session, NEW.stage, NEW.state, NEW.answer);
END;
CREATE TRIGGER gone_on AFTER UPDATE ON sessions BEGIN
    INSERT INTO history VALUES
        (NULL, NEW.round, NEW.attempt, NEW.session, NEW.stage, NEW.state, NEW.answer);
END;
"""


@dataclass(frozen=True)
class Step:
    """What a site stored before it answered."""

    site: str
    round: int
    attempt: int
    session: bytes
    stage: str
    cohort: tuple[str, ...]
    answer: bytes


class Federation:
    """The files of a federation, and its processes."""

    def __init__(
        self,
        folder: Path,
        launcher: Launcher,
        base: Path,
        data: Path,
        sites: Sequence[str] = SITES,
        tables: Mapping[str, Mapping[str, Any]] | None = None,
        listen: Mapping[str, Any] | None = None,
        reach: Mapping[str, str] | None = None,
    ) -> None:
        """`tables` are added to federation.toml, `listen` to server.toml.

        A site connects to its address in `reach`, by default to where the server listens.
        """
        self.folder, self._launch, self.sites = folder, launcher, tuple(sites)
        self._memories: dict[str, Path] = {}
        # One for all, because each reads all of this machine's authorities; and no connection is
        # kept to a server that may be killed.
        self._http = httpx.Client(timeout=10, limits=httpx.Limits(max_keepalive_connections=0))
        labels = sorted(
            {
                row.get("label") or row["answer"]
                for file in data.glob("*/train.jsonl")
                for row in map(json.loads, file.read_text().splitlines())
            }
        )
        federation: dict[str, dict[str, Any]] = {
            "base": {"path": str(base), "max-length": 32},
            "data": {"labels": labels},
            "train": {"steps": 6, "lr": 0.02},
            "rounds": {"count": 3},
            "update": {"clip": 20.0, "bits": 16},
            "secagg": {"enabled": True, "stage-timeout": 30.0},
        }
        for name, table in (tables or {}).items():
            federation[name] = {**federation.get(name, {}), **table}
        self.rounds: int = federation["rounds"]["count"]
        (folder / "federation.toml").write_text(tomli_w.dumps(federation))
        server: dict[str, Any] = {"host": "127.0.0.1", "port": free_port(), "test": "test.jsonl"}
        self.status_port = free_port()
        server["status"] = f"127.0.0.1:{self.status_port}"
        server.update(listen or {})
        self.port: int = server["port"]
        (folder / "server.toml").write_text(tomli_w.dumps({"server": server}))
        self._server, self._reach = f"{server['host']}:{self.port}", reach or {}
        (folder / "sites").mkdir()
        for place in (folder, folder / "sites"):  # for the server, and for a simulation
            shutil.copy(data / "test.jsonl", place)
        hosts = {"localhost", "127.0.0.1", server["host"]}
        make_server_keys(folder / "server-keys", sorted(hosts))
        found = sorted(data.glob("*/train.jsonl"))
        public = [
            self.make_site(name, found[place % len(found)]) for place, name in enumerate(sites)
        ]
        self.roster = make_roster(folder / "roster.toml", folder / "server-keys", public)

    def make_site(self, name: str, train: Path) -> Path:
        """A site's folder; its public file."""
        site = self.site(name)
        site.mkdir(parents=True)
        shutil.copy(train, site / "train.jsonl")
        text = CLIENT_TEMPLATE.format(
            name=name,
            server=self._reach.get(name, self._server),
            federation=self.folder / "federation.toml",
            roster=self.folder / "roster.toml",
            certificate=self.folder / "server-keys" / "ca.crt",
        )
        (site / "client.toml").write_text(text.replace("train.csv", "train.jsonl"))
        self.watch(name)
        return make_site_keys(site / "keys", name)

    def ask(self, path: str) -> httpx.Response | None:
        """What the server says of itself; None if nobody answers."""
        try:
            return self._http.get(f"http://127.0.0.1:{self.status_port}{path}")
        except httpx.TransportError:
            return None

    def health(self) -> dict[str, Any]:
        """`/health`; empty if nobody answers."""
        answer = self.ask("/health")
        said: dict[str, Any] = answer.json() if answer else {}
        return said

    def audit(self, name: str) -> Path:
        """The audit log of a site, or of the server."""
        folder = self.run if name == SERVER else self.folder / "sites" / name
        return folder / "audit.jsonl"

    def verify(self, name: str, *more: str) -> tuple[int, Command]:
        """What `fedtune audit verify` says of a log."""
        roster = self.folder / "roster.toml"
        options = ("--roster", roster, "--name", name, *more)
        return self._launch.run("audit", "verify", self.audit(name), *options)

    def compare(self, name: str) -> dict[str, Any]:
        """What `fedtune audit compare` says of the server's log and that of a site."""
        logs = self.audit(SERVER), self.audit(name)
        roster = self.folder / "roster.toml"
        _, command = self._launch.run("audit", "compare", *logs, "--roster", roster, "--json")
        found = json.loads(command.stdout)
        return {key: found[key] for key in ("counted", "agree")}

    def verified(self, name: str) -> list[tuple[str, dict[str, Any]]]:
        """Events and details of a log that is sound."""
        code, command = self.verify(name)
        assert code == 0, command.stderr
        entries = [json.loads(line) for line in self.audit(name).read_text().splitlines()]
        return [(entry["event"], entry["details"]) for entry in entries]

    def move_memory(self, name: str, folder: Path) -> None:
        """Let a site keep its memory in another folder."""
        self._memories[name] = folder / "site.db"
        file = self.site(name) / "client.toml"
        file.write_text(file.read_text().replace('"site.db"', f'"{self._memories[name]}"'))
        self.watch(name)

    def watch(self, name: str) -> None:
        """Make the site's memory, one that keeps all that it was told."""
        SiteStore(self._memory(name)).close()
        with closing(sqlite3.connect(self._memory(name))) as database:
            database.executescript(_HISTORY)

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def site(self, name: str) -> Path:
        return self.folder / "sites" / name

    def server(self, prepare: Iterable[Callable[[], None]] = ()) -> Command:
        return self._launch.warm("server", self.folder / "federation.toml", prepare=prepare)

    def client(self, name: str, python: Path | None = None) -> Command:
        """The installed command, as a person starts it; or that of another environment."""
        file = self.site(name) / "client.toml"
        return self._launch.cold("client", file, "--once", python=python)

    def set_machine(self, name: str, **values: Any) -> None:
        """Write keys of a site's `[machine]`."""
        self._set(name, "machine", values)

    def set_policy(self, name: str, **values: Any) -> None:
        """Write keys of a site's `[policy]`."""
        self._set(name, "policy", values)

    def set_site(self, name: str, **values: Any) -> None:
        """Write keys of a site's `[site]`."""
        self._set(name, "site", values)

    def let_sites_ask(self, port: int) -> None:
        """Tell all sites where the base model is, and that embeddings may go there."""
        for name in self.sites:
            self.set_site(name, base_server=f"127.0.0.1:{port}")
            self.set_policy(name, max_token_epsilon=inf)

    def _set(self, name: str, table: str, values: Mapping[str, Any]) -> None:
        file = self.site(name) / "client.toml"
        lines = tomli_w.dumps({key.replace("_", "-"): value for key, value in values.items()})
        file.write_text(file.read_text().replace(f"[{table}]\n", f"[{table}]\n{lines}"))

    def warm_client(self, name: str, prepare: Iterable[Callable[[], None]] = ()) -> Command:
        """The same two processes, forked with their imports done."""
        arguments = ("client", self.site(name) / "client.toml", "--once")
        return self._launch.warm(*arguments, prepare=(fork_training, *prepare))

    def command(self, *arguments: str | Path) -> tuple[int, Command]:
        """Run another command to its end."""
        return self._launch.run(*arguments)

    def simulate(self, folder: Path) -> Path:
        """The run of the same federation, simulated."""
        files = ("--config", self.folder / "federation.toml", "--data", self.folder / "sites")
        code, command = self._launch.run("simulate", *files, "--out", folder / "run")
        assert code == 0, command.stderr
        return folder / "run"

    def restart_server(self, server: Command) -> Command:
        """Kill it, and start it again at once: Flower's process of the first may still end."""
        server.kill()
        return self.server()

    def history(self, name: str) -> list[Step]:
        """All that the site ever stored of its sessions, the oldest first."""
        query = "SELECT round, attempt, session, stage, state, answer FROM history ORDER BY number"
        with closing(self._read(self._memory(name))) as database:
            rows = database.execute(query).fetchall()
        return [
            Step(
                name,
                number,
                attempt,
                session,
                stage,
                tuple(advert["client"] for advert in json.loads(state)["adverts"]),
                answer,
            )
            for number, attempt, session, stage, state, answer in rows
        ]

    def last(self, name: str) -> tuple[int, int, str]:
        """Round, attempt and stage of the last state that the site stored."""
        with closing(self._read(self._memory(name))) as database:
            return _last(database)

    def reached(self, name: str, number: int, stage: str) -> bool:
        """Whether the site has stored that stage of that round, in whatever attempt."""
        query = "SELECT count(*) FROM history WHERE round = ? AND stage = ?"
        with closing(self._read(self._memory(name))) as database:
            return bool(database.execute(query, (number, stage)).fetchone()[0])

    def await_stage(self, names: Iterable[str], number: int, stage: str) -> None:
        """Wait until these sites have stored that stage of that round."""
        for name in names:
            wait_until(lambda n=name: self.reached(n, number, stage), f"{name} to have {stage}")

    def await_commit(self, number: int) -> None:
        """Wait until that round is in the journal."""
        wait_until(lambda: self.committed() >= number, f"round {number} to be committed")

    def record(self, number: int) -> dict[str, Any]:
        """What the journal says of a round; waits for it."""
        self.await_commit(number)
        return read_journal(self.run)[number - 1]

    def await_record(self, condition: Callable[[dict[str, Any]], bool], what: str) -> int:
        """Wait for a round, of those not yet committed, of which that holds; its number."""
        number = self.committed() + 1
        deadline = time.monotonic() + DEADLINE
        while not condition(self.record(number)):
            number += 1
            assert time.monotonic() < deadline, f"waited for a round with {what}"
        return number

    def committed(self) -> int:
        """Rounds in the journal."""
        journal = self.run / "journal.db"
        if not journal.exists():
            return 0
        with closing(self._read(journal)) as database:
            database.execute("PRAGMA busy_timeout = 60000")
            return int(database.execute("SELECT max(round) FROM rounds").fetchone()[0])

    @contextmanager
    def held(self, name: str, stage: str) -> Iterator[int]:
        """Hold a round open in `stage`: `name` cannot store its answer; the round's number.

        Its memory is locked by this process, at a moment when it has stored the stage before and
        not yet this one. What it says to the stage before is on its way.
        """
        before = STAGES[STAGES.index(stage) - 1]  # of the first it is the last, a round earlier
        deadline = time.monotonic() + 60
        with closing(sqlite3.connect(self._memory(name), isolation_level=None)) as database:
            while True:
                database.execute("BEGIN IMMEDIATE")
                number, _, found = _last(database)
                if found == before or (not found and stage == ADVERTISED):
                    break
                database.execute("ROLLBACK")
                assert time.monotonic() < deadline, f"{name} is {found} in round {number}"
                time.sleep(HISTORY_POLL)
            try:
                if found:
                    wait_until(lambda: self._logged(name, number, found), f"{name} to answer")
                yield number + 1 if stage == ADVERTISED else number
            finally:
                database.execute("ROLLBACK")

    def _logged(self, name: str, number: int, stage: str) -> bool:
        """Whether a site's audit log says that it answered; the answer leaves after that."""
        for line in reversed(self.audit(name).read_text().splitlines()):
            with suppress(ValueError):  # of a line that is being written
                about = json.loads(line)["details"]
                if about.get("round") == number and about.get("request") == _REQUESTS[stage]:
                    return True
        return False

    def check(self) -> list[dict[str, Any]]:
        """Assert what must hold of every run, at any time; the committed rounds' records."""
        for command in self._launch.commands:
            assert "Traceback" not in command.stderr, command.stderr
        records = read_journal(self.run)
        assert [record["round"] for record in records] == list(range(1, len(records) + 1))
        steps = [step for name in self.sites for step in self.history(name)]
        for name in self.sites:
            _check_site([step for step in steps if step.site == name])
        for record in records:
            _check_round(record, [step for step in steps if step.round == record["round"]])
        return records

    def check_finished(self) -> list[dict[str, Any]]:
        """The same of a server that has ended: what people read says what the journal says."""
        records = self.check()
        assert read_metrics(self.run) == records
        assert len(records) == self.rounds
        summary = json.loads((self.run / "summary.json").read_text())
        assert (summary["status"], summary["rounds"]) == ("finished", self.rounds)
        return records

    def _memory(self, name: str) -> Path:
        return self._memories.get(name, self.site(name) / "site.db")

    @staticmethod
    def _read(path: Path) -> sqlite3.Connection:
        return sqlite3.connect(f"file:{path}?mode=ro", uri=True)


def _last(database: sqlite3.Connection) -> tuple[int, int, str]:
    query = "SELECT round, attempt, stage FROM history ORDER BY number DESC LIMIT 1"
    found: tuple[int, int, str] = database.execute(query).fetchone() or (0, 0, "")
    return found


def _check_site(steps: list[Step]) -> None:
    """What one site said: each stage once, in order, and after signing nothing but revealing."""
    said: dict[bytes, list[Step]] = defaultdict(list)
    values: dict[int, tuple[str, ...]] = {}
    final: Step | None = None
    latest = (0, 0)
    for step in steps:
        where = (step.site, step.round, step.attempt, step.stage)
        session = said[step.session]
        if session:
            assert (step.round, step.attempt) == latest, f"an older session goes on: {where}"
            # One answer for each stage: no second set of shares, no second signature.
            assert STAGES.index(step.stage) == STAGES.index(session[-1].stage) + 1, where
        else:
            assert step.stage == ADVERTISED, where
            assert (step.round, step.attempt) > latest, f"a session anew: {where}"
            # A round that the site has signed is closed for it, whatever the server asks.
            assert final is None or step.round > final.round, where
        session.append(step)
        latest = (step.round, step.attempt)
        if step.stage == MASKED:
            # The same values, once more, go to the very same cohort.
            assert values.setdefault(step.round, step.cohort) == step.cohort, where
        if step.stage in {SIGNED, REVEALED}:
            final = step


def _check_round(record: dict[str, Any], steps: list[Step]) -> None:
    """Whose values the server counted, against what the sites know of the round."""
    number, counted = record["round"], record["clients"]
    opened = {step.session for step in steps if step.stage in {SIGNED, REVEALED}}
    assert len(opened) <= 1, f"two sums of round {number} were opened"
    assert counted == sorted(set(counted)), f"round {number}"
    assert not set(counted) & set(record["failed"]), f"round {number}"
    if counted:
        [session] = opened
        masked, signed = (
            {step.site for step in steps if (step.session, step.stage) == (session, stage)}
            for stage in (MASKED, SIGNED)
        )
        assert set(counted) <= masked, f"round {number}: values of {masked}, counted {counted}"
        assert signed <= set(counted), f"round {number}: {signed} signed, counted {counted}"


def free_port() -> int:
    """A port that is free, and that no outgoing connection gets before a server listens there."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)  # Linux gives out those above
        if port_is_free(port):
            return port


def port_is_free(port: int) -> bool:
    with socket.socket() as door:
        door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            door.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def tell(pids: Iterable[int], number: signal.Signals) -> None:
    """Send a signal to processes."""
    for pid in pids:
        os.kill(pid, number)
