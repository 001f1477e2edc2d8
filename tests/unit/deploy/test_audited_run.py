"""What a server and a site write down, of real rounds with real sites, and when they stop."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from unit.round.masked_run import BIG, CLIENT_UNIT, RECORD_UNIT

from fedtune.adapter.lora import LoRA
from fedtune.audit.entry import Entry
from fedtune.audit.log import AuditLog
from fedtune.audit.verify import verify_log
from fedtune.config import OPEN_POLICY, Policy, load_policy, parse_config
from fedtune.deploy.server_audit import AUDIT, ServerAudit
from fedtune.deploy.site_audit import AuditedMachine
from fedtune.errors import AuditWriteError, PolicyRefusal, ServerUnreachable, WireError
from fedtune.privacy.accountant import Ledger
from fedtune.records import RoundRecord
from fedtune.report.progress import PlainProgress
from fedtune.round.masked import Authority
from fedtune.round.terms import client_release, record_release
from fedtune.secagg.keys import SERVER, Identity, Roster
from fedtune.simulation.folder import RunFolder
from fedtune.simulation.job import Job, JobClient, custom_job
from fedtune.simulation.run import Options, Outcome, Simulation, create_run
from fedtune.train.task import CustomTask
from fedtune.types import sha256_hex
from fedtune.wire import codec

Details = dict[str, Any]
FOUR = (7, 12, 5, 9)


def entries_of(path: Path) -> list[tuple[str, Details]]:
    """Events with their details, after the beginning of the log."""
    found = [Entry.read(line) for line in path.read_bytes().splitlines()]
    return [(entry.event, dict(entry.details)) for entry in found[1:]]


# ------------------------------------------------------------------------------------ at a site
class Audited:
    """A federation of `masked_run` whose first client keeps an audit log."""

    def __init__(self, federation: Any, folder: Path) -> None:
        self.federation, self.path = federation, folder / "audit.jsonl"
        self.name = federation.names[0]
        small = federation.small
        nothing = np.zeros(3, np.int64)
        self.job = Job(
            small.config,
            small.attached,
            CustomTask(),
            "base",
            "ab" * 32,
            "an adapter",
            tuple(
                JobClient(machine.name, machine._local.train_data, None, nothing)
                for machine in small.machines
            ),
            None,
            (),
            "data",
            (),
        )
        self.log: AuditLog | None = None
        self.restart()

    def restart(self) -> None:
        """The site's process ends and starts again."""
        if self.log is not None:
            self.log.close()
            self.federation.restart_sites()
        self.site = self.federation.membership(self.name)
        self.log = AuditLog(self.path, self.site.identity)
        machine = self.federation.machines[self.name]
        self.machine = AuditedMachine(machine, self.site, self.log)
        self.federation.machines[self.name] = self.machine

    @property
    def entries(self) -> list[tuple[str, Details]]:
        """All entries, once the log was verified by the roster's key."""
        verify_log(self.path, lambda name: self.site.roster.keys[name])
        return entries_of(self.path)


@pytest.fixture
def audited(masked_federation: Callable[..., Any], tmp_path: Path) -> Callable[..., Audited]:
    def make(*overrides: str, **more: Any) -> Audited:
        return Audited(masked_federation(*overrides, sizes=FOUR, **more), tmp_path)

    return make


def test_a_masked_round_at_a_site(audited: Callable[..., Audited], tmp_path: Path) -> None:
    found = audited(policy=Policy(min_cohort=2, rules=("fedavg", "krum"), max_update_norm=9.5))
    found.federation.round()
    (started, terms), joined, *asked = found.entries
    assert started == "site-started"
    assert terms["config"] == found.job.config.digest
    assert terms["roster"] == found.federation.authority.roster.digest.hex()
    assert terms["manifest"] == found.job.adapter.manifest.digest
    assert (terms["base"], terms["masked"], terms["rows"]) == ("ab" * 32, True, 7)
    assert (terms["privacy-unit"], terms["runs"]) == ("none", ())
    # The policy in full: it can be read like that of a client.toml.
    (tmp_path / "client.toml").write_text("\n".join(["[policy]", *terms["policy"]]))
    assert load_policy(tmp_path / "client.toml") == found.site.policy
    assert joined == ("run-joined", {"run": "run"})
    place = {"run": "run", "round": 1, "attempt": 1}
    assert asked == [
        ("request-answered", {"request": request, **place})
        for request in ("invite", "cohort", "train", "survivors", "unmasking")
    ]


def test_a_request_that_is_repeated_is_one_entry(audited: Callable[..., Audited]) -> None:
    found = audited()
    _, exchange = found.federation.open_until("train")
    request = exchange.requests[found.name]
    answer = found.machine.train(request)
    before = found.entries
    assert before[-1][1]["request"] == "train"
    assert [found.machine.train(request) for _ in range(3)] == [answer] * 3
    assert found.entries == before
    # A new process has not seen the entry: it says once more that it has answered.
    found.restart()
    assert [found.machine.train(request) for _ in range(3)] == [answer] * 3
    new = found.entries[len(before) :]
    assert [event for event, _ in new] == ["site-started", "request-answered"]
    assert new[0][1]["runs"] == ("run",)
    assert new[1] == before[-1]


def test_what_is_refused_is_told_with_its_reason(audited: Callable[..., Audited]) -> None:
    found = audited(policy=Policy(min_cohort=50))
    hello = codec.encode_hello_request("run\x1b[31m")
    assert found.machine.hello(hello)
    for _ in range(2):
        with pytest.raises(WireError):
            found.machine.converse(b"x" * BIG)
    with pytest.raises(WireError):
        found.machine.hello(b"x")
    _, exchange = found.federation.open_until("share")
    with pytest.raises(PolicyRefusal) as refusal:
        found.machine.converse(exchange.requests[found.name])
    told = found.entries[1:]
    assert told[0] == ("request-answered", {"request": "hello", "run": "run\x1b[31m"})
    assert [event for event, _ in told[1:3]] == ["request-refused"] * 2
    assert [details["request"] for _, details in told[1:3]] == ["converse", "hello"]
    assert "over the limit" in told[1][1]["reason"]
    place = {"run": "run", "round": 1, "attempt": 1}
    refused = {"request": "cohort", "reason": str(refusal.value), **place}
    assert told[-1] == ("request-refused", refused)
    assert all(len(details.get("reason", "")) <= 200 for _, details in told)


def test_of_an_error_that_could_quote_data_only_the_kind_is_told(
    audited: Callable[..., Audited], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = audited(base=(), policy=OPEN_POLICY)
    request = codec.encode_train_request(
        codec.TrainRequest(
            found.machine._machine._local.context("run", 1), found.federation.adapter
        )
    )

    def quotes(*_: object) -> None:
        raise ValueError("a note of a patient")

    monkeypatch.setattr(type(found.federation.small.trainer), "train", quotes)
    with pytest.raises(ValueError, match="a note"):
        found.machine.train(request)
    place = {"request": "train", "run": "run", "round": 1}
    assert found.entries[-1] == ("request-failed", {"reason": "ValueError", **place})


@pytest.mark.parametrize("unit", [CLIENT_UNIT, RECORD_UNIT])
def test_what_each_round_has_spent(audited: Callable[..., Audited], unit: tuple[str, ...]) -> None:
    """By the accountant, from as many releases as there were rounds."""
    found = audited(base=unit)
    spent = []
    config = found.job.config
    for number in (1, 2):
        found.federation.round()
        made = (
            client_release(config, found.job.adapter.manifest.size, number)
            if config.privacy.unit == "client"
            else record_release(config, FOUR[0], number)
        )
        spent.append(Ledger([made] * number).epsilon(config.privacy.delta))
    trained = [details for _, details in found.entries if details.get("request") == "train"]
    assert [details["epsilon"] for details in trained] == pytest.approx(spent)
    assert {details["delta"] for details in trained} == {config.privacy.delta}
    assert spent[1] > spent[0] > 0
    others = [details for _, details in found.entries if details.get("request") != "train"]
    assert not any("epsilon" in details for details in others)


def test_no_answer_leaves_a_site_that_cannot_write(audited: Callable[..., Audited]) -> None:
    found = audited()
    _, exchange = found.federation.open_until("train")
    request = exchange.requests[found.name]
    with found.path.open("ab") as file:
        file.write(b"x")
    for _ in range(2):
        with pytest.raises(AuditWriteError):
            found.machine.train(request)
    # The answer was on the site's disk already; it is given once it can be told.
    kept = found.site.store.answered(found.name, sha256(request).digest())
    found.restart()
    assert found.machine.train(request) == kept
    last = [event for event, _ in found.entries][-3:]
    assert last == ["torn-line-removed", "site-started", "request-answered"]


# -------------------------------------------------------------------------------- at the server
AUTHORITY = Authority(
    server := Identity.generate(SERVER),
    Roster({SERVER: server.public_key, "a": Identity.generate("a").public_key}),
)
CLIENTS = ("a", "b", "c", "d")


def make_job(*overrides: str) -> Job:
    torch.manual_seed(2)
    generator = np.random.default_rng(4)

    def rows(count: int) -> list[tuple[torch.Tensor, int]]:
        inputs = generator.normal(size=(count, 4)).astype(np.float32)
        return [(torch.from_numpy(row), int(row[:3].argmax())) for row in inputs]

    small = ("train.steps=2", "train.batch-size=4", "rounds.count=3", *overrides)
    config = parse_config("", "test", small)
    module = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
    lora = LoRA(rank=2, targets=("0",), also_train=("1",))
    data = [(name, rows(8), None) for name in CLIENTS]
    return custom_job(config, module, lora, data, rows(6), None)


def simulate(
    job: Job, run: RunFolder, on_round: Callable[[RoundRecord], None] | None = None
) -> Outcome:
    """A simulation that a server's audit log watches."""
    with ServerAudit(AUTHORITY, job, run) as audit:
        watchers = [audit]
        simulation = Simulation(
            job, run, Options(workers=0), PlainProgress(quiet=True), on_round, watchers=watchers
        )
        outcome = simulation.execute()
        audit.ended(outcome.summary)
    return outcome


@pytest.mark.parametrize("unit", [(), CLIENT_UNIT])
def test_a_run_at_the_server(tmp_path: Path, unit: tuple[str, ...]) -> None:
    job = make_job(*unit)
    with create_run(job, tmp_path / "run", references=False) as run:
        outcome = simulate(job, run)
        run_id = run.journal.identity()["run_id"]
    path = tmp_path / "run" / AUDIT
    verify_log(path, lambda _: server.public_key)
    (started, terms), *events = entries_of(path)
    assert (started, terms["run"], terms["sites"]) == ("server-started", run_id, CLIENTS)
    assert (terms["config"], terms["roster"]) == (job.config.digest, AUTHORITY.roster.digest.hex())
    assert (terms["masked"], terms["resumed-after-round"]) == (bool(unit), 0)
    joined = [("client-joined", {"client": name}) for name in CLIENTS]
    assert sorted(events[:4], key=str) == joined
    assert events[-1] == ("run-ended", {"status": "finished", "rounds": 3})
    rounds = [details for event, details in events if event == "round-committed"]
    assert len(events) == 4 + 3 + 1
    assert [details["round"] for details in rounds] == [1, 2, 3]
    assert [details["counted"] for details in rounds] == [r.clients for r in outcome.records]
    adapters = [details["adapter"] for details in rounds]
    assert adapters[-1] == sha256_hex(outcome.adapter.astype("<f4").tobytes())
    assert len(set(adapters)) == 3
    if unit:
        spent = [details["epsilon"] for details in rounds]
        assert spent == sorted(spent)
        assert (spent[-1], rounds[-1]["delta"]) == (outcome.summary.epsilon, 1e-5)
    else:
        assert not any("epsilon" in details for details in rounds)


def test_a_server_that_cannot_write_its_log_does_no_more(tmp_path: Path) -> None:
    """It stops after the round that is in the journal, which is told when it can be."""
    job, path = make_job(), tmp_path / "run" / AUDIT

    def disturb(record: RoundRecord) -> None:
        with path.open("ab") as file:
            file.write(b"x")

    with create_run(job, tmp_path / "run", references=False) as run:
        with pytest.raises(AuditWriteError, match="somebody else"):
            simulate(job, run, disturb)
        assert len(run.journal.records()) == 1
        assert simulate(job, run).summary.rounds == 3
    verify_log(path, lambda _: server.public_key)
    rounds = [details for event, details in entries_of(path) if event == "round-committed"]
    assert [details["round"] for details in rounds] == [1, 2, 3]
    assert [details.get("from-journal", False) for details in rounds] == [True, False, False]
    started = [details for event, details in entries_of(path) if event == "server-started"]
    assert [details["resumed-after-round"] for details in started] == [0, 1]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (KeyboardInterrupt(), "KeyboardInterrupt"),
        (ServerUnreachable("no\x1banswer"), "no\N{REPLACEMENT CHARACTER}answer"),
        (ValueError("who knows what this quotes"), "ValueError"),
    ],
)
def test_why_a_server_has_stopped(tmp_path: Path, error: BaseException, reason: str) -> None:
    job = make_job()
    with create_run(job, tmp_path / "run", references=False) as run:
        with suppress(type(error)), ServerAudit(AUTHORITY, job, run) as audit:
            audit.client_refused(7, "x" * 1000)
            audit.round_lost("too few\nclients")
            raise error
        *_, refused, lost, stopped = entries_of(run.path / AUDIT)
    assert refused == ("client-refused", {"node": 7, "reason": "x" * 199 + "…"})
    assert lost[1]["round"] == 1
    assert stopped == ("server-stopped", {"reason": reason})
