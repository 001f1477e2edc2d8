"""Artifacts of a tiny model, for what does not need a real one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from edge_built import Built


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
