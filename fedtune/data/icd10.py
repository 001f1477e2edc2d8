"""`load_icd10`: the packaged example, clinical text whose label anyone can check.

The task is to tell the chapter of ICD-10-CM from the wording of a diagnosis. The texts come with
the package `simple-icd-10-cm` (the classification itself is in the public domain), so nothing is
downloaded and nobody's record is involved.
"""

from __future__ import annotations

from pathlib import Path

from fedtune.data.checks import warnings_about
from fedtune.data.examples import ClientData, FederatedData
from fedtune.data.icd10_cache import cached_corpus
from fedtune.data.partitioners import partition as deal
from fedtune.data.spec import PartitionSpec
from fedtune.errors import ConfigError


def load_icd10(
    *,
    partition: PartitionSpec,
    clients: int,
    seed: int,
    min_size: int = 1,
    cache_dir: Path | None = None,
) -> FederatedData:
    """ICD-10-CM of April 2026 (simple-icd-10-cm 1.5.0), dealt out to `hospital-1` and so on.

    21 chapters with 3,360 training texts (160 each), 1,022 for validation (35 to 50 each) and
    1,021 for testing (34 to 50 each). The split is always the same; `seed` only moves training
    texts between hospitals. No text is in two of the three sets, and neither is any
    three-character category, so a test asks about diseases not seen in training.

    The corpus takes seconds to build and is kept under `cache_dir` (None: `fedtune` in
    `$XDG_CACHE_HOME` or `~/.cache`). `DataError` if the package is missing or the partition leaves
    a hospital with fewer than `min_size` texts; `ConfigError` for a `column:` partition.
    """
    if partition.kind == "column":
        raise ConfigError(f"ICD-10 has no columns for {partition}; use iid, dirichlet or shards")
    corpus = cached_corpus(cache_dir)
    parts = deal(corpus.train.labels, partition, clients, seed, min_size)
    hospitals = tuple(
        ClientData(f"hospital-{number}", corpus.train.select(part), None)
        for number, part in enumerate(parts, 1)
    )
    return FederatedData(
        corpus.labels,
        hospitals,
        corpus.test,
        corpus.validation,
        warnings_about(corpus.labels, hospitals, corpus.test),
        f"ICD-10-CM ({corpus.version}), chapter from the wording of a diagnosis: "
        f"{sum(map(len, parts)):,} training texts for {clients} hospitals by {partition}, "
        f"{len(corpus.validation):,} for validation, {len(corpus.test):,} for testing, "
        f"{len(corpus.labels)} chapters",
    )
