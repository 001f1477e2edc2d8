"""The environment of a device, as client/requirements.edge*.txt makes it, for tests."""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Taken out afterwards, as docs/edge.md says: for programs in C; Python has its own copy.
UNUSED = ("onnxruntime/capi/libonnxruntime.so.*",)
_METADATA = ("pyproject.toml", "README.md", "LICENSE")


def requirements(name: str) -> Path:
    """The exact packages of the environment `name`."""
    return ROOT / "client" / f"requirements.{name}.txt"


def site_packages(python: Path) -> Path:
    """Where the packages of an environment are."""
    (found,) = python.parent.parent.glob("lib/python3*/site-packages")
    return found


def python_of(*names: str) -> Path:
    """The Python of the environment of these lists, made once, below that of the tests.

    Its folder is named for what it was made of: the tests of another tree, which may run at the
    same time, have another. `make clean` removes them all. Of fedtune only the metadata and the
    command are in it: the code comes by PYTHONPATH from the tree under test.
    """
    lists = [requirements(name) for name in names]
    made_of = (*lists, ROOT / "pyproject.toml")
    digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in made_of]
    digest = hashlib.sha256("\n".join([sys.version, *UNUSED, *digests]).encode()).hexdigest()
    folder = Path(sys.prefix) / "devices" / "+".join(names) / digest[:16]
    python, made = folder / "bin" / "python", folder / "made"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several processes may want it first
        if not made.is_file():
            shutil.rmtree(folder, ignore_errors=True)
            venv.create(folder, with_pip=False)
            pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
            install = [*pip, "--python", python, "install", "--no-deps", "--no-compile"]
            for arguments in (
                [*install, *(part for file in lists for part in ("--requirement", file))],
                [*install, _wheel_without_code(pip, folder)],
            ):
                subprocess.run(arguments, check=True, timeout=250)
            for library in UNUSED:
                for file in site_packages(python).glob(library):
                    file.unlink()
            made.touch()
    return python


def _wheel_without_code(pip: list[str], folder: Path) -> Path:
    source = folder / "source"
    source.mkdir()
    for name in _METADATA:
        shutil.copy(ROOT / name, source)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder]
    subprocess.run([*pip, "wheel", *options, source], check=True, timeout=120)
    (wheel,) = folder.glob("fedtune-*.whl")
    return wheel
