"""A federation whose adapter has 100 MB: what it adds to the memory of each process.

    python benchmarks/large_adapter.py --megabytes 100

Three clients, TLS on the loopback, masked, MiniLM with LoRA of a rank so high that the adapter
has the size that was asked for; beside it the same federation with the usual small adapter, in the
same run. What counts at a client is the process that carries the bytes; the one that trains holds
the adapter as parameters, gradients, an update and masked integers, and is reported too. The
physical limit is 1.0: a message is in memory once. Linux only.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from deployed import client_commands, metrics, prepare, run

# LoRA on all linear layers of MiniLM (384 wide, 6 layers): numbers per unit of rank.
PER_RANK = 6 * (4 * (384 + 384) + 2 * (384 + 1536))
CLIENTS = 3


def main() -> None:
    """Run both and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--port", type=int, default=19292)
    args = parser.parse_args()
    rank = args.megabytes * 1_000_000 // 4 // PER_RANK
    found = {}
    for words, value in (("small", 8), ("large", rank)):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / "federation"
            settings = {
                "adapter.rank": str(value),
                "adapter.targets": '["query", "key", "value", "dense"]',
                "update.clip": "1000.0",
                "rounds.count": str(args.rounds),
                "train.steps": "1",
            }
            prepare(folder, CLIENTS, args.port, settings)
            peaks = run(folder, client_commands(folder, CLIENTS))
            records = metrics(folder / "run")
            if [len(record["clients"]) for record in records] != [CLIENTS] * args.rounds:
                raise SystemExit("not all clients took part in all rounds")
            found[words] = peaks
            size = (folder / "run/adapter/adapter_model.safetensors").stat().st_size
            up, down = (records[-1][key] / CLIENTS for key in ("bytes_up", "bytes_down"))
            print(
                f"{words}: adapter {size / 1e6:.1f} MB, {down / 1e6:.1f} MB down and "
                f"{up / 1e6:.1f} MB up per client and round, {records[-1]['seconds']:.1f} s a round"
            )
    size_mib = size / 2**20
    print("\n| peak, MiB | small | large | more, in adapters |\n|---|---|---|---|")
    for words, peak in sorted(found["large"].items()):
        more = (peak - found["small"][words]) / size_mib
        print(f"| {words} | {found['small'][words]:.0f} | {peak:.0f} | {more:.2f} |")
    more = (found["large"]["client, network"] - found["small"]["client, network"]) / size_mib
    print(
        f"\n{'PASS' if more <= 1.3 else 'MISS'} {more:.2f} adapters more at a client, at most 1.3"
    )


if __name__ == "__main__":
    main()
