"""Generate `fedtune/wire/v1` from `proto/`; `tests/packaging` proves that they are in sync.

python scripts/generate_wire.py [OUTPUT_FOLDER]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PROTO = ROOT / "proto"


def generate(output: Path) -> None:
    """Write the module of each file in `proto/`, and its type stub, into `output`."""
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        status = protoc.main(
            [
                "protoc",
                f"--proto_path={PROTO}",
                f"--python_out={folder}",
                f"--pyi_out={folder}",
                *map(str, sorted(PROTO.glob("fedtune/v1/*.proto"))),
            ]
        )
        if status != 0:
            raise SystemExit("protoc failed; its message is above")
        for path in Path(folder).rglob("*_pb2.py*"):
            (output / path.name).write_bytes(path.read_bytes())


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "fedtune" / "wire" / "v1")
