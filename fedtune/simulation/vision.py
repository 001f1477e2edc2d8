"""A model that answers questions about images, with NanoAdapters in front of a frozen decoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from fedtune.adapter.nano import Nano, attach_nano
from fedtune.base.answering import AnsweringDecoder
from fedtune.base.causal import CausalBase
from fedtune.base.connector import (
    SUFFIX,
    Connector,
    Pretraining,
    load_connector,
    pretrain,
    save_connector,
)
from fedtune.base.vision import VisionEncoder
from fedtune.cache import cache_folder
from fedtune.config import Config
from fedtune.data.questions import Captions, QuestionExamples
from fedtune.errors import BaseModelError, ConfigError, DataError
from fedtune.train.channel import Channel, Meter
from fedtune.train.cut import AcrossCut, Behind, InProcessBase, WholeModel
from fedtune.train.protection import protected
from fedtune.train.questions import EncodedQuestions, QuestionAnswering, encode_questions
from fedtune.types import digest_of

_FORMAT = 1  # part of the cache's name: raise it with every change of the pretraining


class VisionModel:
    """Encoder, connector, decoder, NanoAdapters and task, as the configuration says."""

    def __init__(
        self, config: Config, answers: Sequence[str], public: Captions | None = None
    ) -> None:
        """Load it; raises `BaseModelError`, `ConfigError` or `DataError`.

        Without `base.connector`, one is pretrained on `public` images and kept in the cache.
        """
        self.base = CausalBase(config.base.path, config.base.digest)
        self.encoder = VisionEncoder(config.base.encoder)
        self.decoder = AnsweringDecoder(self.base, answers)
        self.connector, self.connector_digest = self._connector(config, public)
        table: nn.Embedding = self.base.module.get_input_embeddings()  # type: ignore[operator]
        self.adapter = attach_nano(self.connector, table, Nano(config.adapter.rank), config.seed)
        self.meter = Meter()
        behind: Behind = WholeModel(self.decoder)
        if config.base.placement == "server":
            # The same arithmetic as over a network, but for the network.
            remote = Channel(InProcessBase(self.decoder), config.split.activations, self.meter)
            behind = AcrossCut(protected(remote, config.split), config.split.labels)
        self.task = QuestionAnswering(int(self.base.tokenizer.pad_token_id or 0), behind)
        self.max_length = min(config.base.max_length, self.base.max_tokens - self.connector.tokens)

    @property
    def digest(self) -> str:
        """SHA-256 of all that is frozen: decoder, encoder, connector, and the answers' tokens."""
        return digest_of(
            [
                self.base.digest,
                self.encoder.digest,
                self.connector_digest,
                self.decoder.tokens.tolist(),
            ]
        )

    def prepare(self, examples: QuestionExamples) -> EncodedQuestions:
        """The questions as the trainer takes them; raises `DataError`."""
        features = self.encoder.features(examples.files)
        return encode_questions(self.base.tokenizer, examples, features, self.max_length)

    def _connector(self, config: Config, public: Captions | None) -> tuple[Connector, str]:
        if config.base.connector is not None:
            return load_connector(
                Path(config.base.connector).expanduser(), config.base.connector_digest
            )
        if public is None:
            raise ConfigError(
                "base.connector is missing; make one with: fedtune nano pretrain-connector"
            )
        path = connector_cache(self.base, self.encoder, public)
        if not path.exists():
            train_connector(self.base, self.encoder, public, path)
        return load_connector(path, config.base.connector_digest)


def train_connector(
    base: CausalBase,
    encoder: VisionEncoder,
    public: Captions,
    path: Path,
    settings: Pretraining = Pretraining(),  # noqa: B008  # frozen
) -> str:
    """Pretrain a connector on captioned images and write it to `path`; its digest.

    Each word stands for itself by its first token. Raises `DataError` for one without tokens.
    """
    features = encoder.features(public.files)
    table: nn.Embedding = base.module.get_input_embeddings()  # type: ignore[operator]
    words = {word for row in public.words for word in row}
    embedding = {word: table.weight[_token_of(base, word)] for word in words}
    with torch.inference_mode():
        targets = torch.stack(
            [torch.stack([embedding[word] for word in row]) for row in public.words]
        )
    connector = pretrain(features, targets.clone().numpy(), settings)
    path.parent.mkdir(parents=True, exist_ok=True)
    return save_connector(connector, path)


def connector_cache(base: CausalBase, encoder: VisionEncoder, public: Captions) -> Path:
    """Where a connector that was pretrained with the default settings is kept.

    The name says of what it was made. Raises `BaseModelError` where there is no place for it.
    """
    folder = cache_folder()
    if folder is None:
        raise BaseModelError(
            "there is no home folder to keep a connector in; make one with: fedtune nano "
            "pretrain-connector, and set base.connector"
        )
    made_of = [_FORMAT, base.digest, encoder.digest, [str(f.name) for f in public.files]]
    return folder / f"connector-{digest_of([*made_of, public.words])[:32]}{SUFFIX}"


def _token_of(base: CausalBase, word: str) -> int:
    """The first token of a word in the middle of a text."""
    ids = base.tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
    if not ids:
        raise DataError(f"the caption's word '{word}' has no token in this base model")
    return int(ids[0])
