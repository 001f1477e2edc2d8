"""Artifacts of a tiny model, for what does not need a real one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from edge_built import NANO, Built, NanoBuilt


@pytest.fixture(scope="session")
def tiny(
    build_artifacts: Callable[..., Any],
    tiny_base: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Built:
    """Of a BERT of two layers. Do not write to them."""
    out = tmp_path_factory.mktemp("tiny") / "artifacts"
    return Built(out, *build_artifacts(out, f'base.path="{tiny_base}"'))


@pytest.fixture(scope="session")
def tiny_with_dropout(
    build_artifacts: Callable[..., Any],
    tiny_base: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Built:
    """The same with dropout in the adapter, and the first token's state instead of the mean."""
    out = tmp_path_factory.mktemp("dropout") / "artifacts"
    overrides = (f'base.path="{tiny_base}"', "adapter.dropout=0.3", 'base.pooling="cls"')
    return Built(out, *build_artifacts(out, *overrides))


@pytest.fixture(scope="session")
def nano(answering_decoder: Path, tmp_path_factory: pytest.TempPathFactory) -> NanoBuilt:
    """Of NanoAdapters in front of a tiny decoder. Do not write to them."""
    from fedtune.base.causal import CausalBase
    from fedtune.base.connector import Pretraining
    from fedtune.base.kit import write_kit
    from fedtune.base.vision import VisionEncoder
    from fedtune.config import parse_config
    from fedtune.data.easy_vqa import public_captions
    from fedtune.data.questions import Captions
    from fedtune.edge.build.nano import build_nano
    from fedtune.simulation.vision import train_connector

    folder = tmp_path_factory.mktemp("nano")
    base, captions = CausalBase(str(answering_decoder)), public_captions()
    few = Captions(captions.files[:16], captions.words[:16])
    connector, settings = folder / "connector.safetensors", Pretraining(steps=5)
    train_connector(base, VisionEncoder(), few, connector, settings)
    kit = write_kit(folder / "kit", base, connector, None)
    config = parse_config(NANO.format(base=answering_decoder, connector=connector), "test", [])
    build_nano(config, kit, folder / "artifacts", lambda _text: None)
    return NanoBuilt(folder / "artifacts", config, kit)
