"""Questions about images: who holds which images, and what was asked about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

NO_IMAGE = -1


@dataclass(frozen=True, eq=False)
class QuestionExamples:
    """`n` questions with their answers. Compared by identity, as `TextExamples`.

    `images` (int64 `[n]`) are places in `files`, or `NO_IMAGE`; `labels` (int64 `[n]`) are places
    in the federation's list of answers. Raises `ValueError` if they do not go together.
    """

    questions: tuple[str, ...]
    images: NDArray[np.int64]
    labels: NDArray[np.int64]
    files: tuple[Path, ...]

    def __post_init__(self) -> None:
        for name, found in (("images", self.images), ("labels", self.labels)):
            if found.shape != (len(self.questions),) or found.dtype != np.int64:
                raise ValueError(
                    f"{len(self.questions)} questions with {name} of shape {found.shape} and "
                    f"dtype {found.dtype}, not int64 of shape [{len(self.questions)}]"
                )
        if len(self) and not NO_IMAGE <= self.images.min() <= self.images.max() < len(self.files):
            raise ValueError(f"a question is about an image that is not one of {len(self.files)}")

    def __len__(self) -> int:
        return len(self.questions)

    def select(self, rows: Sequence[int] | NDArray[np.int64]) -> QuestionExamples:
        """The questions of these rows (shape `[m]`), in that order; the files stay all."""
        chosen = np.asarray(rows, np.int64)
        return QuestionExamples(
            tuple(self.questions[row] for row in chosen),
            self.images[chosen],
            self.labels[chosen],
            self.files,
        )


@dataclass(frozen=True)
class Captions:
    """Images and what is on them, in words: `words` has one row per file, all of one length."""

    files: tuple[Path, ...]
    words: tuple[tuple[str, ...], ...]

    def __post_init__(self) -> None:
        if len(self.files) != len(self.words) or len({len(row) for row in self.words}) > 1:
            raise ValueError("every image needs a caption, and all captions one number of words")

    def __len__(self) -> int:
        return len(self.files)

    def split(self, share: float, seed: int) -> tuple[Captions, Captions]:
        """Most of them, and a random `share` apart, at least one image if there are two."""
        order = np.random.default_rng(seed).permutation(len(self))
        apart = min(max(1, round(share * len(self))), len(self) - 1)
        first, second = (
            Captions(tuple(self.files[i] for i in rows), tuple(self.words[i] for i in rows))
            for rows in (np.sort(order[apart:]), np.sort(order[:apart]))
        )
        return first, second


@dataclass(frozen=True)
class QuestionClient:
    """What one client holds."""

    name: str
    train: QuestionExamples


@dataclass(frozen=True)
class FederatedQuestions:
    """The data of a whole federation.

    `answers` are the words that a question can be answered with, `test` is the common test set of
    the server, `public` what anyone may see, for pretraining, and `public_questions` what is asked
    about such images. `warnings` are single lines for a person; `source` says in one line what this
    data is, with counts.
    """

    answers: tuple[str, ...]
    clients: tuple[QuestionClient, ...]
    test: QuestionExamples
    public: Captions
    warnings: tuple[str, ...]
    source: str
    public_questions: tuple[str, ...] = ()
