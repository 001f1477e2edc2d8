"""Records survive JSON; broken ones are refused by name."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import fields, replace

import pytest
from report_samples import REFERENCES, sample_clients, sample_rounds, sample_summary

from fedtune.errors import RunFolderError
from fedtune.records import Record, Reference, RoundRecord, Score, Summary

RECORDS = [
    sample_rounds()[3],
    replace(sample_rounds()[0], train_loss=None, loss=None, accuracy=None),
    sample_clients()[2],
    REFERENCES[0],
    Score(3, None, 0.5),
    sample_summary(),
    replace(sample_summary(references=False), final=None, best=None, epsilon=3.5),
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda r: type(r).__name__)
def test_round_trip_through_json_text(record: Record) -> None:
    plain = record.to_json()
    text = json.dumps(plain, allow_nan=False)
    assert json.loads(text) == plain  # lists and strings only, no tuples left
    assert list(plain) == [field.name for field in fields(record)]  # type: ignore[arg-type]
    assert type(record).from_json(json.loads(text)) == record


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_floats_that_are_not_finite_become_null_at_every_depth(bad: float) -> None:
    reference = Reference("local-only", bad, bad, 1.0, 8)
    plain = replace(sample_summary(), references=(reference,), seconds=bad).to_json()
    assert plain["seconds"] is None
    assert plain["references"] == [
        {"name": "local-only", "accuracy": None, "loss": None, "seconds": 1.0, "sample_steps": 8}
    ]
    again = Summary.from_json(json.loads(json.dumps(plain, allow_nan=False)))
    assert math.isnan(again.seconds)
    assert again.references[0].loss is None


@pytest.mark.parametrize(
    ("key", "value"),
    [("round", "many"), ("clients", 3), ("failed", ["x"]), ("seconds", "long"), ("bytes_up", 1.5)],
)
def test_wrong_kinds_are_refused_by_key(key: str, value: object) -> None:
    plain = sample_rounds()[0].to_json()
    with pytest.raises(RunFolderError, match=key):
        RoundRecord.from_json(plain | {key: value})
    del plain[key]
    with pytest.raises(RunFolderError, match=key):
        RoundRecord.from_json(plain)


def test_keys_of_a_later_version_are_ignored() -> None:
    record = sample_rounds()[0]
    assert RoundRecord.from_json(record.to_json() | {"new": 1}) == record


def test_unknown_status_is_refused() -> None:
    with pytest.raises(RunFolderError, match="status"):
        Summary.from_json(sample_summary().to_json() | {"status": "fine"})


def test_import_is_cheap() -> None:
    code = (
        "import sys;"
        "from fedtune.report import comparison, headline, html, progress, tables, tensorboard;"
        "heavy = {'torch', 'matplotlib', 'jinja2', 'tensorboard'};"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
