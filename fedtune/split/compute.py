"""Several requests through the decoder at once: padded to the longest, computed, taken apart.

What a request gets does not depend on what shares its batch, but for rounding: examples do not see
each other, and an example's values that are not finite stay in its own row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from fedtune.base.answering import AnsweringDecoder
from fedtune.wire.split import Kind

Float32Array = NDArray[np.float32]
Int64Array = NDArray[np.int64]


@dataclass(frozen=True)
class Work:
    """One request's examples: `tokens` float32 `[sum of lengths, width]`, those that count.

    `lengths` and `labels` are int64 `[n]`; `labels` is empty unless `kind` is `DIFFERENTIATE`.
    """

    kind: Kind
    tokens: Float32Array = field(repr=False)
    lengths: Int64Array = field(repr=False)
    labels: Int64Array = field(repr=False)

    @property
    def longest(self) -> int:
        """Tokens of its longest example."""
        return int(self.lengths.max())


@dataclass(frozen=True)
class Result:
    """Losses `[n]` and gradient `[tokens, width]`, or outputs `[n, size]`; all float32.

    Without what was not asked for; `finite` says whether all of it is.
    """

    values: Float32Array | None = field(default=None, repr=False)
    gradient: Float32Array | None = field(default=None, repr=False)

    @property
    def finite(self) -> bool:
        """Whether training can go on with it."""
        parts = (self.values, self.gradient)
        return all(part is None or bool(np.isfinite(part).all()) for part in parts)


class Graph:
    """A forward pass that is kept for gradients that clients have yet to send."""

    def __init__(self, batch: _Batch) -> None:
        self._batch = batch
        self.rows = len(batch.lengths)

    def shape(self, place: int) -> tuple[int, ...]:
        """Of the outputs of the work at this place of the batch: `(n, size)`."""
        return tuple(self._batch.outputs[self._batch.rows(place)].shape)

    def pull_back(self, upstreams: Mapping[int, Float32Array], last: bool) -> dict[int, Result]:
        """Gradients by the tokens of the works at these places of the batch.

        `upstreams` are float32 `[n, size]`, by place. After the `last` call it is used up.
        """
        batch = self._batch
        weights = torch.zeros_like(batch.outputs)
        for place, upstream in upstreams.items():
            weights[batch.rows(place)] = torch.from_numpy(upstream).to(weights.device)
        (gradient,) = torch.autograd.grad(batch.outputs, batch.x, weights, retain_graph=not last)
        return {place: Result(gradient=batch.tokens(gradient, place)) for place in upstreams}


def compute(decoder: AnsweringDecoder, works: Sequence[Work]) -> tuple[list[Result], Graph | None]:
    """One result per request, and the graph if one of them is of kind `OPEN`."""
    kinds = {work.kind for work in works}
    if not kinds & {Kind.DIFFERENTIATE, Kind.OPEN}:
        with torch.inference_mode():
            batch = _Batch(decoder, works, differentiable=False)
        return [batch.result(place) for place in range(len(works))], None
    batch = _Batch(decoder, works, differentiable=True)
    found = [batch.result(place) for place in range(len(works))]
    if Kind.DIFFERENTIATE in kinds:
        batch.differentiate(found, retain=Kind.OPEN in kinds)
    return found, Graph(batch) if Kind.OPEN in kinds else None


class _Batch:
    def __init__(
        self, decoder: AnsweringDecoder, works: Sequence[Work], differentiable: bool
    ) -> None:
        self._works = works
        self._starts = np.cumsum([0, *(len(work.lengths) for work in works)])
        self.lengths = np.concatenate([work.lengths for work in works])
        padded = np.zeros((len(self.lengths), self.lengths.max(), decoder.width), np.float32)
        padded[self._counting(slice(None))] = np.concatenate([work.tokens for work in works])
        self.x = torch.from_numpy(padded).to(decoder.device).requires_grad_(differentiable)
        lengths = torch.from_numpy(self.lengths).to(decoder.device)
        self.outputs: Tensor = decoder.outputs(self.x, lengths)

    def rows(self, place: int) -> slice:
        return slice(int(self._starts[place]), int(self._starts[place + 1]))

    def tokens(self, values: Tensor, place: int) -> Float32Array:
        """What belongs to one work's tokens, of values `[rows, longest, width]`."""
        rows = self.rows(place)
        found: Float32Array = values[rows].cpu().numpy()[self._counting(rows)]
        return found

    def result(self, place: int) -> Result:
        # A copy: else one request's outputs would hold the memory of all.
        return Result(values=self.outputs[self.rows(place)].detach().cpu().numpy().copy())

    def differentiate(self, found: list[Result], retain: bool) -> None:
        """Put losses and gradients in the places of those that asked for them."""
        asked = [p for p, work in enumerate(self._works) if work.kind == Kind.DIFFERENTIATE]
        losses = {}
        for place in asked:
            labels = torch.from_numpy(self._works[place].labels).to(self.outputs.device)
            logits = self.outputs[self.rows(place)]
            losses[place] = functional.cross_entropy(logits, labels, reduction="none")
        total = torch.cat(list(losses.values())).sum()
        (gradient,) = torch.autograd.grad(total, self.x, retain_graph=retain)
        for place, loss in losses.items():
            found[place] = Result(loss.detach().cpu().numpy(), self.tokens(gradient, place))

    def _counting(self, rows: slice) -> NDArray[np.bool_]:
        found: NDArray[np.bool_] = np.arange(self.lengths.max()) < self.lengths[rows][:, None]
        return found
