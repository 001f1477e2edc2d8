"""Python and the packages that are installed, by their metadata: nothing is imported."""

from __future__ import annotations

import platform
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from fedtune.deploy.doctor.findings import Examination, Verdict
from fedtune.edge.runtime import installed_builds

# What trains, aggregates or reports; the packages of developers are nobody's business here.
EXTRAS = ("torch", "privacy", "report", "parquet", "example")
# Read out where all is well: a difference in these is the first thing to look at.
_TOLD = ("fedtune", "torch", "transformers", "peft", "flwr", "numpy", "cryptography", "protobuf")


@dataclass(frozen=True)
class _Need:
    """A requirement, and the extra of fedtune that asks for it ("": fedtune itself)."""

    requirement: Requirement
    extra: str

    @property
    def install(self) -> str:
        return f"pip install --upgrade 'fedtune{f'[{self.extra}]' if self.extra else ''}'"


def examine_packages(
    examination: Examination, extras: Iterable[str], spared: Collection[str] = ()
) -> None:
    """Versions against what fedtune asks for.

    Packages of other extras than `extras` may lack, and those of the names `spared`.
    """
    examination.begin("software")
    examination.run("python", _python)
    needed = set(extras)
    try:
        # Who trains with PyTorch need not hear of what a device would need.
        needs = _needs(["", *EXTRAS, *sorted(needed.difference(EXTRAS))])
    except metadata.PackageNotFoundError:
        examination.add(
            "packages",
            Verdict("problem", "fedtune is not installed", "pip install 'fedtune[torch]'"),
        )
        return
    wrong = False
    absent: dict[str, list[str]] = {}
    for need in needs:
        version = _version(need.requirement.name)
        if version is None and need.requirement.name in spared:
            continue
        if version is None and need.extra and need.extra not in needed:
            absent.setdefault(need.extra, []).append(need.requirement.name)
        elif version is None:
            wrong = True
            words = f"{need.requirement.name} is not installed"
            examination.add("packages", Verdict("problem", words, need.install))
        elif not need.requirement.specifier.contains(version, prereleases=True):
            wrong = True
            words = f"{need.requirement.name} {version}, but fedtune needs {need.requirement}"
            examination.add("packages", Verdict("problem", words, need.install))
    if not wrong:
        told = [f"{name} {version}" for name in _TOLD if (version := _version(name))]
        examination.add("packages", Verdict("ok", ", ".join(told)))
    for extra, names in absent.items():
        words = f"{', '.join(names)}: not installed, and not needed for what was checked"
        advice = f"if it is needed: pip install 'fedtune[{extra}]'"
        examination.skip("packages", words, advice)
    examination.run("ONNX Runtime", _onnx_runtime)


def _python() -> Verdict[None]:
    version, machine = platform.python_version(), f"{platform.system()} {platform.machine()}"
    required = metadata.metadata("fedtune")["Requires-Python"]
    if not SpecifierSet(required or "").contains(version, prereleases=True):
        words = f"Python {version}, but fedtune needs {required}"
        return Verdict("problem", words, "install fedtune with another Python")
    return Verdict("ok", f"Python {version} on {machine}")


def _onnx_runtime() -> Verdict[None]:
    """All builds of ONNX Runtime write the same files; the one that came last is what runs."""
    found = installed_builds()
    names = sorted(found)
    words = ", ".join(f"{name} {found[name]}" for name in names)
    if len(names) > 1:
        return Verdict(
            "problem",
            f"{words} overwrite each other's files",
            f"pip uninstall -y {' '.join(names)}, then install the one that you need",
        )
    return Verdict("ok", words or "not installed, and not needed to train with PyTorch")


def _needs(extras: Iterable[str]) -> list[_Need]:
    """What the installed fedtune asks for here, by itself ("") and by its extras."""
    texts = [Requirement(text) for text in metadata.requires("fedtune") or ()]
    needs = []
    for extra in extras:
        for requirement in texts:
            marker = requirement.marker
            # What fedtune itself asks for is asked for with every extra too.
            asked = marker is None or marker.evaluate({"extra": extra})
            if asked and (not extra or not (marker is None or marker.evaluate({"extra": ""}))):
                needs.append(_Need(requirement, extra))
    return needs


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
