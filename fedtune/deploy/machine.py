"""The client's machine of a site, made of its files. Here torch is imported."""

from __future__ import annotations

import numpy as np
import torch

from fedtune.audit.log import AuditLog
from fedtune.data.labelled import load_examples
from fedtune.deploy.site_audit import AuditedMachine
from fedtune.deploy.site_files import SiteFiles
from fedtune.errors import KeyFileError
from fedtune.round.membership import Membership
from fedtune.round.site import SiteStore
from fedtune.simulation.job import JobClient, TextModel, job_of_model
from fedtune.train.torch_trainer import choose_device


def make_machine(files: SiteFiles) -> tuple[AuditedMachine, str]:
    """The machine, and in words what it has loaded; raises `UsageError` or `AuditWriteError`."""
    config, site = files.federation, files.config
    keys, members = files.keys(), files.members()
    pinned = site.policy.roster_digest
    if pinned is not None and members.roster.digest.hex() != pinned:
        raise KeyFileError(f"{site.site.roster}: not the roster that policy.roster-digest names")
    device = choose_device(config.train.device)
    torch.set_num_threads(config.train.threads)
    data = config.data
    train, test = (
        load_examples(files.find(name), data.labels, data.text_column, data.label_column)
        if name
        else None
        for name in (site.data.train, site.data.test)
    )
    if train is None:
        raise KeyFileError(f"{files.path}: data.train is missing")
    model = TextModel(config, len(data.labels))
    if device.type != "cpu":
        model.adapter.to(device)
    own = JobClient(
        site.site.name,
        model.prepare(train),
        model.prepare(test) if test else None,
        np.bincount(train.labels, minlength=len(data.labels)),
    )
    membership = Membership(
        site.policy, SiteStore(files.find(site.site.memory)), keys.identity, members.roster
    )
    job = job_of_model(config, model, [own], None, data.labels, "this site's own")
    log = AuditLog(files.find(site.site.audit), keys.identity)
    machine = AuditedMachine(job.machine(0, membership), job, membership, log)
    return machine, f"{len(train):,} rows to train on, base model {config.base.path}"
