"""`load_path`: a folder with one sub-folder per client, or one file that is dealt out here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedtune.data.checks import warnings_about
from fedtune.data.examples import ClientData, FederatedData
from fedtune.data.holdout import hold_out
from fedtune.data.naming import listed, sorted_names
from fedtune.data.partitioners import partition as deal
from fedtune.data.readers import READERS
from fedtune.data.rows import UNLABELLED, Columns, Rows, read_rows, require_rows
from fedtune.data.spec import PartitionSpec
from fedtune.errors import ConfigError, DataError

DEFAULT_CLIENTS = 8


def load_path(
    path: Path,
    *,
    partition: PartitionSpec | None,
    clients: int | None,
    seed: int,
    test_fraction: float = 0.2,
    text_column: str = "text",
    label_column: str | None = "label",
    labels: Sequence[str] | None = None,
    min_size: int = 1,
) -> FederatedData:
    """The data at `path`, which must be one of:

    - a folder of client folders, each with `train.EXT` and optionally `test.EXT`; a `test.EXT`
      directly in it is the common test set. `partition` must be None; `clients` may only confirm
      their number. A client folder without training rows is left out, with a warning.
    - a file, dealt out by `partition` (None: iid) to `clients` (None: 8, or one per value for
      `column:`). A file named `train.EXT` takes the `test.EXT` beside it as the test set; any
      other file gives `test_fraction` of its rows to the test set first.

    `labels` fixes the label names and their order; None takes the union of all files. With
    `label_column` None the texts have no labels, and `FederatedData.labels` is empty. Every client
    holds `min_size` training rows or more. `ConfigError` for a partition of a folder, or by labels
    that there are not; `DataError` for everything that is wrong with the data.
    """
    if path.is_dir():
        if partition is not None:
            raise ConfigError(
                f"{path} is a folder of clients and cannot be partitioned by {partition}; leave "
                "out the partition or give a file"
            )
        return _load_folder(path, Columns(text_column, label_column), clients, labels, min_size)
    spec = partition or PartitionSpec("iid")
    if label_column is None and spec.kind in ("dirichlet", "shards"):
        raise ConfigError(f"{spec} divides by labels, and these texts have none; use iid")
    columns = Columns(text_column, label_column, spec.column)
    return _load_file(
        path,
        columns,
        spec=spec,
        clients=clients,
        seed=seed,
        test_fraction=test_fraction,
        labels=labels,
        min_size=min_size,
    )


# --------------------------------------------------------------------------------- folder
@dataclass(frozen=True)
class _ClientRows:
    name: str
    train: Rows
    test: Rows | None


def _load_folder(
    path: Path,
    columns: Columns,
    clients: int | None,
    labels: Sequence[str] | None,
    min_size: int,
) -> FederatedData:
    usable, left_out = _read_clients(path, columns)
    aside = f" (left out: {listed(left_out)})" if left_out else ""
    if not usable:
        raise DataError(
            f"{path} has no client folder with training rows{aside}; it needs one folder per "
            "client with train.jsonl, train.csv or train.parquet in it, or give a file"
        )
    if clients not in (None, len(usable)):
        raise DataError(
            f"{path} has {len(usable)} client folders with training rows{aside}, not {clients}; "
            "leave out the number of clients or correct it"
        )
    for client in usable:
        if len(client.train) < min_size:
            raise DataError(
                f"{client.train.path} has {len(client.train)} rows, fewer than the minimum of "
                f"{min_size} per client; remove the client or lower the minimum"
            )
    test_rows = _read_test(path, columns)
    files = [client.train for client in usable]
    files += [client.test for client in usable if client.test is not None]
    names = _label_names(labels, columns, files + ([test_rows] if test_rows else []))
    index = _index(names)
    held = tuple(
        ClientData(
            client.name,
            client.train.encode(index),
            client.test.encode(index) if client.test else None,
        )
        for client in usable
    )
    test = test_rows.encode(index) if test_rows else None
    notes = [f"{len(left_out)} client folders are left out: {listed(left_out)}"] if left_out else []
    own = [client.test for client in held if client.test is not None]
    tests = [f"{len(test):,} common test rows"] if test else []
    if own:
        tests.append(f"{sum(map(len, own)):,} test rows at {len(own)} clients")
    return FederatedData(
        names,
        held,
        test,
        None,
        (*notes, *warnings_about(names, held, test)),
        f"{path}: {len(held)} client folders with {sum(len(c.train) for c in held):,} training "
        f"rows, {' and '.join(tests) or 'no test rows'}{_how_many(names)}",
    )


def _read_clients(path: Path, columns: Columns) -> tuple[list[_ClientRows], list[str]]:
    """The clients with training rows, and what is said of the others; both by folder name."""
    usable, left_out = [], []
    for folder in [entry for entry in _entries(path) if entry.is_dir()]:
        if folder.name.startswith("."):
            continue
        file = _find(folder, "train")
        if file is None:
            left_out.append(f"{folder.name} has no train file")
        elif not (train := read_rows(file, columns)):
            left_out.append(f"{folder.name} has no rows in {file.name}")
        else:
            usable.append(_ClientRows(folder.name, train, _read_test(folder, columns)))
    return usable, left_out


# ----------------------------------------------------------------------------------- file
def _load_file(
    path: Path,
    columns: Columns,
    *,
    spec: PartitionSpec,
    clients: int | None,
    seed: int,
    test_fraction: float,
    labels: Sequence[str] | None,
    min_size: int,
) -> FederatedData:
    rows = require_rows(read_rows(path, columns))
    # The test set is the server's: the column that says which client a row is of may be missing.
    test_rows = None
    if path.stem == "train":
        test_rows = _read_test(path.parent, Columns(columns.text, columns.label))
    names = _label_names(labels, columns, [rows, test_rows] if test_rows else [rows])
    index = _index(names)
    train, ids = rows.encode(index), rows.clients
    if test_rows is None:
        strata = [rows.labels] if ids is None else [rows.labels, ids]
        kept, held_out = hold_out(rows.texts, strata, test_fraction, seed)
        test, train = train.select(held_out), train.select(kept)
        ids = None if ids is None else tuple(ids[i] for i in kept)
        origin = "held out as test rows"
    else:
        test, origin = test_rows.encode(index), f"test rows from {test_rows.path.name}"

    client_names = sorted_names(ids) if ids is not None else None
    if clients is None:
        clients = DEFAULT_CLIENTS if client_names is None else len(client_names)
    parts = deal(train.labels, spec, clients, seed, min_size, ids)
    if client_names is None:
        client_names = tuple(f"client-{i}" for i in range(1, clients + 1))
    held = tuple(
        ClientData(name, train.select(part), None)
        for name, part in zip(client_names, parts, strict=True)
    )
    return FederatedData(
        names,
        held,
        test,
        None,
        warnings_about(names, held, test),
        f"{path}: {sum(map(len, parts)):,} training rows for {clients} clients by {spec}, "
        f"{len(test):,} {origin}{_how_many(names)}",
    )


# ----------------------------------------------------------------------------------- both
def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise DataError(f"{folder} cannot be listed: {error.strerror or error}") from error


def _find(folder: Path, stem: str) -> Path | None:
    """The one file `stem.EXT` in the folder, or None; an extension is refused when it is read."""
    found = [p for p in _entries(folder) if p.is_file() and p.stem == stem]
    if len(found) > 1:
        raise DataError(
            f"{folder} has {listed([p.name for p in found])}; keep one of them, as "
            f"{' or '.join(stem + ending for ending in READERS)}"
        )
    return found[0] if found else None


def _read_test(folder: Path, columns: Columns) -> Rows | None:
    file = _find(folder, "test")
    return None if file is None else require_rows(read_rows(file, columns))


def _index(names: Sequence[str]) -> dict[str, int]:
    return {name: place for place, name in enumerate(names or [UNLABELLED])}


def _how_many(names: Sequence[str]) -> str:
    return f", {len(names)} labels" if names else ""


def _label_names(
    given: Sequence[str] | None, columns: Columns, files: Iterable[Rows]
) -> tuple[str, ...]:
    if columns.label is None:
        return ()
    if given is None:
        return sorted_names(label for rows in files for label in rows.labels)
    if not given or len(set(given)) < len(given):
        raise DataError("the given labels are empty or name one twice; give each label once")
    return tuple(given)
