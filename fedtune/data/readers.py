"""Cells of a `.jsonl`, `.csv` or `.parquet` file, each with the line or row it stands in."""

from __future__ import annotations

import csv
import difflib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from fedtune.data.naming import listed, quoted
from fedtune.errors import DataError

NumberedCells = tuple[int, tuple[object, ...]]

# Python's own limit of 131,072 characters is less than a long document.
MAX_CSV_FIELD = 10_000_000


def read_cells(path: Path, columns: Sequence[str]) -> Iterator[NumberedCells]:
    """`(number, cells)` per row of the file, with one cell per name in `columns`, unchecked.

    `number` counts from 1: the line where the row starts or, in parquet, the row. Blank lines are
    skipped. `DataError` for a file that is missing, unreadable, malformed or lacks a column.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path} is of no known kind; use one of {', '.join(READERS)}")
    if not path.is_file():
        raise DataError(f"{path} {'is not a file' if path.exists() else 'does not exist'}")
    try:
        yield from reader(path, columns)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def place(path: Path, number: int) -> str:
    """`FILE, line 7`, as errors name it."""
    return f"{path}, {'row' if path.suffix.lower() == '.parquet' else 'line'} {number}"


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines with their ends. Only a line feed ends a line; U+2028 and friends are text."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{place(path, number)}: byte {error.start + 1} is not UTF-8; "
                    "save the file as UTF-8"
                ) from error


def _jsonl(path: Path, columns: Sequence[str]) -> Iterator[NumberedCells]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            raise DataError(
                f"{place(path, number)}: invalid JSON ({reason}); write one object per line"
            ) from error
        if not isinstance(record, dict):
            raise DataError(
                f'{place(path, number)}: not a JSON object; write one {{"text": ..., '
                '"label": ...} per line'
            )
        _require(columns, record, place(path, number))
        yield number, tuple(record[column] for column in columns)


def _csv(path: Path, columns: Sequence[str]) -> Iterator[NumberedCells]:
    # The limit belongs to the whole process: it is only ever raised.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_CSV_FIELD))
    reader = csv.reader((line for _, line in _lines(path)), strict=True)
    header: list[str] = []
    start = 1
    try:
        for row in reader:
            if row and not header:
                header = row
                if len(set(header)) < len(header):
                    raise DataError(
                        f"{place(path, start)}: two columns have the same name; rename one"
                    )
                _require(columns, header, place(path, start))
                wanted = [header.index(column) for column in columns]
            elif row:
                if len(row) != len(header):
                    raise DataError(
                        f"{place(path, start)}: {len(row)} cells, but the header has "
                        f"{len(header)}; put texts that hold commas in double quotes"
                    )
                yield start, tuple(row[i] for i in wanted)
            start = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{place(path, start)}: invalid CSV ({error}); check the quotes") from error


def _parquet(path: Path, columns: Sequence[str]) -> Iterator[NumberedCells]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(
            f"{path}: reading parquet needs pyarrow; pip install 'fedtune[parquet]'"
        ) from error
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _require(columns, file.schema_arrow.names, str(path))
            for batch in file.iter_batches(columns=list(columns)):
                cells = [batch.column(column).to_pylist() for column in columns]
                for number, row in enumerate(zip(*cells, strict=True), number + 1):  # noqa: B020
                    yield number, row
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(f"{path} is not a readable parquet file: {reason}") from error


READERS: Mapping[str, Callable[[Path, Sequence[str]], Iterator[NumberedCells]]] = {
    ".jsonl": _jsonl,
    ".csv": _csv,
    ".parquet": _parquet,
}


def _require(columns: Sequence[str], present: Iterable[str], where: str) -> None:
    names = list(present)
    for column in columns:
        if column not in names:
            nearest = difflib.get_close_matches(column, names, n=1)
            hint = f"; did you mean {quoted(nearest[0])}?" if nearest else ""
            raise DataError(
                f"{where}: no column {column!r}; there are "
                f"{listed([quoted(name) for name in names]) or 'none'}{hint}"
            )
