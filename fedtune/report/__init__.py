"""What a person sees of a run: progress, tables, TensorBoard events, the HTML report.

Names are loaded at their first use: whoever writes a record does not pay for rich.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedtune.report.files import write_atomic, write_json
    from fedtune.report.headline import headline
    from fedtune.report.html import render_html
    from fedtune.report.progress import LiveProgress, PlainProgress, Progress, make_progress
    from fedtune.report.records import (
        ClientSummary,
        Reference,
        RoundRecord,
        Score,
        Status,
        Summary,
    )
    from fedtune.report.tables import print_summary
    from fedtune.report.tensorboard import write_events

_HOMES = {
    "ClientSummary": "records",
    "LiveProgress": "progress",
    "PlainProgress": "progress",
    "Progress": "progress",
    "Reference": "records",
    "RoundRecord": "records",
    "Score": "records",
    "Status": "records",
    "Summary": "records",
    "headline": "headline",
    "make_progress": "progress",
    "print_summary": "tables",
    "render_html": "html",
    "write_atomic": "files",
    "write_events": "tensorboard",
    "write_json": "files",
}

__all__ = [
    "ClientSummary",
    "LiveProgress",
    "PlainProgress",
    "Progress",
    "Reference",
    "RoundRecord",
    "Score",
    "Status",
    "Summary",
    "headline",
    "make_progress",
    "print_summary",
    "render_html",
    "write_atomic",
    "write_events",
    "write_json",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
