"""`fedtune edge verify` for NanoAdapters: all graphs of a client's half against PyTorch's."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fedtune.edge.artifacts import EdgeArtifacts
from fedtune.edge.checks import Check, difference
from fedtune.edge.nano import join, open_half, part
from fedtune.edge.questions import ImageReader

# As in `edge.verify`; where an image is scaled, places between pixels are rounded.
LIMITS = {"features": 1e-4, "tokens": 1e-5, "embeddings": 1e-5, "gradient": 1e-5}


def verify_nano(artifacts: EdgeArtifacts, threads: int) -> Iterator[Check]:
    """Compare with the reference; raises as `verify` does."""
    reference = artifacts.reference()
    reader, half = ImageReader(artifacts, threads), open_half(artifacts, threads)

    def check(what: str, name: str, found: np.ndarray) -> Check:
        return Check(what, difference(found, reference[name]), LIMITS[name.partition("-")[0]])

    for name in sorted(name for name in reference if name.startswith("pixels-")):
        pixels = reference[name]
        number = name.removeprefix("pixels-")
        height, width, _ = pixels.shape
        what = f"features of {height} × {width} pixels"
        yield check(what, f"features-{number}", reader.see(pixels.astype(np.uint8)))
    features = reference["features"].astype(np.float16)
    yield check("an image's tokens", "tokens", reader.connect(features))
    start, image = reference["start"], reference["tokens"]
    places, pictured = reference["places"].astype(np.int64), reference["pictured"].astype(bool)
    embeddings = join(*half.embeddings(start, image, places), pictured)
    # What does not count is never sent.
    counts = np.arange(embeddings.shape[1]) < reference["lengths"][:, None]
    expected = reference["embeddings"][counts]
    yield Check("embeddings", difference(embeddings[counts], expected), LIMITS["embeddings"])
    slopes = part(reference["slope"], image.shape[1], pictured)
    gradient = half.pull_back(start, image, places, *slopes)
    yield check("gradient", "gradient", gradient)
