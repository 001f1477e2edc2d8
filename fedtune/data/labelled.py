"""One file of texts, for a model whose labels are settled or that has none."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedtune.data.examples import TextExamples
from fedtune.data.rows import UNLABELLED, Columns, read_rows, require_rows


def load_examples(
    path: Path,
    labels: Sequence[str],
    text_column: str = "text",
    label_column: str | None = "label",
) -> TextExamples:
    """The rows of the file at `path`; raises `DataError`, also for a label not in `labels`.

    With `label_column` None the rows have no labels, see `Columns`.
    """
    rows = require_rows(read_rows(path, Columns(text_column, label_column)))
    known = labels if label_column else [UNLABELLED]
    return rows.encode({label: place for place, label in enumerate(known)})
