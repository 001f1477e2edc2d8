"""The checks of a site, in the order in which one needs what the other found."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedtune.base.resolve import PACKAGED
from fedtune.config import Conditions, Config
from fedtune.deploy.conditions import Judgement, judge
from fedtune.deploy.doctor.data import examine_base, examine_lengths, examine_rows
from fedtune.deploy.doctor.findings import Examination, Verdict
from fedtune.deploy.doctor.keys import examine_site_keys
from fedtune.deploy.doctor.machine import Needs, examine_machine
from fedtune.deploy.doctor.network import examine_network
from fedtune.deploy.doctor.packages import examine_packages
from fedtune.deploy.keys import Members
from fedtune.deploy.readings import Reader
from fedtune.deploy.site_files import SiteFiles
from fedtune.errors import BaseModelError, ConfigError
from fedtune.report import words
from fedtune.round.policy import check_policy

if TYPE_CHECKING:  # it imports torch
    from fedtune.deploy.doctor.predict import ModelShape

CORRECT = "correct the file; docs/configuration.md has every key"
FIRST = "solve the problems above first"
TRAINING = ("torch", "transformers", "peft")


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
    fetched = _is_fetched(files)
    # What would bring the base model is not needed where it comes from the server.
    examine_packages(examination, extras_for(config, data) - ({"example"} if fetched else set()))
    found = examine_site_keys(examination, files)
    examine_network(examination, site.server, found.authority, found.transport)
    if fetched:
        examination.begin("base model")
        advice = "fedtune client fetches it from the server when it starts; or set machine.base"
        examination.add("base model", Verdict("warning", "it is not on this machine", advice))
        base = None
    else:
        base = examine_base(examination, config, files.config.policy.base_digests)
    if base is not None and found.members is not None:
        members, digest = found.members, base[1]
        examination.run("policy", lambda: _policy(files, members, digest))
    shape = _shape(examination, config, base[0] if base else None)
    rows = examine_rows(examination, config, site.name, data[0], data[1] if data[1:] else None)
    needs = Needs()
    if base is None or shape is None:
        examination.skip("length of texts", "the base model is not known", FIRST)
    else:
        tokens = shape.longest
        if rows is not None:
            tokens = examine_lengths(examination, base[0], rows, shape.longest) or tokens
        needs = _predict(examination, files, shape, tokens, found.members)
    _time(examination, files, measured, rows is not None and shape is not None)
    machine = files.config.machine
    examine_machine(
        examination, files.find(site.memory).parent, needs, machine.threads, machine.device
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
    if config.base.path in PACKAGED:
        extras.add("example")
    return extras


def absent() -> list[str]:
    """What it takes to look at a model, and is not installed."""
    return [name for name in TRAINING if importlib.util.find_spec(name) is None]


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


def _is_fetched(files: SiteFiles) -> bool:
    """Whether the base model is going to come from the server."""
    try:
        return files.federation.base.digest is not None and not files.has_base()
    except BaseModelError:
        return False  # machine.base names one that is not there


def _policy(files: SiteFiles, members: Members, base_digest: str) -> Verdict[None]:
    config = files.federation
    digest = members.roster.digest if config.secagg.enabled else None
    check_policy(files.config.policy, config, base_digest, config.aggregate.rule, digest)
    return Verdict("ok", "this site's policy allows what the federation asks for")


def _shape(examination: Examination, config: Config, base: Path | None) -> ModelShape | None:
    if base is None or (lacking := absent()):
        why = f"not installed: {', '.join(lacking)}" if base else "there is no base model"
        examination.skip("model", why, FIRST)
        return None
    from fedtune.deploy.doctor.predict import look_at

    return examination.run("model", lambda: look_at(base, config))


def _predict(
    examination: Examination,
    files: SiteFiles,
    shape: ModelShape,
    tokens: int,
    members: Members | None,
) -> Needs:
    """What rounds need of this machine, as far as it can be told."""
    from fedtune.deploy.doctor import predict
    from fedtune.deploy.doctor.traffic import predict_traffic

    config, name = files.federation, files.config.site.name
    memory = predict.site_memory(config, shape, tokens, predict.process_memory())
    examination.begin("a round")
    if members is None:
        examination.skip("traffic", "there is no roster", FIRST)
        return Needs(memory=memory)
    names = list(members.transport)

    def traffic() -> Verdict[None]:
        found = predict_traffic(config, shape.adapter, name, names)
        text = (
            f"about {words.size(found.up)} up and {words.size(found.down)} down in each of "
            f"{words.plural(config.rounds.count, 'round')}, and what HTTP and TLS add"
        )
        numbers = {"bytes_up_per_round": found.up, "bytes_down_per_round": found.down}
        return Verdict("ok", text, numbers=numbers)

    examination.run("traffic", traffic)
    return Needs(predict.site_disk(config, shape, len(names)), memory)


def _time(examination: Examination, files: SiteFiles, measured: bool, possible: bool) -> None:
    examination.begin("a round")
    train, timeout = files.federation.train, files.federation.rounds.timeout

    def timed() -> Verdict[None]:
        from fedtune.deploy.doctor.measure import measure

        found = measure(files.path)
        seconds = found.seconds_per_step * train.steps
        text = (
            f"{words.duration(seconds)} of training per round ({train.steps} steps of "
            f"{found.seconds_per_step:.3f} s), at most {words.size(found.peak_bytes)} of memory"
        )
        numbers = {
            "seconds_per_step": found.seconds_per_step,
            "seconds_per_round": seconds,
            "peak_bytes": found.peak_bytes,
        }
        advice = "lower train.steps or raise rounds.timeout, with all parties"
        if seconds > timeout:
            text += f", but rounds.timeout is {words.duration(timeout)}"
            return Verdict("problem", text, advice, numbers)
        if seconds > timeout / 2:
            text += f", and rounds.timeout is {words.duration(timeout)}"
            return Verdict("warning", text, advice, numbers)
        return Verdict("ok", text, numbers=numbers)

    if measured and possible:
        examination.run("training", timed, FIRST)
    elif measured:
        examination.skip("training", "there is no model to train, or there are no rows", FIRST)
    else:
        examination.skip(
            "training", "not timed, since it loads the base model", "fedtune doctor --measure"
        )
