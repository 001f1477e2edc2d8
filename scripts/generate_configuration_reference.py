"""Write `docs/configuration.md` from the typed configuration.

python scripts/generate_configuration_reference.py
"""

from __future__ import annotations

import types
import typing
from pathlib import Path
from typing import Any, Literal

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from fedtune.config import ClientConfig, Config, ServerConfig, preset_names

TARGET = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"

INTRODUCTION = """\
# Configuration

One TOML file describes a federation. `fedtune init > federation.toml` prints the preset
`hospitals` to start from, `fedtune simulate --config federation.toml` runs it, and
`--set table.key=value` overrides any key, `--set table.key=unset` takes one out that a preset has
set. Unknown keys, wrong types and values out of range
are refused before anything is written.

Packaged presets: {presets}.

This page is generated from `fedtune/config.py`.
"""

SITE = """\
# A site's own file

`client.toml` belongs to a site, not to the federation: `fedtune client client.toml`. Its policy is
stronger than anything that a server asks for. `fedtune simulate --policy client.toml` rehearses
the policy: every simulated site follows it. Without that flag simulated sites accept everything,
since whoever simulates is server and sites in one.
"""

SERVER = """\
# The server's own file

`server.toml` lies beside `federation.toml`: `fedtune server federation.toml`.
"""


def reference() -> str:
    """The whole page."""
    parts = [INTRODUCTION.format(presets=", ".join(f"`{name}`" for name in preset_names()))]
    top = {n: f for n, f in Config.model_fields.items() if not _is_table(f)}
    parts.append(_table("Top level", "", top))
    for name, field in Config.model_fields.items():
        table: Any = field.annotation
        if _is_table(field):
            parts.append(_table(f"`[{name}]`", table.__doc__ or "", table.model_fields))
    for introduction, kind in ((SITE, ClientConfig), (SERVER, ServerConfig)):
        parts.append(introduction)
        for name, field in kind.model_fields.items():
            part: Any = field.annotation
            parts.append(_table(f"`[{name}]`", part.__doc__ or "", part.model_fields))
    return "\n".join(parts)


def _is_table(field: FieldInfo) -> bool:
    return hasattr(field.annotation, "model_fields")


def _table(title: str, words: str, fields: dict[str, FieldInfo]) -> str:
    lines = [f"## {title}", "", *([words, ""] if words else [])]
    lines += ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    for name, field in fields.items():
        meaning = " ".join((field.description or "").split()).replace("|", "\\|")
        row = (f"`{name.replace('_', '-')}`", _type(field), _default(field.default), meaning)
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join([*lines, ""])


def _type(field: FieldInfo) -> str:
    annotation = field.annotation
    options = [a for a in typing.get_args(annotation) if a is not types.NoneType]
    if types.NoneType in typing.get_args(annotation):
        annotation = options[0]
    if typing.get_origin(annotation) is Literal:
        return " \\| ".join(f"`{value}`" for value in typing.get_args(annotation))
    if typing.get_origin(annotation) is tuple:
        return "list of strings"
    if typing.get_origin(annotation) is typing.Annotated:
        annotation, *metadata = typing.get_args(annotation)
        field = metadata[0]
    words = {bool: "true or false", int: "integer", float: "number", str: "string"}[annotation]
    signs = {Ge: "≥", Gt: ">", Le: "≤", Lt: "<"}
    bounds = [
        f"{sign} {getattr(item, kind.__name__.lower()):,}"
        for item in field.metadata
        for kind, sign in signs.items()
        if isinstance(item, kind)
    ]
    return " ".join([words, ", ".join(bounds)]).strip()


def _default(value: object) -> str:
    if value is None:
        return "unset"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, float):
        return f"`{value:.4g}`"
    return "`[]`" if value == () else f"`{value}`"


if __name__ == "__main__":
    TARGET.write_text(reference(), encoding="utf-8")
