"""Canaries: secrets of known value, and where they must not turn up with every logger at DEBUG."""

from __future__ import annotations

import base64
import json
import logging
import multiprocessing
import os
import signal
import sqlite3
import stat
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from e2e_helpers import DEADLINE, line_count, read_metrics, read_rows, read_summary, write_rows
from numpy.typing import NDArray
from torch import nn

TEXT = "canary patient zero was bitten by a purple walrus"
LABEL = "canary-diagnosis-7c41"
NAMES = ("ward-a", "ward-b", "ward-c", "ward-d")
CALM, QUOTES, DIES, SHY = NAMES  # without trouble; with trouble in round 2, 3, 4
ROUNDS = 4
FLOATS = 8  # so many numbers in a row are told from any others


# ------------------------------------------------------------------------- what to look for
@dataclass(frozen=True)
class Spelled:
    """A secret, named for messages of failed tests, in all its usual spellings.

    `exact` are byte strings, `folded` such as are looked for whatever the case.
    """

    name: str
    exact: frozenset[bytes]
    folded: frozenset[bytes]

    def is_in(self, text: bytes, lower: bytes) -> bool:
        """Whether any spelling is in `text`; `lower` is `text` in lower case."""
        return any(s in text for s in self.exact) or any(s in lower for s in self.folded)


def spelled(name: str, secret: bytes) -> Spelled:
    """Spellings of each half of `secret`: pages of a database may cut it in two once."""
    half = min(len(secret), 32) // 2
    assert half >= 10, name
    parts = [secret[:half], secret[half : 2 * half]]
    exact = set(parts) | {escape_of(part) for part in parts}
    for part in parts:
        exact |= {s.encode() for s in (", ".join(map(str, part)), ",".join(map(str, part)))}
        exact |= set(base64_of(part))
    whole = {str(int.from_bytes(secret, order)) for order in ("little", "big")}
    exact |= {number.encode() for number in whole}
    return Spelled(name, frozenset(exact), frozenset(part.hex().encode() for part in parts))


def escape_of(part: bytes) -> bytes:
    """As in the repr of bytes, but for quotation marks."""
    return repr(part)[2:-1].encode()


def base64_of(part: bytes) -> Iterator[bytes]:
    """What is left of `part` in base64 wherever in a longer byte string it begins."""
    for shift in range(3):
        first, last = -(-8 * shift // 6), 8 * (shift + len(part)) // 6
        for encode in (base64.standard_b64encode, base64.urlsafe_b64encode):
            yield encode(bytes(shift) + part)[first:last]


def words(name: str, text: str) -> Spelled:
    """A text as itself, escaped and encoded."""
    raw = text.encode()
    found = spelled(name, raw)
    exact = {raw, text.encode("utf-16-le"), text.encode("utf-32-le"), *found.exact}
    return Spelled(name, frozenset(exact), found.folded | {raw.lower()})


def numbers(name: str, vector: NDArray[Any]) -> Spelled:
    """A vector by a few of its values in a row: as bytes of any width, or as decimal digits."""
    values = vector[:FLOATS]
    found = [spelled(name, values.astype(kind).tobytes()) for kind in kinds_of(values)]
    digits = {str(value) for value in values} | {repr(float(value)) for value in values}
    exact = {text.encode() for text in digits if len(text) >= FLOATS}
    if values.dtype.kind == "i":
        exact = {sep.join(str(value) for value in values).encode() for sep in (", ", ",", " ")}
    exact |= {spelling for part in found for spelling in part.exact}
    return Spelled(name, frozenset(exact), frozenset(s for part in found for s in part.folded))


def kinds_of(values: NDArray[Any]) -> tuple[str, ...]:
    return ("<f4", "<f8", ">f4") if values.dtype.kind == "f" else ("<i4", "<i8", ">i4")


def found_in(text: bytes, secrets: Iterable[Spelled]) -> list[str]:
    """Names of the secrets that are in `text`."""
    lower = text.lower()
    return [secret.name for secret in secrets if secret.is_in(text, lower)]


def of_sites(database: Path) -> dict[str, bytes]:
    """All that is secret in the sites' memory: identities, keys, seeds, shares, and pair seeds."""
    from fedtune.secagg.client import pairwise_seed
    from fedtune.secagg.saved import load

    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as opened:
        identities = opened.execute("SELECT name, private_key FROM identities").fetchall()
        sessions = opened.execute("SELECT client, round, state FROM sessions").fetchall()
    secrets = {f"identity of {name or 'the server'}": key for name, key in identities}
    for client, number, data in sessions:
        state, of = load(data), f"in round {number} of {client}"
        names = [advert.client for advert in state.adverts]
        secrets[f"sealing key {of}"] = state.sealing.private_key
        secrets[f"masking key {of}"] = state.masking.private_key
        secrets[f"seed {of}"] = state.self_mask
        owners = [client, *(names[place] for place in state.sharers)]
        pairs = [state.own_shares, *state.shares]
        for owner, pair in zip(owners, pairs, strict=False):
            if pair:
                secrets[f"key share in round {number} of {owner} at {client}"] = pair[:33]
                secrets[f"seed share in round {number} of {owner} at {client}"] = pair[33:]
        for other, name in enumerate(names if state.masking.private_key else []):
            if name != client:
                seed = pairwise_seed(
                    state.masking, state.adverts, state.binding, state.place, other
                )
                secrets[f"pair seed {of} and {name}"] = seed
    return {name: secret for name, secret in secrets.items() if secret}


# ----------------------------------------------------------- processes that say all they can
class PerProcess(logging.Handler):
    """Writes to a file for each process."""

    def __init__(self, folder: Path) -> None:
        super().__init__(logging.DEBUG)
        self._folder = folder
        self.setFormatter(logging.Formatter("%(name)s %(levelname)s %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        with (self._folder / f"{os.getpid()}.log").open("a") as file:
            file.write(self.format(record) + "\n")


def stay_at_debug(logger: logging.Logger, _level: int | str) -> None:
    """In place of `setLevel`: nobody turns a logger down."""
    logging.Logger.setLevel(logger, logging.DEBUG)


def log_everything(folder: Path) -> None:
    """Every logger that is there or comes says everything, in a file for each process."""
    folder.mkdir()
    handler = PerProcess(folder)
    loggers = [logging.getLogger(name) for name in list(logging.root.manager.loggerDict)]
    for logger in [logging.root, *loggers]:
        kind = type(logger)
        logger.__class__ = type(f"Loud{kind.__name__}", (kind,), {"setLevel": stay_at_debug})
        logger.setLevel(logging.DEBUG)
    logging.setLoggerClass(
        type("LoudLogger", (logging.getLoggerClass(),), {"setLevel": stay_at_debug})
    )
    logging.root.addHandler(handler)
    for logger in loggers:
        if not logger.propagate:
            logger.addHandler(handler)


def loudly(folder: Path, act: Callable[[Path], None]) -> None:
    """In a process of its own: `act`, with all that it says in `folder`."""
    for name, number in (("stdout", 1), ("stderr", 2)):
        file = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    # By lines: a worker that is ended takes what it has not written yet with it.
    sys.stdout, sys.stderr = (os.fdopen(number, "w", 1, closefd=False) for number in (1, 2))
    (folder / "server").write_text(str(os.getpid()))
    os.chdir(folder)
    torch.set_num_threads(1)
    log_everything(folder / "logs")
    act(folder)


def run_loudly(folder: Path, act: Callable[[Path], None]) -> int:
    """`loudly` to its end; the exit code."""
    process = multiprocessing.get_context("forkserver").Process(target=loudly, args=(folder, act))
    process.start()
    process.join(DEADLINE)
    code = process.exitcode
    if code is None:
        process.kill()
        process.join()
        raise AssertionError(f"still running after {DEADLINE} s")
    return code


@dataclass(frozen=True)
class Traces:
    """Everything that such a process left behind."""

    folder: Path

    @cached_property
    def logs(self) -> dict[int, bytes]:
        """By process."""
        return {int(p.stem): p.read_bytes() for p in (self.folder / "logs").iterdir()}

    @cached_property
    def of_server(self) -> bytes:
        """Its log."""
        return self.logs[int((self.folder / "server").read_text())]

    @cached_property
    def output(self) -> bytes:
        """Of all processes."""
        return (self.folder / "stdout").read_bytes() + (self.folder / "stderr").read_bytes()

    @cached_property
    def files(self) -> dict[str, bytes]:
        """Every file of the run but the sites' own."""
        return {
            name: data for name, data in files_of(self.folder / "run").items() if not is_sites(name)
        }

    @cached_property
    def sites(self) -> bytes:
        """The sites' own files, one after the other."""
        found = files_of(self.folder / "run").items()
        return b"".join(data for name, data in found if is_sites(name))


def is_sites(name: str) -> bool:
    return name.startswith("sites.db")


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# ------------------------------------- a federation whose sites keep their errors to themselves
class Notes(torch.utils.data.Dataset[tuple[torch.Tensor, int]]):
    """Notes that a site reads when asked, with a trouble of its own in one round."""

    def __init__(self, seed: int, metrics: Path, trouble: Mapping[int, str]) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._inputs = torch.randn(12, 4, generator=generator)
        self._metrics, self._trouble = metrics, trouble

    def __len__(self) -> int:
        return len(self._inputs)

    def __getitem__(self, place: int) -> tuple[torch.Tensor, int]:
        trouble = self._trouble.get(line_count(self._metrics) + 1)
        if trouble == "quotes":
            try:
                raise KeyError(LABEL)
            except KeyError as error:
                raise ValueError(f"the note '{TEXT}' has no known label: {LABEL}") from error
        if trouble == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        inputs = self._inputs[place]
        return inputs, int(inputs[:3].argmax())


def hold(folder: Path) -> None:
    """Server and sites as they are when deployed, but in one machine's processes.

    All that crosses the network and all secrets of each round are kept in `folder`.
    """
    from flwr.app import Context, Message

    from fedtune.adapter.lora import LoRA
    from fedtune.audit.log import AuditLog
    from fedtune.config import Policy, parse_config
    from fedtune.deploy.server_audit import ServerAudit
    from fedtune.deploy.site_audit import AuditedMachine
    from fedtune.flower import internals
    from fedtune.flower.client_app import make_client_app
    from fedtune.flower.grid import KIND, LocalGrid, message_handler
    from fedtune.flower.pool import ForkPool
    from fedtune.records import RoundRecord
    from fedtune.report.progress import make_progress
    from fedtune.round.client import ClientMachine
    from fedtune.round.terms import make_quantizer, make_ring
    from fedtune.simulation.job import custom_job
    from fedtune.simulation.run import Options, Simulation, create_run
    from fedtune.simulation.sites import Sites

    class Network(LocalGrid):
        """Somebody listens, and looks at the sites' disks after each exchange."""

        def send_and_receive(
            self, messages: Iterable[Message], *, timeout: float | None = None
        ) -> Iterator[Message]:
            sent = list(messages)
            keep("requests", *(internals.message_to_bytes(message).hex() for message in sent))
            for message in super().send_and_receive(sent, timeout=timeout):
                keep("answers", internals.message_to_bytes(message).hex())
                yield message
            now = disks()
            for name, secret in of_sites(path / "sites.db").items():
                seen = bool(found_in(now, [spelled(name, secret)]))
                keep("secrets", json.dumps([name, secret.hex(), seen]))

    def keep(name: str, *lines: str) -> None:
        with (folder / name).open("a") as file:
            file.writelines(f"{line}\n" for line in lines)

    def disks() -> bytes:
        return b"".join(file.read_bytes() for file in sorted(path.glob("sites.db*")))

    path = folder / "run"
    troubles = {QUOTES: {2: "quotes"}, DIES: {3: "dies"}, SHY: {4: "quotes"}}
    rows = [
        (name, Notes(seed, path / "metrics.jsonl", troubles.get(name, {})), None)
        for seed, name in enumerate(NAMES)
    ]
    test = [(torch.eye(4)[place], place) for place in range(3)]
    torch.manual_seed(5)
    module = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3))
    settings = ("update.clip=2.0", "update.bits=16", "secagg.enabled=true", "train.lr=0.05")
    small = ("train.steps=3", "train.batch-size=6", "aggregate.weighting=uniform")
    config = parse_config("", "canary", [*settings, *small, f"rounds.count={ROUNDS}"])
    job = custom_job(
        config, module, LoRA(rank=2, targets=("0",), also_train=("2",)), rows, test, None
    )

    with create_run(job, path, references=False) as run:
        sites = Sites(path / "sites.db", list(NAMES))

        def machine(place: int) -> ClientMachine:
            membership = sites.membership(NAMES[place])
            if NAMES[place] == SHY:
                membership = replace(membership, policy=Policy())
            return job.machine(place, membership)

        def of_node(context: Context) -> Audited:
            return Audited(int(context.node_config["partition-id"]))

        class Audited:
            """A site's machine with an audit log, open while it is asked something."""

            def __init__(self, place: int) -> None:
                self._place = place

            def __getattr__(self, question: str) -> Callable[[bytes], bytes]:
                def ask(payload: bytes) -> bytes:
                    membership = sites.membership(name := NAMES[self._place])
                    with AuditLog(path / f"audit-{name}.jsonl", membership.identity) as log:
                        site = AuditedMachine(machine(self._place), membership, log)
                        return getattr(site, question)(payload)

                return ask

        adapter = run.journal.last_state()[1].adapter

        def on_round(record: RoundRecord) -> None:
            """Keep what a site has learned in the round."""
            nonlocal adapter
            local = machine(NAMES.index(CALM))._local
            learned = local.train(adapter, run.journal.identity()["run_id"], record.round)
            keep("losses", repr(learned.loss))
            update = learned.update
            quantizer = make_quantizer(config, len(update), len(NAMES))
            rng = local.rounding(record.round)
            integers = quantizer.encode(update, local.train_examples, 1.0, rng)
            ring = make_ring(quantizer, len(NAMES))
            packed = np.frombuffer(ring.pack(ring.lower(integers)), np.uint8)
            vectors = {"update": update, "trained": adapter + update, "integers": integers}
            np.savez(folder / f"{record.round}.npz", packed=packed, **vectors)
            (folder / f"{record.round}.disk").write_bytes(disks())
            sites.close()  # a worker may be forked from this process later
            adapter = run.journal.last_state()[1].adapter

        sites.close()
        handler = message_handler(make_client_app(of_node), len(NAMES), wire=True)
        pool = ForkPool({KIND: handler}, 2)
        try:
            grid = Network(pool, len(NAMES))
            progress = make_progress()
            audit = ServerAudit(sites.authority, job, run)
            watchers = [audit]
            simulation = Simulation(job, run, Options(0), progress, on_round, grid, sites, watchers)
            outcome = simulation.execute()
            assert outcome.error is None
            said = [outcome, sites, sites.authority, sites.membership(CALM), machine(0), run, job]
            print(*(f"{thing!r} {thing!s}" for thing in said))
        finally:
            pool.close()
            sites.close()


@dataclass(frozen=True)
class Federation(Traces):
    """What `hold` left behind."""

    @cached_property
    def kept(self) -> list[tuple[str, bytes, bool]]:
        """Each secret that a site ever had on its disk: name, and if it was found there."""
        lines = {line: json.loads(line) for line in read_lines(self.folder / "secrets")}
        return [(name, bytes.fromhex(secret), seen) for name, secret, seen in lines.values()]

    @cached_property
    def secrets(self) -> list[Spelled]:
        """All keys, seeds and shares."""
        found = {name: secret for name, secret, _ in self.kept}
        return [spelled(name, secret) for name, secret in found.items()]

    @cached_property
    def updates(self) -> list[Spelled]:
        """What one site has learned in each round, as floats and as integers before masking."""
        found = []
        for number in range(1, ROUNDS + 1):
            with np.load(self.folder / f"{number}.npz") as file:
                size = len(file["update"])
                for name, vector in file.items():
                    of = f"{name} of {CALM} in round {number}"
                    if name == "packed":
                        middle = len(vector) // 2
                        found.append(spelled(of, vector[middle : middle + 32].tobytes()))
                        continue
                    # Weights of the classifier, which change in every round.
                    part = vector[size - 3 - FLOATS : size - 3]
                    assert len(set(part.tolist())) == FLOATS
                    found.append(numbers(of, part))
        return found

    @cached_property
    def requests(self) -> list[bytes]:
        return [bytes.fromhex(line) for line in read_lines(self.folder / "requests")]

    @cached_property
    def answers(self) -> list[bytes]:
        return [bytes.fromhex(line) for line in read_lines(self.folder / "answers")]


def read_lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    """A masked run in whose second round a site's error quotes a note, in whose third one is
    killed in training, and in whose fourth one fails that does not tell the server."""
    folder = tmp_path_factory.mktemp("federation")
    code = run_loudly(folder, hold)
    assert code == 0, (folder / "stderr").read_text()
    return Federation(folder)


QUOTED = [words("text", TEXT), words("label", LABEL)]


class TestFederation:
    def test_it_went_as_arranged(self, federation: Federation) -> None:
        metrics = read_metrics(federation.folder / "run")
        assert [list(row["failed"]) for row in metrics] == [[], [QUOTES], [DIES], []]
        assert metrics[1]["failed"][QUOTES] == "raised ValueError"
        assert "SIGKILL" in metrics[2]["failed"][DIES]
        # The logs are there, Flower's too, and the sites' own have what the server's has not.
        assert b"flwr INFO" in federation.of_server
        assert len(federation.logs) >= 3
        logs = b"".join(federation.logs.values())
        assert logs.count(f"ValueError: the note '{TEXT}'".encode()) == 2
        assert f"{SHY}: training failed in round 4".encode() in logs

    def test_the_secrets_are_those_of_the_run(self, federation: Federation) -> None:
        """Each was on a site's disk at some time, spelled as the search spells it."""
        seen = {name for name, _, seen in federation.kept if seen}
        names = [secret.name for secret in federation.secrets]
        assert {name for name in names if not name.startswith("pair seed")} == seen
        kinds = Counter(name.partition(" in round ")[0] for name in names if " in " in name)
        everyone, masking = 4 * ROUNDS, 4 * ROUNDS - 2
        assert kinds == {
            "sealing key": everyone,
            "masking key": everyone,
            "seed": everyone,
            "pair seed": everyone * 3,
            # Each site's of each, but for the two that never masked: they kept their own only.
            "key share": masking * 4 + 2,
            "seed share": masking * 4 + 2,
        }
        assert len(names) == sum(kinds.values()) + len(NAMES) + 1

    def test_no_key_seed_or_share_is_in_any_log_or_output(self, federation: Federation) -> None:
        for log in federation.logs.values():
            assert found_in(log, federation.secrets) == []
        assert found_in(federation.output, federation.secrets) == []

    def test_no_key_seed_or_share_is_in_what_the_server_writes(
        self, federation: Federation
    ) -> None:
        assert {"journal.db", "metrics.jsonl", "report.html"} < set(federation.files)
        for name, data in federation.files.items():
            assert found_in(data, federation.secrets) == [], name

    def test_an_error_that_quotes_a_note_does_not_reach_the_server(
        self, federation: Federation
    ) -> None:
        for answer in federation.answers:
            assert found_in(answer, QUOTED) == []
        assert found_in(federation.of_server + federation.output, QUOTED) == []
        for name, data in federation.files.items():
            assert found_in(data, QUOTED) == [], name

    def test_only_shares_that_are_revealed_cross_the_network(self, federation: Federation) -> None:
        """And of those of one client's, in one round, only of one kind."""
        assert len(federation.requests) == len(federation.answers) > ROUNDS * 5 * 3
        shares = [secret for secret in federation.secrets if " share " in secret.name]
        others = [secret for secret in federation.secrets if " share " not in secret.name]
        for message in (*federation.requests, *federation.answers):
            assert found_in(message, others) == []
        for request in federation.requests:
            assert found_in(request, shares) == []
        revealed = [name for answer in federation.answers for name in found_in(answer, shares)]
        expected = []
        for row in read_metrics(federation.folder / "run"):
            for holder in row["clients"]:
                of = f"in round {row['round']} of"
                expected += [f"seed share {of} {name} at {holder}" for name in row["clients"]]
                expected += [f"key share {of} {name} at {holder}" for name in row["failed"]]
        assert sorted(revealed) == sorted(expected)

    def test_what_a_site_has_learned_is_nowhere(self, federation: Federation) -> None:
        for log in federation.logs.values():
            assert found_in(log, federation.updates) == []
        for message in (*federation.requests, *federation.answers):
            assert found_in(message, federation.updates) == []
        for name, data in federation.files.items():
            assert found_in(data, federation.updates) == [], name
        assert found_in(federation.sites + federation.output, federation.updates) == []

    def test_audit_logs_hold_nothing_that_was_learned(self, federation: Federation) -> None:
        """That no secret, update, text or label is in them is tested with the other files."""
        logs = {name for name in federation.files if name.startswith("audit")}
        assert logs == {"audit.jsonl", *(f"audit-{name}.jsonl" for name in NAMES)}
        losses = [loss[:8].encode() for loss in read_lines(federation.folder / "losses")]
        assert len(set(losses)) == ROUNDS
        failed = []
        for name in sorted(logs):
            data = federation.files[name]
            assert b'"round":4' in data
            assert not any(loss in data for loss in losses)
            events = [json.loads(line) for line in data.splitlines()]
            failed += [e["details"] for e in events if e["event"] == "request-failed"]
        # The trouble of the one that tells is there by its kind, that of the shy one is not.
        assert [(f["request"], f["round"], f["reason"]) for f in failed] == [
            ("train", 2, "ValueError")
        ]

    def test_the_server_forgets_the_masked_values(self, federation: Federation) -> None:
        from fedtune.flower.envelope import unwrap
        from fedtune.flower.internals import message_from_bytes
        from fedtune.wire.envelope import Kind, read_envelope
        from fedtune.wire.v1 import messages_pb2 as pb

        bodies = []
        for answer in federation.answers:
            message = message_from_bytes(answer)
            if message.has_content() and message.metadata.message_type == "train":
                envelope = read_envelope(unwrap(message), 1 << 20)
                assert envelope.kind is Kind.UPDATE
                bodies.append(pb.MaskedUpdate.FromString(envelope.body).values)
        assert len(bodies) == 4 * ROUNDS - 2
        masked = [spelled("masked values", body[:32]) for body in bodies]
        for name, data in federation.files.items():
            assert found_in(data, masked) == [], name
        assert found_in(federation.of_server + federation.sites, masked) == []

    def test_a_site_forgets_what_it_needs_no_more(self, federation: Federation) -> None:
        """Between rounds its disk holds what it has revealed, and what a lost client had begun."""
        path = federation.folder / "run" / "sites.db"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert [file.name for file in path.parent.glob("sites.db*")] == ["sites.db"]
        identities = {s.name for s in federation.secrets if s.name.startswith("identity")}
        assert len(identities) == len(NAMES) + 1
        for row in read_metrics(federation.folder / "run"):
            of = f"in round {row['round']} of"
            left = {f"key share {of} {a} at {b}" for a in row["failed"] for b in row["clients"]}
            left |= {f"seed share {of} {a} at {b}" for a in row["clients"] for b in row["clients"]}
            for lost in row["failed"]:
                shares = {f"{kind} share {of} {lost} at {lost}" for kind in ("key", "seed")}
                left |= {f"{what} {of} {lost}" for what in ("sealing key", "masking key", "seed")}
                left |= shares
            disk = (federation.folder / f"{row['round']}.disk").read_bytes()
            assert set(found_in(disk, federation.secrets)) == identities | left
        # Nothing was lost in the last round, and the run's end adds nothing.
        assert not row["failed"]
        assert set(found_in(path.read_bytes(), federation.secrets)) == identities | left


# ------------------------------------------------------------------------ the command itself
def command(arguments: tuple[str, ...], _folder: Path) -> None:
    from fedtune.cli import main

    sys.argv = ["fedtune", *arguments]
    main()


@dataclass(frozen=True)
class Commanded(Traces):
    """What `fedtune simulate` left behind."""

    @cached_property
    def secrets(self) -> list[Spelled]:
        found = of_sites(self.folder / "run" / "sites.db")
        return [spelled(name, secret) for name, secret in found.items()]


@pytest.fixture(scope="module", params=["finished", "failed"])
def commanded(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    quick: list[str],
    client_folders: Path,
) -> Commanded:
    """A round from which one client disappears, or two when the masks are to be taken off."""
    folder = tmp_path_factory.mktemp("commanded")
    data = folder / "clinics"
    for source in sorted(client_folders.rglob("*.jsonl")):
        rows = [
            {"text": f"{row['text']} {TEXT}", "label": f"{LABEL} {row['label']}"}
            for row in read_rows(source)
        ]
        write_rows(data / source.relative_to(client_folders), rows)
    flags = {
        "finished": ("--drop", "0.2", "--drop-at", "train"),
        "failed": ("--drop", "0.5", "--drop-at", "reveal"),
    }[request.param]
    more = ("--data", str(data), "--rounds", "1", "--out", "run", "--wire", "--debug")
    code = run_loudly(folder, partial(command, (*quick, *more, *flags)))
    assert code == {"finished": 0, "failed": 1}[request.param], (folder / "stderr").read_text()
    return Commanded(folder)


class TestCommand:
    def test_no_key_seed_or_share_leaves_the_sites_own_file(self, commanded: Commanded) -> None:
        assert b"flwr INFO" in commanded.of_server
        assert b"absent, as rehearsed" in commanded.output
        shown = {**commanded.files, "logs": b"".join(commanded.logs.values())}
        for name, data in {**shown, "output": commanded.output}.items():
            assert found_in(data, commanded.secrets) == [], name
        own = [s.name for s in commanded.secrets if not s.name.startswith("pair seed")]
        assert found_in(commanded.sites, commanded.secrets) == own
        # Five identities, and what is left of those that did not come to the end.
        assert len(own) >= 5 + 5

    def test_no_text_leaves_the_data(self, commanded: Commanded, tiny_base: Path) -> None:
        from transformers import AutoTokenizer

        ids = AutoTokenizer.from_pretrained(tiny_base)(TEXT)["input_ids"][1:-1]
        assert len(ids) >= FLOATS
        canaries = [QUOTED[0], numbers("token ids", np.array(ids))]
        for name, data in files_of(commanded.folder / "run").items():
            assert found_in(data, canaries) == [], name
        logs = b"".join(commanded.logs.values())
        assert found_in(logs + commanded.output, canaries) == []

    def test_labels_are_what_the_model_answers_and_else_nowhere(self, commanded: Commanded) -> None:
        files = files_of(commanded.folder / "run")
        told = {name for name, data in files.items() if found_in(data, QUOTED[1:])}
        assert told == {"summary.json", "report.html", "adapter/passport.json"}
        assert len(read_summary(commanded.folder / "run")["labels"]) == 4
        logs = b"".join(commanded.logs.values())
        assert found_in(logs + commanded.output, QUOTED[1:]) == []


@pytest.mark.parametrize(
    "spell",
    [
        bytes,
        bytes.hex,
        lambda secret: secret.hex().upper(),
        lambda secret: base64.b64encode(secret).decode(),
        lambda secret: base64.b64encode(b"x" + secret + b"y").decode(),
        lambda secret: base64.urlsafe_b64encode(b"xy" + secret).decode(),
        repr,
        lambda secret: repr(list(secret)),
        lambda secret: json.dumps(list(secret), separators=(",", ":")),
        lambda secret: str(int.from_bytes(secret, "little")),
        lambda secret: f"0x{int.from_bytes(secret, 'big'):064x}",
        lambda secret: secret[:20],
    ],
)
@pytest.mark.parametrize("secret", [bytes(range(100, 132)), b"'" + bytes(range(200, 231))])
def test_the_search_finds_a_secret_in_every_spelling(
    spell: Callable[[bytes], str | bytes], secret: bytes
) -> None:
    text = spell(secret)
    data = b"a line with " + (text if isinstance(text, bytes) else text.encode()) + b" in it"
    assert found_in(data, [spelled("it", secret), spelled("not it", bytes(range(32)))]) == ["it"]


@pytest.mark.parametrize("kind", ["f4", "i8"])
def test_the_search_finds_a_vector_in_every_spelling(kind: str) -> None:
    values = np.random.default_rng(3).normal(size=FLOATS) * 1000
    vector = values.astype(kind)
    looked_for = [numbers("it", vector), numbers("not it", vector[::-1] + 1)]
    for text in (vector.tobytes(), str(vector.tolist()).encode(), vector.tobytes().hex().encode()):
        assert found_in(b"a line with " + text, looked_for) == ["it"]
