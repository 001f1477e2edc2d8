"""A frozen decoder that answers out of a list: what stays at the server in federated NanoAdapters.

It takes embeddings instead of tokens and gives one score for each answer, so the output layer is
computed at one position and for a few words, not for the whole vocabulary. Or it gives the states
at that position, after some of its layers, to those who have the output layer's rows for the
answers themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedtune.base.causal import CausalBase
from fedtune.errors import BaseModelError, DataError


@dataclass(frozen=True)
class Head:
    """The output layer's rows for the answers, float32 `[answers, width]`.

    `scale` is about the root mean square of a state's values: that of a text of all the answers.
    """

    weight: Tensor = field(repr=False)
    scale: float


class Answering:
    """What scores answers: a decoder that takes embeddings, and its output layer's rows of them."""

    def __init__(self, decoder: nn.Module, head: Tensor) -> None:
        """`head` is float32 `[answers, width]`."""
        self._decoder, self._head = decoder, head

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
        return self._last(embeddings, lengths) @ self._head.T

    def outputs(self, embeddings: Tensor, lengths: Tensor) -> Tensor:
        """What is given to who trains: the `scores`."""
        return self.scores(embeddings, lengths)

    def _last(self, embeddings: Tensor, lengths: Tensor) -> Tensor:
        """The last state of each example, float32 `[n, width]`."""
        places = torch.arange(embeddings.shape[1], device=embeddings.device)
        mask = (places < lengths[:, None]).long()
        states: Tensor = self._decoder(
            inputs_embeds=embeddings, attention_mask=mask, use_cache=False
        ).last_hidden_state
        return states[torch.arange(len(states), device=states.device), lengths - 1].float()

    def to(self, device: torch.device) -> None:
        """Move the decoder."""
        self._decoder.to(device)
        self._head = self._head.to(device)


class AnsweringDecoder(Answering):
    """A whole decoder and the first tokens of the answers that it can give."""

    def __init__(self, base: CausalBase, answers: Sequence[str], rungs: int = 0) -> None:
        """Its `outputs` are the answers' scores, or with `rungs` the states after so many layers.

        Those are evenly spread; the last is the last layer, whose state is taken after the final
        norm. Raises `DataError` if two answers begin with the same token: only the first is scored.
        Raises `BaseModelError` for a decoder that cannot be taken apart.
        """
        self.base, self.answers = base, tuple(answers)
        self.tokens = first_tokens(base.tokenizer, self.answers)
        super().__init__(*apart(base.module, base.name, self.tokens))
        self.rungs = rungs
        # The layers whose states are looked at on the way; the last one's are what comes out.
        self._rungs: list[nn.Module] = []
        if rungs > 1:
            layers = getattr(self._decoder, "layers", ())
            if len(layers) < rungs:
                raise BaseModelError(
                    f"base model {base.name}: {len(layers)} layers known, adapter.rungs = {rungs}; "
                    "lower it"
                )
            places = [len(layers) * rung // rungs - 1 for rung in range(1, rungs)]
            self._rungs = [layers[place] for place in places]

    @property
    def head(self) -> Head:
        """What makes scores of its last states."""
        with torch.inference_mode():
            table: nn.Embedding = self.base.module.get_input_embeddings()  # type: ignore[operator]
            tokens = torch.from_numpy(self.tokens).to(self.device)
            state = self._last(table(tokens)[None].float(), tokens.new_tensor([len(tokens)]))
        return Head(self._head.detach().float().cpu(), float(state.square().mean().sqrt()))

    def outputs(self, embeddings: Tensor, lengths: Tensor) -> Tensor:
        """The `scores`; or the states at the last position, float32 `[n, rungs · width]`.

        Arguments are those of `scores`.
        """
        if not self.rungs:
            return self.scores(embeddings, lengths)
        found: list[Tensor] = []
        with self._looking(lengths, found):
            last = self._last(embeddings, lengths)
        return torch.cat([*found, last], 1)

    @contextmanager
    def _looking(self, lengths: Tensor, found: list[Tensor]) -> Iterator[None]:
        """While the decoder runs, append what it has at the last position after each rung."""

        def look(_layer: nn.Module, _inputs: Any, output: Any) -> None:
            states: Tensor = output[0] if isinstance(output, tuple) else output
            rows = torch.arange(len(states), device=states.device)
            found.append(states[rows, lengths - 1].float())

        hooks = [layer.register_forward_hook(look) for layer in self._rungs]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def apart(module: Any, name: str, tokens: NDArray[np.int64]) -> tuple[Any, Tensor]:
    """The decoder `name` without its output layer, and that layer's rows of `tokens`.

    Raises `BaseModelError` for one that cannot be taken apart.
    """
    if getattr(module, "model", None) is None or getattr(module, "lm_head", None) is None:
        raise BaseModelError(
            f"base model {name}: not a decoder with `model` and `lm_head`, as Llama's"
        )
    with torch.inference_mode():
        head: Tensor = module.lm_head.weight[torch.from_numpy(tokens)]
    return module.model, head.clone()  # a copy outside inference mode's graph rules


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
