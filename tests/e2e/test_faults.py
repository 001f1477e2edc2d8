"""A deployed federation that is killed, left, slowed down and starved, and goes on."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
from deployed import MASKED, SIGNED, SITES, STAGES, Federation
from e2e_helpers import DEADLINE, adapter_bytes, wait_until
from process_changes import shift_clock, speak_wire_version

from fedtune.deploy.worker import Worker
from fedtune.errors import JobError, WireError


def test_the_server_and_a_site_are_killed_in_every_stage(
    make_federation: Callable[..., Federation], tmp_path: Path
) -> None:
    """Ten kills in one run; the adapter is that of a run in which nothing happened."""
    federation = make_federation(tables={"rounds": {"count": 11}})
    server = federation.server()
    clients = {name: federation.warm_client(name) for name in SITES}
    *others, held = SITES
    for stage in STAGES:
        with federation.held(held, stage) as number:
            federation.await_stage(others, number, stage)
            server = federation.restart_server(server)
        federation.await_commit(number)
    for stage in STAGES:
        with federation.held(held, stage) as number:
            federation.await_stage(others, number, stage)
            clients[held].kill()
        clients[held] = federation.warm_client(held)
        federation.await_commit(number)
    assert server.wait() == 0, server.stderr
    for client in clients.values():
        assert client.wait() == 0, client.stderr
    records = federation.check_finished()
    assert all(record["clients"] == list(SITES) for record in records)
    assert adapter_bytes(federation.run) == adapter_bytes(federation.simulate(tmp_path))


def test_a_training_process_that_dies_while_it_is_asked(
    make_federation: Callable[..., Federation],
) -> None:
    """Half of a question is in the pipe to it; the next question finds another one."""
    federation = make_federation()
    with Worker(federation.site(SITES[0]) / "client.toml") as worker:
        first, pipe = worker._process.pid, worker._process.stdin
        assert pipe is not None
        os.kill(first, signal.SIGSTOP)
        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, 4096)
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(ask, worker, b"t", bytes(6000))
            try:
                wait_until(lambda: waiting_bytes(pipe.fileno()) > 0, "the pipe to fill")
            finally:
                os.kill(first, signal.SIGKILL)
            with pytest.raises(JobError, match="the training process ended"):
                asked.result(DEADLINE)
        with pytest.raises(WireError):
            ask(worker, b"h", b"not a message")
        assert worker._process.pid != first


def ask(worker: Worker, question: bytes, payload: bytes) -> bytes:
    worker.ask(question, payload)
    return worker.answer()


def waiting_bytes(pipe: int) -> int:
    """Bytes that were written to a pipe and not yet read."""
    found = fcntl.ioctl(pipe, termios.FIONREAD, bytes(4))
    return int.from_bytes(found, sys.byteorder)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system of its own, of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    found = subprocess.run(mount, capture_output=True, text=True, check=False)
    if found.returncode:
        pytest.skip(f"no file system can be mounted here: {found.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """A file that takes all the room that is left."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    return filler


def test_sites_come_go_stall_and_differ(
    make_federation: Callable[..., Federation], small_disk: Path
) -> None:
    """One run: what happens to one site is said, and the others go on without it."""
    steady, restless, other = SITES, "clinic-3", "clinic-4"
    federation = make_federation(
        sites=(*steady, restless, other),
        tables={
            "rounds": {"count": 200, "timeout": 6.0},
            "secagg": {"colluding": 0.2, "stage-timeout": 15.0},
        },
        listen={"patience": 0.5},
    )
    federation.move_memory(restless, small_disk)
    server = federation.server()
    clocks = {"clinic-1": 600.0, "clinic-2": -600.0}
    clients = {
        name: federation.warm_client(name, [partial(shift_clock, clocks.get(name, 0.0))])
        for name in steady
    }
    newer = federation.warm_client(other, [partial(speak_wire_version, 2)])

    # Two clocks are wrong, and another version of fedtune wants to take part.
    assert federation.record(1)["clients"] == list(steady)
    for name, ahead in clocks.items():
        [found] = re.findall(r"its clock is ([+-]\d+) s from ours", clients[name].stderr)
        assert int(found) == pytest.approx(-ahead, abs=5)
    refused = "HelloRequest has wire version 1, this side speaks 2"
    wait_until(lambda: refused in newer.stderr, "the newer site to refuse")
    wait_until(lambda: refused in server.stderr, "the server to hear of it")

    # One joins late, leaves for two rounds, and comes back.
    late = federation.warm_client(restless)
    joined = federation.await_record(lambda r: restless in r["clients"], "the late site")
    assert joined > 1
    late.interrupt()
    assert late.wait() == 130
    gone = federation.await_record(
        lambda r: restless not in {*r["clients"], *r["failed"]}, "the site gone"
    )
    for number in (gone, gone + 1):
        assert federation.record(number)["clients"] == list(steady)
    late = federation.warm_client(restless)
    federation.await_record(lambda r: restless in r["clients"], "the site back")

    # Its training stalls: the round ends without it, and what it sends later is not counted.
    [training] = late.workers()
    with federation.held(restless, MASKED) as stalled:
        wait_until(lambda: federation.health().get("stage") == "train", "it to be asked")
        os.kill(training, signal.SIGSTOP)
    record = federation.record(stalled)
    os.kill(training, signal.SIGCONT)
    assert record["clients"] == list(steady)
    assert record["failed"] == {restless: "no answer within 6 s"}
    federation.await_stage([restless], stalled, MASKED)
    assert federation.await_record(lambda r: restless in r["clients"], "it again") > stalled

    # Its disk is full: it says so, and loses nothing.
    with federation.held(restless, MASKED) as full:
        filler = fill(small_disk)
    record = federation.record(full)
    assert record["clients"] == list(steady)
    assert record["failed"] == {
        restless: "this site's memory cannot be written: database or disk is full"
    }
    assert not federation.reached(restless, full, MASKED)
    filler.unlink()
    federation.await_record(lambda r: restless in r["clients"], "the site with room again")

    # Its training process is killed, and does not start again before its data are back.
    rows = federation.site(restless) / "train.jsonl"
    with federation.held(restless, MASKED) as killed:
        wait_until(lambda: federation.health().get("stage") == "train", "it to be asked")
        rows.rename(rows.with_suffix(".away"))
        os.kill(training, signal.SIGKILL)
    record = federation.record(killed)
    assert record["failed"] == {restless: "the training process does not start"}
    assert rows.name in late.stderr
    assert rows.name not in server.stderr
    rows.with_suffix(".away").rename(rows)
    federation.await_record(lambda r: restless in r["clients"], "the site with its data again")

    # Its values are in when it is killed, and the server too: the round ends without it.
    with federation.held(restless, SIGNED) as left:
        federation.await_stage(steady, left, SIGNED)
        late.kill()
        server = federation.restart_server(server)
    record = federation.record(left)
    assert record["clients"] == [*steady, restless]
    assert record["late"] == {restless: "asked to sign: not connected"}
    late = federation.warm_client(restless)
    federation.await_record(lambda r: restless in r["clients"], "the site after the restart")

    # The server is of another version: nobody takes part, and both sides say why.
    server.interrupt()
    assert server.wait() == 130
    assert "Traceback" not in (federation.run / "superlink.log").read_text()
    before = federation.committed()
    server = federation.server([partial(speak_wire_version, 2)])
    refused = "HelloRequest has wire version 2, this side speaks 1"
    for name in steady:
        wait_until(lambda c=clients[name]: refused in c.stderr, f"{name} to refuse")
    wait_until(lambda: server.stderr.count(refused) >= len(steady), "the server to hear of it")
    assert federation.committed() == before
    federation.restart_server(server)
    federation.await_record(lambda r: {*steady} <= {*r["clients"]}, "all of them again")
    records = federation.check()
    assert records[stalled - 1]["clients"] == records[full - 1]["clients"] == list(steady)
