"""The values that this room hands out: labelled texts, per client and for the server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class TextExamples:
    """`n` labelled texts. Compared by identity, because arrays have no single truth value.

    `labels` is int64 of shape `[n]`, an index into `FederatedData.labels`; zeros without labels.
    Raises `ValueError` if the two do not go together.
    """

    texts: tuple[str, ...]
    labels: NDArray[np.int64]

    def __post_init__(self) -> None:
        if self.labels.shape != (len(self.texts),) or self.labels.dtype != np.int64:
            raise ValueError(
                f"{len(self.texts)} texts with labels of shape {self.labels.shape} "
                f"and dtype {self.labels.dtype}, not int64 of shape [{len(self.texts)}]"
            )

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, indices: Sequence[int] | NDArray[np.int64]) -> TextExamples:
        """The examples at `indices` (shape `[m]`), in that order."""
        rows = np.asarray(indices, np.int64)
        return TextExamples(tuple(self.texts[i] for i in rows), self.labels[rows])


@dataclass(frozen=True)
class ClientData:
    """What one client holds; `test` is its own test set, where it has one."""

    name: str
    train: TextExamples
    test: TextExamples | None


@dataclass(frozen=True)
class FederatedData:
    """The data of a whole federation.

    `labels` are the names of the classes: the sorted union over all clients and the test set,
    unless the caller gave them; empty for texts without labels. `test` is the common test set held
    by the server; None when only clients have tests. `validation` is for choosing settings, never
    for reporting. `warnings` are single lines for a person; `source` says in one line what this
    data is, with counts.
    """

    labels: tuple[str, ...]
    clients: tuple[ClientData, ...]
    test: TextExamples | None
    validation: TextExamples | None
    warnings: tuple[str, ...]
    source: str


def label_counts(examples: TextExamples, num_labels: int) -> NDArray[np.int64]:
    """Examples per label, int64 of shape `[num_labels]`; `ValueError` if a label is beyond it."""
    counts = np.bincount(examples.labels, minlength=num_labels)
    if len(counts) > num_labels:
        raise ValueError(f"label {len(counts) - 1} is not one of {num_labels} labels")
    return counts.astype(np.int64)
