"""The environment of a device: what it has, how large it is, and that a site runs in it."""

from __future__ import annotations

import json
import re
import subprocess
import tomllib
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
from edge_environment import UNUSED, requirements, site_packages
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("edge", "edge-plain")
LARGEST = 150_000_000  # bytes of all packages together
# Nothing of what trains or aggregates elsewhere, nor what the packages' metadata ask for besides.
ABSENT = (
    *("torch", "transformers", "peft", "onnx", "onnxscript", "sympy", "h5py", "scipy", "pandas"),
    *("grpc", "Crypto", "sqlalchemy", "alembic", "uv", "uvloop", "fastapi", "starlette", "uvicorn"),
    *("setuptools", "pip", "cerberus", "dp_accounting", "pyarrow", "matplotlib", "huggingface_hub"),
)
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def artifacts(
    build_artifacts: Callable[..., object],
    tiny_base: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Of a BERT of two layers."""
    out = tmp_path_factory.mktemp("tiny") / "artifacts"
    build_artifacts(out, f'base.path="{tiny_base}"')
    return out


@pytest.fixture(params=NAMES)
def python(request: pytest.FixtureRequest) -> Path:
    found: Path = request.getfixturevalue(f"{request.param.replace('-', '_')}_python")
    return found


@pytest.fixture
def run(python: Path, child_environment: dict[str, str]) -> Run:
    """Run this tree's code in the environment; what it writes leaves no bytecode there."""

    def started(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [python, *arguments],
            env={**child_environment, "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    return started


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(path: Path) -> dict[str, str]:
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    found = (line.split("==") for line in lines)  # all are exact, or this fails
    return {canonical(name): version for name, version in found}


@pytest.mark.parametrize("name", NAMES)
def test_a_device_has_the_versions_that_everything_is_tested_with(name: str) -> None:
    constraints, own = pins(ROOT / "constraints.txt"), pins(requirements(name))
    assert {package: constraints.get(package) for package in own} == own
    # One build of ONNX Runtime: all write the same files.
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    runtime, tokenizers = project["optional-dependencies"][name]
    assert [package for package in own if package.startswith("onnx")] == [
        re.split("[=<>]", runtime)[0]
    ]
    assert tokenizers.startswith("tokenizers")


def test_the_two_differ_in_nothing_but_onnx_runtime() -> None:
    one, other = (pins(requirements(name)).items() for name in NAMES)
    assert {name for name, _ in one ^ other} == {"onnxruntime", "onnxruntime-training-cpu"}


def asked_for(name: str) -> list[Requirement]:
    """What a package asks for; with an extra, the marker says which."""
    if name != "fedtune":
        return [Requirement(text) for text in metadata.requires(name) or ()]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = [Requirement(text) for text in project["dependencies"]]
    for extra, texts in project["optional-dependencies"].items():
        for text in texts:
            found.append(Requirement(f'{text}; extra == "{extra}"'))
    return found


def test_everything_that_the_tests_run_with_is_pinned() -> None:
    """What `.[dev]` brings, followed through the packages' own metadata."""
    constraints = pins(ROOT / "constraints.txt")
    absent, todo, seen = set(), ["fedtune[dev]"], set()
    while todo:
        requirement = Requirement(todo.pop())
        for extra in ("", *sorted(requirement.extras)):
            key = (canonical(requirement.name), extra)
            if key in seen:
                continue
            seen.add(key)
            for needed in asked_for(requirement.name):
                if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                    todo.append(f"{needed.name}[{','.join(needed.extras)}]")
        if canonical(requirement.name) not in {*constraints, "fedtune", "setuptools"}:
            absent.add(requirement.name)
    assert absent == set()
    assert len(seen) > 80


def test_a_device_has_what_it_needs_and_no_more(python: Path, run: Run) -> None:
    code = (
        "import importlib.util, sys\n"
        "print(*(name for name in sys.argv[1:] if importlib.util.find_spec(name)))"
    )
    assert run("-c", code, *ABSENT).stdout.split() == []
    folder = site_packages(python)
    parts = (folder, ROOT / "fedtune")  # whose code is not in the former
    files = (path for part in parts for path in part.rglob("*") if path.suffix != ".pyc")
    size = sum(path.lstat().st_size for path in files)
    assert size < LARGEST, f"{size / 1e6:.1f} MB"
    installed = {
        canonical(found.name): found.version for found in metadata.distributions(path=[str(folder)])
    }
    assert installed.pop("fedtune") == metadata.version("fedtune")
    assert installed == pins(requirements(python.parents[2].name))


def test_a_packages_library_for_other_languages_is_not_missed(python: Path, run: Run) -> None:
    assert not [file for pattern in UNUSED for file in site_packages(python).glob(pattern)]
    code = (
        "import onnxruntime\nprint(onnxruntime.get_available_providers())\n"
        "print(open('/proc/self/maps').read().count('libonnxruntime.so'))"
    )
    result = run("-c", code)
    assert result.returncode == 0, result.stderr
    providers, mapped = result.stdout.splitlines()
    assert "CPUExecutionProvider" in providers
    assert mapped == "0"


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["client", "--help"],
        ["doctor", "--help"],
        ["edge", "verify", "--help"],
        ["audit", "verify", "--help"],
        ["keys", "site", "--help"],
    ],
    ids=" ".join,
)
def test_a_command_of_a_device_says_what_it_does(run: Run, words: list[str]) -> None:
    result = run("-m", "fedtune.cli", *words)
    assert (result.returncode, result.stderr) == (0, "")
    assert "Usage: " in result.stdout


@pytest.mark.parametrize(
    ("modules", "has_flower"),
    [
        ("fedtune.deploy.client", True),
        ("fedtune.deploy.training, fedtune.deploy.machine, fedtune.deploy.edge_site", False),
    ],
)
def test_a_process_of_a_site_starts(run: Run, modules: str, has_flower: bool) -> None:
    result = run("-c", f"import sys, {modules}\nprint('flwr' in sys.modules)")
    assert (result.stdout.strip(), result.stderr) == (str(has_flower), "")


def test_a_device_with_nano_adapters_has_grpc_and_pillow_besides(
    edge_nano_python: Path, child_environment: dict[str, str]
) -> None:
    more = pins(requirements("edge-nano"))
    constraints = pins(ROOT / "constraints.txt")
    assert {package: constraints.get(package) for package in more} == more
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extra = project["optional-dependencies"]["edge-nano"]
    assert {canonical(Requirement(text).name) for text in extra} == set(more)
    folder = site_packages(edge_nano_python)
    found = metadata.distributions(path=[str(folder)])
    installed = {canonical(one.name): one.version for one in found}
    del installed["fedtune"]
    assert installed == pins(requirements("edge-plain")) | more
    # Nothing else comes with them, and both processes of a site start, the one that talks to the
    # network without what of Flower would need PyCryptodome.
    for modules, has_flower in (
        ("fedtune.deploy.client", True),
        ("fedtune.deploy.training, fedtune.deploy.machine, fedtune.deploy.edge_vision_site", False),
    ):
        result = subprocess.run(
            [edge_nano_python, "-c", f"import sys, {modules}\nprint('flwr' in sys.modules)"],
            env={**child_environment, "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (result.stdout.strip(), result.stderr) == (str(has_flower), "")


def test_a_device_computes_what_pytorch_did(run: Run, artifacts: Path) -> None:
    result = run("-m", "fedtune.cli", "edge", "verify", artifacts, "--json")
    assert (result.returncode, result.stderr) == (0, "")
    report = json.loads(result.stdout)
    assert report["passed"]
    assert len(report["checks"]) >= 15
