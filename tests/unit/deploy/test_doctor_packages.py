"""Installed packages, against folders of metadata as pip leaves them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from doctor_helpers import only, statuses

from fedtune.deploy.doctor.findings import Examination
from fedtune.deploy.doctor.packages import examine_packages

ONNX_RUNTIME = "onnxruntime/__init__.py"


@pytest.fixture
def site_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands before all others where packages are looked for."""
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    return tmp_path


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder where packages are looked for."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    return tmp_path


def install(folder: Path, name: str, version: str, *lines: str, file: str = "") -> None:
    """What pip leaves of a package: metadata, and a list of its files."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    head = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *lines]
    (info / "METADATA").write_text("\n".join(head) + "\n")
    (info / "RECORD").write_text(f"{file},,\n" if file else "")


def examined(*extras: str) -> Examination:
    examination = Examination()
    examine_packages(examination, extras)
    return examination


def test_what_the_tests_run_with_is_what_fedtune_needs() -> None:
    found = examined("torch", "report", "privacy", "parquet", "example")
    assert statuses(found) == {"python": "ok", "packages": "ok", "ONNX Runtime": "ok"}
    assert "flwr 1.41" in only(found, "packages").finding


@pytest.mark.parametrize(
    ("name", "version", "needs", "extra"),
    [("flwr", "1.42.0", "flwr<1.42,>=1.41", ""), ("peft", "0.18.0", "peft>=0.19", "[torch]")],
)
def test_a_version_that_fedtune_does_not_take_is_a_problem(
    site_packages: Path, name: str, version: str, needs: str, extra: str
) -> None:
    install(site_packages, name, version)
    found = only(examined("torch"), "packages")
    assert found.status == "problem"
    assert found.finding.startswith(f"{name} {version}, but fedtune needs {needs}")
    assert found.advice == f"pip install --upgrade 'fedtune{extra}'"


def test_only_what_a_role_needs_may_not_lack(bare: Path) -> None:
    requires = ["numpy>=2", 'torch>=2.10; extra == "torch"', 'jinja2>=3; extra == "report"']
    lines = ["Requires-Python: >=3.11", *(f"Requires-Dist: {need}" for need in requires)]
    install(bare, "fedtune", "0.1.0", *lines)
    install(bare, "numpy", "2.4.6")
    found = [f for f in examined("torch").findings if f.check == "packages"]
    assert [(f.status, f.finding.partition(" ")[0]) for f in found] == [
        ("problem", "torch"),
        ("skipped", "jinja2:"),
    ]
    assert "fedtune[report]" in found[1].advice


def test_another_python_is_a_problem(bare: Path) -> None:
    install(bare, "fedtune", "0.1.0", "Requires-Python: >=3.99")
    found = only(examined(), "python")
    assert found.status == "problem"
    assert "fedtune needs >=3.99" in found.finding


def test_two_onnx_runtimes_are_a_problem(bare: Path) -> None:
    install(bare, "fedtune", "0.1.0", "Requires-Python: >=3.11")
    install(bare, "onnxruntime", "1.31.0", file=ONNX_RUNTIME)
    # Of the same name and family, but it writes nothing there.
    install(bare, "onnxruntime-extensions", "0.14.0", file="onnxruntime_extensions/a.py")
    found = only(examined(), "ONNX Runtime")
    assert (found.status, found.finding) == ("ok", "onnxruntime 1.31.0")

    install(bare, "onnxruntime-training-cpu", "1.19.2", file=ONNX_RUNTIME)
    found = only(examined(), "ONNX Runtime")
    assert found.status == "problem"
    assert "onnxruntime 1.31.0, onnxruntime-training-cpu 1.19.2" in found.finding
    assert "pip uninstall -y onnxruntime onnxruntime-training-cpu," in found.advice
