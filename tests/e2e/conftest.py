"""A tiny real base model, a small real federation, and finished runs to look at."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Before anything imports huggingface_hub, which reads it once: no test asks the network.
os.environ["HF_HUB_OFFLINE"] = "1"

from deployed import Federation
from e2e_helpers import Launcher
from small_files import Rows, read_icd_rows, write_clients
from vqa_files import write_question_clients


@pytest.fixture(scope="session")
def icd_rows() -> tuple[Rows, Rows]:
    """See `read_icd_rows`."""
    return read_icd_rows()


@pytest.fixture(scope="session")
def client_folders(tmp_path_factory: pytest.TempPathFactory, icd_rows: tuple[Rows, Rows]) -> Path:
    """A folder of four clients of different sizes with a common test set. Do not write to it."""
    return write_clients(tmp_path_factory.mktemp("data") / "clinics", *icd_rows)


@pytest.fixture(scope="session")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of four clients with questions about images. Do not write to it."""
    return write_question_clients(tmp_path_factory.mktemp("questions") / "sites")


@pytest.fixture(scope="module")
def make_federation(
    tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, client_folders: Path
) -> Iterator[Callable[..., Federation]]:
    """Make a deployed federation; arguments are those of `Federation` behind the files."""
    launchers: list[Launcher] = []

    def make(**arguments: Any) -> Federation:
        folder = tmp_path_factory.mktemp("federation")
        launchers.append(Launcher(folder, tmp_path_factory.mktemp("outputs")))
        return Federation(folder, launchers[-1], tiny_base, client_folders, **arguments)

    yield make
    for launcher in launchers:
        launcher.end_all()


@pytest.fixture(scope="session")
def quick(tiny_base: Path, client_folders: Path) -> list[str]:
    """Arguments of a small run of a second or two: three rounds of the four clients."""
    return [
        "simulate",
        "--data",
        str(client_folders),
        "--base",
        str(tiny_base),
        "--rounds",
        "3",
        "--workers",
        "2",
        "--set",
        "train.steps=6",
        "--set",
        "train.lr=0.02",
        "--set",
        "base.max-length=32",
    ]


@pytest.fixture(scope="session")
def finished_run(
    tmp_path_factory: pytest.TempPathFactory, quick: list[str]
) -> Iterator[tuple[Path, str, str]]:
    """A run of the installed command with `--json`, its stdout and its stderr. Only read it."""
    folder = tmp_path_factory.mktemp("finished")
    launcher = Launcher(folder, tmp_path_factory.mktemp("outputs"))
    command = launcher.cold(*quick, "--json")
    assert command.wait() == 0, command.stderr
    yield folder / "runs" / "clinics", command.stdout, command.stderr
    launcher.end_all()


@pytest.fixture
def launcher(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, tiny_base: Path
) -> Iterator[Launcher]:
    """Starts commands in `tmp_path`."""
    started = Launcher(tmp_path, tmp_path_factory.mktemp("outputs"))
    yield started
    started.end_all()


@pytest.fixture
def run_main(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run the command line in this process: exit code, stdout, stderr."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        from fedtune.cli import main

        monkeypatch.setattr("sys.argv", ["fedtune", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capfd.readouterr()
        code = ended.value.code
        return (code if isinstance(code, int) else int(code is not None)), out, err

    return run
