"""What a reader is told about privacy."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from report_samples import sample_rounds, sample_summary
from rich.console import Console

from fedtune.report.html import render_html
from fedtune.report.tables import print_summary

UNIT = "all data of one client, against none, at delta 1e-05"


def test_the_epsilon_stands_with_its_unit(tmp_path: Path):
    summary = replace(sample_summary(), epsilon=7.9999, epsilon_unit=UNIT)
    page = render_html(summary, sample_rounds())
    assert "ε = 8.00" in page
    assert UNIT in page
    screen = io.StringIO()
    print_summary(summary, Console(file=screen, width=200), tmp_path)
    assert f"privacy spent: epsilon 8 for {UNIT}" in screen.getvalue()


@pytest.mark.parametrize(("masked", "words"), [(True, "sums only"), (False, "each update")])
def test_what_the_server_saw(masked: bool, words: str):
    summary = replace(sample_summary(), masked=masked)
    page = render_html(summary, sample_rounds())
    assert words in page
    assert "Privacy spent" not in page
