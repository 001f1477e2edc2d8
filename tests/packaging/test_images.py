"""The images: what goes into them, from where, and as whom they run.

There is no container engine in the test command: the files are read as Docker's reference
describes them, strictly, so that an instruction that is not understood here is an error.
"""

from __future__ import annotations

import ast
import fnmatch
import json
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

import click
import pytest
import typer
import yaml
from edge_environment import UNUSED

from fedtune.cli import app

ROOT = Path(__file__).resolve().parents[2]
EDGE = "client/Dockerfile.edge"
IMAGES = ("server/Dockerfile", "client/Dockerfile", "client/Dockerfile.cuda", EDGE)
REQUIREMENTS = ("client/requirements.edge-plain.txt", "client/requirements.edge.txt")
COMPOSED = ("server", "client")
_KNOWN = {
    *("FROM", "WORKDIR", "COPY", "RUN", "ARG", "ENV", "USER", "VOLUME", "EXPOSE"),
    *("STOPSIGNAL", "HEALTHCHECK", "ENTRYPOINT", "CMD"),
}


@dataclass(frozen=True)
class Instruction:
    name: str
    words: str


def _instructions(path: str) -> list[Instruction]:
    """The instructions of a Dockerfile, continued lines joined; fails for one that is unknown."""
    lines = [
        line
        for line in (ROOT / path).read_text().splitlines()
        if line.strip() and not line.lstrip().startswith("#")
    ]
    found = []
    for line in re.sub(r"\\\n", " ", "\n".join(lines)).splitlines():
        name, _, words = line.partition(" ")
        assert name in _KNOWN, f"{path}: {line}"
        found.append(Instruction(name, " ".join(words.split())))
    return found


def _stages(path: str) -> list[list[Instruction]]:
    stages: list[list[Instruction]] = []
    for instruction in _instructions(path):
        if instruction.name == "FROM":
            stages.append([])
        stages[-1].append(instruction)
    return stages


def _all(stage: list[Instruction], name: str) -> list[str]:
    return [instruction.words for instruction in stage if instruction.name == name]


def _ignored(name: str) -> bool:
    """Whether .dockerignore keeps a file out; the last pattern that fits decides."""
    ignored = False
    parents = ["/".join(name.split("/")[: n + 1]) for n in range(name.count("/") + 1)]
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = line.removeprefix("!")
        anywhere = pattern.removeprefix("**/")
        fits = any(
            fnmatch.fnmatchcase(parent, pattern)
            or (anywhere != pattern and fnmatch.fnmatchcase(parent.split("/")[-1], anywhere))
            for parent in parents
        )
        if fits:
            ignored = not line.startswith("!")
    return ignored


@pytest.mark.parametrize("path", IMAGES)
def test_an_image_has_what_it_installs_and_nothing_else(path: str) -> None:
    build, final = _stages(path)
    sources = [word for words in _all(build, "COPY") for word in words.split()[:-1]]
    pins = REQUIREMENTS if path == EDGE else ("constraints.txt",)
    assert sorted(sources) == sorted(["LICENSE", "README.md", "fedtune", "pyproject.toml", *pins])
    for source in sources:
        assert (ROOT / source).exists(), source
        assert not _ignored(source), source
    assert _all(final, "COPY") == ["--from=build /opt/fedtune /opt/fedtune"]
    # Both stages by the same tag, never "latest": the environment runs where it was made.
    bases = [_all(stage, "FROM")[0].split()[0] for stage in (build, final)]
    assert bases == ["python:3.11-slim-bookworm"] * 2


@pytest.mark.parametrize("path", [path for path in IMAGES if path != EDGE])
def test_an_image_installs_the_set_that_was_tested(path: str) -> None:
    build, final = _stages(path)
    installs = [words for words in _all(build, "RUN") if "pip install" in words]
    assert len(installs) == 2
    assert all("--constraint constraints.txt" in words for words in installs)
    # From the second index, which anybody may name at build time, comes torch and nothing else.
    assert "--no-deps" in installs[0]
    assert installs[0].endswith('--index-url "$TORCH_INDEX" --constraint constraints.txt torch')
    [extras] = re.findall(r"'\.\[([a-z,]+)\]'", installs[1])
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(extras.split(",")) <= set(known)
    assert not [words for words in _all(final, "RUN") if "pip" in words]
    pinned = {
        line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text().split("\n")
    }
    assert "torch" in pinned


def test_the_image_of_a_device_installs_the_device_s_packages_and_no_more() -> None:
    build, final = _stages(EDGE)
    installs = [words for words in _all(build, "RUN") if " install " in words]
    assert len(installs) == 2
    # As the head of the requirements says, and as the tests' environment is made.
    options = "install --no-cache-dir --no-deps --no-compile "
    assert all(f"pip --python /opt/fedtune/bin/python {options}" in words for words in installs)
    assert installs[0].endswith('--requirement "client/requirements.$RUNTIME.txt"')
    assert installs[1].endswith(" .")
    assert _all(build, "ARG") == ['RUNTIME="edge"']
    [unused] = UNUSED
    assert any(
        words.startswith("rm -f ") and words.endswith(unused) for words in _all(build, "RUN")
    )
    assert "RUNTIME=edge-plain" in (ROOT / EDGE).read_text()
    assert not [words for words in _all(final, "RUN") if "pip" in words]


@pytest.mark.parametrize("path", IMAGES)
def test_an_image_runs_as_nobody_in_particular_and_holds_no_secret(path: str) -> None:
    build, final = _stages(path)
    assert _all(final, "USER") == ["10001:10001"]
    [account] = [words for words in _all(final, "RUN") if "useradd" in words]
    assert "--uid 10001 --gid 10001" in account
    assert "/usr/sbin/nologin" in account
    assert "--mode=0700 /data" in account
    assert _all(final, "VOLUME") == ["/data"]
    assert _all(final, "STOPSIGNAL") == ["SIGTERM"]
    text = (ROOT / path).read_text()
    assert not re.search(r"https?://(?!127\.0\.0\.1)", text)
    assert not re.search(r"^ADD\b|--mount=type=secret|--trusted-host|curl|wget", text, re.MULTILINE)
    for words in [*_all(build, "ARG"), *_all(build, "ENV"), *_all(final, "ENV")]:
        assert not re.search(r"secret|token|password|passwd|credential|[a-z_]key", words, re.I), (
            words
        )
    argument = 'RUNTIME="edge"' if path == EDGE else 'TORCH_INDEX=""'
    assert [words for stage in (build, final) for words in _all(stage, "ARG")] == [argument]


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("server/Dockerfile", ["server", "/data/federation.toml"]),
        ("client/Dockerfile", ["client", "/data/client.toml"]),
        ("client/Dockerfile.cuda", ["client", "/data/client.toml"]),
        (EDGE, ["client", "/data/client.toml"]),
    ],
)
def test_an_image_starts_a_command_that_there_is(path: str, words: list[str]) -> None:
    _, final = _stages(path)
    [entry], [default] = _all(final, "ENTRYPOINT"), _all(final, "CMD")
    assert json.loads(entry) == ["fedtune"], "not by a shell, which would keep SIGTERM to itself"
    assert json.loads(default) == words
    known = typer.main.get_command(app)
    assert isinstance(known, click.Group)
    known.commands[words[0]].make_context("fedtune", words[1:])


def test_the_server_is_asked_for_its_health_in_good_python() -> None:
    _, final = _stages("server/Dockerfile")
    [check] = _all(final, "HEALTHCHECK")
    options, _, command = check.partition("CMD ")
    assert set(re.findall(r"--([a-z-]+)=", options)) == {
        "interval",
        "timeout",
        "start-period",
        "retries",
    }
    program, flag, code = json.loads(command)
    assert (program, flag) == ("python", "-c")
    ast.parse(code)
    assert "http://127.0.0.1:9093/health" in code
    for path in IMAGES[1:]:
        assert _all(_stages(path)[1], "HEALTHCHECK") == ["NONE"]


@pytest.mark.parametrize(
    ("name", "ignored"),
    [
        ("pyproject.toml", False),
        ("fedtune/cli.py", False),
        ("fedtune/presets/hospitals.toml", False),
        ("fedtune/__pycache__/cli.cpython-311.pyc", True),
        ("fedtune/server-keys/ca.key", True),
        ("fedtune/site.db", True),
        (".git/config", True),
        (".venv/bin/python", True),
        ("runs/hospitals/journal.db", True),
        ("my-federation/server-keys/identity.key", True),
        ("server/federation/server-keys/ca.key", True),
        ("client/site/train.csv", True),
        ("client/requirements.edge.txt", False),
        ("client/requirements.edge-plain.txt", False),
        ("tests/conftest.py", True),
    ],
)
def test_no_key_no_run_and_no_history_goes_to_the_build(name: str, ignored: bool) -> None:
    assert _ignored(name) is ignored


@pytest.mark.parametrize("role", COMPOSED)
def test_a_container_can_write_nothing_but_its_data(role: str) -> None:
    document = yaml.safe_load((ROOT / role / "compose.yaml").read_text())
    [(name, service)] = document["services"].items()
    assert name == role
    build = service["build"]
    assert (ROOT / role / build["context"]).resolve() == ROOT
    assert build["dockerfile"] in IMAGES
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["ulimits"] == {"core": 0}
    assert "privileged" not in service
    assert "cap_add" not in service
    assert "user" not in service, "the image names it"
    [volume], [scratch] = service["volumes"], service["tmpfs"]
    assert volume.partition(":")[2] == "/data"
    assert scratch.startswith("/tmp:")  # where the images' HOME and TMPDIR lie
    assert {"noexec", "nosuid", "nodev"} <= set(scratch.split(","))
    assert ("ports" in service) is (role == "server")
