"""Texts as token ids, and batches of them. Knows no torch: edge devices train on them too."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedtune.errors import DataError
from fedtune.types import Task

IGNORED = -100  # a label that does not count, as in torch
_NO_IDS = np.empty(0, np.int32)


@dataclass(frozen=True)
class TokenizedTexts:
    """Token ids of all texts end to end (int32), where each starts, and labels (int64 `[n]`).

    Flat arrays and no Python objects: forked workers share their pages.
    """

    ids: NDArray[np.int32]
    starts: NDArray[np.int64]
    labels: NDArray[np.int64]

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens per text, int64 `[n]`."""
        return np.diff(self.starts)

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, rows: NDArray[np.int64]) -> TokenizedTexts:
        """The texts of these rows."""
        lengths = self.lengths[rows]
        starts = np.concatenate([[0], np.cumsum(lengths)])
        ids = [self.ids[self.starts[row] : self.starts[row + 1]] for row in rows]
        return TokenizedTexts(np.concatenate([_NO_IDS, *ids]), starts, self.labels[rows])

    def concatenate(self, others: Sequence[TokenizedTexts]) -> TokenizedTexts:
        """These texts and then those of `others`."""
        parts = [self, *others]
        lengths = np.concatenate([part.lengths for part in parts])
        return TokenizedTexts(
            np.concatenate([part.ids for part in parts]),
            np.concatenate([[0], np.cumsum(lengths)]),
            np.concatenate([part.labels for part in parts]),
        )

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]], labels: NDArray[np.int64]) -> TokenizedTexts:
        """The texts of these token ids, one sequence per text."""
        starts = np.zeros(len(rows) + 1, np.int64)
        np.cumsum([len(row) for row in rows], out=starts[1:])
        ids: Iterable[int] = (token for row in rows for token in row)
        return cls(np.fromiter(ids, np.int32, int(starts[-1])), starts, labels)


def ended(rows: Iterable[Sequence[int]], end_id: int, max_length: int) -> list[list[int]]:
    """Rows of tokens with the token that ends a text, except where they were cut before it.

    Raises `DataError` for a text without tokens: it has no next token to learn.
    """
    found = [[*row, end_id] if len(row) < max_length else list(row) for row in rows]
    if any(len(row) < 2 for row in found):
        raise DataError("a text has no token that the base model knows; remove it")
    return found


class Batch(NamedTuple):
    """Token ids and mask, int64 `[batch, longest]`, and labels of what the model says.

    `labels` are int64 `[batch]` for a classifier, `[batch · longest]` for a language model.
    """

    ids: NDArray[np.int64]
    mask: NDArray[np.int64]
    labels: NDArray[np.int64]


def padded(data: TokenizedTexts, rows: NDArray[np.int64], pad_id: int) -> Batch:
    """The texts of these rows, filled up with `pad_id` to the longest."""
    lengths = data.lengths[rows]
    width = int(lengths.max())
    ids = np.full((len(rows), width), pad_id, np.int64)
    for line, row, length in zip(ids, rows, lengths, strict=True):
        start = data.starts[row]
        line[:length] = data.ids[start : start + length]
    mask = (np.arange(width) < lengths[:, None]).astype(np.int64)
    return Batch(ids, mask, data.labels[rows])


def with_next_tokens(data: TokenizedTexts, rows: NDArray[np.int64], pad_id: int) -> Batch:
    """The same texts; each position's label is the token that follows, `IGNORED` if none does."""
    ids, mask, _ = padded(data, rows, pad_id)
    return Batch(ids, mask, next_tokens(ids, mask))


def next_tokens(ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.int64]:
    """The labels of a language model, int64 `[batch · longest]`: see `with_next_tokens`."""
    labels = np.full_like(ids, IGNORED)
    labels[:, :-1] = np.where(mask[:, 1:] == 1, ids[:, 1:], IGNORED)
    return labels.reshape(-1)


Collate = Callable[[TokenizedTexts, NDArray[np.int64], int], Batch]
COLLATE: dict[Task, Collate] = {"text-classification": padded, "causal-lm": with_next_tokens}
