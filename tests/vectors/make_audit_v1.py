"""Write audit_v1.json: an audit log as an independent implementation writes it.

    python tests/vectors/make_audit_v1.py

Written from docs/file-formats.md alone; it shares no code with fedtune. Any other program that
reads or writes audit logs can test itself against the file.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

OUTPUT = Path(__file__).with_name("audit_v1.json")
LOGS = {
    "": (
        "11" * 32,
        [
            '"event":"server-started","details":{"masked":true,"sites":["a","Z\\u00fcrich"]}',
            '"event":"round-committed","details":{"counted":[],"epsilon":0.1,"round":1}',
        ],
    ),
    "Zürich": (
        "22" * 32,
        ['"event":"request-refused","details":{"reason":"\\"no\\"\\n\\u001b \\\\ \\ud83d\\ude00"}'],
    ),
}


def framed(label: str, *fields: bytes) -> bytes:
    """Each part after its length in 8 bytes, least significant first."""
    parts = (b"fedtune v1 " + label.encode(), *fields)
    return b"".join(len(part).to_bytes(8, "little") + part for part in parts)


def write(name: str, seed: str, entries: list[str]) -> dict[str, object]:
    """A log with its writer and its head."""
    key = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(seed))
    public = key.public_key().public_bytes_raw()
    writer = json.dumps(name)
    begun = f'"event":"log-begun","details":{{"public-key":"{public.hex()}","writer":{writer}}}'
    previous = hashlib.sha256(framed("audit genesis", name.encode(), public)).hexdigest()
    lines = []
    for number, entry in enumerate([begun, *entries], 1):
        time = f"2026-03-01T09:00:0{number}.000500Z"
        body = f'{{"number":{number},"time":"{time}",{entry},"previous":"{previous}"}}'
        signature = key.sign(framed("audit entry", body.encode())).hex()
        lines.append(f'{body[:-1]},"signature":"{signature}"}}')
        previous = hashlib.sha256(lines[-1].encode()).hexdigest()
    return {
        "writer": name,
        "private_key": seed,
        "public_key": public.hex(),
        "lines": lines,
        "head": f"{len(lines)}:{previous}",
    }


def document() -> list[dict[str, object]]:
    """What audit_v1.json holds."""
    return [write(name, seed, entries) for name, (seed, entries) in LOGS.items()]


if __name__ == "__main__":
    OUTPUT.write_text(json.dumps(document(), indent=1) + "\n")
