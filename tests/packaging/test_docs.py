"""The documentation says what the code does."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def test_the_configuration_reference_is_generated_from_the_configuration() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "generate_configuration_reference.py"))
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page == script["reference"](), "run scripts/generate_configuration_reference.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8"))
    broken = [link for link in links if not (page.parent / link).exists()]
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_keys_named_in_the_documentation_exist(page: Path) -> None:
    from fedtune.config import known_keys

    keys = {key for key, _ in known_keys()}
    tables = {key.partition(".")[0] for key in keys if "." in key}
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"`([a-z]+\.[a-z][a-z0-9-]+)", text))
    unknown = {key for key in named if key.partition(".")[0] in tables} - keys
    assert not {
        key for key in unknown if not key.endswith((".md", ".py", ".jsonl", ".json", ".csv"))
    }
