"""A site that answers questions about images without torch, with the base model at the server."""

from __future__ import annotations

from fedtune.adapter.parts import parts_of
from fedtune.data.question_files import read_questions
from fedtune.deploy.base_link import connect_base
from fedtune.deploy.edge_site import MomentFile, edge_settings, open_artifacts
from fedtune.deploy.site_files import SiteFiles
from fedtune.deploy.site_training import SiteTraining
from fedtune.edge.artifacts import EdgeArtifacts
from fedtune.edge.nano import NanoQuestions, open_half
from fedtune.edge.questions import ImageReader, QuestionReader
from fedtune.edge.trainer import EdgeTrainer
from fedtune.errors import ConfigError
from fedtune.train.protection import protected


def load_questions(files: SiteFiles) -> SiteTraining:
    """What trains at this site, on its questions; raises `UsageError`."""
    config, data = files.federation, files.config.data
    artifacts = open_nano_artifacts(files)
    answers, threads = config.data.labels, config.train.threads
    train = read_questions(files.find(data.train), answers)
    test = read_questions(files.find(data.test), answers) if data.test else None
    trainer = _trainer(files, artifacts)
    # Encoder and connector go when all images were seen.
    reader = QuestionReader(artifacts, ImageReader(artifacts, threads, files.config.machine.device))
    return SiteTraining(
        trainer,
        reader.prepare(train),
        reader.prepare(test) if test else None,
        f"{files.config.machine.runtime}, artifacts {artifacts.digest[:16]}, base model at "
        f"{files.base_server}",
        parts_of(config.adapter.private, artifacts.tensors, artifacts.initial()),
    )


def open_nano_artifacts(files: SiteFiles) -> EdgeArtifacts:
    """The site's artifacts, for what is built without torch; raises `UsageError`."""
    config, machine = files.federation, files.config.machine
    if not files.splits:
        raise ConfigError(
            f'machine.runtime = "{machine.runtime}" has no base model behind an image encoder: set '
            'base.placement = "server" in the federation, or machine.runtime = "torch"'
        )
    if config.rungs:
        raise ConfigError(
            'a gray box (adapter.output-rank) or a ladder needs machine.runtime = "torch"'
        )
    if machine.runtime == "ort":
        raise ConfigError(
            'machine.runtime = "ort" has no NanoAdapters: set it to "stepgraph", which runs on '
            "either build of ONNX Runtime"
        )
    if config.train.method == "forward-only":
        raise ConfigError(
            'train.method = "forward-only" in front of a cut needs machine.runtime = "torch"'
        )
    if machine.precision != "float32":
        raise ConfigError(
            f'machine.precision = "{machine.precision}" is not built for NanoAdapters, which have '
            "few frozen weights; leave it out"
        )
    if machine.max_memory_mb is not None:
        raise ConfigError(
            "machine.max-memory-mb is not built for NanoAdapters: a step takes little beside the "
            "images' tokens; leave it out"
        )
    return open_artifacts(files)


def _trainer(files: SiteFiles, artifacts: EdgeArtifacts) -> EdgeTrainer:
    config, machine, cut = files.federation, files.config.machine, artifacts.cut
    base_digest = artifacts.manifest.base_digest
    remote = connect_base(files, base_digest, cut.answer_tokens, cut.width)
    half = open_half(artifacts, config.train.threads, machine.device)
    model = NanoQuestions(
        half, protected(remote, config.split), config.split.labels, cut.digest(base_digest)
    )
    moments = MomentFile(files.find(machine.moments)) if machine.moments else None
    return EdgeTrainer(artifacts.tensors, model, edge_settings(config.train), moments)
