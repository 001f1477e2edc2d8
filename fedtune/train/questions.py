"""The task of answering questions about images."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from fedtune.adapter.nano import READOUT, Prompt
from fedtune.train.cut import Behind
from fedtune.train.question_rows import EncodedQuestions
from fedtune.train.task import Outputs
from fedtune.train.texts import padded


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
        features, pictured = (torch.from_numpy(array).to(device) for array in data.pictures(rows))
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
