"""A small real federation's data, as files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from e2e_helpers import write_rows

CHAPTERS = ("Neoplasms", "Eye", "Musculoskeletal", "Pregnancy")
TRAIN_ROWS = (48, 40, 32, 24)
TEST_ROWS = 48

Rows = list[dict[str, str]]


def read_icd_rows() -> tuple[Rows, Rows]:
    """Training and test rows of four chapters of ICD-10-CM."""
    from fedtune.data import PartitionSpec, load_icd10

    data = load_icd10(partition=PartitionSpec("iid"), clients=1, seed=0)
    assert data.test is not None
    chosen = [label for label in data.labels if label.startswith(CHAPTERS)]
    assert len(chosen) == len(CHAPTERS)

    def rows(texts: tuple[str, ...], labels: np.ndarray, number: int) -> Rows:
        found = [
            {"text": text, "label": data.labels[label]}
            for text, label in zip(texts, labels.tolist(), strict=True)
            if data.labels[label] in chosen
        ]
        order = np.random.default_rng(3).permutation(len(found))[:number]
        return [found[place] for place in order]

    train = data.clients[0].train
    return (
        rows(train.texts, train.labels, sum(TRAIN_ROWS)),
        rows(data.test.texts, data.test.labels, TEST_ROWS),
    )


def write_clients(folder: Path, train: Rows, test: Rows) -> Path:
    """A folder of four clients of different sizes with a common test set."""
    start = 0
    for place, size in enumerate(TRAIN_ROWS):
        write_rows(folder / f"clinic-{place}" / "train.jsonl", train[start : start + size])
        start += size
    write_rows(folder / "test.jsonl", test)
    return folder
