"""Which rows go to which client; the same rows as `flwr-datasets` 0.6.1 for the same seed.

That holds bit for bit (`tests/unit/data/vectors`), so a study made with Flower's data sets can be
repeated here. Where `flwr-datasets` fails or leaves a client empty, `partition` refuses and names
a setting that works.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from fedtune.data.naming import quoted, sorted_names
from fedtune.data.spec import PartitionSpec
from fedtune.errors import DataError

Indices = NDArray[np.int64]

# `flwr-datasets` draws once and then again ten times before it gives up.
_DIRICHLET_ATTEMPTS = 11
_ALPHA_LADDER = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 1000.0)


def partition(
    labels: NDArray[np.int64],
    spec: PartitionSpec,
    clients: int,
    seed: int,
    min_size: int = 1,
    column: Sequence[str] | None = None,
) -> list[NDArray[np.int64]]:
    """Row indices per client: a list of `clients` int64 arrays, disjoint, of shape `[n_i]`.

    `labels` has shape `[n]`. `column` gives each row's client for a `column:` spec, whose clients
    come in the order of `sorted_names`. All rows are dealt out, except those that `shards` cannot
    divide evenly. `DataError` if a client would get fewer than `min_size` rows.
    """
    if clients < 1 or min_size < 1:
        raise DataError(
            f"a partition needs one client and one row per client or more, "
            f"not {clients} clients with {min_size} rows"
        )
    if len(labels) < min_size:
        raise DataError(
            f"{len(labels)} training rows are too few for even one client with at least "
            f"{min_size}; add data or lower the minimum"
        )
    if spec.alpha is not None:
        return _dirichlet(labels, spec.alpha, clients, seed, min_size)
    if spec.shards_per_client is not None:
        return _shards(labels, spec.shards_per_client, clients, seed, min_size)
    if spec.column is not None:
        return _column(column, spec.column, len(labels), clients, min_size)
    return _iid(len(labels), clients, seed, min_size)


def _refusal(rows: int, spec: str, clients: int, min_size: int, advice: str) -> DataError:
    return DataError(
        f"{rows} training rows cannot be partitioned by {spec} over {clients} clients with at "
        f"least {min_size} each; {advice}"
    )


def _iid(rows: int, clients: int, seed: int, min_size: int) -> list[Indices]:
    if rows // clients < min_size:
        advice = f"use clients <= {rows // min_size}"
        raise _refusal(rows, "iid", clients, min_size, advice)
    return np.array_split(np.random.default_rng(seed).permutation(rows), clients)


# ------------------------------------------------------------------------------ dirichlet
def _dirichlet(
    labels: NDArray[np.int64], alpha: float, clients: int, seed: int, min_size: int
) -> list[Indices]:
    parts = _draw_dirichlet(labels, alpha, clients, seed, min_size)
    if parts is None:
        advice = _dirichlet_advice(labels, alpha, clients, seed, min_size)
        raise _refusal(len(labels), f"dirichlet:{alpha:g}", clients, min_size, advice)
    return parts


def _draw_dirichlet(
    labels: NDArray[np.int64], alpha: float, clients: int, seed: int, min_size: int
) -> list[Indices] | None:
    """The partition, or None if no attempt gave every client `min_size` rows."""
    if len(labels) < clients * min_size:
        return None
    rng = np.random.default_rng(seed)
    rows_of_label = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    for _ in range(_DIRICHLET_ATTEMPTS):
        pieces: list[list[Indices]] = []
        for rows in rows_of_label:
            shares = np.cumsum(rng.dirichlet(np.full(clients, alpha)))
            # Truncation, not rounding, and the last client takes the rest: as flwr-datasets does.
            pieces.append(np.split(rows, (shares * len(rows)).astype(int)[:-1]))
        parts = [np.concatenate(of_client) for of_client in zip(*pieces, strict=True)]
        if min(map(len, parts)) >= min_size:
            for part in parts:
                rng.shuffle(part)
            return parts
    return None


def _dirichlet_advice(
    labels: NDArray[np.int64], alpha: float, clients: int, seed: int, min_size: int
) -> str:
    """A larger alpha or, where none does it, a smaller number of clients; both were tried."""
    for larger in (a for a in _ALPHA_LADDER if a > alpha):
        if _draw_dirichlet(labels, larger, clients, seed, min_size) is not None:
            return f"dirichlet:{larger:g} works with this seed"
    fewer = next(
        count
        for count in _shrinking(clients)
        if _draw_dirichlet(labels, alpha, count, seed, min_size) is not None
    )
    return f"clients = {fewer} works with this seed"


def _shrinking(clients: int) -> Iterator[int]:
    """Client counts below `clients` down to 1, in steps of a tenth."""
    while clients > 1:
        clients = clients * 9 // 10
        yield clients


# --------------------------------------------------------------------------------- shards
def _shards(
    labels: NDArray[np.int64], per_client: int, clients: int, seed: int, min_size: int
) -> list[Indices]:
    size = len(labels) // (clients * per_client)
    if size * per_client < min_size:
        advice = _shards_advice(len(labels), per_client, clients, min_size)
        raise _refusal(len(labels), f"shards:{per_client}", clients, min_size, advice)
    rng = np.random.default_rng(seed)
    by_label = np.argsort(labels, kind="stable")
    # There may be more shards of this size than clients take; which ones are left over is random.
    dealt = rng.permutation(len(labels) // size)[: clients * per_client]
    parts = []
    for shards in dealt.reshape(clients, per_client):
        parts.append(np.concatenate([by_label[s * size : (s + 1) * size] for s in shards]))
    for part in parts:
        rng.shuffle(part)
    return parts


def _shards_advice(rows: int, per_client: int, clients: int, min_size: int) -> str:
    """The most clients with these shards, and the most shards for these clients."""
    options = []
    smallest_shard = -(-min_size // per_client)
    if most_clients := rows // (per_client * smallest_shard):
        options.append(f"clients <= {most_clients}")
    # One shard per client is the least demanding; beyond `rows // min_size` clients nothing works.
    fewer_clients = min(clients, rows // min_size)
    for shards in range(min(per_client - 1, rows // fewer_clients), 0, -1):
        if rows // (fewer_clients * shards) * shards >= min_size:
            of_clients = "" if fewer_clients == clients else f" with clients = {fewer_clients}"
            options.append(f"shards:{shards}{of_clients}")
            break
    return f"use {' or '.join(options)}"


# --------------------------------------------------------------------------------- column
def _column(
    values: Sequence[str] | None, name: str, rows: int, clients: int, min_size: int
) -> list[Indices]:
    if values is None or len(values) != rows:
        raise ValueError(f"column:{name} needs the column's value for each of {rows} rows")
    rows_of: dict[str, list[int]] = {value: [] for value in sorted_names(values)}
    if len(rows_of) != clients:
        raise DataError(
            f"the column {name!r} has {len(rows_of)} distinct values, but {clients} clients are "
            f"asked for; leave out the number of clients or set it to {len(rows_of)}"
        )
    for row, value in enumerate(values):
        rows_of[value].append(row)
    smallest = min(rows_of, key=lambda value: len(rows_of[value]))
    if len(rows_of[smallest]) < min_size:
        raise DataError(
            f"the client {quoted(smallest)} of the column {name!r} has {len(rows_of[smallest])} "
            f"training rows, fewer than the minimum of {min_size}; remove small clients or lower "
            f"the minimum to {len(rows_of[smallest])}"
        )
    return [np.array(indices, np.int64) for indices in rows_of.values()]
