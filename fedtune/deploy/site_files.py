"""A site's files, found through its client.toml."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedtune.base.resolve import resolve_base
from fedtune.config import BASE_PORT, ClientConfig, Config, load_client, load_config
from fedtune.deploy.keys import Members, SiteKeys, public_der, read_roster, read_site_keys
from fedtune.errors import BaseModelError, ConfigError, KeyFileError

CLIENT_TEMPLATE = """\
# One site's own file. Every key is in docs/configuration.md; paths are relative to this file.
#
# Take part:                 fedtune client client.toml
# See what it would refuse:  fedtune simulate --policy client.toml

[site]
name = "{name}"
server = "{server}"
federation = "{federation}"
roster = "{roster}"
certificate = "{certificate}"
keys = "keys"          # private: they never leave this folder
memory = "site.db"     # what this site remembers; losing it ends its part in a running run
audit = "audit.jsonl"  # what it was asked and what it answered, signed; back it up too

[data]
train = "train.csv"    # columns text and label

[machine]
threads = 1
# base = "/models/base"  # where the base model lies here, if it shall not be fetched

# When this machine takes part: while all that is set here holds. Nothing set: always.
[conditions]
# hours = ["22:00-06:00", "sat,sun 00:00-24:00"]  # local time; one of them is enough
# min-battery = 0.4         # charge; 1 is full
# mains-only = true         # not on battery
# max-load = 0.5            # per core, average of a minute, without what our training adds
# max-temperature = 70      # °C
# min-free-memory-mb = 1000

# Stronger than anything that a server asks for. What stands here is the default.
[policy]
require-masking = true      # the server may see sums only
min-cohort = 3              # fewest updates in a sum that ours is part of
min-threshold = 0.6666      # more than this share of a round must agree to open its sum
min-colluding = 0.0         # least share of clients in league with the server that must not matter
require-privacy = "none"    # "record" or "client": differential privacy must be on
max-delta = 1e-3
report-failures = false     # may the server learn that training failed here?
share-metrics = "sum"       # losses and counts: "never", in a masked "sum", or "each" by itself
# max-epsilon = 3.0         # most that we ever spend, over all runs together
# min-noise = 0.5           # least noise multiplier
# max-token-epsilon = inf   # embeddings may go to a base model at the server; see docs/nano.md
# max-update-norm = 20.0
# base-digests = ["..."]    # SHA-256, as in passport.json
# rules = ["fedavg"]
# roster-digest = "..."     # SHA-256, told to us by other means than through the server
"""


@dataclass(frozen=True)
class SiteFiles:
    """What a site's file says, with the paths that it names."""

    path: Path
    config: ClientConfig
    federation: Config

    @classmethod
    def read(cls, path: Path) -> SiteFiles:
        """Read client.toml and the federation's configuration; raises `ConfigError`."""
        config = load_client(path)
        for key in ("name", "server"):
            if not getattr(config.site, key):
                raise ConfigError(f"{path}: site.{key} is missing")
        machine = config.machine
        own = {
            "base.path": machine.base or None,
            "train.device": machine.device,
            "train.threads": machine.threads,
        }
        file = path.parent / config.site.federation
        federation = load_config(file, values=own)
        if federation.base.connector is not None:
            connector = file.parent / Path(federation.base.connector).expanduser()
            own["base.connector"] = str(connector)  # relative to the file that names it
            federation = load_config(file, values=own)
        found = cls(path, config, federation)
        digest = federation.base.digest
        if not machine.base and digest and (folder := found.fetched_base(digest)).is_dir():
            base = federation.base.model_copy(update={"path": str(folder)})
            federation = federation.model_copy(update={"base": base})
        if federation.lacks_labels:
            raise ConfigError(
                f"{config.site.federation}: data.labels is missing; sites must agree on the labels "
                "and their order"
            )
        return cls(path, config, federation)

    def find(self, name: str) -> Path:
        """A path as client.toml means it."""
        return self.path.parent / Path(name).expanduser()

    def fetched_base(self, digest: str) -> Path:
        """Where the base model of this digest is put when it comes from the server."""
        return self.find(self.config.machine.models) / digest

    @property
    def splits(self) -> bool:
        """Whether training asks the base model at the server."""
        return self.federation.base.placement == "server"

    @property
    def has_kit(self) -> bool:
        """Whether a kit is what this site has of the base model."""
        return self.federation.base.placement != "client"

    @property
    def base_server(self) -> str:
        """Where it is, HOST:PORT."""
        host, _, _ = self.config.site.server.rpartition(":")
        return self.config.site.base_server or f"{host}:{BASE_PORT}"

    @property
    def needs_base(self) -> bool:
        """Whether this site loads the base model; artifacts hold what a device needs of it."""
        return self.config.machine.runtime == "torch" and not self.has_kit

    @property
    def step(self) -> Literal["ort", "stepgraph", "forward"]:
        """What a step of training runs, where it is not PyTorch that trains."""
        if self.federation.train.method == "forward-only":
            return "forward"
        return "ort" if self.config.machine.runtime == "ort" else "stepgraph"

    def has_base(self) -> bool:
        """Whether there is a base model here; that it is the right one is seen when it is loaded.

        Raises `BaseModelError` if `machine.base` names one that is not there.
        """
        if self.config.machine.base:
            resolve_base(self.config.machine.base)
            return True
        try:
            resolve_base(self.federation.base.path)
        except BaseModelError:
            return False
        return True

    def members(self) -> Members:
        """The roster; raises `KeyFileError` if this site is not in it."""
        members = read_roster(self.find(self.config.site.roster))
        if self.config.site.name not in members.transport:
            raise KeyFileError(
                f"{self.config.site.roster}: there is no {self.config.site.name} in it; send "
                "public.toml to the operator, who makes a new roster"
            )
        return members

    def keys(self) -> SiteKeys:
        """This site's private keys; raises `KeyFileError`, also if the roster has others."""
        site, members = self.config.site, self.members()
        found = read_site_keys(self.find(site.keys), site.name)
        for kind, listed, own in (
            ("its identity", members.roster.keys[site.name], found.identity.public_key),
            ("its transport key", members.transport[site.name], public_der(found.transport)),
        ):
            if listed != own:
                raise KeyFileError(
                    f"{site.roster}: it has another key for {site.name} than {site.keys} ({kind}); "
                    "send public.toml to the operator, who makes a new roster"
                )
        return found
