"""The base model and a site's rows: there, whole, and in the agreed format.

What is said of rows are counts, lines and agreed labels, never what stands in them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedtune.base.resolve import digest_base, resolve_base
from fedtune.config import Base, Config
from fedtune.data import ClientData, TextExamples
from fedtune.data.checks import warnings_about
from fedtune.data.readers import place
from fedtune.data.rows import UNLABELLED, Columns, read_rows, require_rows
from fedtune.deploy.doctor.findings import Examination, Verdict
from fedtune.errors import DataError
from fedtune.report import words

MOST_TOKENIZED = 2000  # rows that are tokenized to see how long they are
MANY_CUT = 0.1  # a larger share of rows that are cut is worth a warning
_MOST_LABELS = 8  # with more, only the rarest and the commonest are told


def examine_base(
    examination: Examination, config: Config, accepted: Sequence[str]
) -> tuple[Path, str] | None:
    """The base model's folder and digest; `accepted` are policy.base-digests."""
    examination.begin("base model")
    advice = "set base.path, or where the base model lies on this machine"
    return examination.run("base model", lambda: _base(config.base, accepted), advice)


def examine_rows(
    examination: Examination, config: Config, name: str, train: Path, test: Path | None = None
) -> TextExamples | None:
    """The rows of a site, or None if they cannot be trained on."""
    examination.begin("data")
    rows = examination.run("rows to train on", lambda: look_at_rows(train, config))
    tested = (
        examination.run("rows to test on", lambda: look_at_rows(test, config)) if test else None
    )
    if rows is not None:
        own = ClientData(name, rows, tested)
        for warning in warnings_about(config.data.labels, [own], None):
            examination.add(
                "content", Verdict("warning", warning, "see whether this is meant to be so")
            )
    return rows


def examine_lengths(
    examination: Examination, folder: Path, rows: TextExamples, longest: int
) -> int | None:
    """Tokens of the longest row, at most `longest`, to which longer ones are cut."""
    return examination.run("length of texts", lambda: _lengths(folder, rows, longest))


def look_at_rows(path: Path, config: Config) -> Verdict[TextExamples]:
    """The rows of a file, and how many of each label, if all of them can be used."""
    data = config.data
    try:
        rows = require_rows(read_rows(path, Columns(data.text_column, config.label_column)))
    except DataError as error:
        # What follows can name columns, which without a header are the first row's texts.
        what = str(error).partition("; ")[0]
        return Verdict(
            "problem",
            what,
            f"the file needs {_columns(config)}, and no empty cell",
        )
    if config.label_column is None:
        examples = rows.encode({UNLABELLED: 0})
        text = words.plural(len(rows), "row")
        return Verdict("ok", text, numbers={"rows": len(rows)}, value=examples)
    agreed = set(data.labels)
    wrong = [number for number, label in zip(rows.numbers, rows.labels, strict=True)
             if label not in agreed]  # fmt: skip
    if wrong:
        return Verdict(
            "problem",
            f"{words.plural(len(wrong), 'row')} of {len(rows):,} with a label that data.labels "
            f"does not have, the first in {place(path, wrong[0])}",
            "correct the labels, or agree on others with all parties",
            {"rows": len(rows), "unknown_labels": len(wrong)},
        )
    examples = rows.encode({label: number for number, label in enumerate(data.labels)})
    counts = np.bincount(examples.labels, minlength=len(data.labels)).tolist()
    numbers = dict(zip(data.labels, counts, strict=True))
    text = f"{words.plural(len(rows), 'row')}; {_spread(numbers)}"
    return Verdict("ok", text, numbers={"rows": len(rows), **numbers}, value=examples)


def _columns(config: Config) -> str:
    text, label = config.data.text_column, config.label_column
    return f"a column {text}" if label is None else f"columns {text} and {label}"


def _base(base: Base, accepted: Sequence[str]) -> Verdict[tuple[Path, str]]:
    folder = resolve_base(base.path)
    for file in sorted(folder.glob("*.safetensors")):
        if (fault := _fault(file)) is not None:
            return Verdict("problem", f"{file} is not whole ({fault})", "copy it again")
    digest = digest_base(folder)
    text = f"{folder}, digest {digest}"
    if base.digest is not None and digest != base.digest:
        words = f"{text}, but base.digest says {base.digest}"
        return Verdict("problem", words, "take the agreed base model; ask the operator for it")
    if accepted and digest not in accepted:
        words = f"{text}, which policy.base-digests does not have"
        return Verdict("problem", words, "take the agreed base model; ask the operator for it")
    return Verdict("ok", text, value=(folder, digest))


def _fault(file: Path) -> str | None:
    """What is wrong with a file of weights; nothing is loaded."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "numpy"):
            return None
    except (SafetensorError, OSError) as error:
        return str(error).partition("\n")[0]


def _spread(counts: dict[str, int]) -> str:
    """How many rows each label has, or with many labels the rarest and the commonest."""
    ordered = sorted(counts.items(), key=lambda item: item[1])
    if len(counts) > _MOST_LABELS:
        few, many = ordered[0], ordered[-1]
        return f"{len(counts)} labels, from {few[0]} ({few[1]:,}) to {many[0]} ({many[1]:,})"
    return ", ".join(f"{label} {count:,}" for label, count in reversed(ordered))


def _lengths(folder: Path, rows: TextExamples, longest: int) -> Verdict[int]:
    from transformers.utils import logging

    from fedtune.base.loading import load_tokenizer

    logging.set_verbosity_error()  # it would warn of texts that are longer than the model takes
    tokens = load_tokenizer(folder)(list(chosen_rows(rows).texts))["input_ids"]
    return told_lengths(np.array([len(row) for row in tokens]), len(rows), longest)


def chosen_rows(rows: TextExamples) -> TextExamples:
    """Those that are tokenized to see how long they are, from all over the file."""
    chosen = np.linspace(0, len(rows) - 1, min(len(rows), MOST_TOKENIZED)).astype(np.int64)
    return rows.select(chosen)


def told_lengths(lengths: NDArray[np.int64], rows: int, longest: int) -> Verdict[int]:
    """What `lengths` (tokens) of some of `rows` rows say; its value, at most `longest`: the most.

    Longer ones than `longest` are cut.
    """
    share = float((lengths > longest).mean())
    found = min(int(lengths.max()), longest)
    looked = f" of {len(lengths):,} rows looked at" if len(lengths) < rows else ""
    text = (
        f"{words.percent(share)}{looked} are longer than {longest} tokens and are cut; the longest "
        f"has {int(lengths.max()):,}, half have {int(np.median(lengths)):,} or less"
    )
    numbers = {"share_cut": share, "longest": int(lengths.max())}
    if share > MANY_CUT:
        advice = "raise base.max-length with all parties, or shorten the texts"
        return Verdict("warning", text, advice, numbers, found)
    return Verdict("ok", text, numbers=numbers, value=found)
