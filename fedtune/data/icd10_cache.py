"""The finished ICD-10-CM corpus on disk: parsing takes seconds, reading this takes none."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from fedtune.cache import cache_folder
from fedtune.data.examples import TextExamples
from fedtune.data.icd10_corpus import MISSING, Corpus, build_corpus
from fedtune.errors import DataError
from fedtune.types import digest_of

# Part of the file name: raise it with every change of `icd10_corpus` or of this format.
_FORMAT = 1


def cached_corpus(cache_dir: Path | None) -> Corpus:
    """The corpus of the installed package, from the cache where there is a sound one.

    A cache that is missing, broken or of another version is rebuilt; one that cannot be written
    is done without. `DataError` if `simple-icd-10-cm` is missing.
    """
    try:
        version = importlib.metadata.version("simple-icd-10-cm")
    except importlib.metadata.PackageNotFoundError as error:
        raise DataError(MISSING) from error
    folder = cache_dir or cache_folder()
    if folder is None:
        return build_corpus(f"simple-icd-10-cm {version}")
    path = folder / f"icd10cm-{version}-v{_FORMAT}.json"
    corpus = _read(path)
    if corpus is None:
        corpus = build_corpus(f"simple-icd-10-cm {version}")
        with contextlib.suppress(OSError):
            _write(path, corpus)
    return corpus


def _read(path: Path) -> Corpus | None:
    """The corpus in the file, or None if it is not there or not exactly what `_write` wrote."""
    try:
        content = json.loads(path.read_text("utf-8"))
        body = content["corpus"]
        if content["sha256"] != digest_of(body):
            return None
        return Corpus(
            body["version"],
            tuple(body["labels"]),
            train=_examples(body["train"]),
            validation=_examples(body["validation"]),
            test=_examples(body["test"]),
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _write(path: Path, corpus: Corpus) -> None:
    """Write the file in one step, so that a reader beside us never sees half of it."""
    body = {
        "version": corpus.version,
        "labels": list(corpus.labels),
        "train": _columns(corpus.train),
        "validation": _columns(corpus.validation),
        "test": _columns(corpus.test),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, part = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with open(descriptor, "w", encoding="utf-8") as file:  # noqa: PTH123 - a descriptor
            json.dump({"sha256": digest_of(body), "corpus": body}, file)
        Path(part).replace(path)
    except OSError:
        Path(part).unlink(missing_ok=True)
        raise


def _columns(examples: TextExamples) -> dict[str, Any]:
    return {"texts": list(examples.texts), "labels": examples.labels.tolist()}


def _examples(columns: dict[str, Any]) -> TextExamples:
    return TextExamples(tuple(columns["texts"]), np.array(columns["labels"], np.int64))
