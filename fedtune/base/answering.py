"""A frozen decoder that answers out of a list: what stays at the server in federated NanoAdapters.

It takes embeddings instead of tokens and gives one score for each answer, so the output layer is
computed at one position and for a few words, not for the whole vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedtune.base.causal import CausalBase
from fedtune.errors import BaseModelError, DataError


class AnsweringDecoder:
    """A decoder and the first tokens of the answers that it can give."""

    def __init__(self, base: CausalBase, answers: Sequence[str]) -> None:
        """Raises `DataError` if two answers begin with the same token: only the first is scored.

        Raises `BaseModelError` for a decoder whose output layer cannot be taken apart.
        """
        module: Any = base.module
        if getattr(module, "model", None) is None or getattr(module, "lm_head", None) is None:
            raise BaseModelError(
                f"base model {base.name}: not a decoder with `model` and `lm_head`, as Llama's"
            )
        self.base, self.answers = base, tuple(answers)
        self.tokens = first_tokens(base.tokenizer, self.answers)
        self._decoder: nn.Module = module.model
        with torch.inference_mode():
            head: Tensor = module.lm_head.weight[torch.from_numpy(self.tokens)]
        self._head = head.clone()  # a copy outside inference mode's graph rules

    @property
    def width(self) -> int:
        """Length of an embedding."""
        return self._head.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the decoder is."""
        return self._head.device

    def scores(self, embeddings: Tensor, lengths: Tensor) -> Tensor:
        """Logits of the answers, float32 `[n, answers]`.

        `embeddings` are float32 `[n, longest, width]`, filled up on the right; `lengths` (int64
        `[n]`) say how many of each count. Differentiable by the embeddings.
        """
        places = torch.arange(embeddings.shape[1], device=embeddings.device)
        mask = (places < lengths[:, None]).long()
        states: Tensor = self._decoder(
            inputs_embeds=embeddings, attention_mask=mask, use_cache=False
        ).last_hidden_state
        last = states[torch.arange(len(states), device=states.device), lengths - 1]
        return last.float() @ self._head.T

    def to(self, device: torch.device) -> None:
        """Move the decoder."""
        self.base.module.to(device)
        self._head = self._head.to(device)


def first_tokens(tokenizer: Any, answers: Sequence[str]) -> NDArray[np.int64]:
    """The token that each answer begins with, int64 `[answers]`; raises `DataError` for a twin."""
    rows = [tokenizer(f" {answer}", add_special_tokens=False)["input_ids"] for answer in answers]
    first = [row[0] if row else None for row in rows]
    for place, token in enumerate(first):
        if token is None or token in first[:place]:
            other = f", as '{answers[first.index(token)]}' does" * (token is not None)
            raise DataError(
                f"the answer '{answers[place]}' has no first token of its own in this base "
                f"model{other}; only first tokens are scored"
            )
    return np.array(first, np.int64)
