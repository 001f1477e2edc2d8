"""The rows of one file as checked strings, and their labels as numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedtune.data.examples import TextExamples
from fedtune.data.naming import listed, quoted
from fedtune.data.readers import place, read_cells
from fedtune.errors import DataError

UNLABELLED = ""


@dataclass(frozen=True)
class Columns:
    """Names of the columns to read; `client` is the one that a `column:` partition goes by.

    With `label` None the texts have no labels, and each row's is `UNLABELLED`.
    """

    text: str
    label: str | None
    client: str | None = None


@dataclass(frozen=True)
class Rows:
    """One file's rows; `numbers` say where in it each row stands. `clients` as in `Columns`."""

    path: Path
    numbers: tuple[int, ...]
    texts: tuple[str, ...]
    labels: tuple[str, ...]
    clients: tuple[str, ...] | None

    def __len__(self) -> int:
        return len(self.texts)

    def encode(self, index: Mapping[str, int]) -> TextExamples:
        """The rows with `index[label]` as labels; `DataError` for a label it does not have."""
        for number, label in zip(self.numbers, self.labels, strict=True):
            if label not in index:
                raise DataError(
                    f"{place(self.path, number)}: the label {quoted(label)} is not one of the "
                    f"given labels ({listed([quoted(name) for name in index])})"
                )
        return TextExamples(self.texts, np.array([index[name] for name in self.labels], np.int64))


def read_rows(path: Path, columns: Columns) -> Rows:
    """All rows of a file, possibly none; `DataError` for the first cell that cannot be used.

    Texts are kept exactly as they are. Labels and clients may be strings, integers or truth
    values, and become strings.
    """
    names = [name for name in (columns.text, columns.label, columns.client) if name]
    numbers, texts, labels, clients = [], [], [], []
    for number, cells in read_cells(path, names):
        where = place(path, number)
        text = cells[0]
        if text is not None and not isinstance(text, str):
            raise DataError(
                f"{where}: {columns.text!r} is a {type(text).__name__}, not text; put it in quotes"
            )
        numbers.append(number)
        texts.append(usable(text, columns.text, where))
        if columns.label:
            labels.append(usable(_name(cells[1], columns.label, where), columns.label, where))
        else:
            labels.append(UNLABELLED)
        if columns.client:
            clients.append(usable(_name(cells[-1], columns.client, where), columns.client, where))
    return Rows(
        path,
        tuple(numbers),
        tuple(texts),
        tuple(labels),
        tuple(clients) if columns.client else None,
    )


def require_rows(rows: Rows) -> Rows:
    """`rows`, or `DataError` if there are none."""
    if not rows:
        raise DataError(f"{rows.path} has no rows; add some or remove the file")
    return rows


def _name(cell: object, column: str, where: str) -> str | None:
    """The cell as a string; truth values in JSON's spelling."""
    match cell:
        case None | str():
            return cell
        case bool():
            return "true" if cell else "false"
        case int():
            return str(cell)
    raise DataError(
        f"{where}: {column!r} is a {type(cell).__name__}; write a string, an integer or a "
        "truth value"
    )


def usable(value: str | None, column: str, where: str) -> str:
    """`value`, or `DataError` if it is empty or has half of a character."""
    if value is None or not value.strip():
        raise DataError(f"{where}: {column!r} is empty; fill it in or remove the row")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        # No tokenizer and no file takes half of a character; everything else stays as it is.
        raise DataError(
            f"{where}: {column!r} has a lone surrogate at character {error.start + 1}; "
            "write the whole character or remove it"
        ) from error
    return value
