"""A server of a small real decoder, in this process or in one of its own, and who may use it.

As a program: serve what the JSON file of the first argument says until standard input ends.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedtune.base.answering import AnsweringDecoder
from fedtune.base.causal import CausalBase
from fedtune.config import Limits
from fedtune.secagg.keys import SERVER, Identity, Roster
from fedtune.split.client import GrpcBase, Patience
from fedtune.split.server import SplitServer, Tls, terms_of
from fedtune.train.activations import Encoding
from fedtune.train.channel import Meter
from fedtune.wire.split import Terms

ANSWERS = ("fracture", "renal", "left", "with", "sepsis")
FEDERATION = "ab" * 32
HOST = "127.0.0.1"
LONG = 60.0  # seconds; nothing takes so long unless something is wrong
SHORT = Patience(total=60.0, connect=20.0)


def load_decoder(folder: Path) -> AnsweringDecoder:
    """The tiny decoder, with answers."""
    return AnsweringDecoder(CausalBase(str(folder)), ANSWERS)


class Held:
    """A decoder that computes only while its gate is open, and remembers how much."""

    def __init__(self, decoder: AnsweringDecoder) -> None:
        self.decoder = decoder
        self.gate, self.entered = threading.Event(), threading.Semaphore(0)
        self.gate.set()
        self.rows: list[int] = []
        self.inputs: list[weakref.ref[Any]] = []
        self.error: Exception | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.decoder, name)

    def outputs(self, embeddings: Any, lengths: Any) -> Any:
        """See `AnsweringDecoder.outputs`."""
        self.rows.append(len(lengths))
        self.inputs.append(weakref.ref(embeddings))
        self.entered.release()
        assert self.gate.wait(LONG)
        if self.error is not None:
            raise self.error
        return self.decoder.outputs(embeddings, lengths)


class HeldByFile(AnsweringDecoder):
    """One that says in a file when it begins, and goes on when another is gone."""

    begun: Path
    hold: Path

    def outputs(self, embeddings: Any, lengths: Any) -> Any:
        """See `AnsweringDecoder.outputs`."""
        self.begun.touch()
        while self.hold.exists():
            time.sleep(0.01)
        return super().outputs(embeddings, lengths)


@dataclass(frozen=True)
class Parties:
    """Identities by name, and the roster that has them all."""

    identities: Mapping[str, Identity]
    roster: Roster

    @classmethod
    def make(cls, *names: str) -> Parties:
        """New ones."""
        made = {name: Identity.generate(name) for name in names}
        public = {name: identity.public_key for name, identity in made.items()}
        return cls(made, Roster({SERVER: Identity.generate(SERVER).public_key, **public}))

    def base(
        self,
        name: str,
        port: int,
        terms: Terms,
        authority: bytes | None = None,
        meter: Meter | None = None,
        patience: Patience = SHORT,
    ) -> GrpcBase:
        """A client of the server at `port`."""
        identity = self.identities[name]
        return GrpcBase(
            f"{HOST}:{port}", authority, identity, self.roster, terms, meter or Meter(), patience
        )


@dataclass
class ServerProcess:
    """A server in a process of its own, which can be killed and started again."""

    folder: Path
    decoder: Path
    roster: Roster
    encoding: Encoding = "float32"
    keys: Path | None = None  # of the server, for TLS
    limits: Limits = field(default_factory=Limits)
    port: int = 0
    held: bool = False
    _process: subprocess.Popen[str] | None = field(default=None, repr=False)

    @property
    def begun(self) -> Path:
        """There when a batch has begun, if it is `held`."""
        return self.folder / "begun"

    @property
    def hold(self) -> Path:
        """A batch goes on when this is not there, if it is `held`."""
        return self.folder / "hold"

    def start(self) -> ServerProcess:
        """Start it; on the same port as before, if it was started before."""
        settings = self.folder / "split.json"
        written = {
            "decoder": str(self.decoder),
            "encoding": self.encoding,
            "port": self.port,
            "keys": str(self.keys) if self.keys else None,
            "roster": {name: key.hex() for name, key in self.roster.keys.items()},
            "limits": self.limits.model_dump(),
            "held": [str(self.begun), str(self.hold)] if self.held else None,
        }
        settings.write_text(json.dumps(written))
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.port = int(self._line())
        return self

    def kill(self) -> None:
        """End it without a word."""
        assert self._process is not None
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def stop(self) -> dict[str, Any]:
        """End it politely; what it has counted."""
        assert self._process is not None
        if self._process.poll() is None and self._process.stdin is not None:
            self._process.stdin.close()
            found: dict[str, Any] = json.loads(self._line())
            self._process.wait()
            return found
        return {}

    @property
    def peak_memory(self) -> int:
        """Bytes of memory that it ever had at a time."""
        assert self._process is not None
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        [line] = [line for line in status.splitlines() if line.startswith("VmHWM")]
        return int(line.split()[1]) * 1024

    def _line(self) -> str:
        assert self._process is not None
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the server ended without a word"
        return line


@contextmanager
def serving(
    decoder: Any,
    roster: Roster,
    encoding: Encoding = "float32",
    keys: Path | None = None,
    limits: Limits | None = None,
) -> Iterator[SplitServer]:
    """A server in this process."""
    terms = terms_of(decoder, FEDERATION, encoding)
    tls = tls_of(keys) if keys else None
    with SplitServer(decoder, terms, roster, HOST, 0, tls, limits or Limits()) as server:
        yield server


def wait_for(condition: Callable[[], bool], seconds: float = LONG) -> None:
    """Until it holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.005)


def some_examples(
    seed: int, count: int, width: int, longest: int = 12
) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]:
    """Embeddings, lengths and labels of examples of different lengths."""
    random = np.random.default_rng(seed)
    lengths = random.integers(1, longest + 1, count)
    embeddings = random.normal(scale=0.2, size=(count, longest, width)).astype(np.float32)
    return embeddings, lengths, random.integers(0, len(ANSWERS), count)


def tls_of(keys: Path) -> Tls:
    """The server's certificate and key, as `fedtune keys server` made them."""
    return Tls((keys / "server.crt").read_bytes(), (keys / "server.key").read_bytes())


def main(arguments: Sequence[str]) -> None:
    """Serve."""
    import torch

    torch.set_num_threads(1)
    settings = json.loads(Path(arguments[0]).read_text())
    decoder = load_decoder(Path(settings["decoder"]))
    keys, held = settings["keys"], settings["held"]
    if held:
        decoder.__class__ = HeldByFile
        decoder.begun, decoder.hold = map(Path, held)  # type: ignore[attr-defined]
    server = SplitServer(
        decoder,
        terms_of(decoder, FEDERATION, settings["encoding"]),
        Roster({name: bytes.fromhex(key) for name, key in settings["roster"].items()}),
        HOST,
        settings["port"],
        tls_of(Path(keys)) if keys else None,
        Limits(**settings["limits"]),
    )
    with server:
        print(server.port, flush=True)
        sys.stdin.read()
    status = server.status
    counted = {name: vars(traffic) for name, traffic in status.traffic.items()}
    print(json.dumps({"batches": status.batches, "traffic": counted}), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
