"""Texts as the base model's tokenizer has them, by the library `tokenizers` alone."""

from __future__ import annotations

import os

# Its threads would only wait for each other beside a training process.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from tokenizers import Tokenizer

from fedtune.data import TextExamples
from fedtune.edge import artifacts as files
from fedtune.edge.artifacts import EdgeArtifacts
from fedtune.errors import ArtifactError
from fedtune.train.texts import TokenizedTexts, ended

_NO_LIMIT = 1 << 30  # tokens


class EdgeTokenizer:
    """The tokenizer of a base model, which cuts texts to `max_length` tokens, or not if None."""

    def __init__(self, artifacts: EdgeArtifacts, max_length: int | None) -> None:
        """Raises `ArtifactError`."""
        path = artifacts.path(files.TOKENIZER)
        try:
            self._tokenizer: Tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise ArtifactError(f"{path}: cannot be read: {error}") from error
        self._max_length, self._end_id = max_length, artifacts.manifest.end_id
        self._tokenizer.no_padding()
        if max_length is None:
            self._tokenizer.no_truncation()
        else:
            self._tokenizer.enable_truncation(max_length)

    def prepare(self, examples: TextExamples) -> TokenizedTexts:
        """The texts as the trainer takes them; raises `DataError`."""
        rows = [one.ids for one in self._tokenizer.encode_batch(list(examples.texts))]
        if self._end_id is not None:
            rows = ended(rows, self._end_id, self._max_length or _NO_LIMIT)
        return TokenizedTexts.of(rows, examples.labels)

    def word(self, token: int) -> str:
        """What a token stands for."""
        found: str = self._tokenizer.decode([token])
        return found
