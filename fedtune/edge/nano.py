"""NanoAdapters on a device: its half of the model as graphs, the base model at the server.

The server gives the gradient at the cut. What is left is a product of it with the Jacobian of the
client's half, which is what the step graph computes.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedtune.edge.artifacts import FORWARD, STEP, EdgeArtifacts, Precision
from fedtune.edge.engines import gradient_name
from fedtune.edge.runtime import open_session
from fedtune.train.cross_entropy import cross_entropy
from fedtune.train.question_rows import EncodedQuestions
from fedtune.train.remote import Float32Array, Labels, RemoteBase, differentiate
from fedtune.train.texts import padded
from fedtune.train.trainer import Dataset, Evaluation
from fedtune.types import Float32Vector, Manifest

# Of the graphs: tokens of images and places in the table in, adapted embeddings out.
IMAGE, PLACES = "image", "places"
ADAPTED_IMAGE, ADAPTED_TEXT = "adapted_image", "adapted_text"
IMAGE_SLOPE, TEXT_SLOPE = "adapted_image.slope", "adapted_text.slope"
EVALUATED_AT_ONCE = 32
PRECISION: Precision = "float32"  # of what little is frozen here


def join(image: Float32Array, text: Float32Array, pictured: NDArray[np.bool_]) -> Float32Array:
    """Embeddings in their order, float32 `[n, image tokens + longest, width]`.

    A question comes after its image. Without one nothing stands in its place, as `ClientHalf` has
    it: what does not count is at the end.
    """
    alone = np.concatenate([text, image], 1)
    return np.where(pictured[:, None, None], np.concatenate([image, text], 1), alone)


def part(
    gradient: Float32Array, image_tokens: int, pictured: NDArray[np.bool_]
) -> tuple[Float32Array, Float32Array]:
    """The gradients by the two inputs of `join`, given that by its output."""
    longest = gradient.shape[1] - image_tokens
    behind = pictured[:, None, None]
    image = np.where(behind, gradient[:, :image_tokens], gradient[:, longest:])
    return image, np.where(behind, gradient[:, image_tokens:], gradient[:, :longest])


class NanoHalf:
    """The client's half: `forward.onnx`, and `step.onnx` with its derivatives."""

    def __init__(
        self, forward: Path, step: Path, manifest: Manifest, threads: int, device: str = "cpu"
    ) -> None:
        """Raises `ConfigError` if a graph does not load."""
        self._manifest = manifest
        self._forward = open_session(forward, threads, device)
        self._step = open_session(step, threads, device)
        self._gradients = [gradient_name(tensor.name) for tensor in manifest.tensors]

    def embeddings(
        self, adapter: Float32Vector, image: Float32Array, places: NDArray[np.int64]
    ) -> tuple[Float32Array, Float32Array]:
        """Adapted embeddings of images and questions, float32 `[n, tokens, width]` each.

        `image` is float32 `[n, image tokens, width]`, `places` int64 `[n, longest]`.
        """
        inputs = {IMAGE: image, PLACES: places, **self._manifest.split(adapter)}
        adapted_image, adapted_text = self._forward.run([ADAPTED_IMAGE, ADAPTED_TEXT], inputs)
        return adapted_image, adapted_text

    def pull_back(
        self,
        adapter: Float32Vector,
        image: Float32Array,
        places: NDArray[np.int64],
        image_slope: Float32Array,
        text_slope: Float32Array,
    ) -> Float32Vector:
        """The gradient by the adapter, given those by what `embeddings` gives."""
        inputs = {IMAGE: image, PLACES: places, **self._manifest.split(adapter)}
        inputs |= {IMAGE_SLOPE: image_slope, TEXT_SLOPE: text_slope}
        found = self._step.run(self._gradients, inputs)
        return np.concatenate([gradient.reshape(-1) for gradient in found])


class Embedded(NamedTuple):
    """A batch in front of the cut: what goes into the half, what comes out, and what counts.

    `sent` is float32 `[n, image tokens + longest, width]`; the rest is int64 or bool `[n]`.
    """

    image: Float32Array
    places: NDArray[np.int64]
    pictured: NDArray[np.bool_]
    sent: Float32Array
    lengths: NDArray[np.int64]
    labels: NDArray[np.int64]


class NanoQuestions:
    """Questions about images, answered across the cut: a `Differentiable`.

    Its rows have places in the artifacts' table of embeddings for tokens, and the connector's
    tokens for features, see `edge.questions`.
    """

    def __init__(
        self, half: NanoHalf, remote: RemoteBase, labels: Labels, base_digest: str
    ) -> None:
        """`labels` says where the answers stay; `base_digest` is of all that is frozen."""
        self._half, self._remote, self._labels = half, remote, labels
        self._base_digest = base_digest

    @property
    def base_digest(self) -> str:
        """SHA-256 of all that is frozen."""
        return self._base_digest

    def reseed(self, seed: int) -> None:
        """NanoAdapters have no dropout."""

    def gradient(
        self, adapter: Float32Vector, data: Dataset, rows: NDArray[np.int64]
    ) -> tuple[float, Float32Vector]:
        """See `Differentiable.gradient`; the base model is asked once."""
        batch = self._embed(adapter, _questions(data), rows)
        loss, slope = differentiate(
            self._remote, self._labels, batch.sent, batch.lengths, batch.labels
        )
        tokens = batch.image.shape[1]
        slopes = part(slope / np.float32(len(rows)), tokens, batch.pictured)
        return loss, self._half.pull_back(adapter, batch.image, batch.places, *slopes)

    def evaluate(self, adapter: Float32Vector, data: Dataset) -> Evaluation:
        """Evaluate in batches of similar length."""
        questions = _questions(data)
        order = np.argsort(questions.lengths, kind="stable")
        loss_sum, found = 0.0, [np.empty(0, np.int64)]
        for start in range(0, len(order), EVALUATED_AT_ONCE):
            batch = self._embed(adapter, questions, order[start : start + EVALUATED_AT_ONCE])
            logits = self._remote.outputs(batch.sent, batch.lengths).astype(np.float64)
            loss_sum += float(cross_entropy(logits, batch.labels).sum())
            found.append(logits.argmax(-1))
        predictions, labels = np.concatenate(found), questions.labels[order]
        correct = int((predictions == labels).sum())
        return Evaluation(len(questions), loss_sum, correct, predictions, labels)

    def _embed(
        self, adapter: Float32Vector, data: EncodedQuestions, rows: NDArray[np.int64]
    ) -> Embedded:
        places, mask, labels = padded(data.texts, rows, pad_id=0)
        image, pictured = data.pictures(rows)
        sent = join(*self._half.embeddings(adapter, image, places), pictured)
        lengths = mask.sum(1) + image.shape[1] * pictured
        return Embedded(image, places, pictured, sent, lengths, labels)


def open_half(artifacts: EdgeArtifacts, threads: int, device: str = "cpu") -> NanoHalf:
    """The client's half; raises `ArtifactError` or `ConfigError`."""
    forward, step = (artifacts.path(f"{PRECISION}/{name}") for name in (FORWARD, STEP))
    return NanoHalf(forward, step, artifacts.tensors, threads, device)


def _questions(data: Dataset) -> EncodedQuestions:
    if not isinstance(data, EncodedQuestions):
        raise TypeError(f"a device trains on questions here, not on {type(data).__name__}")
    return data
