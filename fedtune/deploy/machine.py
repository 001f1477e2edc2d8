"""The client's machine of a site, made of its files.

What trains is imported by what the site's `machine.runtime` says: an edge device has no torch.
"""

from __future__ import annotations

import importlib.util

from fedtune.audit.log import AuditLog
from fedtune.data import TextExamples
from fedtune.data.labelled import load_examples
from fedtune.deploy.site_audit import AuditedMachine
from fedtune.deploy.site_files import SiteFiles
from fedtune.deploy.site_training import IN_FRONT_OF_A_CUT, SiteTraining
from fedtune.errors import ConfigError, KeyFileError
from fedtune.round.client import ClientMachine
from fedtune.round.membership import Membership
from fedtune.round.site import SiteStore
from fedtune.update import make_pipeline


def make_machine(files: SiteFiles) -> tuple[AuditedMachine, str]:
    """The machine, and in words what it has loaded; raises `UsageError` or `AuditWriteError`."""
    config, site = files.federation, files.config
    keys, members = files.keys(), files.members()
    pinned = site.policy.roster_digest
    if pinned is not None and members.roster.digest.hex() != pinned:
        raise KeyFileError(f"{site.site.roster}: not the roster that policy.roster-digest names")
    training = load_training(files)
    membership = Membership(
        site.policy, SiteStore(files.find(site.site.memory)), keys.identity, members.roster
    )
    machine = ClientMachine(
        site.site.name,
        config,
        training.trainer,
        training.train,
        training.test,
        make_pipeline(config.update, config.values_sent(training.manifest.size)),
        membership,
        training.parts,
    )
    log = AuditLog(files.find(site.site.audit), keys.identity)
    words = f"{len(training.train):,} rows to train on, {training.words}"
    return AuditedMachine(machine, membership, log), words


def load_training(files: SiteFiles) -> SiteTraining:
    """What trains at this site; raises `UsageError`."""
    config = files.federation
    if config.base.task == "visual-question-answering":
        return _load_questions(files)
    train, test = (
        load_examples(
            files.find(name), config.data.labels, config.data.text_column, config.label_column
        )
        if name
        else None
        for name in (files.config.data.train, files.config.data.test)
    )
    if train is None:
        raise ConfigError(f"{files.path}: data.train is missing")
    return _load(files, train, test)


def _load(files: SiteFiles, train: TextExamples, test: TextExamples | None) -> SiteTraining:
    if files.config.machine.runtime == "torch":
        from fedtune.deploy.torch_site import load
    else:
        from fedtune.deploy.edge_site import load
    return load(files, train, test)


def _load_questions(files: SiteFiles) -> SiteTraining:
    if files.config.machine.runtime == "torch":
        from fedtune.deploy.vision_site import load_questions
    else:
        lacking = [name for name in IN_FRONT_OF_A_CUT if importlib.util.find_spec(name) is None]
        if lacking:
            raise ConfigError(
                f"not installed: {', '.join(lacking)}: install client/requirements.edge-nano.txt "
                "as docs/edge.md says"
            )
        from fedtune.deploy.edge_vision_site import load_questions
    return load_questions(files)
