"""Noise on what passes the cut: a `RemoteBase` that never gets an embedding as it is."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from fedtune.config import Split
from fedtune.privacy.metric import MetricPrivacy, clip_scale
from fedtune.privacy.randomness import SecureRandom
from fedtune.train.remote import Float32Array, RemoteBase


class Protected:
    """A `RemoteBase` to which each embedding goes clipped and with noise (Shen et al. 2023).

    It stands before the encoding, so what is sent is rounded noise, not noise on what was rounded.
    Every call draws anew, in training as in evaluation. Losses, outputs and gradients that come
    back are those at the noisy point; gradients are taken on to the embedding before it was
    clipped. Filled-up places are not sent, and stay zero. Not to be shared between threads.
    """

    def __init__(self, remote: RemoteBase, privacy: MetricPrivacy) -> None:
        self._remote = remote
        self._privacy = privacy
        self._random = SecureRandom()

    def differentiate(
        self, embeddings: Float32Array, lengths: NDArray[np.int64], labels: NDArray[np.int64]
    ) -> tuple[Float32Array, Float32Array]:
        """See `RemoteBase.differentiate`."""
        losses, gradient = self._remote.differentiate(
            self._released(embeddings, lengths), lengths, labels
        )
        return losses, self._before_clipping(gradient, embeddings, lengths)

    def outputs(self, embeddings: Float32Array, lengths: NDArray[np.int64]) -> Float32Array:
        """See `RemoteBase.outputs`."""
        return self._remote.outputs(self._released(embeddings, lengths), lengths)

    def activations(self, embeddings: Float32Array, lengths: NDArray[np.int64]) -> Float32Array:
        """See `RemoteBase.activations`."""
        return self._remote.activations(self._released(embeddings, lengths), lengths)

    def pull_back(
        self,
        embeddings: Float32Array,
        lengths: NDArray[np.int64],
        upstream: Callable[[Float32Array], Float32Array],
    ) -> Float32Array:
        """See `RemoteBase.pull_back`."""
        gradient = self._remote.pull_back(self._released(embeddings, lengths), lengths, upstream)
        return self._before_clipping(gradient, embeddings, lengths)

    def _released(self, embeddings: Float32Array, lengths: NDArray[np.int64]) -> Float32Array:
        counted = _counted(embeddings, lengths)
        sent = np.zeros_like(embeddings)
        sent[counted] = self._privacy.release(embeddings[counted], self._random)
        return sent

    def _before_clipping(
        self, gradient: Float32Array, embeddings: Float32Array, lengths: NDArray[np.int64]
    ) -> Float32Array:
        """The gradient by what was clipped: a clipped token cannot change its length."""
        counted = _counted(embeddings, lengths)
        tokens = embeddings[counted]
        scale = clip_scale(tokens, self._privacy.clip)[:, None]
        # The unit vector of a clipped token; zero for the others, whose gradient stays as it is.
        unit = np.where(scale < 1, tokens * (scale / self._privacy.clip), 0.0)
        incoming = gradient[counted]
        along = (incoming * unit).sum(1, keepdims=True)
        found = np.zeros_like(gradient)
        found[counted] = scale * (incoming - along * unit)
        return found


def protected(remote: RemoteBase, split: Split) -> RemoteBase:
    """`remote`, behind noise if the configuration asks for it."""
    privacy = metric_privacy(split)
    return remote if privacy is None else Protected(remote, privacy)


def metric_privacy(split: Split) -> MetricPrivacy | None:
    """The noise of the configuration, if there is one."""
    if split.clip is None or split.eta is None:
        return None
    return MetricPrivacy(split.clip, split.eta)


def _counted(embeddings: Float32Array, lengths: NDArray[np.int64]) -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = np.arange(embeddings.shape[1]) < lengths[:, None]
    return found
