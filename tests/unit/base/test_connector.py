"""The connector: that it learns what can be learned, and which files are one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fedtune.base.connector import (
    Connector,
    Pretraining,
    load_connector,
    nearest_words,
    pretrain,
    save_connector,
)
from fedtune.errors import BaseModelError

WORDS, WIDTH, FEATURES = 4, 24, 10


def test_it_learns_to_say_what_features_show() -> None:
    rng = np.random.default_rng(0)
    tables = [rng.normal(size=(WORDS, WIDTH)).astype(np.float32) for _ in range(2)]
    meant = rng.integers(0, WORDS, (300, 2))
    shown = rng.normal(size=(2, WORDS, FEATURES))
    features = (
        shown[0, meant[:, 0]] + shown[1, meant[:, 1]] + 0.1 * rng.normal(size=(300, FEATURES))
    )
    targets = np.stack([tables[k][meant[:, k]] for k in range(2)], 1)
    half = features.astype(np.float16)
    connector = pretrain(half[:200], targets[:200], Pretraining(steps=300))
    seen = torch.from_numpy(half[200:].astype(np.float32))
    found = nearest_words(connector, seen, [torch.from_numpy(table) for table in tables])
    assert (found.numpy() == meant[200:]).mean() > 0.95
    lengths = connector(seen).norm(dim=-1)
    expected = float(np.linalg.norm(targets[:200], axis=-1).mean())
    torch.testing.assert_close(lengths, torch.full_like(lengths, expected))


def test_the_same_seed_gives_the_same_connector() -> None:
    rng = np.random.default_rng(1)
    features = rng.normal(size=(20, FEATURES)).astype(np.float16)
    targets = rng.normal(size=(20, 2, WIDTH)).astype(np.float32)
    one, other = (pretrain(features, targets, Pretraining(steps=5)) for _ in range(2))
    assert torch.equal(one.out.weight, other.out.weight)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, str]:
    torch.manual_seed(0)
    path = tmp_path / "connector.safetensors"
    return path, save_connector(Connector(FEATURES, WIDTH, 2), path)


def test_it_comes_back_from_its_file_in_half_precision(saved: tuple[Path, str]) -> None:
    path, digest = saved
    connector, found = load_connector(path, digest)
    assert found == digest
    assert (connector.features, connector.width, connector.tokens) == (FEATURES, WIDTH, 2)
    half = load_file(path)["out.weight"]
    assert half.dtype == torch.float16
    assert torch.equal(connector.out.weight, half.float())
    assert not any(p.requires_grad for p in connector.parameters())


def test_another_digest_is_refused(saved: tuple[Path, str]) -> None:
    with pytest.raises(BaseModelError, match=r"base\.connector-digest says 00"):
        load_connector(saved[0], "0" * 64)


@pytest.mark.parametrize("kind", ["missing", "text", "other tensors", "torn"])
def test_what_is_no_connector_is_refused(saved: tuple[Path, str], kind: str) -> None:
    path = saved[0]
    if kind == "missing":
        path.unlink()
    elif kind == "text":
        path.write_text("not safetensors")
    elif kind == "torn":
        path.write_bytes(path.read_bytes()[:-7])
    else:
        save_file({"weight": torch.zeros(2, 2)}, path)
    with pytest.raises(BaseModelError, match="pretrain-connector"):
        load_connector(path)
