"""A device without PyTorch keeps a part of the adapter to itself, as a workstation does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from edge_built import Built

from fedtune.config import ClientConfig, Machine, parse_config
from fedtune.data import TextExamples
from fedtune.deploy import edge_site, torch_site
from fedtune.deploy.site_files import SiteFiles
from fedtune.errors import ArtifactError
from fedtune.round.local import LocalWork
from fedtune.round.personal import Personal
from fedtune.round.site import SiteStore

OVERRIDES = (
    'data.labels=["a","b","c"]',
    "base.max-length=64",
    'adapter.private=["classifier", "lora_A"]',
    "train.steps=4",
    "train.lr=0.1",
    "train.optimizer=sgd",
)


def _files(tiny: Built, tiny_base: Path, runtime: str, *more: str) -> SiteFiles:
    config = parse_config("", "test", [f'base.path="{tiny_base}"', *OVERRIDES, *more])
    machine = Machine.model_validate({"runtime": runtime, "artifacts": str(tiny.folder)})
    return SiteFiles(Path("client.toml"), ClientConfig(machine=machine), config)


def test_it_learns_and_sends_what_a_workstation_does(
    tiny: Built, tiny_base: Path, texts: list[str], tmp_path: Path
) -> None:
    rows = TextExamples(tuple(texts[:24]), np.arange(24, dtype=np.int64) % 3)
    found = []
    for runtime, load in (("torch", torch_site.load), ("stepgraph", edge_site.load)):
        files = _files(tiny, tiny_base, runtime)
        site = load(files, rows, None)
        assert site.parts is not None
        store = SiteStore(tmp_path / f"{runtime}.db")
        personal = Personal(site.parts, store, "a")
        local = LocalWork("a", files.federation, site.trainer, site.train, None, personal)
        adapter = site.parts.shared_of(site.parts.start)
        for number in (1, 2):
            result = local.train(adapter, "run", number)
            assert result.private is not None
            store.keep("a", result.private)
            adapter = adapter + result.update
        found.append((local.manifest, adapter, result.private))
        store.close()
    (manifest, update, private), (edge_manifest, edge_update, edge_private) = found
    assert all(".lora_B." in tensor.name for tensor in manifest.tensors)
    assert edge_manifest == manifest
    assert np.abs(private.after - private.before).max() > 1e-3
    np.testing.assert_allclose(edge_update, update, atol=1e-5)
    np.testing.assert_allclose(edge_private.before, private.before, atol=1e-5)
    np.testing.assert_allclose(edge_private.after, private.after, atol=1e-5)


def test_artifacts_must_begin_where_the_others_do(
    tiny: Built, tiny_base: Path, texts: list[str]
) -> None:
    rows = TextExamples(tuple(texts[:3]), np.arange(3, dtype=np.int64))
    with pytest.raises(ArtifactError, match="initial adapter is of seed 0, the federation's of 1"):
        edge_site.load(_files(tiny, tiny_base, "stepgraph", "seed=1"), rows, None)
