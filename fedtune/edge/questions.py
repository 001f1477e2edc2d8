"""Questions about images as a device trains on them: read, encoded once, and looked up.

A row has places in the artifacts' table of embeddings for its tokens. An image is encoded, put
through the connector and forgotten: both are frozen, so a step begins behind them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedtune.base.images import Features, cached_features, read_pixels
from fedtune.data.questions import QuestionExamples
from fedtune.edge.artifacts import CONNECTOR, ENCODER, EdgeArtifacts
from fedtune.edge.nano import PRECISION
from fedtune.edge.runtime import open_session
from fedtune.edge.tokens import EdgeTokenizer
from fedtune.train.question_rows import EncodedQuestions, encode_questions, no_embedding

PIXELS, FEATURES, TOKENS = "pixels", "features", "tokens"
_AT_ONCE = 64


class ImageReader:
    """The image encoder and the connector."""

    def __init__(self, artifacts: EdgeArtifacts, threads: int, device: str = "cpu") -> None:
        """Raises `ArtifactError` or `ConfigError`."""
        cut = artifacts.cut
        self._width, self._shape = cut.features, (cut.image_tokens, cut.width)
        encoder, connector = (f"{PRECISION}/{name}" for name in (ENCODER, CONNECTOR))
        # Not the digest of the weights alone: another exporter may round otherwise.
        self._digest = artifacts.manifest.files[encoder].sha256
        self._encoder, self._connector = (
            open_session(artifacts.path(name), threads, device) for name in (encoder, connector)
        )

    def see(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Features of an image: uint8 `[height, width, 3]` → float32 `[1, features]`."""
        (found,) = self._encoder.run([FEATURES], {PIXELS: pixels})
        return np.asarray(found, np.float32)

    def connect(self, features: Features) -> NDArray[np.float32]:
        """The connector's tokens, float32 `[n, image tokens, width]`."""
        found = np.empty((len(features), *self._shape), np.float32)
        for start in range(0, len(features), _AT_ONCE):
            some = features[start : start + _AT_ONCE].astype(np.float32)
            (found[start : start + len(some)],) = self._connector.run([TOKENS], {FEATURES: some})
        return found

    def tokens(self, files: Sequence[Path]) -> NDArray[np.float32]:
        """The connector's tokens of image files; features are kept in the cache.

        Raises `DataError` for a file that is not an image.
        """
        return self.connect(
            cached_features(self._digest, self._width, files, lambda: self._features(files))
        )

    def _features(self, files: Sequence[Path]) -> Features:
        found = np.empty((len(files), self._width), np.float16)
        for row, file in zip(found, files, strict=True):  # one at a time: they differ in size
            row[:] = self.see(read_pixels(file))[0]
        return found


class QuestionReader:
    """Makes rows of questions."""

    def __init__(self, artifacts: EdgeArtifacts, images: ImageReader) -> None:
        """Raises `ArtifactError`."""
        self._longest = artifacts.manifest.max_length
        self._tokenizer = EdgeTokenizer(artifacts, self._longest + 1)
        self._vocabulary = artifacts.vocabulary()
        self._images = images

    def prepare(self, examples: QuestionExamples) -> EncodedQuestions:
        """The questions as `NanoQuestions` takes them; raises `DataError`."""
        tokens = self._images.tokens(examples.files)
        found = encode_questions(self._tokenizer.prepare, examples, tokens, self._longest)
        return replace(found, texts=replace(found.texts, ids=self._places(found.texts.ids)))

    def _places(self, ids: NDArray[np.int32]) -> NDArray[np.int32]:
        lacking: NDArray[Any] = np.setdiff1d(ids, self._vocabulary)
        if len(lacking):
            raise no_embedding(self._tokenizer.word(int(lacking[0])), len(lacking))
        return np.searchsorted(self._vocabulary, ids).astype(np.int32)
