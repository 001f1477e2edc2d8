"""Worker processes: failures that stay with their task, deadlines, and who outlives whom."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedtune.flower.pool import Failed, ForkPool, InlinePool, Pool, Task


def _block(_payload: bytes) -> bytes:
    threading.Event().wait()
    raise AssertionError("unreachable")


def _raise(payload: bytes) -> bytes:
    raise ValueError(payload.decode())


def _kill_self(_payload: bytes) -> bytes:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")


def _exit(payload: bytes) -> bytes:
    os._exit(int(payload))


HANDLERS = {
    "double": lambda payload: payload * 2,
    "pid": lambda _payload: str(os.getpid()).encode(),
    "raise": _raise,
    "block": _block,
    "kill": _kill_self,
    "exit": _exit,
}


@pytest.fixture
def pool() -> Iterator[ForkPool]:
    made = ForkPool(HANDLERS, 2)
    yield made
    made.close()


def _tasks(*pairs: tuple[str, bytes]) -> list[Task]:
    return [Task(key, kind, lambda p=payload: p) for key, (kind, payload) in enumerate(pairs)]  # type: ignore[misc]


def _usable(pool: Pool) -> bool:
    """Whether the pool still has all its workers: as many processes answer."""
    tasks = _tasks(*[("double", bytes([key])) for key in range(6)])
    return dict(pool.run(tasks, timeout=30)) == {key: bytes([key]) * 2 for key in range(6)}


@pytest.mark.parametrize("make", [InlinePool, lambda handlers: ForkPool(handlers, 3)])
def test_every_task_has_its_own_result(make: Callable[..., Pool]):
    pool = make(HANDLERS)
    payloads = [os.urandom(key * 1000) for key in range(20)]
    payloads[3] = b"\0a\0b"
    results = list(pool.run(_tasks(*[("double", payload) for payload in payloads])))
    assert sorted(key for key, _ in results) == list(range(20))
    assert all(result == payloads[key] * 2 for key, result in results)
    assert list(pool.run([])) == []
    pool.close()


def test_large_payloads_pass_both_ways(pool: ForkPool):
    payload = os.urandom(20_000_000)
    results = dict(pool.run(_tasks(*[("double", payload)] * 3)))
    assert all(results[key] == payload * 2 for key in range(3))


def test_work_is_done_in_as_many_processes(pool: ForkPool):
    # Both tasks are running at the same time: each waits for the other's byte.
    a, b = os.pipe(), os.pipe()

    def meet(payload: bytes) -> bytes:
        mine, other = (a, b) if payload == b"a" else (b, a)
        os.write(mine[1], payload)
        return os.read(other[0], 1)

    meeting = ForkPool({"meet": meet}, 2)
    assert meeting.size == 2
    results = dict(meeting.run(_tasks(("meet", b"a"), ("meet", b"b")), timeout=30))
    assert results == {0: b"b", 1: b"a"}
    meeting.close()


def test_workers_are_not_this_process(pool: ForkPool):
    pids = {int(result) for _, result in pool.run(_tasks(*[("pid", b"")] * 8))}  # type: ignore[arg-type]
    assert os.getpid() not in pids
    assert pids <= {worker.pid for worker in pool._workers}


@pytest.mark.parametrize("make", [InlinePool, lambda handlers: ForkPool(handlers, 2)])
def test_a_task_that_raises_fails_alone(make: Callable[..., Pool]):
    pool = make(HANDLERS)
    tasks = _tasks(("double", b"a"), ("raise", b"who?"), ("double", b"b"), ("raise", b""))
    assert dict(pool.run(tasks)) == {
        0: b"aa",
        1: Failed("who?"),
        2: b"bb",
        3: Failed("ValueError"),
    }
    pool.close()


def test_a_worker_that_raised_goes_on(pool: ForkPool):
    before = {worker.pid for worker in pool._workers}
    list(pool.run(_tasks(*[("raise", b"x")] * 4)))
    assert {worker.pid for worker in pool._workers} == before
    assert _usable(pool)


def test_a_worker_that_is_killed_fails_its_task_and_is_replaced(pool: ForkPool):
    tasks = _tasks(("double", b"a"), ("kill", b""), *[("double", b"b")] * 6, ("exit", b"3"))
    results = dict(pool.run(tasks))
    assert {key for key, result in results.items() if isinstance(result, Failed)} == {1, 8}
    assert "SIGKILL" in results[1].reason  # type: ignore[union-attr]
    assert "3" in results[8].reason  # type: ignore[union-attr]
    assert pool.size == 2
    assert _usable(pool)


def test_all_workers_killed_at_once(pool: ForkPool):
    results = dict(pool.run(_tasks(*[("kill", b"")] * 5)))
    assert all("SIGKILL" in result.reason for result in results.values())  # type: ignore[union-attr]
    assert len(results) == 5
    assert _usable(pool)


def test_a_worker_that_died_while_idle_costs_no_task(pool: ForkPool):
    victim = pool._workers[0].pid
    os.kill(victim, signal.SIGKILL)
    os.waitid(os.P_PID, victim, os.WEXITED | os.WNOWAIT)
    assert _usable(pool)


def test_after_a_worker_died_while_idle_the_pool_is_whole_again(pool: ForkPool):
    victim = pool._workers[1].pid
    os.kill(victim, signal.SIGKILL)
    os.waitid(os.P_PID, victim, os.WEXITED | os.WNOWAIT)
    results = dict(pool.run(_tasks(*[("double", b"x")] * 5)))
    failed = [result for result in results.values() if isinstance(result, Failed)]
    assert len(failed) <= 1
    assert len(results) == 5
    assert _usable(pool)


def test_a_task_that_hangs_is_ended_at_its_deadline(pool: ForkPool):
    started = time.monotonic()
    tasks = _tasks(("block", b""), *[("double", b"x")] * 4, ("block", b""))
    results = dict(pool.run(tasks, timeout=1.0))
    # Two hang at most one after the other; far from for ever.
    assert 1.0 <= time.monotonic() - started < 8
    assert {key for key, result in results.items() if isinstance(result, Failed)} == {0, 5}
    assert "1 s" in results[0].reason  # type: ignore[union-attr]
    assert _usable(pool)


def test_a_deadline_runs_from_the_start_of_its_own_task():
    # Five tasks of 0.3 s one after the other take longer than the 1 s that each may take.
    pool = ForkPool({"wait": lambda _: str(threading.Event().wait(0.3)).encode()}, 1)
    results = dict(pool.run(_tasks(*[("wait", b"")] * 5), timeout=1.0))
    assert results == dict.fromkeys(range(5), b"False")
    pool.close()


def test_a_slow_caller_makes_no_task_late():
    ours, theirs = os.pipe()
    pool = ForkPool({"now": lambda p: p, "told": lambda _: os.read(ours, 1)}, 2)
    results = {}
    for key, result in pool.run(_tasks(("now", b"n"), ("told", b"")), timeout=0.5):
        results[key] = result
        if key == 0:
            os.write(theirs, b"x")  # now the other task is done at once
            time.sleep(0.8)
    pool.close()
    assert results == {0: b"n", 1: b"x"}


def test_a_caller_that_stops_early_leaves_a_usable_pool(pool: ForkPool):
    before = {worker.pid for worker in pool._workers}
    results = pool.run(_tasks(("double", b"a"), ("block", b""), *[("double", b"x")] * 50))
    assert next(results) == (0, b"aa")
    results.close()  # type: ignore[attr-defined]
    after = {worker.pid for worker in pool._workers}
    assert len(after) == 2
    assert before - after  # the one that hung is gone
    for pid in before - after:
        assert not Path(f"/proc/{pid}").exists()
    assert _usable(pool)


def test_a_payload_that_cannot_be_made_leaves_a_usable_pool(pool: ForkPool):
    tasks = [*_tasks(("double", b"a")), Task(1, "double", lambda: 1 // 0)]  # type: ignore[arg-type, return-value]
    with pytest.raises(ZeroDivisionError):
        list(pool.run(tasks))
    assert _usable(pool)


def test_payloads_are_made_when_a_worker_is_free():
    pool = ForkPool({"pass": lambda payload: payload}, 1)
    made: list[int] = []

    def make(key: int) -> Callable[[], bytes]:
        return lambda: made.append(key) or b"x"  # type: ignore[func-returns-value]

    results = pool.run([Task(key, "pass", make(key)) for key in range(5)])
    for count, _ in enumerate(results, start=1):
        assert len(made) <= count + 1
    assert made == list(range(5))
    pool.close()


def test_close_ends_all_workers():
    pool = ForkPool(HANDLERS, 3)
    pids = [worker.pid for worker in pool._workers]
    pool.close()
    assert [pid for pid in pids if Path(f"/proc/{pid}").exists()] == []


def test_start_is_called_in_each_worker_and_in_its_replacement():
    state = {"started": 0}

    def start(_nothing: bytes) -> bytes:
        state["started"] += 1
        return b""

    handlers = {"ask": lambda _: str(state["started"]).encode(), "kill": _kill_self}
    pool = ForkPool(handlers, 2, start)
    list(pool.run(_tasks(("kill", b""))))
    results = dict(pool.run(_tasks(*[("ask", b"")] * 6)))
    assert results == dict.fromkeys(range(6), b"1")
    assert state["started"] == 0
    pool.close()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_worker_holds_the_parents_end_of_a_pipe():
    # Else a sibling would never see its pipe end when the parent dies.
    def sockets(_payload: bytes) -> bytes:
        links = []
        for entry in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                links.append(str(entry.readlink()))
        return "\n".join(links).encode()

    pool = ForkPool({"sockets": sockets, "kill": _kill_self}, 3)
    list(pool.run(_tasks(("kill", b""))))  # a replacement is forked later than its siblings
    descriptors = [worker.pipe.fileno() for worker in pool._workers]
    ours = {str(Path(f"/proc/self/fd/{number}").readlink()) for number in descriptors}
    for _, result in pool.run(_tasks(*[("sockets", b"")] * 12)):
        assert isinstance(result, bytes)
        assert ours.isdisjoint(result.decode().splitlines())
    assert len(ours) == 3
    pool.close()


_PARENT = """
import os, threading
from fedtune.flower.pool import ForkPool, Task

def block(_):
    threading.Event().wait()

pool = ForkPool({"pid": lambda p: str(os.getpid()).encode(), "block": block}, 3)
print(*[worker.pid for worker in pool._workers], flush=True)
# One worker hangs in a task, the other two are idle.
for key, result in pool.run([Task(0, "block", lambda: b""), Task(1, "pid", lambda: b"")]):
    print("ready", flush=True)
"""


def _alive(pid: int) -> bool:
    """Whether the process runs; one that only waits to be reaped does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_workers_end_with_a_parent_that_is_killed(child_environment):
    arguments = [sys.executable, "-c", _PARENT]
    with subprocess.Popen(arguments, env=child_environment, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pids = [int(word) for word in parent.stdout.readline().split()]
        assert parent.stdout.readline() == b"ready\n"
        assert all(_alive(pid) for pid in pids)
        parent.kill()
        parent.wait()
        try:
            deadline = time.monotonic() + 60  # of a slow machine
            while any(_alive(pid) for pid in pids) and time.monotonic() < deadline:
                time.sleep(0.01)
            assert [pid for pid in pids if _alive(pid)] == []
        finally:
            for pid in pids:
                if _alive(pid):
                    os.kill(pid, signal.SIGKILL)
