"""A test set taken out of one file before its rows go to clients."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedtune.errors import DataError

Indices = NDArray[np.int64]


def hold_out(
    texts: Sequence[str], strata: Sequence[Sequence[str]], fraction: float, seed: int
) -> tuple[Indices, Indices]:
    """`(train, test)`: sorted row indices, int64, disjoint and together all `n` rows.

    Each of `strata` has a value for every row. Of every value of the first (the labels), about
    `fraction` of the rows become test rows. No value of any of them loses its last training row.
    Rows with identical texts stay together. `DataError` if `fraction` is not between 0 and 1 or
    no row can be held out.
    """
    if not 0 < fraction < 1:
        raise DataError(f"the test fraction must be between 0 and 1, not {fraction}")
    rng = np.random.default_rng([seed, 1])  # [seed] alone is the stream of the partition
    groups = _same_text(texts)
    # A group of one text with several labels (annotators disagree) counts for its first label.
    by_label: dict[str, list[list[int]]] = {}
    for group in groups:
        by_label.setdefault(strata[0][group[0]], []).append(group)
    left = [Counter(values) for values in strata]
    test: list[int] = []
    due = 0.0
    names = sorted(by_label)
    for name in rng.permutation(len(names)):
        candidates = by_label[names[name]]
        # What rounding kept from one label is carried to the next, so that many rare labels
        # together still give their fraction; never more than one row of it, to stay stratified.
        due = min(due, 1.0) + fraction * sum(map(len, candidates))
        for i in rng.permutation(len(candidates)):
            group = candidates[i]
            taken = [Counter(values[row] for row in group) for values in strata]
            spared = all(
                have[value] > count
                for have, take in zip(left, taken, strict=True)
                for value, count in take.items()
            )
            if spared and len(group) <= due + 1e-9:  # 0.1 + 0.2 is not quite 0.3
                due -= len(group)
                test += group
                for have, take in zip(left, taken, strict=True):
                    have.subtract(take)
    if not test:
        raise DataError(
            f"no test rows can be held out of {len(texts)} rows with a test fraction of "
            f"{fraction:g}; add rows, raise the fraction or give a test file"
        )
    held = np.zeros(len(texts), bool)
    held[test] = True
    return np.flatnonzero(~held), np.flatnonzero(held)


def _same_text(texts: Sequence[str]) -> list[list[int]]:
    groups: dict[str, list[int]] = {}
    for row, text in enumerate(texts):
        groups.setdefault(text, []).append(row)
    return list(groups.values())
