"""A client's session as bytes for its own disk, and back. It holds secrets: it never travels."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from fedtune.secagg.client import ClientSession, Stage
from fedtune.secagg.keys import RoundKey
from fedtune.secagg.messages import Advert, Reveal


def dump(session: ClientSession) -> bytes:
    """JSON, bytes as hexadecimal digits."""
    value = {
        "stage": session.stage,
        "name": session.name,
        "session": session.session.hex(),
        "sealing": session.sealing.private_key.hex(),
        "masking": session.masking.private_key.hex(),
        "self_mask": session.self_mask.hex(),
        "adverts": dump_adverts(session.adverts),
        "own_shares": session.own_shares.hex(),
        "sharers": session.sharers,
        "shares": [share.hex() for share in session.shares],
        "survivors": session.survivors,
        "revealed": _dump_reveal(session.revealed),
    }
    return json.dumps(value).encode()


def load(data: bytes) -> ClientSession:
    """The session that `dump` wrote."""
    value = json.loads(data)
    return ClientSession(
        Stage(value["stage"]),
        value["name"],
        bytes.fromhex(value["session"]),
        RoundKey(bytes.fromhex(value["sealing"])),
        RoundKey(bytes.fromhex(value["masking"])),
        bytes.fromhex(value["self_mask"]),
        load_adverts(value["adverts"]),
        bytes.fromhex(value["own_shares"]),
        tuple(value["sharers"]),
        tuple(bytes.fromhex(share) for share in value["shares"]),
        tuple(value["survivors"]),
        _load_reveal(value["revealed"]),
    )


def dump_adverts(adverts: tuple[Advert, ...]) -> list[dict[str, str]]:
    """Adverts as plain JSON values."""
    return [_plain(asdict(advert)) for advert in adverts]


def load_adverts(values: list[dict[str, str]]) -> tuple[Advert, ...]:
    """Adverts from `dump_adverts`."""
    return tuple(_advert(value) for value in values)


def _dump_reveal(reveal: Reveal | None) -> dict[str, list[str]] | None:
    if reveal is None:
        return None
    return {kind: [share.hex() for share in shares] for kind, shares in asdict(reveal).items()}


def _load_reveal(value: dict[str, list[str]] | None) -> Reveal | None:
    if value is None:
        return None
    return Reveal(**{kind: tuple(map(bytes.fromhex, shares)) for kind, shares in value.items()})


def _plain(fields: dict[str, Any]) -> dict[str, str]:
    return {key: v.hex() if isinstance(v, bytes) else v for key, v in fields.items()}


def _advert(fields: dict[str, str]) -> Advert:
    rest = {key: bytes.fromhex(text) for key, text in fields.items() if key != "client"}
    return Advert(fields["client"], **rest)
