"""A site that trains with ONNX Runtime: its artifacts, its texts, and the memory of a step."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection, Sequence
from pathlib import Path

from fedtune.data import TextExamples
from fedtune.deploy.doctor.data import chosen_rows, examine_rows, told_lengths
from fedtune.deploy.doctor.findings import FIRST, Examination, Verdict
from fedtune.deploy.doctor.machine import NETWORK_PROCESS, Needs
from fedtune.deploy.doctor.rounds import examine_policy, examine_traffic
from fedtune.deploy.keys import Members
from fedtune.deploy.site_files import SiteFiles
from fedtune.edge.artifacts import EdgeArtifacts
from fedtune.edge.runtime import import_build, installed_builds
from fedtune.report import words
from fedtune.resources import resident_memory

TRAINING = ("tokenizers", "onnxruntime")
_PROCESS = 90 << 20  # bytes that a process holds which has imported what trains
EXTRAS = {
    "onnxruntime-training-cpu": "edge",
    "onnxruntime-training": "edge-cuda",
    "onnxruntime": "edge-plain",
}


def edge_extra(training_build: bool, builds: Collection[str]) -> str:
    """The extra of fedtune that a device needs, where these builds of ONNX Runtime are."""
    fitting = [name for name in EXTRAS if not training_build or "training" in name]
    installed = [EXTRAS[name] for name in fitting if name in builds]
    return installed[0] if installed else ("edge" if training_build else "edge-plain")


def examine_runtime(examination: Examination, files: SiteFiles) -> None:
    """Whether what machine.runtime names runs here."""
    examination.run("runtime", lambda: _runtime(files))


def examine_edge(
    examination: Examination, files: SiteFiles, data: Sequence[Path], members: Members | None
) -> tuple[Needs, bool]:
    """What training with ONNX Runtime needs, and whether it is possible."""
    artifacts = _examine_artifacts(examination, files)
    if artifacts is not None and members is not None:
        examine_policy(examination, files, members, artifacts.manifest.base_digest)
    config = files.federation
    rows = examine_rows(examination, config, files.config.site.name, *data)
    if artifacts is None:
        examination.skip("length of texts", "there are no artifacts", FIRST)
        return Needs(), False
    memory = _examine_step(examination, files, artifacts, rows)
    disk = examine_traffic(examination, files, artifacts.tensors.size, members)
    return Needs(disk, memory), rows is not None


def _examine_artifacts(examination: Examination, files: SiteFiles) -> EdgeArtifacts | None:
    """The artifacts of a site, if they are whole and of this federation."""
    examination.begin("artifacts")
    lacking = [name for name in TRAINING if importlib.util.find_spec(name) is None]
    if lacking:
        examination.skip("artifacts", f"not installed: {', '.join(lacking)}", FIRST)
        return None
    return examination.run("artifacts", lambda: _artifacts(files))


def _examine_step(
    examination: Examination,
    files: SiteFiles,
    artifacts: EdgeArtifacts,
    rows: TextExamples | None,
) -> int | None:
    """How long the rows are, and how they go through; bytes of memory of both processes."""
    longest = artifacts.manifest.max_length
    if rows is not None:
        longest = examination.run("length of texts", lambda: _lengths(artifacts, rows)) or longest
    examination.begin("a round")
    return examination.run("memory of a step", lambda: _step(files, artifacts, longest))


def _runtime(files: SiteFiles) -> Verdict[None]:
    import_build(files.step)
    runtime, builds = files.config.machine.runtime, installed_builds()
    told = ", ".join(f"{name} {version}" for name, version in builds.items())
    return Verdict("ok", f'runtime = "{runtime}": {told}')


def _artifacts(files: SiteFiles) -> Verdict[EdgeArtifacts]:
    from fedtune.deploy.edge_site import open_artifacts
    from fedtune.edge.artifacts import TOKENIZER
    from fedtune.edge.devices import check_files

    machine = files.config.machine
    if machine.runtime == "torch":
        raise ValueError("a site that trains with PyTorch has no artifacts")
    artifacts = open_artifacts(files)
    check_files(artifacts, files.step, machine.precision)
    artifacts.path(TOKENIZER)
    text = (
        f"{artifacts.folder}, digest {artifacts.digest}; the base model "
        f"{artifacts.manifest.base_digest}, and an adapter of {artifacts.tensors.size:,}"
    )
    numbers = {"adapter_parameters": artifacts.tensors.size}
    if machine.artifacts_digest is None:
        advice = "set machine.artifacts-digest, told to you on another way than the files came"
        return Verdict(
            "warning", f"{text}; whatever lies there is used", advice, numbers, artifacts
        )
    return Verdict("ok", text, numbers=numbers, value=artifacts)


def _lengths(artifacts: EdgeArtifacts, rows: TextExamples) -> Verdict[int]:
    from fedtune.edge.tokens import EdgeTokenizer

    chosen = chosen_rows(rows)
    return told_lengths(
        EdgeTokenizer(artifacts, None).prepare(chosen).lengths,
        len(rows),
        artifacts.manifest.max_length,
    )


def _step(files: SiteFiles, artifacts: EdgeArtifacts, tokens: int) -> Verdict[int]:
    """What the training process takes of memory, as the artifacts' measured model has it."""
    from fedtune.edge.devices import fit

    config, machine = files.federation, files.config.machine
    memory = artifacts.manifest.memory.get(f"{files.step}/{machine.precision}")
    if memory is None:
        return Verdict(
            "warning",
            "the artifacts do not say what a step takes",
            "build them on Linux, or see with: fedtune doctor --measure",
        )
    # With record-level privacy a step takes one row at a time.
    batch = 1 if config.privacy.unit == "record" else config.train.batch_size
    process = resident_memory() or _PROCESS
    rows, fitting = batch, tokens
    if machine.max_memory_mb is not None:
        rows, fitting = fit(memory, machine.max_memory_mb * 1e6 - process, batch, tokens)
    need = int(process + memory.peak(rows, fitting))
    text = f"about {words.size(need)} with {words.plural(rows, 'row')} of {fitting} tokens"
    numbers = {"need_bytes": need, "rows": rows, "tokens": fitting}
    if rows < batch:
        text += f" at a time, in {-(-batch // rows)} passes of a batch of {batch}"
    if fitting < tokens:
        text += f"; longer texts than {fitting} tokens are cut, the longest has {tokens}"
        advice = "raise machine.max-memory-mb"
        return Verdict("warning", text, advice, numbers, need + NETWORK_PROCESS)
    return Verdict("ok", text, numbers=numbers, value=need + NETWORK_PROCESS)
