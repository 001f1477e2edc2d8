"""The example files are what `fedtune init` writes, and every key in them is one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fedtune.config import Policy, load_client, load_server
from fedtune.deploy.init import init_folder
from fedtune.errors import RunFolderError

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = {"server.toml": ROOT / "server", "client.toml": ROOT / "client"}
# A key that is commented out; prose has no equals sign.
_COMMENTED = re.compile(r"^# ([a-z-]+ = .*)$", re.MULTILINE)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    init_folder(tmp_path / "federation", "hospitals")
    return tmp_path / "federation"


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_what_init_writes(folder: Path, name: str) -> None:
    assert (EXAMPLES[name] / name).read_text() == (folder / name).read_text(), (
        f"copy {name} of a new fedtune init FOLDER to {EXAMPLES[name].name}/"
    )


@pytest.mark.parametrize(
    ("name", "load"), [("server.toml", load_server), ("client.toml", load_client)]
)
def test_keys_that_are_commented_out_are_keys(folder: Path, name: str, load) -> None:
    text = (folder / name).read_text()
    assert len(_COMMENTED.findall(text)) >= 2
    (folder / name).write_text(_COMMENTED.sub(r"\1", text))
    assert load(folder / name) != load(EXAMPLES[name] / name)


def test_the_examples_show_the_defaults(folder: Path) -> None:
    client = load_client(folder / "client.toml")
    shown, default = client.policy.model_dump(), Policy().model_dump()
    assert shown.pop("min_threshold") == pytest.approx(default.pop("min_threshold"), abs=1e-4)
    assert shown == default
    listed = {
        key
        for table in ("site", "data", "machine")
        for key in getattr(client, table).model_fields_set
    }
    assert {"federation", "roster", "certificate", "keys", "memory", "train", "threads"} <= listed
    for table in (client.site, client.data, client.machine):
        fresh = type(table)()
        for key in table.model_fields_set - {"name", "server"}:
            assert getattr(table, key) == getattr(fresh, key), key


def test_nothing_is_written_over(folder: Path) -> None:
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(RunFolderError, match="another folder"):
        init_folder(folder, "hospitals")
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
