"""A model that answers questions about images, with NanoAdapters in front of a frozen decoder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedtune.adapter.ladder import attach_ladder
from fedtune.adapter.lora import AttachedAdapter
from fedtune.adapter.nano import Nano, attach_nano
from fedtune.base.answering import AnsweringDecoder, Head, first_tokens
from fedtune.base.causal import CausalBase
from fedtune.base.connector import (
    SUFFIX,
    Connector,
    Pretraining,
    load_connector,
    nearest_words,
    pretrain,
    save_connector,
)
from fedtune.base.emulator import Emulator
from fedtune.base.images import Features
from fedtune.base.kit import Table
from fedtune.base.vision import VisionEncoder
from fedtune.cache import cache_folder
from fedtune.config import Config
from fedtune.data.questions import Captions, QuestionExamples
from fedtune.errors import BaseModelError, ConfigError, DataError
from fedtune.simulation.emulation import find_emulator
from fedtune.train.channel import Meter, in_process_channel
from fedtune.train.cut import AcrossCut, Behind, InProcessBase, WholeModel
from fedtune.train.ladder import LadderAnswering
from fedtune.train.protection import protected
from fedtune.train.question_rows import EncodedQuestions, encode_questions, no_embedding
from fedtune.train.questions import QuestionAnswering
from fedtune.train.state_cache import StateCache
from fedtune.train.task import Task, tokenize
from fedtune.types import digest_of

_FORMAT = 1  # part of the cache's name: raise it with every change of the pretraining


class VisionClient:
    """A client's half with its task: encoder, connector, embeddings, adapter."""

    def __init__(
        self,
        config: Config,
        tokenizer: Any,
        table: nn.Embedding | Table,
        max_tokens: int,
        connector: Path,
        behind: Behind,
        head: Head | None = None,
    ) -> None:
        """`table` has the embeddings, `behind` is what answers; raises `UsageError`.

        `head` makes scores of states, if `config.rungs` says that those are the answers.
        """
        self.encoder = VisionEncoder(config.base.encoder)
        self.connector_path = connector
        self.connector, self.connector_digest = load_connector(
            connector, config.base.connector_digest
        )
        self.adapter = attach_adapter(config, self.connector, table, head)
        self.tokenizer = tokenizer
        self.pad_id = int(tokenizer.pad_token_id or 0)
        questions = QuestionAnswering(self.pad_id, behind)
        self.task: Task = questions
        if config.adapter.kind == "ladder":
            cache = StateCache(config.rungs * table.embedding_dim)
            self.task = LadderAnswering(self.adapter.module, questions, cache)
        self.max_length = min(config.base.max_length, max_tokens - self.connector.tokens)
        self._table = table
        self._features: dict[tuple[Path, ...], Features] = {}
        self._prepared = 0

    def prepare(self, examples: QuestionExamples) -> EncodedQuestions:
        """The questions as the trainer takes them; raises `DataError`."""
        # Clients of one data set share the array, and with it the memory of forked workers.
        if examples.files not in self._features:
            self._features[examples.files] = self.encoder.features(examples.files)
        features = self._features[examples.files]
        longest = self.max_length
        tokenized = partial(tokenize, self.tokenizer, max_length=longest + 1)
        found = encode_questions(tokenized, examples, features, longest, self._prepared)
        self._prepared += len(found)
        if isinstance(self._table, Table) and (lacking := self._table.lacking(found.texts.ids)):
            raise no_embedding(self.tokenizer.decode(lacking[:1]), len(lacking))
        return found

    def digest(
        self, base_digest: str, answers: Sequence[str], emulator_digest: str | None = None
    ) -> str:
        """SHA-256 of all that is frozen: decoder, encoder, connector, and the answers' tokens.

        And of the decoder's emulator, where clients train against one.
        """
        return frozen_digest(
            base_digest,
            self.encoder.digest,
            self.connector_digest,
            first_tokens(self.tokenizer, answers),
            emulator_digest,
        )


def frozen_digest(
    base: str, encoder: str, connector: str, tokens: NDArray[np.int64], emulator: str | None
) -> str:
    """See `VisionClient.digest`."""
    return digest_of([base, encoder, connector, tokens.tolist(), *([emulator] * bool(emulator))])


class VisionModel:
    """The whole model, with the decoder: what simulates, and what a server evaluates."""

    def __init__(
        self,
        config: Config,
        answers: Sequence[str],
        public: Captions | None = None,
        public_questions: Sequence[str] = (),
    ) -> None:
        """Load it; raises `BaseModelError`, `ConfigError` or `DataError`.

        Without `base.connector`, one is pretrained on `public` images, and without `emulator.path`
        one is made of `public_questions`; they are kept in the cache.
        """
        self.base = CausalBase(config.base.path, config.base.digest)
        self.decoder = AnsweringDecoder(self.base, answers, config.rungs)
        self.meter = Meter()
        behind: Behind = WholeModel(self.decoder)
        if config.base.placement == "server":
            # The same arithmetic as over a network, but for the network.
            whole, encoding = InProcessBase(self.decoder), config.split.activations
            width = self.decoder.width
            remote = in_process_channel(whole, width, encoding, self.meter, config.rungs)
            behind = AcrossCut(protected(remote, config.split), config.split.labels)
        self.emulator: Emulator | None = None
        if config.base.placement == "emulator":
            self.emulator = find_emulator(config, self.base, answers, public_questions)
            behind = WholeModel(self.emulator)
        table: nn.Embedding = self.base.module.get_input_embeddings()  # type: ignore[operator]
        connector = find_connector(config, self.base, public)
        tokenizer, longest = self.base.tokenizer, self.base.max_tokens
        head = self.decoder.head if config.rungs else None
        self.client = VisionClient(config, tokenizer, table, longest, connector, behind, head)
        self.adapter, self.task = self.client.adapter, self.client.task
        self.plugged: QuestionAnswering | None = None
        if self.emulator is not None:
            self.plugged = QuestionAnswering(self.client.pad_id, WholeModel(self.decoder))
        emulated = self.emulator.digest if self.emulator else None
        self.digest = self.client.digest(self.base.digest, answers, emulated)

    def prepare(self, examples: QuestionExamples) -> EncodedQuestions:
        """See `VisionClient.prepare`."""
        return self.client.prepare(examples)


def attach_adapter(
    config: Config, connector: Connector, table: nn.Embedding | Table, head: Head | None
) -> AttachedAdapter:
    """The client's half with the adapter of the configuration; raises `ConfigError`.

    `head` is there if `config.rungs` is more than 0.
    """
    found = config.adapter
    if found.kind == "ladder":
        if head is None:
            raise ValueError("a ladder without a head")
        return attach_ladder(connector, table, head, config.rungs, found.rank, config.seed)
    return attach_nano(connector, table, Nano(found.rank, found.output_rank), config.seed, head)


def find_connector(config: Config, base: CausalBase, public: Captions | None) -> Path:
    """The connector that the configuration names, or one pretrained on `public` images.

    Raises `BaseModelError`, `ConfigError` or `DataError`.
    """
    if config.base.connector is not None:
        return Path(config.base.connector).expanduser()
    if not public:
        raise ConfigError(
            "base.connector is missing; make one with: fedtune nano pretrain-connector"
        )
    encoder = VisionEncoder(config.base.encoder)
    path = connector_cache(base, encoder, public)
    if not path.exists():
        train_connector(base, encoder, public, path)
    return path


def train_connector(
    base: CausalBase,
    encoder: VisionEncoder,
    public: Captions,
    path: Path,
    settings: Pretraining = Pretraining(),  # noqa: B008  # frozen
    progress: Callable[[int, int, float], None] | None = None,
) -> str:
    """Pretrain a connector on captioned images and write it to `path`; its digest.

    Each word stands for itself by its first token. Raises `DataError` for one without tokens.
    """
    features = encoder.features(public.files)
    embedding = _embeddings(base, {word for row in public.words for word in row})
    targets = np.stack([[embedding[word] for word in row] for row in public.words])
    connector = pretrain(features, targets, settings, progress)
    path.parent.mkdir(parents=True, exist_ok=True)
    return save_connector(connector, path)


def connector_accuracy(
    base: CausalBase, encoder: VisionEncoder, captions: Captions, path: Path
) -> list[float]:
    """For each place of a caption, how often the connector's token is nearest to the right word.

    Of the words that stand in that place in `captions`.
    """
    connector, _ = load_connector(path)
    features = torch.from_numpy(encoder.features(captions.files).astype(np.float32))
    places = list(zip(*captions.words, strict=True))
    choices = [sorted(set(words)) for words in places]
    embedding = _embeddings(base, {word for words in choices for word in words})
    tables = [torch.from_numpy(np.stack([embedding[w] for w in words])) for words in choices]
    found = nearest_words(connector, features, tables).numpy()
    return [
        float(np.mean([words[int(i)] == word for i, word in zip(found[:, k], right, strict=True)]))
        for k, (words, right) in enumerate(zip(choices, places, strict=True))
    ]


def _embeddings(base: CausalBase, words: Iterable[str]) -> dict[str, NDArray[np.float32]]:
    table: nn.Embedding = base.module.get_input_embeddings()  # type: ignore[operator]
    return {word: table.weight[_token_of(base, word)].detach().numpy() for word in words}


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
