"""Kills, Ctrl-C, dying workers and failing clients: what is left, and how the run goes on."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from e2e_helpers import (
    Audit,
    Command,
    Launcher,
    adapter_bytes,
    line_count,
    read_journal,
    read_metrics,
    read_summary,
    tree,
    wait_gone,
    wait_until,
)
from torch import nn

import fedtune
from fedtune.errors import ConfigError, DataError, JobError, RunFolderError, UsageError
from fedtune.records import RoundRecord

ROUNDS = 5
SECONDS_TO_DIE = 10.0


@pytest.fixture(scope="module")
def long_run(quick: list[str]) -> list[str]:
    """Arguments of a run with time enough between its rounds to be killed in them."""
    return [*quick, "--rounds", str(ROUNDS), "--set", "train.steps=12"]


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory, long_run: list[str]
) -> tuple[bytes, list[dict[str, Any]], list[str]]:
    """The same run without any trouble: adapter, metrics, and each change it made to files."""
    folder = tmp_path_factory.mktemp("whole")
    launcher = Launcher(folder, tmp_path_factory.mktemp("outputs"))
    log = tmp_path_factory.mktemp("logs") / "changes"
    code, command = launcher.run(*long_run, "--out", "run", audit=Audit(folder, log))
    assert code == 0, command.stderr
    return adapter_bytes(folder / "run"), read_metrics(folder / "run"), log.read_text().splitlines()


Whole = tuple[bytes, list[dict[str, Any]], list[str]]
TIMES = ("seconds", "train_seconds")


def without_times(metrics: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in TIMES} for row in metrics]


def assert_resumes(launcher: Launcher, run: Path, whole: Whole) -> None:
    """`--resume` ends where the run without trouble did, with each round once."""
    code, command = launcher.run("simulate", "--resume", run, "--workers", "2")
    assert code == 0, command.stderr
    assert_finished(run, whole)


def assert_finished(run: Path, whole: Whole) -> None:
    """The folder is that of the run without trouble, but for times and ids."""
    assert adapter_bytes(run) == whole[0]
    assert [row["round"] for row in read_metrics(run)] == list(range(1, ROUNDS + 1))
    assert read_metrics(run) == read_journal(run)
    assert without_times(read_metrics(run)) == without_times(whole[1])
    summary = read_summary(run)
    assert (summary["status"], summary["rounds"]) == ("finished", ROUNDS)
    assert sorted(path.name for path in run.iterdir() if not path.name.startswith(".")) == [
        "adapter",
        "config.toml",
        "journal.db",
        "journal.lock",
        "metrics.jsonl",
        "report.html",
        "sites.db",
        "summary.json",
        "tensorboard",
    ]
    assert len(list((run / "tensorboard").glob("events*"))) == 1


def assert_whole_files(run: Path) -> None:
    """What is in the folder after a kill is there whole, and the journal is a run's."""
    from safetensors.numpy import load_file

    assert (run / "config.toml").is_file()
    committed = len(read_journal(run))
    if (run / "metrics.jsonl").exists():
        text = (run / "metrics.jsonl").read_text()
        assert text == "" or text.endswith("\n")
        assert committed - 1 <= len(read_metrics(run)) <= committed
    if (run / "adapter").exists():
        assert load_file(run / "adapter" / "adapter_model.safetensors")
        json.loads((run / "adapter" / "passport.json").read_text())
    if (run / "summary.json").exists():
        read_summary(run)


def started(command: Command, metrics: Path, rounds: int) -> list[int]:
    """Wait until so many rounds are committed; the workers at that moment."""
    wait_until(lambda: line_count(metrics) >= rounds or not command.running, f"round {rounds}")
    assert command.running, command.stderr
    workers = command.workers()
    assert len(workers) == 2
    return workers


class TestKill:
    def test_the_installed_command_after_its_second_round(
        self, launcher: Launcher, long_run: list[str], whole: Whole
    ) -> None:
        run = launcher.folder / "run"
        command = launcher.cold(*long_run, "--out", "run")
        workers = started(command, run / "metrics.jsonl", 2)

        command.kill()

        wait_gone(workers, SECONDS_TO_DIE)
        assert_whole_files(run)
        assert_resumes(launcher, run, whole)

    @pytest.mark.parametrize("seed", [1, 2])
    def test_at_a_random_moment_in_a_round(
        self, seed: int, launcher: Launcher, long_run: list[str], whole: Whole
    ) -> None:
        chosen = random.Random(seed)
        run = launcher.folder / "run"
        command = launcher.warm(*long_run, "--out", "run")
        workers = started(command, run / "metrics.jsonl", chosen.randint(1, ROUNDS - 2))
        moment = time.monotonic() + chosen.random() * whole[1][-1]["seconds"]
        wait_until(lambda: time.monotonic() >= moment, "the moment")

        command.kill()

        wait_gone(workers, SECONDS_TO_DIE)
        assert_whole_files(run)
        assert_resumes(launcher, run, whole)

    def test_again_and_again(self, launcher: Launcher, long_run: list[str], whole: Whole) -> None:
        run = launcher.folder / "run"
        command = launcher.warm(*long_run, "--out", "run")
        for rounds in (1, 3):
            workers = started(command, run / "metrics.jsonl", rounds)
            # As good as a step that takes for ever: it cannot see that its pipe has ended.
            os.kill(workers[0], signal.SIGSTOP)
            command.kill()
            try:
                wait_gone(workers, SECONDS_TO_DIE)
            finally:
                with suppress(ProcessLookupError):
                    os.kill(workers[0], signal.SIGCONT)
            committed = len(read_journal(run))
            if rounds == 1:
                command = launcher.warm("simulate", "--resume", "run", "--workers", "2")
        assert committed >= 3
        assert_resumes(launcher, run, whole)

    @pytest.mark.parametrize("change", ["made", "first metrics", "adapter", "summary", "events"])
    def test_just_before_a_change_of_a_file(
        self, change: str, launcher: Launcher, long_run: list[str], whole: Whole, tmp_path: Path
    ) -> None:
        """SIGKILL at certain steps of making the folder and of writing the results."""
        names = whole[2]
        places = {
            "made": _nth(names, "os.rename .run", last=True),
            "first metrics": _nth(names, "open run/metrics.jsonl"),
            "adapter": _nth(names, "os.rename run/.adapter.new", last=True),
            "summary": _nth(names, "os.rename run/.tmp-", skip=1),
            "events": _nth(names, "os.rename run/tensorboard/.tmp-"),
        }
        run = launcher.folder / "run"
        audit = Audit(launcher.folder, launcher.folder / "changes", places[change])

        code, _ = launcher.run(*long_run, "--out", "run", audit=audit)

        assert code == -signal.SIGKILL
        if change == "made":
            assert not run.exists()
            code, command = launcher.run(*long_run, "--out", "run")
            assert code == 0, command.stderr
        else:
            assert_whole_files(run)
        assert_resumes(launcher, run, whole)

    def test_leaves_nothing_hidden_behind(
        self, launcher: Launcher, long_run: list[str], whole: Whole
    ) -> None:
        place = _nth(whole[2], "os.rename run/.tmp-", skip=1)
        audit = Audit(launcher.folder, launcher.folder / "changes", place)
        code, _ = launcher.run(*long_run, "--out", "run", audit=audit)
        assert code == -signal.SIGKILL
        code, _ = launcher.run("simulate", "--resume", "run", "--workers", "0")
        assert code == 0
        hidden = [name for name in tree(launcher.folder / "run") if "/." in f"/{name}"]
        assert hidden == []

    def test_a_finished_run_is_resumed_without_harm(
        self, launcher: Launcher, finished_run: tuple[Path, str, str]
    ) -> None:
        import shutil

        run = shutil.copytree(finished_run[0], launcher.folder / "run")
        before, summary = tree(run), read_summary(run)
        started_at = time.monotonic()

        code, command = launcher.run("simulate", "--resume", "run", "--workers", "0", "--json")

        assert code == 0, command.stderr
        assert time.monotonic() - started_at < 60
        after = tree(run)
        for name in ("config.toml", "metrics.jsonl", "adapter/adapter_model.safetensors"):
            assert after[name] == before[name]
        changing = ("peak_rss_mb", "name")
        again = read_summary(run)
        assert {k: v for k, v in again.items() if k not in changing} == {
            k: v for k, v in summary.items() if k not in changing
        }


def _nth(lines: Sequence[str], start: str, skip: int = 0, last: bool = False) -> int:
    """The number, from 1, of a change whose line starts so."""
    found = [number for number, line in enumerate(lines, 1) if line.startswith(start)]
    return found[-1] if last else found[skip]


class TestInterrupt:
    def test_ctrl_c_names_the_command_to_go_on_with(
        self, launcher: Launcher, long_run: list[str], whole: Whole
    ) -> None:
        command = launcher.cold(*long_run, "--out", "run")
        run = launcher.folder / "run"
        workers = started(command, run / "metrics.jsonl", 2)

        command.interrupt()

        assert command.wait() == 130
        wait_gone(workers, SECONDS_TO_DIE)
        assert "Traceback" not in command.stderr
        last = command.stderr.strip().splitlines()[-1]
        assert last == "fedtune: interrupted; go on with: fedtune simulate --resume run"
        assert read_summary(run)["status"] == "interrupted"
        assert read_summary(run)["rounds"] == len(read_metrics(run)) < ROUNDS
        assert_whole_files(run)
        # The words of the message, as a person would copy them.
        words = last.partition("go on with: fedtune ")[2].split()
        code, resumed = launcher.run(*words)
        assert code == 0, resumed.stderr
        assert_finished(run, whole)

    def test_ctrl_c_before_the_run_begins(self, launcher: Launcher, long_run: list[str]) -> None:
        command = launcher.cold(*long_run, "--out", "run")
        # Python has set its handler by the time it has opened torch's libraries.
        maps = Path(f"/proc/{command.pid}/maps")
        wait_until(lambda: "libtorch" in maps.read_text(), "the imports")

        command.interrupt()

        assert command.wait() == 130
        assert "Traceback" not in command.stderr
        assert command.stderr.count("\n") <= 1
        assert list(launcher.folder.iterdir()) == []

    def test_a_worker_that_is_killed_costs_its_client_one_round(
        self, launcher: Launcher, long_run: list[str]
    ) -> None:
        command = launcher.warm(*long_run, "--out", "run", "--set", "train.steps=40")
        run = launcher.folder / "run"
        workers = started(command, run / "metrics.jsonl", 1)

        os.kill(workers[0], signal.SIGKILL)

        assert command.wait() == 0, command.stderr
        metrics = read_metrics(run)
        assert [row["round"] for row in metrics] == list(range(1, ROUNDS + 1))
        failures = [(row["round"], *item) for row in metrics for item in row["failed"].items()]
        # Between two tasks a worker has no client; then the next task finds it dead.
        assert len(failures) <= 1
        for number, name, reason in failures:
            assert reason.endswith("its process was ended by SIGKILL (out of memory?)")
            assert name not in metrics[number - 1]["clients"]
            assert len(metrics[number - 1]["clients"]) == 3
            assert f"{name} failed" in command.stderr
            [client] = [c for c in read_summary(run)["per_client"] if c["name"] == name]
            assert (client["rounds_failed"], client["rounds_completed"]) == (1, ROUNDS - 1)
        assert read_summary(run)["status"] == "finished"
        assert failures or "evaluation failed" not in command.stderr

    def test_a_second_process_is_refused_and_does_no_harm(
        self, launcher: Launcher, long_run: list[str], whole: Whole
    ) -> None:
        command = launcher.warm(*long_run, "--out", "run")
        run = launcher.folder / "run"
        started(command, run / "metrics.jsonl", 1)

        code, second = launcher.run("simulate", "--resume", "run")

        assert code == 2
        assert "run is in use by another process" in second.stderr
        assert command.wait() == 0, command.stderr
        assert adapter_bytes(run) == whole[0]
        assert read_metrics(run) == read_journal(run)
        code, _ = launcher.run("simulate", "--resume", "run", "--workers", "0")
        assert code == 0  # the lock went with the process that held it


# ------------------------------------------------------------------------------ the Python API
class Linear(nn.Module):
    """Three classes from four numbers."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            self.inner = nn.Linear(4, 8)
            self.head = nn.Linear(8, 3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.inner(inputs)))


class Rows(torch.utils.data.Dataset[tuple[torch.Tensor, int]]):
    """Rows that a user reads when asked."""

    def __init__(self, seed: int, rows: int = 24) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._inputs = torch.randn(rows, 4, generator=generator)

    def __len__(self) -> int:
        return len(self._inputs)

    def __getitem__(self, place: int) -> tuple[torch.Tensor, int]:
        inputs = self._inputs[place]
        return inputs, int(inputs[:3].argmax())


class InRound(Rows):
    """Rows that do something of their own while the given round runs, read from the metrics."""

    def __init__(self, run: Path, number: int) -> None:
        super().__init__(9)
        self._metrics, self._number = run / "metrics.jsonl", number

    def __getitem__(self, place: int) -> tuple[torch.Tensor, int]:
        inputs, target = super().__getitem__(place)
        if line_count(self._metrics) + 1 == self._number:
            return self.trouble(inputs), target
        return inputs, target

    def trouble(self, inputs: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class Raises(InRound):
    def trouble(self, inputs: torch.Tensor) -> torch.Tensor:
        raise FileNotFoundError("scan-17.png is not there")


class NotANumber(InRound):
    def trouble(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs * float("nan")


class Blocks(InRound):
    def trouble(self, inputs: torch.Tensor) -> torch.Tensor:
        while True:
            signal.pause()


class Exits(InRound):
    def trouble(self, inputs: torch.Tensor) -> torch.Tensor:
        os._exit(3)


LORA = fedtune.LoRA(rank=2, targets=("inner",), also_train=("head",))
SETTINGS = {"train.steps": 3, "train.batch-size": 6, "train.lr": 0.02}


def clients(*others: fedtune.Client) -> list[fedtune.Client]:
    good = [fedtune.Client(f"good-{i}", Rows(i), Rows(10 + i, 30)) for i in (1, 2)]
    return [*good, *others]


def simulate(run: Path, federation: Sequence[fedtune.Client], **more: Any) -> fedtune.Run:
    arguments = {
        "adapter": LORA,
        "rounds": 3,
        "settings": SETTINGS,
        "out": run,
        "workers": 2,
        "quiet": True,
        **more,
    }
    return fedtune.simulate(Linear(), federation, **arguments)


class TestApi:
    @pytest.mark.parametrize(
        ("kind", "reason"),
        [
            (Raises, "raised FileNotFoundError: scan-17.png is not there"),
            (NotANumber, "the loss or the adapter is no longer finite"),
            (Blocks, "no answer within 3 s"),
            (Exits, "its process ended with status 3"),
        ],
    )
    def test_a_client_that_fails_in_one_round_is_left_out_of_it(
        self, kind: Callable[[Path, int], InRound], reason: str, tmp_path: Path
    ) -> None:
        path = tmp_path / "run"
        seen: list[RoundRecord] = []

        run = simulate(
            path,
            clients(fedtune.Client("bad", kind(path, 2))),
            settings={**SETTINGS, "rounds.timeout": 3},
            on_round=seen.append,
        )

        assert [record.round for record in seen] == [1, 2, 3]
        assert tuple(seen) == run.rounds
        assert [list(record.failed) for record in seen] == [[], ["bad"], []]
        assert seen[1].failed["bad"].startswith(reason)
        assert [record.clients for record in seen] == [
            ("bad", "good-1", "good-2"),
            ("good-1", "good-2"),
            ("bad", "good-1", "good-2"),
        ]
        assert run.summary.status == "finished"
        [bad] = [client for client in run.summary.per_client if client.name == "bad"]
        assert (bad.rounds_completed, bad.rounds_failed) == (2, 1)
        assert all(np.isfinite(tensor).all() for tensor in run.adapter.values())

    def test_a_failed_client_leaves_no_mark_on_the_adapter(self, tmp_path: Path) -> None:
        """The same as if it had not been there, and not as if it had sent nothing of weight."""

        class Never(Raises):
            def __getitem__(self, place: int) -> tuple[torch.Tensor, int]:
                raise OSError("no disk")

        path = tmp_path / "with"
        with_it = simulate(path, clients(fedtune.Client("bad", Never(path, 0))))
        without = simulate(tmp_path / "without", clients())
        for name, tensor in without.adapter.items():
            np.testing.assert_array_equal(with_it.adapter[name], tensor)

    @pytest.mark.parametrize("workers", [0, 2])
    def test_too_few_clients_end_the_run_and_resume_goes_on(
        self, tmp_path: Path, workers: int
    ) -> None:
        path, mended = tmp_path / "run", tmp_path / "mended"
        settings = {**SETTINGS, "rounds.min-clients": 3}

        class Mendable(Raises):
            def trouble(self, inputs: torch.Tensor) -> torch.Tensor:
                return inputs if mended.exists() else super().trouble(inputs)

        def go(resume: bool) -> fedtune.Run:
            federation = clients(fedtune.Client("bad", Mendable(path, 2)))
            return simulate(path, federation, settings=settings, resume=resume, workers=workers)

        with pytest.raises(JobError, match=r"round 2: 2 of 3 .*min-clients asks for 3.*scan-17"):
            go(resume=False)
        assert read_summary(path)["status"] == "failed"
        assert "scan-17.png" in read_summary(path)["warnings"][-1]
        assert [row["round"] for row in read_metrics(path)] == [1]
        assert (path / "adapter" / "passport.json").is_file()

        mended.touch()
        resumed = go(resume=True)

        assert [record.round for record in resumed.rounds] == [1, 2, 3]
        assert read_summary(path)["status"] == "finished"
        never = simulate(
            tmp_path / "whole", clients(fedtune.Client("bad", InRound(path, 99))), settings=settings
        )
        for name, tensor in never.adapter.items():
            np.testing.assert_array_equal(resumed.adapter[name], tensor)

    def test_the_command_line_fails_with_one_where_the_api_raises(
        self, launcher: Launcher, quick: list[str]
    ) -> None:
        # A learning rate at which every client's loss is soon no number.
        command = ("--set", "train.lr=1e30", "--set", "train.optimizer=sgd", "--out", "run")
        code, ended = launcher.run(*quick, *command)
        assert code == 1
        last = ended.stderr.strip().splitlines()[-1]
        assert last.startswith("fedtune: the run failed: round ")
        assert "clinic-0, clinic-1 and 2 more: the loss or the adapter is no longer finite" in last
        assert "lower train.lr" in last
        assert read_summary(launcher.folder / "run")["status"] == "failed"

    def test_what_a_run_gives_back_is_what_its_folder_holds(self, tmp_path: Path) -> None:
        rows = list(Rows(99, 60))
        federation = [fedtune.Client(name, list(Rows(i))) for i, name in enumerate("ab")]
        run = simulate(tmp_path / "run", federation, test=rows)
        assert run.path == tmp_path / "run"
        assert run.summary.to_json() == read_summary(run.path)
        assert [record.to_json() for record in run.rounds] == read_metrics(run.path)
        with torch.no_grad():
            answers = [int(run.model(rows[i][0][None]).argmax()) for i in range(60)]
        hits = [answer == rows[i][1] for i, answer in enumerate(answers)]
        assert run.accuracy == pytest.approx(np.mean(hits))
        assert run.summary.bytes_up > 0

    @pytest.mark.parametrize("kind", ["lazy", "labels of its own"])
    def test_a_common_test_set_for_data_sets_that_nobody_counted(
        self, kind: str, tmp_path: Path
    ) -> None:
        federation = [fedtune.Client("a", Rows(1))]
        if kind != "lazy":
            federation = [fedtune.Client("a", [(x, target % 2) for x, target in Rows(1)])]
        run = simulate(tmp_path / "run", federation, test=Rows(99, 60))
        assert run.accuracy is not None

    def test_texts_in_memory_and_a_loss_of_ones_own(self, tmp_path: Path, tiny_base: Path) -> None:
        rows = [(f"{word} number {i}", word) for i in range(6) for word in ("left", "right")]
        run = fedtune.simulate(
            str(tiny_base),
            [fedtune.Client("a", rows), fedtune.Client("b", rows[:6], rows[6:])],
            rounds=1,
            settings={"train.steps": 2},
            out=tmp_path / "texts",
            workers=0,
            quiet=True,
        )
        assert run.summary.labels == ("left", "right")
        own = simulate(
            tmp_path / "own",
            clients(),
            loss=lambda module, batch: ((module(batch[0]) - 1) ** 2).mean(),
        )
        assert own.rounds[-1].train_loss < own.rounds[0].train_loss  # type: ignore[operator]

    def test_resume_of_a_finished_run_trains_nothing(self, tmp_path: Path) -> None:
        first = simulate(tmp_path / "run", clients())
        seen: list[RoundRecord] = []
        second = simulate(tmp_path / "run", clients(), resume=True, on_round=seen.append)
        assert seen == []
        assert second.rounds == first.rounds
        for name, tensor in first.adapter.items():
            np.testing.assert_array_equal(second.adapter[name], tensor)

    def test_resume_with_other_clients_or_settings_is_refused(self, tmp_path: Path) -> None:
        simulate(tmp_path / "run", clients(), rounds=1)
        before = tree(tmp_path)
        other = [fedtune.Client("good-1", Rows(1)), fedtune.Client("new", Rows(2))]
        with pytest.raises(RunFolderError, match="data"):
            simulate(tmp_path / "run", other, rounds=1, resume=True)
        with pytest.raises(RunFolderError, match="configuration"):
            simulate(tmp_path / "run", clients(), rounds=2, resume=True)
        with pytest.raises(RunFolderError, match="exists already"):
            simulate(tmp_path / "run", clients(), rounds=1)
        assert tree(tmp_path) == before

    @pytest.mark.parametrize(
        ("more", "error", "says"),
        [
            ({"settings": {"rounds.count": 3}}, ConfigError, "rounds.count"),
            ({"settings": {"seed": 3, "adapter.rank": 2}}, ConfigError, "adapter.rank, seed"),
            ({"settings": {"train.step": 3}}, ConfigError, "train.steps"),
            ({"settings": {"train.lr": float("nan")}}, ConfigError, "train.lr"),
            ({"rounds": 0}, ConfigError, "rounds.count"),
            ({"adapter": fedtune.LoRA(targets=("outer",))}, ConfigError, "outer"),
            ({"adapter": fedtune.LoRA(also_train=("tail",))}, ConfigError, "tail"),
        ],
    )
    def test_wrong_arguments_are_told_and_nothing_is_written(
        self, more: dict[str, Any], error: type[Exception], says: str, tmp_path: Path
    ) -> None:
        with pytest.raises(error, match=says):
            simulate(tmp_path / "run", clients(), **more)
        assert list(tmp_path.iterdir()) == []

    def test_clients_that_are_none_are_told(self, tmp_path: Path, tiny_base: Path) -> None:
        twice = [fedtune.Client("a", Rows(1)), fedtune.Client("a", Rows(2))]
        with pytest.raises(UsageError, match="client"):
            simulate(tmp_path / "run", [])
        for federation, says in (
            (twice, "name of its own"),
            ([fedtune.Client("a", [])], "no training rows at a"),
        ):
            with pytest.raises(DataError, match=says):
                simulate(tmp_path / "run", federation)
        with pytest.raises(DataError, match="pairs"):
            fedtune.simulate(str(tiny_base), [fedtune.Client("a", ["text"])], quiet=True)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("how", ["callback", "refused"])
    def test_the_folder_is_free_again_after_an_error(
        self, how: str, tmp_path: Path, launcher: Launcher
    ) -> None:
        def on_round(_record: RoundRecord) -> None:
            raise ZeroDivisionError

        path = tmp_path / "run"
        if how == "callback":
            with pytest.raises(ZeroDivisionError):
                simulate(path, clients(), on_round=on_round)
        else:
            simulate(path, clients(), rounds=1)
            with pytest.raises(RunFolderError):
                simulate(path, clients(), rounds=2, resume=True)
        _, command = launcher.run("simulate", "--resume", path)
        assert "in use by another process" not in command.stderr
