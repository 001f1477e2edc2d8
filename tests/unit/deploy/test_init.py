"""The files that `fedtune init` makes are those that a server reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedtune.config import load_server
from fedtune.deploy.init import SERVER, init_folder, init_rehearsal


def test_a_new_federation_is_watched_from_its_own_machine_only(tmp_path: Path) -> None:
    init_folder(tmp_path / "new", "hospitals")
    listen = load_server(tmp_path / "new" / SERVER).server
    assert (listen.host, listen.port) == ("0.0.0.0", 9092)
    assert listen.status_address == ("127.0.0.1", 9093)


@pytest.mark.parametrize(("port", "status"), [(9092, 10092), (9093, 10093), (65535, 64535)])
def test_rehearsals_with_ports_of_their_own_do_not_meet(
    tmp_path: Path, port: int, status: int
) -> None:
    init_rehearsal(tmp_path / "new", "hospitals", 3, port)
    listen = load_server(tmp_path / "new" / SERVER).server
    assert listen.port == port
    assert listen.status_address == ("127.0.0.1", status)
