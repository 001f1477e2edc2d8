"""A device's artifacts, texts and memory, spoilt as it happens, and looked at without torch."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from doctor_helpers import only, statuses

from fedtune.base.resolve import digest_base
from fedtune.config import ClientConfig, Machine, parse_config
from fedtune.deploy import keys
from fedtune.deploy.doctor.edge import edge_extra
from fedtune.deploy.doctor.findings import Examination
from fedtune.deploy.doctor.site import examine_site
from fedtune.deploy.site_files import SiteFiles
from fedtune.edge.artifacts import MANIFEST, EdgeArtifacts, Memory
from fedtune.resources import resident_memory

NAMES = ("a", "b", "c")
WORDS = ("acute", "renal", "failure", "with", "fracture", "of", "the", "left", "femur")
TEXTS = [" ".join(WORDS[: 1 + place % len(WORDS)]) for place in range(60)]
BATCH = 400


@dataclass(frozen=True)
class Site:
    """A site that trains on artifacts, whose files a test may change."""

    folder: Path
    allowed: str = ""
    """The only base model that its policy allows."""

    @property
    def artifacts(self) -> EdgeArtifacts:
        return EdgeArtifacts(self.folder / "artifacts")

    def write(self, federation: dict[str, Any] | None = None, **machine: Any) -> Path:
        """Its files, with this of the federation and of `[machine]` besides."""
        text = (self.folder / "made.toml").read_text()
        more = tomli_w.dumps(federation) if federation else ""
        (self.folder / "federation.toml").write_text(text + more)
        own = {
            "site": {
                "name": "a",
                "server": "127.0.0.1:1",  # where nobody listens
                "certificate": "server/ca.crt",
                "keys": "keys-a",
            },
            "data": {"train": "train.jsonl"},
            "policy": {"base-digests": [self.allowed]} if self.allowed else {},
            "machine": {"runtime": "stepgraph", **machine},
        }
        client = self.folder / "client.toml"
        client.write_text(tomli_w.dumps(own))
        return client

    def examine(self, federation: dict[str, Any] | None = None, **machine: Any) -> Examination:
        examination = Examination()
        examine_site(examination, self.write(federation, **machine), False)
        return examination


@pytest.fixture(scope="module")
def made(
    build_artifacts: Callable[..., Any],
    tiny_base: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A site's files. Do not write to them."""
    folder = tmp_path_factory.mktemp("made")
    build_artifacts(folder / "artifacts", f'base.path="{tiny_base}"')
    federation = {
        "data": {"labels": ["a", "b", "c"]},
        "base": {
            "path": "nowhere/at-all/here",
            "digest": digest_base(tiny_base),
            "max-length": 64,
        },
        "train": {"batch-size": BATCH, "steps": 2},
        "secagg": {"enabled": True},
        "update": {"clip": 20.0, "bits": 16},
    }
    (folder / "made.toml").write_text(tomli_w.dumps(federation))
    keys.make_server_keys(folder / "server", ["127.0.0.1"])
    public = [keys.make_site_keys(folder / f"keys-{name}", name) for name in NAMES]
    keys.make_roster(folder / "roster.toml", folder / "server", public)
    rows = [{"text": text, "label": NAMES[place % 3]} for place, text in enumerate(TEXTS)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def site(made: Path, tmp_path: Path) -> Site:
    return Site(Path(shutil.copytree(made, tmp_path / "site")))


def test_artifacts_that_are_in_order(site: Site, tiny_base: Path) -> None:
    from transformers import AutoTokenizer

    found = site.examine(**{"artifacts-digest": site.artifacts.digest})
    for check in ("runtime", "artifacts", "policy", "length of texts", "traffic"):
        assert only(found, check).status == "ok", only(found, check)
    assert "base model" not in statuses(found), "it is in the artifacts"
    assert "model" not in statuses(found)
    assert "device" not in statuses(found)
    assert digest_base(tiny_base) in only(found, "artifacts").finding
    size = sum(tensor.size for tensor in site.artifacts.tensors.tensors)
    assert only(found, "artifacts").numbers["adapter_parameters"] == size
    tokens = AutoTokenizer.from_pretrained(tiny_base)(TEXTS)["input_ids"]
    longest = max(len(row) for row in tokens)
    assert only(found, "length of texts").numbers == {"share_cut": 0, "longest": longest}
    step = only(found, "memory of a step")
    assert (step.numbers["rows"], step.numbers["tokens"]) == (BATCH, longest)
    need = only(found, "memory").numbers["need_bytes"]
    assert need == step.numbers["need_bytes"] + (120 << 20)


def test_texts_that_are_cut(site: Site) -> None:
    long = json.dumps({"text": " ".join(WORDS * 20), "label": "a"}) + "\n"
    with (site.folder / "train.jsonl").open("a") as file:
        file.write(long * 20)
    found = only(site.examine(), "length of texts")
    assert found.status == "warning"
    assert found.numbers["share_cut"] == 20 / 80
    assert found.numbers["longest"] > 64


def test_artifacts_whose_digest_nobody_told(site: Site) -> None:
    found = only(site.examine(), "artifacts")
    assert found.status == "warning"
    assert "machine.artifacts-digest" in found.advice


def test_a_base_model_that_the_policy_does_not_allow(site: Site, tiny_base: Path) -> None:
    for digest, status in ((digest_base(tiny_base), "ok"), ("0" * 64, "problem")):
        found = only(Site(site.folder, digest).examine(), "policy")
        assert found.status == status, found
    assert "base-digests" in found.finding


@pytest.mark.parametrize("name", ["float32/base.bin", "float32/step.onnx", "tokenizer.json"])
def test_a_file_that_has_changed(site: Site, name: str) -> None:
    path = site.folder / "artifacts" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    found = site.examine()
    assert only(found, "artifacts").status == "problem"
    assert name in only(found, "artifacts").finding
    assert statuses(found)["length of texts"] == statuses(found)["training"] == "skipped"


def test_a_manifest_that_is_not_the_one_that_was_told(site: Site) -> None:
    found = only(site.examine(**{"artifacts-digest": "0" * 64}), "artifacts")
    assert found.status == "problem"
    assert site.artifacts.digest in found.finding


def test_artifacts_that_are_not_there(site: Site) -> None:
    (site.folder / "artifacts" / MANIFEST).unlink()
    found = only(site.examine(), "artifacts")
    assert found.status == "problem"
    assert "fedtune edge build" in found.advice


@pytest.mark.parametrize(
    ("federation", "words"),
    [
        ({"adapter": {"rank": 3}}, "built for another"),
        ({"seed": 99}, ""),
    ],
)
def test_artifacts_of_another_federation(
    site: Site, federation: dict[str, Any], words: str
) -> None:
    text = (site.folder / "made.toml").read_text()
    (site.folder / "made.toml").write_text(tomli_w.dumps(federation) + text)
    found = only(site.examine(), "artifacts")
    assert (found.status == "problem") == bool(words)
    assert words in found.finding


def test_what_a_budget_of_memory_leaves(site: Site) -> None:
    longest = int(only(site.examine(), "memory of a step").numbers["tokens"])
    memory: Memory = site.artifacts.manifest.memory["stepgraph/float32"]
    middle = (memory.peak(1, longest) + memory.peak(BATCH, longest)) / 2
    budget = int((resident_memory() + middle) / 1e6)
    step = only(site.examine(**{"max-memory-mb": budget}), "memory of a step")
    rows, need = int(step.numbers["rows"]), step.numbers["need_bytes"]
    assert 1 < rows < BATCH
    assert step.numbers["tokens"] == longest
    # The most that fit.
    assert need <= budget * 1e6
    assert need + memory.peak(rows + 1, longest) - memory.peak(rows, longest) > budget * 1e6
    passes = -(-BATCH // rows)
    assert f"in {passes} passes of a batch of {BATCH}" in step.finding

    found = only(site.examine(**{"max-memory-mb": 1}), "memory of a step")
    assert found.status == "problem"
    assert "max-memory-mb leaves 0 MiB" in found.finding


@pytest.mark.parametrize(
    ("runtime", "builds", "extra"),
    [
        ("ort", [], "edge"),
        ("ort", ["onnxruntime-training-cpu"], "edge"),
        ("ort", ["onnxruntime-training"], "edge-cuda"),
        ("ort", ["onnxruntime"], "edge"),
        ("stepgraph", [], "edge-plain"),
        ("stepgraph", ["onnxruntime"], "edge-plain"),
        ("stepgraph", ["onnxruntime-training-cpu"], "edge"),
        ("stepgraph", ["onnxruntime-training"], "edge-cuda"),
    ],
)
def test_the_extra_of_a_runtime(runtime: str, builds: list[str], extra: str) -> None:
    assert edge_extra(runtime == "ort", builds) == extra


def test_without_gradients_no_build_must_train() -> None:
    found = {}
    for method, more in (("backprop", []), ("forward-only", ["train.optimizer=sgd"])):
        config = parse_config("", "test", [f"train.method={method}", *more])
        for runtime in ("ort", "stepgraph"):
            machine = Machine.model_validate({"runtime": runtime})
            files = SiteFiles(Path("client.toml"), ClientConfig(machine=machine), config)
            found[runtime, method] = files.step
    assert [case for case, step in found.items() if step == "ort"] == [("ort", "backprop")]


@pytest.mark.parametrize(
    ("name", "runtime", "works"),
    [("edge", "ort", True), ("edge_plain", "stepgraph", True), ("edge_plain", "ort", False)],
)
def test_a_device_without_torch(
    request: pytest.FixtureRequest,
    site: Site,
    child_environment: dict[str, str],
    name: str,
    runtime: str,
    works: bool,
) -> None:
    """The command itself, in a device's environment, and four steps of training."""
    python: Path = request.getfixturevalue(f"{name}_python")
    client = site.write(runtime=runtime, **{"artifacts-digest": site.artifacts.digest})
    done = subprocess.run(
        [python, "-m", "fedtune.cli", "doctor", client, "--measure", "--json"],
        env={**child_environment, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stderr == ""
    findings = json.loads(done.stdout)["findings"]
    said = {"skipped": "", "problem": ""}
    problems = {finding["check"] for finding in findings if finding["status"] == "problem"}
    for finding in findings:
        said[finding["status"]] = said.get(finding["status"], "") + finding["finding"] + "\n"
    assert "torch, transformers, peft: not installed, and not needed" in said["skipped"]
    if works:
        assert problems == {"port"}, said["problem"]
        [training] = [finding for finding in findings if finding["check"] == "training"]
        assert training["status"] == "ok"
        # Half to twice of what is predicted, without the process that talks to the network.
        [step] = [finding for finding in findings if finding["check"] == "memory of a step"]
        assert 0.5 < step["numbers"]["need_bytes"] / training["numbers"]["peak_bytes"] < 2
    else:
        assert problems == {"port", "packages", "runtime", "training"}, said["problem"]
        assert "needs the training build" in said["problem"]
