"""Image files as pixels, and what an encoder made of them, kept on disk. Knows no torch."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from fedtune.cache import cache_folder
from fedtune.errors import DataError
from fedtune.files import write_atomic

Features = NDArray[np.float16]
SIDE = 128  # pixels; ImageNet's 224 would take three times as long, and tells no more here
_MOST_PIXELS = 4096 * 4096


def read_pixels(file: Path) -> NDArray[np.uint8]:
    """The image as it is, uint8 `[height, width, 3]`; raises `DataError`."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file) as image:
            if image.width * image.height > _MOST_PIXELS:
                raise DataError(f"{file}: {image.width} × {image.height} pixels are too many")
            return np.array(image.convert("RGB"))
    except (OSError, ValueError, UnidentifiedImageError) as error:
        raise DataError(f"{file}: not an image that can be read: {error}") from error


def cached_features(
    encoder: str, width: int, files: Sequence[Path], compute: Callable[[], Features]
) -> Features:
    """What `compute` finds on the images, float16 `[n, width]`, from the cache where it is there.

    The cache is found by the images' digests and by `encoder`, which says who computes.
    """
    cache = _cache(encoder, files)
    if cache is not None:
        with contextlib.suppress(OSError, SafetensorError, KeyError):
            found: Features = load_file(cache)["features"]
            if found.shape == (len(files), width) and found.dtype == np.float16:
                return found
    computed = compute()
    if cache is not None:
        with contextlib.suppress(OSError):
            cache.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(cache, save({"features": computed}))
    return computed


def _cache(encoder: str, files: Sequence[Path]) -> Path | None:
    folder = cache_folder()
    if folder is None:
        return None
    digest = hashlib.sha256(f"{encoder} {SIDE}".encode())
    for file in files:
        try:
            digest.update(hashlib.sha256(file.read_bytes()).digest())
        except OSError as error:
            raise DataError(f"{file}: cannot be read: {error}") from error
    return folder / f"features-{digest.hexdigest()[:32]}.safetensors"
