"""Questions about images as rows to train on, and the task of answering them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from fedtune.adapter.nano import READOUT, Prompt
from fedtune.base.vision import Features
from fedtune.data.questions import NO_IMAGE, QuestionExamples
from fedtune.errors import DataError
from fedtune.train.cut import Behind
from fedtune.train.task import Outputs, tokenize
from fedtune.train.texts import TokenizedTexts, padded

# The answer is the token that follows; without a space at its end, since tokens begin with one.
PROMPT = " {question} Answer:"


@dataclass(frozen=True)
class EncodedQuestions:
    """Token ids, labels, and each question's place in `features` (float16 `[images, width]`).

    The features are shared by all who select from one set, and by forked workers. `numbers`
    (int64 `[n]`) tell the questions apart that were prepared in one process.
    """

    texts: TokenizedTexts
    images: NDArray[np.int64]
    features: Features
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

    def select(self, rows: NDArray[np.int64]) -> EncodedQuestions:
        """The questions of these rows."""
        return EncodedQuestions(
            self.texts.select(rows), self.images[rows], self.features, self.numbers[rows]
        )

    def concatenate(self, others: Sequence[EncodedQuestions]) -> EncodedQuestions:
        """These questions and then those of `others`."""
        parts = [self, *others]
        features, images, start = [], [], 0
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
    tokenizer: Any, examples: QuestionExamples, features: Features, max_length: int, first: int = 0
) -> EncodedQuestions:
    """Tokenize once what is trained on every round; `features` has a row for each of its files.

    The questions are numbered from `first`. Raises `DataError` for a question that is longer than
    `max_length` tokens: cut, it would be another question.
    """
    from fedtune.data import TextExamples

    texts = tuple(PROMPT.format(question=question) for question in examples.questions)
    found = tokenize(tokenizer, TextExamples(texts, examples.labels), max_length + 1)
    if len(found) and found.lengths.max() > max_length:
        row = int(found.lengths.argmax())
        raise DataError(
            f"the question {examples.questions[row]!r} has more than base.max-length = "
            f"{max_length} tokens"
        )
    numbers = np.arange(first, first + len(found))
    return EncodedQuestions(found, examples.images, features, numbers)


class QuestionAnswering:
    """One answer out of a list per question, cross-entropy at the answer, exact match."""

    evaluated_at_once = 32

    def __init__(self, pad_id: int, behind: Behind) -> None:
        self._pad_id = pad_id
        self.behind = behind

    def batch(
        self, data: EncodedQuestions, rows: NDArray[np.int64], device: torch.device
    ) -> tuple[Prompt, Tensor]:
        """The prompt of these rows, and their labels, int64 `[batch]`."""
        ids, mask, labels = (
            torch.from_numpy(array).to(device) for array in padded(data.texts, rows, self._pad_id)
        )
        images = data.images[rows]
        features = torch.from_numpy(data.features[images].astype(np.float32)).to(device)
        pictured = torch.from_numpy(images != NO_IMAGE).to(device)
        return Prompt(features, pictured, ids, mask), labels

    def loss(self, module: nn.Module, batch: tuple[Prompt, Tensor]) -> Tensor:
        """Mean cross-entropy over the answers."""
        prompt, labels = batch
        embeddings, lengths = module(prompt)
        return self.behind.loss(embeddings, lengths, labels, module.get_submodule(READOUT))

    def outputs(self, module: nn.Module, batch: tuple[Prompt, Tensor]) -> Outputs:
        """Cross-entropy, and the likeliest answer of each question."""
        prompt, labels = batch
        embeddings, lengths = module(prompt)
        logits = self.behind.scores(embeddings, lengths, module.get_submodule(READOUT))
        loss = functional.cross_entropy(logits, labels, reduction="sum")
        return Outputs(loss, logits.argmax(-1).cpu().numpy(), labels.cpu().numpy())
