"""What of NanoAdapters is exported."""

from __future__ import annotations

from typing import Any

from fedtune.adapter.lora import AttachedAdapter
from fedtune.adapter.nano import ClientHalf, Nano, attach_nano
from fedtune.base.answering import first_tokens
from fedtune.base.connector import Connector, load_connector
from fedtune.base.kit import ClientKit, Table
from fedtune.base.vision import VisionEncoder
from fedtune.config import Config
from fedtune.errors import ConfigError


class Half:
    """What is exported: all that stands in front of the cut, with PyTorch."""

    def __init__(self, config: Config, kit: ClientKit) -> None:
        """Load it; raises `UsageError`."""
        if config.base.digest not in (None, kit.manifest.base_digest):
            raise ConfigError(
                f"{kit.folder}: made of the base model {kit.manifest.base_digest}, base.digest "
                f"says {config.base.digest}; make a kit of this federation's: fedtune nano kit"
            )
        self.encoder = VisionEncoder(config.base.encoder)
        self.connector: Connector
        self.connector, self.connector_digest = load_connector(
            kit.connector, config.base.connector_digest
        )
        self.table: Table = kit.table()
        self.tokenizer: Any = kit.tokenizer()
        self.answers = first_tokens(self.tokenizer, config.data.labels)
        self.adapter: AttachedAdapter = attach_nano(
            self.connector, self.table, Nano(config.adapter.rank), config.seed
        )
        self.max_length = min(
            config.base.max_length, kit.manifest.max_tokens - self.connector.tokens
        )

    @property
    def module(self) -> ClientHalf:
        """The client's half."""
        module = self.adapter.module
        if not isinstance(module, ClientHalf):
            raise TypeError("these are no NanoAdapters")
        return module
