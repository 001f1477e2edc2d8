"""Texts without labels, for tasks that have none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedtune.data import FederatedData, PartitionSpec, load_path
from fedtune.data.labelled import load_examples
from fedtune.errors import ConfigError, DataError

TEXTS = [f"note {number} of a visit" for number in range(40)]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    rows = "".join(f"{text},ward-{number % 3}\n" for number, text in enumerate(TEXTS))
    path = tmp_path / "notes.csv"
    path.write_text(f"text,ward\n{rows}")
    return path


def _load(path: Path, partition: str | None = None, clients: int | None = None) -> FederatedData:
    spec = PartitionSpec.parse(partition) if partition else None
    return load_path(path, partition=spec, clients=clients, seed=1, label_column=None)


def _all_texts(data: FederatedData) -> list[str]:
    assert data.test is not None
    held = [text for client in data.clients for text in client.train.texts]
    return sorted([*held, *data.test.texts])


@pytest.mark.parametrize(("partition", "clients"), [("iid", 4), ("column:ward", 3)])
def test_every_row_is_dealt_out_or_held_out(file: Path, partition: str, clients: int) -> None:
    data = _load(file, partition, clients)
    assert _all_texts(data) == sorted(TEXTS)
    assert len(data.clients) == clients
    assert data.test is not None
    assert len(data.test) == 8  # a fifth
    assert data.labels == ()
    assert "labels" not in data.source
    assert data.warnings == ()
    assert all((client.train.labels == 0).all() for client in data.clients)


def test_a_folder_of_clients_needs_no_labels_either(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (tmp_path / "test.jsonl").write_text('{"text": "three"}\n')
    data = _load(tmp_path)
    assert [client.train.texts for client in data.clients] == [("one", "two")] * 2
    assert data.test is not None
    assert data.test.texts == ("three",)


@pytest.mark.parametrize("partition", ["dirichlet:0.3", "shards:2"])
def test_a_partition_by_labels_is_refused(file: Path, partition: str) -> None:
    with pytest.raises(ConfigError, match="labels"):
        _load(file, partition, 2)


def test_a_file_of_texts(file: Path) -> None:
    rows = load_examples(file, [], "text", None)
    assert rows.texts == tuple(TEXTS)
    np.testing.assert_array_equal(rows.labels, np.zeros(40))


@pytest.mark.parametrize(
    ("content", "word"), [("ward\n1\n", "no column 'text'"), ("text\n \n", "is empty")]
)
def test_texts_are_still_checked(tmp_path: Path, content: str, word: str) -> None:
    path = tmp_path / "notes.csv"
    path.write_text(content)
    with pytest.raises(DataError) as caught:
        load_examples(path, [], "text", None)
    assert word in str(caught.value)
