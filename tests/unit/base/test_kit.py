"""A client's kit: the rows that it has, and what it does not let in."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fedtune.base.causal import CausalBase
from fedtune.base.kit import MANIFEST, ClientKit, write_kit
from fedtune.errors import BaseModelError
from fedtune.types import sha256_hex


@pytest.fixture(scope="module")
def base(answering_decoder: Path) -> CausalBase:
    return CausalBase(str(answering_decoder))


@pytest.fixture
def kit(base: CausalBase, tmp_path: Path) -> ClientKit:
    connector = tmp_path / "connector"
    connector.write_bytes(b"a connector")
    return write_kit(tmp_path / "kit", base, connector, ["what color is it?"])


def test_it_has_the_base_models_rows_for_its_vocabulary_alone(
    base: CausalBase, kit: ClientKit
) -> None:
    ids = base.tokenizer("what color is it?")["input_ids"]
    table, whole = kit.table(), base.module.get_input_embeddings()
    with torch.no_grad():
        torch.testing.assert_close(table(torch.tensor([ids])), whole(torch.tensor([ids])))
    other = next(token for token in range(len(whole.weight)) if token not in table.tokens)
    assert table.lacking(np.array([*ids, other], np.int32)) == [other]
    assert float(table(torch.tensor([other])).abs().max()) == 0.0
    assert kit.tokenizer()("what is it?")["input_ids"] == base.tokenizer("what is it?")["input_ids"]


def test_a_manifest_names_no_file_outside_of_the_kit(kit: ClientKit, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"of this machine")
    path = kit.folder / MANIFEST
    content = json.loads(path.read_text())
    content["files"]["../secret"] = sha256_hex(secret.read_bytes())
    path.write_text(json.dumps(content))
    with pytest.raises(BaseModelError, match=r"\.\./secret is not inside"):
        ClientKit(kit.folder)
