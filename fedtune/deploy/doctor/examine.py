"""Which checks a machine gets: a site's, a server's, or those of the machine itself."""

from __future__ import annotations

import os
from pathlib import Path

from fedtune.config import read_toml
from fedtune.deploy.doctor.findings import Examination
from fedtune.deploy.doctor.machine import examine_machine
from fedtune.deploy.doctor.packages import examine_packages
from fedtune.deploy.doctor.server import examine_server
from fedtune.deploy.doctor.site import examine_site


def examine(file: Path | None, measured: bool) -> tuple[str, Examination]:
    """Make all checks for `file`: whose they are ("site", "server", "machine"), and the findings.

    A file with a table `[site]` is a site's client.toml, any other a server's federation.toml.
    Raises `ConfigError` if it cannot be read or is not TOML.
    """
    examination = Examination()
    if file is None:
        examine_packages(examination, ())
        examine_machine(examination, Path.cwd())
        return "machine", examination
    # A base model by a hub id is looked for here; nothing is fetched.
    os.environ["HF_HUB_OFFLINE"] = "1"
    if "site" in read_toml(file):
        examine_site(examination, file, measured)
        return "site", examination
    examine_server(examination, file)
    return "server", examination
