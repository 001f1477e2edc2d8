"""What a site's own file, and a server's, say of the machine that they are on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from fedtune.deploy import keys
from fedtune.deploy.server import Deployment
from fedtune.deploy.site_files import SiteFiles
from fedtune.errors import ConfigError, KeyFileError


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A federation of one site and its server, and another site's keys. Do not write to it."""
    folder = tmp_path_factory.mktemp("made")
    federation = {"data": {"labels": ["x", "y"]}}
    (folder / "federation.toml").write_text(tomli_w.dumps(federation))
    keys.make_server_keys(folder / "server-keys", ["127.0.0.1"])
    public = keys.make_site_keys(folder / "keys", "a")
    keys.make_roster(folder / "roster.toml", folder / "server-keys", [public])
    keys.make_site_keys(folder / "new-keys", "a")
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(made, tmp_path / "federation"))


def site(folder: Path, **machine: Any) -> SiteFiles:
    value = {"site": {"name": "a", "server": "127.0.0.1:9"}, "machine": machine}
    (folder / "client.toml").write_text(tomli_w.dumps(value))
    return SiteFiles.read(folder / "client.toml")


# Also what would be another value, another key or none at all if it were read as TOML.
PATHS = [
    "it's here",
    'a "quoted" one',
    "a\nb",
    "back\\slash",
    "3",
    "true",
    "unset",
    "[a]",
    "#",
    "é",
]


@pytest.mark.parametrize("path", PATHS)
def test_where_the_base_model_lies_is_taken_as_it_is(folder: Path, path: str) -> None:
    assert site(folder, base=path).federation.base.path == path
    (folder / "server.toml").write_text(tomli_w.dumps({"server": {"base": path}}))
    assert Deployment.read(folder / "federation.toml").federation.base.path == path


@pytest.mark.parametrize("said", [{}, {"base": ""}])
def test_what_is_not_said_is_as_the_federation_has_it(folder: Path, said: dict[str, str]) -> None:
    (folder / "server.toml").write_text(tomli_w.dumps({"server": said}))
    server = Deployment.read(folder / "federation.toml")
    paths = [site(folder, **said).federation.base.path, server.federation.base.path]
    assert paths == ["all-MiniLM-L6-v2"] * 2


def test_the_machine_is_checked_as_the_federations_own_keys_are(folder: Path) -> None:
    found = site(folder, device="cuda:1", threads=7).federation.train
    assert (found.device, found.threads) == ("cuda:1", 7)
    for device in ("gpu", 'cpu"'):
        with pytest.raises(ConfigError, match="device must be auto, cpu, cuda"):
            site(folder, device=device)
    (folder / "federation.toml").write_text("base = 3\n[data]\nlabels = ['x', 'y']\n")
    with pytest.raises(ConfigError, match="base: "):
        site(folder, base="here")


@pytest.mark.parametrize(
    ("name", "kind"), [(keys.IDENTITY, "its identity"), (keys.TRANSPORT, "its transport key")]
)
def test_keys_are_those_of_the_roster(folder: Path, name: str, kind: str) -> None:
    """Half of a new pair beside half of the old one: the server would not know it."""
    files = site(folder)
    assert keys.public_der(files.keys().transport) == files.members().transport["a"]
    shutil.copy(folder / "new-keys" / name, folder / "keys" / name)
    with pytest.raises(KeyFileError) as wrong:
        files.keys()
    assert f"it has another key for a than keys ({kind})" in str(wrong.value)
