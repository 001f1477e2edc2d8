"""`fedtune init FOLDER`: the files of a federation, to be edited; and one to rehearse with."""

from __future__ import annotations

import csv
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path

import tomli_w

from fedtune.base.resolve import digest_base, resolve_base
from fedtune.config import PRESETS, load_preset, read_toml
from fedtune.data.examples import TextExamples
from fedtune.data.icd10 import load_icd10
from fedtune.data.spec import PartitionSpec
from fedtune.deploy.keys import AUTHORITY, make_roster, make_server_keys, make_site_keys
from fedtune.deploy.site_files import CLIENT_TEMPLATE
from fedtune.errors import BaseModelError, ConfigError, RunFolderError

FEDERATION, SERVER, CLIENT, ROSTER = "federation.toml", "server.toml", "client.toml", "roster.toml"
README = "README.md"
SITES, SERVER_KEYS, SITE_KEYS = "sites", "server-keys", "keys"
STATUS_PORT = 9093
REHEARSAL_HOSTS = ("localhost", "127.0.0.1")

_SERVER = """\
# The server's own file. Every key is in docs/configuration.md.

[server]
host = "{host}"
port = {port}             # the only port that sites need to reach
keys = "server-keys"     # made by: fedtune keys server
roster = "roster.toml"   # made by: fedtune keys roster
run = "run"              # journal, metrics, adapter and report; a restart goes on with it
status = "127.0.0.1:{status}"  # /health and /metrics, for this machine only; "": none, the default
# test = "test.csv"      # rows to evaluate the global adapter on
# base = "/models/base"  # where the base model lies on this machine
"""

_README = """\
# A federation

1. Edit `federation.toml`: above all `data.labels`, the labels in the order of the model's outputs.
   Every site gets this file and agrees to it by installing it.
2. On the server: `fedtune keys server server-keys --host NAME`, where NAME is the name or address
   by which sites reach the server.
3. At each site: `fedtune keys site keys --name NAME`; the site sends `keys/public.toml` to you.
   Its private keys stay where they are.
4. On the server: `fedtune keys roster . PUBLIC.toml ...`. Send `roster.toml`, `federation.toml`,
   `client.toml` and `server-keys/ca.crt` to the sites, and tell them the roster's digest on another
   way, best by telephone: who can replace the roster can read everything.
5. At each site: edit `client.toml`: name, server, data, and the policy, which is the site's own.
6. On the server: `fedtune server federation.toml`. At each site: `fedtune client client.toml`.

`ca.key`, `server.key` and `identity.key` must never leave the server. After Ctrl-C, a crash or a
power cut start the same command again: it goes on where it was.
"""


def init_folder(folder: Path, preset: str) -> None:
    """Write federation.toml, server.toml, a client.toml for the sites to edit, and a README.

    Raises `RunFolderError`.
    """
    _make(folder)
    load_preset(preset)
    text = (PRESETS / f"{preset}.toml").read_text()
    (folder / FEDERATION).write_text(_with_digest(text), encoding="utf-8")
    server = _SERVER.format(host="0.0.0.0", port=9092, status=STATUS_PORT)  # noqa: S104
    (folder / SERVER).write_text(server, encoding="utf-8")
    client = CLIENT_TEMPLATE.format(
        name="clinic-1",
        server="fedtune.example.org:9092",
        federation=FEDERATION,
        roster=ROSTER,
        certificate=AUTHORITY,
    )
    (folder / CLIENT).write_text(client, encoding="utf-8")
    (folder / README).write_text(_README, encoding="utf-8")


def init_rehearsal(folder: Path, preset: str, clients: int, port: int) -> None:
    """A whole federation for this machine: packaged data, keys for all, a file for each site."""
    if clients < 3:
        raise ConfigError(f"--example {clients}: secure aggregation needs 3 sites or more")
    config = load_preset(preset)
    spec = PartitionSpec.parse(config.data.partition or "iid")
    data = load_icd10(partition=spec, clients=clients, seed=config.seed)
    _make(folder)
    federation = read_toml(PRESETS / f"{preset}.toml")
    federation["data"] = {"labels": list(data.labels)}
    federation["base"]["digest"] = digest_base(resolve_base(federation["base"]["path"]))
    text = "# Made for a rehearsal on one machine: ICD-10 chapters at hospitals that differ.\n"
    (folder / FEDERATION).write_text(text + tomli_w.dumps(federation), encoding="utf-8")
    # Two rehearsals with ports of their own do not meet here either.
    status = port + 1000 if port + 1000 < 65536 else port - 1000
    server = _SERVER.format(host="127.0.0.1", port=port, status=status).replace("# test", "test")
    (folder / SERVER).write_text(server, encoding="utf-8")
    (folder / README).write_text(_README, encoding="utf-8")
    if data.test is not None:
        _write_rows(folder / "test.csv", data.test, data.labels)
    make_server_keys(folder / SERVER_KEYS, REHEARSAL_HOSTS)
    public = []
    for client in data.clients:
        site = folder / SITES / client.name
        site.mkdir(parents=True)
        _write_rows(site / "train.csv", client.train, data.labels)
        public.append(make_site_keys(site / SITE_KEYS, client.name))
        (site / CLIENT).write_text(
            CLIENT_TEMPLATE.format(
                name=client.name,
                server=f"127.0.0.1:{port}",
                federation=f"../../{FEDERATION}",
                roster=f"../../{ROSTER}",
                certificate=f"../../{SERVER_KEYS}/{AUTHORITY}",
            ),
            encoding="utf-8",
        )
    make_roster(folder / ROSTER, folder / SERVER_KEYS, public)


def _with_digest(text: str) -> str:
    """A configuration that also says which base model it means, if that is on this machine."""
    path = tomllib.loads(text)["base"]["path"]
    try:
        digest = digest_base(resolve_base(path))
    except BaseModelError:
        return text
    line = f'digest = "{digest}"  # a site without it fetches it from the server'
    return re.sub(r"(?m)^(path = .*)$", rf"\1\n{line}", text, count=1)


def _make(folder: Path) -> None:
    if folder.exists() and any(folder.iterdir()):
        raise RunFolderError(f"{folder}: there are files already; take another folder")
    folder.mkdir(parents=True, exist_ok=True)


def _write_rows(path: Path, rows: TextExamples, labels: Sequence[str]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows(
            (text, labels[label]) for text, label in zip(rows.texts, rows.labels, strict=True)
        )
