"""The runbook's commands are commands, and its messages are those that the code says."""

from __future__ import annotations

import ast
import re
import shlex
from functools import cache
from pathlib import Path

import click
import pytest
import typer

from fedtune.cli import app
from fedtune.deploy import init, site_files

ROOT = Path(__file__).resolve().parents[2]
RUNBOOK = (ROOT / "docs" / "runbook.md").read_text(encoding="utf-8")
# Typed in a shell, or told to a container of ours.
_COMMAND = re.compile(r"^ *(?:fedtune|docker run .* fedtune-(?:server|client)) (.*)")


def _commands() -> list[str]:
    """What stands behind `fedtune` in blocks of code."""
    blocks = re.findall(r"^ *```\n(.*?)```", RUNBOOK, re.DOTALL | re.MULTILINE)
    matches = (_COMMAND.match(line) for block in blocks for line in block.splitlines())
    return sorted({match[1] for match in matches if match})


def _parse(words: list[str]) -> None:
    """As the command line would, up to the call; raises `click.ClickException` or `KeyError`."""
    command: click.Command = typer.main.get_command(app)
    while isinstance(command, click.Group):
        command, words = command.commands[words[0]], words[1:]
    command.make_context("fedtune", words)


COMMANDS = _commands()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_runbook_can_be_given(command: str) -> None:
    _parse(shlex.split(command))


def test_a_command_that_there_is_not_would_be_seen() -> None:
    assert len(COMMANDS) >= 8
    for words in (
        ["keys", "certificates", "x"],
        ["keys", "server", "x", "--hosts", "y"],
        ["serve"],
    ):
        with pytest.raises((click.ClickException, KeyError)):
            _parse(words)


def _text(node: ast.expr) -> str:
    """A text of the code, with … for what is filled in; empty for anything else."""
    if isinstance(node, ast.JoinedStr):
        return "".join(str(p.value) if isinstance(p, ast.Constant) else "…" for p in node.values)
    return str(node.value) if isinstance(node, ast.Constant) else ""


@cache
def _said() -> list[str]:
    files = sorted((ROOT / "fedtune").rglob("*.py"))
    nodes = (node for file in files for node in ast.walk(ast.parse(file.read_text("utf-8"))))
    texts = [_text(node) for node in nodes if isinstance(node, ast.JoinedStr | ast.Constant)]
    return [re.sub(r"%[a-z]", "…", text) for text in texts]


def _pieces(text: str) -> list[str]:
    """What does not change in a message."""
    return [piece for part in text.split("…") if len(piece := part.strip(" :;,()")) > 3]


SECTION = RUNBOOK.partition("## What they say")[2].partition("\n## ")[0]


@pytest.mark.parametrize("message", re.findall(r"^\| `([^`]+)`", SECTION, re.MULTILINE))
def test_a_message_of_the_runbook_is_one_that_is_said(message: str) -> None:
    pieces = _pieces(message)
    assert pieces
    for piece in pieces:
        assert any(piece in text for text in _said()), piece


def test_what_a_site_tells_its_operator_is_in_the_runbook() -> None:
    """Every `say` of the process that talks to the network."""
    files = [ROOT / "fedtune" / "deploy" / name for name in ("client.py", "base_fetch.py")]
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text("utf-8")))]
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    told = [
        _text(call.args[0])
        for call in calls
        if getattr(call.func, "attr", getattr(call.func, "id", "")) in ("say", "_say")
    ]
    assert len(told) >= 7
    assert not [piece for text in told for piece in _pieces(text) if piece not in SECTION]


def test_the_files_that_it_names_are_those_that_are_made() -> None:
    for name in (init.FEDERATION, init.SERVER, init.CLIENT, init.ROSTER, f"{init.SERVER_KEYS}/"):
        assert f"`{name}`" in RUNBOOK
    assert 'memory = "site.db"' in site_files.CLIENT_TEMPLATE
    assert "`site.db`" in RUNBOOK
    for link in (
        "server/Dockerfile",
        "client/Dockerfile.cuda",
        "server/compose.yaml",
        "server/fedtune-server.service",
    ):
        assert link in RUNBOOK
        assert (ROOT / link).is_file()
