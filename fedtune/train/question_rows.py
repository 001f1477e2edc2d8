"""Questions about images as rows to train on. Knows no torch: edge devices train on them too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedtune.base.images import Features
from fedtune.data import TextExamples
from fedtune.data.questions import NO_IMAGE, QuestionExamples
from fedtune.errors import DataError
from fedtune.train.texts import TokenizedTexts

# The answer is the token that follows; without a space at its end, since tokens begin with one.
PROMPT = " {question} Answer:"


@dataclass(frozen=True)
class EncodedQuestions:
    """Token ids, labels, and each question's place in `features`, which has a row for each image.

    The rows are what an image encoder sees (float16 `[images, width]`), or on a device the tokens
    that a connector makes of it (float32 `[images, tokens, width]`). They are shared by all who
    select from one set, and by forked workers. `numbers` (int64 `[n]`) tell the questions apart
    that were prepared in one process.
    """

    texts: TokenizedTexts
    images: NDArray[np.int64]
    features: Features | NDArray[np.float32]
    numbers: NDArray[np.int64]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each question, int64 `[n]`."""
        return self.texts.lengths

    @property
    def labels(self) -> NDArray[np.int64]:
        """Places in the list of answers, int64 `[n]`."""
        return self.texts.labels

    def __len__(self) -> int:
        return len(self.texts)

    def pictures(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """The images of these rows (float32 `[n, *]`, else zeros), and which have one."""
        images = self.images[rows]
        pictured: NDArray[np.bool_] = images != NO_IMAGE
        found = np.zeros((len(rows), *self.features.shape[1:]), np.float32)
        found[pictured] = self.features[images[pictured]]
        return found, pictured

    def select(self, rows: NDArray[np.int64]) -> EncodedQuestions:
        """The questions of these rows."""
        return EncodedQuestions(
            self.texts.select(rows), self.images[rows], self.features, self.numbers[rows]
        )

    def concatenate(self, others: Sequence[EncodedQuestions]) -> EncodedQuestions:
        """These questions and then those of `others`."""
        parts = [self, *others]
        features: list[NDArray[Any]] = []
        images, start = [], 0
        if all(part.features is self.features for part in parts):
            features, images = [self.features], [part.images for part in parts]
        else:
            for part in parts:
                features.append(part.features)
                images.append(np.where(part.images == NO_IMAGE, NO_IMAGE, part.images + start))
                start += len(part.features)
        return EncodedQuestions(
            self.texts.concatenate([part.texts for part in others]),
            np.concatenate(images),
            features[0] if len(features) == 1 else np.concatenate(features),
            np.concatenate([part.numbers for part in parts]),
        )


def encode_questions(
    tokenize: Callable[[TextExamples], TokenizedTexts],
    examples: QuestionExamples,
    features: Features | NDArray[np.float32],
    max_length: int,
    first: int = 0,
) -> EncodedQuestions:
    """Tokenize once what is trained on every round; `features` has a row for each of its files.

    The questions are numbered from `first`. `tokenize` cuts nothing that has up to one token more
    than `max_length`. Raises `DataError` for a question that is longer than `max_length` tokens:
    cut, it would be another question.
    """
    texts = tuple(PROMPT.format(question=question) for question in examples.questions)
    found = tokenize(TextExamples(texts, examples.labels))
    if len(found) and found.lengths.max() > max_length:
        row = int(found.lengths.argmax())
        raise DataError(
            f"the question {examples.questions[row]!r} has more than base.max-length = "
            f"{max_length} tokens"
        )
    numbers = np.arange(first, first + len(found))
    return EncodedQuestions(found, examples.images, features, numbers)


def no_embedding(word: str, tokens: int) -> DataError:
    """What to say of questions with so many tokens, that of `word` first, that a kit lacks."""
    return DataError(
        f"the kit of the base model has no embedding for {word!r} and {tokens - 1} other tokens of "
        "these questions; ask the operator for one with a larger vocabulary (fedtune nano kit "
        "--texts)"
    )
