"""ONNX Runtime on a device: which build is there, and how its sessions are opened."""

from __future__ import annotations

import ctypes
import sys
import types
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.utils import canonicalize_name

from fedtune.errors import ConfigError

TRAINING_VERSION = "1.19.2"  # the last one that trains
_MMAP_THRESHOLD, _LARGE_BLOCK = -3, 1 << 17  # M_MMAP_THRESHOLD of malloc.h; bytes
_ERRORS = 3  # of the runtime's log, in which all else is about itself
_FAMILY = ("onnxruntime", "ort-")
_MODULE = "onnxruntime/__init__.py"


def installed_builds() -> dict[str, str]:
    """The distributions that write the package `onnxruntime`, with their versions.

    They all write the same files; of several, the one that came last is what runs, or a mixture.
    """
    return {
        name: distribution.version
        for distribution in metadata.distributions()
        # By name first: the lists of files of all packages are long.
        if (name := canonicalize_name(distribution.name)).startswith(_FAMILY)
        and any(str(file) == _MODULE for file in distribution.files or ())
    }


def import_runtime() -> Any:
    """The package `onnxruntime`; raises `ConfigError` if there is none, or several in one."""
    builds = installed_builds()
    if len(builds) > 1:
        names = sorted(builds)
        raise ConfigError(
            f"{' and '.join(names)} are both installed and overwrite each other's files: "
            f"pip uninstall -y {' '.join(names)}, then install fedtune[edge] or fedtune[edge-plain]"
        )
    try:
        import onnxruntime

        onnxruntime.set_default_logger_severity(_ERRORS)
    except ImportError as error:
        raise ConfigError(
            "ONNX Runtime is not installed: pip install 'fedtune[edge]' (training build) or "
            "'fedtune[edge-plain]'"
        ) from error
    return onnxruntime


def import_training() -> Any:
    """ONNX Runtime's `training.api`; raises `ConfigError` if this build does not train."""
    runtime = import_runtime()
    folder = Path(runtime.__file__).parent / "training"
    if runtime.__version__ != TRAINING_VERSION or not (folder / "api").is_dir():
        raise ConfigError(
            f'runtime = "ort" needs the training build of ONNX Runtime {TRAINING_VERSION}, this '
            f"is {', '.join(installed_builds())} {runtime.__version__}: pip install "
            "'fedtune[edge]', or set runtime = \"stepgraph\""
        )
    name = "onnxruntime.training"
    if name not in sys.modules:
        # Its own __init__ imports torch, for interfaces that nothing here uses.
        package = types.ModuleType(name)
        package.__path__ = [str(folder)]
        sys.modules[name] = package
        runtime.training = package
    from onnxruntime.training import api

    return api


def use_little_memory() -> None:
    """Give memory back when it is freed, which the C library otherwise keeps for later.

    glibc raises the size above which it does so with every large block that is freed; named
    explicitly, the size stays. Half of what a step takes depends on it. Other libraries have no
    such setting and need none.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_MMAP_THRESHOLD, _LARGE_BLOCK)


def session_options(threads: int) -> Any:
    """Options for little memory: no arena that keeps its peak, no second copy of weights."""
    runtime = import_runtime()
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.enable_cpu_mem_arena = False
    options.log_severity_level = _ERRORS
    options.add_session_config_entry("session.disable_prepacking", "1")
    return options


def open_session(graph: Path, threads: int) -> Any:
    """An inference session on the CPU; raises `ConfigError` if the graph does not load."""
    runtime = import_runtime()
    try:
        return runtime.InferenceSession(
            str(graph), session_options(threads), providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # of a dozen kinds without a common base
        raise ConfigError(
            f"{graph}: ONNX Runtime {runtime.__version__} does not load it: "
            f"{str(error).strip().splitlines()[0]}"
        ) from error
