"""The README's Python example runs as it stands and does what it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).resolve().parent.parent.parent / "README.md"


def test_the_python_example_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    example = next(block for block in blocks if "fedtune.simulate(" in block)
    assert len([line for line in example.splitlines() if line.strip()]) <= 10
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(example, names)  # our own documentation
    run = names["run"]
    accuracy = run.accuracy  # type: ignore[attr-defined]  # a fedtune.Run
    assert accuracy > 0.8, "chance is 0.25"
    assert (tmp_path / "runs" / "simulation" / "adapter" / "passport.json").is_file()
