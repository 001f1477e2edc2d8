"""The task of answering questions with a ladder beside a frozen language model.

Nothing in front of the language model is trained, so what it makes of an example never changes:
each is brought to it once, forward only, and its states are kept. Later epochs ask nobody.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from fedtune.adapter.nano import READOUT
from fedtune.train.question_rows import EncodedQuestions
from fedtune.train.questions import QuestionAnswering
from fedtune.train.state_cache import StateCache, halved
from fedtune.train.task import Outputs


class LadderAnswering:
    """As `QuestionAnswering`, where a batch is states, float32 `[n, rungs · width]`, and labels."""

    evaluated_at_once = 32

    def __init__(self, half: nn.Module, questions: QuestionAnswering, cache: StateCache) -> None:
        """`half` is a client's; `questions` has the prompts and what is behind the cut."""
        self._half, self._questions, self._cache = half, questions, cache

    def batch(
        self, data: EncodedQuestions, rows: NDArray[np.int64], device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """The states of these rows, asked for where they are not kept, and the labels.

        First or later, they are rounded to float16 alike.
        """
        numbers = data.numbers[rows]
        known = self._cache.known(numbers)
        if known.all():
            found = self._cache.get(numbers)
        else:
            asked = self._ask(data, rows[~known], device)
            self._cache.put(numbers[~known], asked)
            found = np.empty((len(rows), asked.shape[1]), np.float16)
            found[~known], found[known] = asked, self._cache.get(numbers[known])
        states = torch.from_numpy(found.astype(np.float32)).to(device)
        return states, torch.from_numpy(data.labels[rows]).to(device)

    def loss(self, module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Mean cross-entropy over the answers."""
        states, labels = batch
        return functional.cross_entropy(module.get_submodule(READOUT)(states), labels)

    def outputs(self, module: nn.Module, batch: tuple[Tensor, Tensor]) -> Outputs:
        """Cross-entropy, and the likeliest answer of each question."""
        states, labels = batch
        scores: Tensor = module.get_submodule(READOUT)(states)
        loss = functional.cross_entropy(scores, labels, reduction="sum")
        return Outputs(loss, scores.argmax(-1).cpu().numpy(), labels.cpu().numpy())

    def _ask(
        self, data: EncodedQuestions, rows: NDArray[np.int64], device: torch.device
    ) -> NDArray[np.float16]:
        training = torch.is_grad_enabled()  # evaluations are counted apart
        with torch.inference_mode():
            prompt, _ = self._questions.batch(data, rows, device)
            embeddings, lengths = self._half(prompt)
            states = self._questions.behind.activations(embeddings, lengths, training)
        return halved(states.cpu().numpy())
