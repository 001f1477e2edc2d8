"""The checks of a site, in the order in which one needs what the other found."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedtune.base.resolve import PACKAGED
from fedtune.config import Conditions, Config
from fedtune.deploy.conditions import Judgement, judge
from fedtune.deploy.doctor.edge import (
    edge_extra,
    examine_edge,
    examine_runtime,
)
from fedtune.deploy.doctor.findings import Examination, Verdict
from fedtune.deploy.doctor.keys import examine_site_keys
from fedtune.deploy.doctor.machine import examine_machine
from fedtune.deploy.doctor.network import examine_network
from fedtune.deploy.doctor.packages import examine_packages
from fedtune.deploy.doctor.pytorch import examine_pytorch, is_fetched
from fedtune.deploy.doctor.rounds import examine_time
from fedtune.deploy.doctor.vision import examine_vision
from fedtune.deploy.readings import Reader
from fedtune.deploy.site_files import SiteFiles
from fedtune.edge.runtime import installed_builds
from fedtune.errors import ConfigError

CORRECT = "correct the file; docs/configuration.md has every key"
# Of those that fedtune itself asks for, what only a server imports.
SERVERS = ("starlette", "uvicorn")
# Extras that a site without PyTorch does without.
WORKSTATIONS = {"torch", "example", "vqa", "split"}


def examine_site(examination: Examination, path: Path, measured: bool) -> None:
    """Check the machine of a site with the client.toml `path`; if `measured`, train a little."""
    examination.begin("configuration")
    files = examination.run("files", lambda: _read(path))
    if files is None:
        examine_packages(examination, {"torch"})
        examine_machine(examination, path.parent)
        return
    config, site = files.federation, files.config.site
    data = [files.find(name) for name in (files.config.data.train, files.config.data.test) if name]
    runtime = files.config.machine.runtime
    extras = extras_for(config, data)
    if runtime != "torch":
        more = {edge_extra(files.step == "ort", installed_builds())}
        if config.base.task == "visual-question-answering":
            more.add("edge-nano")
        examine_packages(examination, extras - WORKSTATIONS | more, SERVERS)
        examine_runtime(examination, files)
    else:
        # What would bring the base model is not needed where it comes from the server.
        examine_packages(examination, extras - ({"example"} if is_fetched(files) else set()))
    found = examine_site_keys(examination, files)
    examine_network(examination, site.server, found.authority, found.transport)
    if config.base.task == "visual-question-answering":
        needs, possible = examine_vision(examination, files, data, found.members)
    elif runtime == "torch":
        needs, possible = examine_pytorch(examination, files, data, found.members)
    else:
        needs, possible = examine_edge(examination, files, data, found.members)
    examine_time(examination, files, measured, possible)
    machine = files.config.machine
    examine_machine(
        examination,
        files.find(site.memory).parent,
        needs,
        machine.threads,
        machine.device if runtime == "torch" else None,
    )
    examine_conditions(examination, files.config.conditions)


def examine_conditions(examination: Examination, conditions: Conditions) -> None:
    """What is read now for each of a site's conditions, and whether it would take part."""
    examination.begin("conditions")
    for found in judge(conditions, Reader(Path(conditions.sysfs)).read()):
        examination.add(found.key, _judged(found))


def extras_for(config: Config, data: Sequence[Path]) -> set[str]:
    """The extras of fedtune that training or evaluating with these files needs."""
    extras = {"torch"}
    if config.privacy.unit != "none":
        extras.add("privacy")
    if any(path.suffix.lower() == ".parquet" for path in data):
        extras.add("parquet")
    if config.base.task == "visual-question-answering":
        return extras | ({"vqa", "split"} if config.base.placement == "server" else {"vqa"})
    if config.base.path in PACKAGED:
        extras.add("example")
    return extras


def _read(path: Path) -> Verdict[SiteFiles]:
    try:
        files = SiteFiles.read(path)
    except ConfigError as error:
        return Verdict("problem", str(error), CORRECT)
    text = f"{path} and {files.config.site.federation} say what they must"
    return Verdict("ok", text, value=files)


def _judged(found: Judgement) -> Verdict[None]:
    if found.unreadable is not None:
        advice = "make it readable, or take the key out"
        return Verdict("problem", str(found.unreadable), advice)
    if not found.met:
        return Verdict("warning", found.text, "it takes part when this holds")
    return Verdict("ok", found.text)
