"""ONNX Runtime on a device: which build is there, and how its sessions are opened."""

from __future__ import annotations

import ctypes
import sys
import types
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.utils import canonicalize_name

from fedtune.errors import ConfigError

TRAINING_VERSION = "1.19.2"  # the last one that trains
# By their own metadata the packages ask for three times what is used.
_LISTS = (
    "client/requirements.edge.txt (it trains) or client/requirements.edge-plain.txt "
    "as docs/edge.md says"
)
_MMAP_THRESHOLD, _LARGE_BLOCK = -3, 1 << 17  # M_MMAP_THRESHOLD of malloc.h; bytes
_ERRORS = 3  # of the runtime's log, in which all else is about itself
_CPU, _CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
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


@cache
def _use_little_memory() -> None:
    """Give memory back when it is freed, which the C library otherwise keeps for later.

    glibc raises the size above which it does so with every large block that is freed; named
    explicitly, the size stays. It is what loading a model leaves behind, a few megabytes. Other
    libraries have no such setting and need none.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_MMAP_THRESHOLD, _LARGE_BLOCK)


def import_runtime() -> Any:
    """The package `onnxruntime`; raises `ConfigError` if there is none, or several in one."""
    builds = installed_builds()
    if len(builds) > 1:
        names = sorted(builds)
        raise ConfigError(
            f"{' and '.join(names)} are both installed and overwrite each other's files: "
            f"pip uninstall -y {' '.join(names)}, then install {_LISTS}"
        )
    _use_little_memory()
    try:
        import onnxruntime

        onnxruntime.set_default_logger_severity(_ERRORS)
    except ImportError as error:
        raise ConfigError(f"ONNX Runtime is not installed: install {_LISTS}") from error
    return onnxruntime


def import_training() -> Any:
    """ONNX Runtime's `training.api`; raises `ConfigError` if this build does not train."""
    runtime = import_runtime()
    folder = Path(runtime.__file__).parent / "training"
    if runtime.__version__ != TRAINING_VERSION or not (folder / "api").is_dir():
        raise ConfigError(
            f'runtime = "ort" needs the training build of ONNX Runtime {TRAINING_VERSION}, this '
            f"is {', '.join(installed_builds())} {runtime.__version__}: install "
            'client/requirements.edge.txt as docs/edge.md says, or set runtime = "stepgraph"'
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


def import_build(step: str) -> None:
    """Import what runs a step: for `ort` the build that trains, else any; raises `ConfigError`."""
    if step == "ort":
        import_training()
    else:
        import_runtime()


@cache
def _share_arena() -> None:
    """One arena for all sessions of the process, which grows by just what it is asked for.

    Without an arena a step takes nearly twice as long, for pages that come and go; with ONNX
    Runtime's own, which doubles, a tenth more memory.
    """
    runtime = import_runtime()
    allocator = runtime.OrtAllocatorType.ORT_ARENA_ALLOCATOR
    memory = runtime.OrtMemoryInfo("Cpu", allocator, 0, runtime.OrtMemType.DEFAULT)
    # No limit, growth as requested, and the rest as it is by default.
    runtime.create_and_register_allocator(memory, runtime.OrtArenaCfg(0, 1, -1, -1))


def session_options(threads: int, prepack: bool = False) -> Any:
    """Options for little memory: a shared arena, and unless `prepack` no second copy of weights."""
    _share_arena()
    options = import_runtime().SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.enable_mem_pattern = False  # one block per step size, beside what is there
    options.log_severity_level = _ERRORS
    options.add_session_config_entry("session.use_env_allocators", "1")
    options.add_session_config_entry("session.disable_prepacking", "0" if prepack else "1")
    return options


def providers_of(device: str) -> list[Any]:
    """What runs a session's nodes on `machine.device`, the first that can.

    `auto` is the CPU: on a small model CUDA must be asked for. Raises `ConfigError` if this build
    of ONNX Runtime has no such device.
    """
    if device in {"auto", "cpu"}:
        return [_CPU]
    kind, _, number = device.partition(":")
    if kind != "cuda" or _CUDA not in import_runtime().get_available_providers():
        raise ConfigError(
            f"machine.device = {device}: {', '.join(installed_builds())} does not know it; use "
            "auto or cpu, or for CUDA install fedtune[edge-cuda]"
        )
    return [(_CUDA, {"device_id": int(number or 0)}), _CPU]


def open_session(graph: Path, threads: int, device: str = "cpu", prepack: bool = False) -> Any:
    """An inference session; raises `ConfigError` if the graph or the device does not load.

    With `prepack` weights are laid out for the matrix products when it is opened: faster steps, for
    a copy of some of them.
    """
    runtime, providers = import_runtime(), providers_of(device)
    try:
        session = runtime.InferenceSession(
            str(graph), session_options(threads, prepack), providers=providers
        )
    except Exception as error:  # of a dozen kinds without a common base
        raise ConfigError(
            f"{graph}: ONNX Runtime {runtime.__version__} does not load it: "
            f"{str(error).strip().splitlines()[0]}"
        ) from error
    if len(session.get_providers()) < len(providers):  # it goes on with what is left
        raise ConfigError(f"machine.device = {device}: ONNX Runtime cannot use it; use auto or cpu")
    return session
