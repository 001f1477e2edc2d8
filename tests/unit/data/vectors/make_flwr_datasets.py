"""Writes `flwr_datasets.json`: partitions as the original library makes them.

Run it in an environment of its own, not in that of this repository::

    python -m venv /tmp/fds && /tmp/fds/bin/pip install flwr-datasets==0.6.1
    /tmp/fds/bin/python tests/unit/data/vectors/make_flwr_datasets.py

Labels are drawn here and stored in the file, so that the tests depend on no generator. Where the
library refuses, the case has `null` for its parts.
"""

import json
import warnings
from importlib.metadata import version
from pathlib import Path

import numpy as np
from datasets import Dataset
from flwr_datasets.partitioner import (
    DirichletPartitioner,
    IidPartitioner,
    NaturalIdPartitioner,
    Partitioner,
    ShardPartitioner,
)


def label_sets() -> dict[str, list[int]]:
    """Even, skewed, binary, with unused numbers, sorted, and very few rows."""
    rng = np.random.default_rng(2026)
    return {
        "even": rng.integers(0, 5, 150).tolist(),
        "skewed": rng.choice(6, 170, p=[0.6, 0.2, 0.1, 0.05, 0.03, 0.02]).tolist(),
        "binary": rng.integers(0, 2, 61).tolist(),
        "gaps": (rng.integers(0, 4, 90) * 7).tolist(),
        "sorted": sorted(rng.integers(0, 3, 80).tolist()),
        "few": rng.integers(0, 3, 9).tolist(),
    }


def parts_of(partitioner: Partitioner, rows: Dataset) -> list[list[int]] | None:
    """Row numbers per partition, or None where the library refuses."""
    partitioner.dataset = rows
    try:
        return [partitioner.load_partition(i)["row"] for i in range(partitioner.num_partitions)]
    except (ValueError, ZeroDivisionError):  # the latter is how shards of no rows end
        return None


def cases(name: str, labels: list[int]) -> list[dict[str, object]]:
    """All cases of one label set."""
    rows = Dataset.from_dict({"row": range(len(labels)), "label": labels})
    found: list[dict[str, object]] = []

    def add(spec: str, clients: int, seed: int, min_size: int, made: Partitioner) -> None:
        # `iid` takes the rows as they come: shuffling them first is left to the user.
        source = rows.shuffle(seed=seed) if spec == "iid" else rows
        parts = parts_of(made, source)
        found.append(
            {
                "labels": name,
                "spec": spec,
                "clients": clients,
                "seed": seed,
                "min_size": min_size,
                "parts": parts and [list(part) for part in parts],
            }
        )

    for seed, clients in ((0, 1), (1, 4), (42, 7)):
        add("iid", clients, seed, 1, IidPartitioner(clients))
        for alpha in (0.05, 0.3, 1.0, 100.0):
            for least in (1, 5):
                made = DirichletPartitioner(clients, "label", alpha, least, seed=seed)
                add(f"dirichlet:{alpha:g}", clients, seed, least, made)
        for shards in (1, 2, 5):
            made = ShardPartitioner(clients, "label", shards, seed=seed)
            add(f"shards:{shards}", clients, seed, 1, made)
    if name == "few":
        # Rarely met, so that some seeds need the last attempt and some would need one more.
        for seed in range(100, 160):
            made = DirichletPartitioner(4, "label", 0.5, 2, seed=seed)
            add("dirichlet:0.5", 4, seed, 2, made)
    return found


def natural_ids() -> list[dict[str, object]]:
    """A column of names, and one of integers that sort differently as text."""
    rng = np.random.default_rng(7)
    columns = [
        [("north", "Süd", "east")[i] for i in rng.integers(0, 3, 40)],
        rng.choice([1, 2, 9, 10, 30], 40).tolist(),
    ]
    found: list[dict[str, object]] = []
    for column in columns:
        partitioner = NaturalIdPartitioner("id")
        parts = parts_of(partitioner, Dataset.from_dict({"row": range(40), "id": column}))
        assert parts is not None
        names = [str(partitioner.partition_id_to_natural_id[i]) for i in range(len(parts))]
        found.append({"column": list(map(str, column)), "names": names, "parts": list(parts)})
    return found


def main() -> None:
    """Write the file beside this one."""
    warnings.simplefilter("ignore")  # the library warns at every repeated draw
    sets = label_sets()
    content = {
        "made_with": {name: version(name) for name in ("flwr-datasets", "datasets", "numpy")},
        "labels": sets,
        "cases": [case for name, labels in sets.items() for case in cases(name, labels)],
        "natural_ids": [dict(c, parts=[list(p) for p in c["parts"]]) for c in natural_ids()],
    }
    path = Path(__file__).with_name("flwr_datasets.json")
    path.write_text(json.dumps(content, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
