"""Secure aggregation by fedtune and by Flower (SecAgg+), and what the processor allows.

    python benchmarks/secagg.py --out secagg.json
    python benchmarks/secagg.py --clients 10 100 --sizes 75000 1000000

Both add up the same vectors of 16-bit values in whole sessions in this process, on one core:
all clients with all up to 21, else each with 20 others; two thirds of those who hold shares
open a mask; nobody drops out, or every tenth after having shared keys and before sending values.
`client` is what one client does in a session: keys, shares, opening shares, masking, packing,
signing, revealing; `masking` of these from its vector to what it sends. `server` is all that the
server does; `unmask` of these from the last answer to the sum.

Of Flower, `SecAggPlusWorkflow` and `secaggplus_mod` run as they are, with defaults (steps of
2^-18, modulus 2^32); see `peers/secagg_flower.py`. Not counted for either: training,
quantization (Flower's is timed apart), protobuf and the network. fedtune's clients share with
all others, Flower's with those they mask with only, as each is built.

Every client sends a vector of its own, and the sum is checked (fedtune exactly, Flower within its
quantization), where that takes less than `--budget` seconds and, for Flower, which holds all
vectors at once, 4 GiB; else the first three do, and the server gets copies of theirs for the
others (marked ^). The last row of a cell is the time of AES-256-CTR and of additions alone, one
measured and multiplied (~). Linux only.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray
from peers.secagg_flower import CLIP, Session, run_flower

from fedtune.secagg.client import ClientSession, Stage
from fedtune.secagg.keys import SERVER, Identity, Roster
from fedtune.secagg.messages import Delivery, MaskedValues, sharers_signed
from fedtune.secagg.ring import Ring
from fedtune.secagg.server import Aggregation
from fedtune.secagg.session import Session as SecaggSession
from fedtune.secagg.session import Terms
from fedtune.types import RoundContext

LARGEST = (1 << 15) - 1  # of a value of 16 bits
NEIGHBOURS = 20
DROPOUTS = (0.0, 0.1)
SAMPLE = 3  # clients that send vectors of their own in any case
MOST_BYTES = 4 << 30  # of all of Flower's masked vectors together
BRIEF = 10.0  # seconds; shorter sessions are repeated
PIECE = 1 << 17  # bytes of key stream that stay in the cache

CLIENT_TARGET, SERVER_TARGET = 2.0, 20.0  # seconds, at
TARGET_CELL = (100, 13_600_000)
FASTER_TARGET = 4.0
BYTES_TARGET, BYTES_FROM = 1.5, 1_000_000  # times fp16, from that many values


@dataclass(frozen=True)
class Cell:
    """So many clients with so many values each."""

    clients: int
    slots: int

    @property
    def complete(self) -> bool:
        """Whether everyone masks with everyone."""
        return self.clients <= NEIGHBOURS + 1

    @property
    def neighbours(self) -> int:
        """How many others each client masks with."""
        return self.clients - 1 if self.complete else NEIGHBOURS

    @property
    def terms(self) -> Terms:
        """Of fedtune; the defaults but for the graph."""
        return Terms() if self.complete else Terms(neighbours=NEIGHBOURS, colluding=0.1)

    @property
    def ring(self) -> Ring:
        """As small as it can be without the sum wrapping."""
        return Ring((2 * self.clients * LARGEST).bit_length())

    def dropped(self, share: float) -> set[int]:
        """Places of those who drop out."""
        count = int(share * self.clients)
        return set(random.Random(self.clients).sample(range(self.clients), count))

    def values(self, place: int) -> NDArray[np.int64]:
        """The vector of one client."""
        generator = np.random.default_rng([self.slots, place])
        return generator.integers(-LARGEST, LARGEST + 1, self.slots)

    def floats(self, place: int) -> NDArray[np.float32]:
        """The same vector for Flower, from end to end of its range."""
        return (self.values(place) * (CLIP / LARGEST)).astype(np.float32)


class Federation:
    """Server and clients of one session of fedtune, in one process, each with its seconds."""

    def __init__(self, cell: Cell, dropped: Collection[int]) -> None:
        self.cell = cell
        self.dropped = dropped
        self.names = [f"client-{place:03d}" for place in range(cell.clients)]
        self.identities = {name: Identity.generate(name) for name in self.names}
        keys = {name: identity.public_key for name, identity in self.identities.items()}
        self.roster = Roster({SERVER: Identity.generate(SERVER).public_key, **keys})
        zeros = "00" * 32
        context = RoundContext("benchmark", 1, zeros, zeros, zeros)
        self.session = SecaggSession(context, 1, zeros, self.roster.digest)
        self.seconds = dict.fromkeys([SERVER, *self.names], 0.0)
        self.masking: dict[str, float] = {}  # of the clients that sent a vector of their own
        self.sent = dict.fromkeys(self.names, 0)
        self.states: dict[str, ClientSession] = {}
        self.plain = np.zeros(cell.slots, np.int64)
        arguments = (self.session.digest, self.roster, cell.terms, cell.slots)
        self.server: Aggregation = self.timed(SERVER, Aggregation, *arguments)

    def timed(self, who: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call `function` and count its time for `who`."""
        started = time.perf_counter()
        result = function(*arguments)
        self.seconds[who] += time.perf_counter() - started
        return result

    def asked(self, name: str, method: str, *arguments: Any) -> Any:
        """The answer of a client; its state goes on."""
        function = partial(getattr(ClientSession, method), self.states[name])
        self.states[name], answer = self.timed(name, function, *arguments)
        return answer

    def share_keys(self) -> dict[str, Delivery]:
        """All send keys and shares."""
        terms = self.cell.terms
        for name in self.names:
            begun = self.timed(name, ClientSession.begin, self.identities[name], self.session)
            self.states[name], advert = begun
            self.sent[name] += sum(map(len, (*advert.fields(), advert.signature)))
            self.timed(SERVER, self.server.receive_advert, name, advert)
        cohort = self.timed(SERVER, self.server.close_adverts)
        for name in self.names:
            shares = self.asked(name, "share", cohort, self.roster, terms)
            self.sent[name] += sum(map(len, shares.sealed))
            self.timed(SERVER, self.server.receive_shares, name, shares)
        deliveries: dict[str, Delivery] = self.timed(SERVER, self.server.close_shares)
        self.timed(SERVER, self.server.expect, self.cell.ring)
        return deliveries

    def send_values(
        self, deliveries: dict[str, Delivery], all_real: Callable[[list[float]], bool]
    ) -> None:
        """All but the dropped send; from some number on maybe a copy of what another sent."""
        terms, everyone, packed = self.cell.terms, True, b""
        ring = self.cell.ring
        for place, name in enumerate(self.names):
            if place in self.dropped:
                continue
            accepted = self.timed(name, self.states[name].accept, deliveries[name], terms)
            self.states[name] = accepted
            if len(self.masking) == SAMPLE:
                everyone = all_real(list(self.masking.values()))
            if everyone or len(self.masking) < SAMPLE:
                values = self.cell.values(place)
                self.plain += values
                before = self.seconds[name]
                masked = self.asked(name, "mask", values, ring, self.identities[name], terms)
                self.masking[name] = self.seconds[name] - before
                packed = masked.packed
            else:
                self.states[name] = replace(accepted, stage=Stage.MASKED)
                sharers = sharers_signed(accepted.binding, accepted.sharers)
                masked = MaskedValues(packed, self.identities[name].sign(sharers))
            self.sent[name] += len(masked.packed) + len(masked.voucher)
            self.timed(SERVER, self.server.receive_values, name, masked)

    def open(self) -> tuple[NDArray[np.int64], float]:
        """The survivors sign and reveal; the sum, and the seconds of unmasking it."""
        sealed = self.timed(SERVER, self.server.close_values)
        for name in sealed.names:
            identity, terms = self.identities[name], self.cell.terms
            signature = self.asked(name, "sign", sealed.survivors, identity, self.roster, terms)
            self.sent[name] += len(signature)
            self.timed(SERVER, self.server.receive_signature, name, signature)
        unmasking = self.timed(SERVER, self.server.close_signatures)
        for name in sealed.names:
            reveal = self.asked(name, "reveal", unmasking, self.roster, self.cell.terms)
            self.sent[name] += sum(map(len, (*reveal.self_masks, *reveal.masking_keys)))
            self.timed(SERVER, self.server.receive_reveal, name, reveal)
        before = self.seconds[SERVER]
        total = self.timed(SERVER, self.server.close_reveals)
        return total, self.seconds[SERVER] - before


def run_fedtune(
    cell: Cell, dropped: Collection[int], all_real: Callable[[list[float]], bool]
) -> Session:
    """One session; exits if the sum is wrong."""
    federation = Federation(cell, dropped)
    federation.send_values(federation.share_keys(), all_real)
    total, unmask_s = federation.open()
    survivors = cell.clients - len(dropped)
    masking = federation.masking
    checked = len(masking) == survivors
    if checked and not np.array_equal(total, federation.plain):
        raise SystemExit("fedtune: the sum is wrong")
    graph = cell.terms.graph_of(cell.clients)
    pairs = sum(other not in dropped for place in dropped for other in graph.neighbours(place))
    return Session(
        client_s=[federation.seconds[name] for name in masking],
        masking_s=list(masking.values()),
        server_s=federation.seconds[SERVER],
        unmask_s=unmask_s,
        bytes_up=max(federation.sent.values()),
        masks=survivors + pairs,
        checked=checked,
    )


@dataclass(frozen=True)
class Limit:
    """Seconds for one mask or vector of so many 32-bit words."""

    slots: int
    aes_s: float  # key stream of AES-256-CTR, piece after piece into the same buffer
    mask_add_s: float  # adding as many words from the cache
    vector_add_s: float  # adding another vector of that length from memory

    @classmethod
    def measured(cls, slots: int) -> Limit:
        """The median of five."""
        total, other = np.zeros(slots, np.uint32), np.ones(slots, np.uint32)
        zeros, buffer = memoryview(bytes(PIECE)), np.zeros(PIECE + 15, np.uint8)
        stream = buffer[:PIECE].view(np.uint32)
        seconds: dict[str, list[float]] = {"aes": [], "mask": [], "vector": []}
        for _ in range(5):
            encryptor = Cipher(algorithms.AES(bytes(32)), modes.CTR(bytes(16))).encryptor()
            started = time.perf_counter()
            for start in range(0, total.nbytes, PIECE):
                encryptor.update_into(zeros[: total.nbytes - start], buffer.data)
            expanded = time.perf_counter()
            for start in range(0, slots, len(stream)):
                piece = total[start : start + len(stream)]
                np.add(piece, stream[: len(piece)], out=piece)
            masked = time.perf_counter()
            np.add(total, other, out=total)
            seconds["aes"].append(expanded - started)
            seconds["mask"].append(masked - expanded)
            seconds["vector"].append(time.perf_counter() - masked)
        return cls(slots, *(statistics.median(found) for found in seconds.values()))

    @property
    def mask_s(self) -> float:
        """One mask expanded and added."""
        return self.aes_s + self.mask_add_s

    def __str__(self) -> str:
        rates = [4e-9 * self.slots / s for s in (self.aes_s, self.mask_add_s, self.vector_add_s)]
        return (
            f"{self.slots:,} words of 32 bits: AES-256-CTR {rates[0]:.1f} GB/s, added from the "
            f"cache {rates[1]:.1f} GB/s, from memory {rates[2]:.1f} GB/s"
        )


# Sessions by the share of clients that drop out.
Runs = dict[float, list[Session]]


@dataclass(frozen=True)
class Result:
    """All sessions of one cell."""

    cell: Cell
    fedtune: Runs
    flower: Runs
    limit: Limit


def measure(cell: Cell, arguments: argparse.Namespace) -> Result:
    """Both dropout rates, fedtune before Flower in each."""

    def all_real(most_bytes: float, masking: list[float]) -> bool:
        # Making the vector and taking it in cost about as much again as a fast client.
        seconds = cell.clients * (statistics.median(masking) + 3e-8 * cell.slots)
        return seconds < arguments.budget and 8 * cell.clients * cell.slots <= most_bytes

    found: dict[str, Runs] = {"fedtune": {}, "flower": {}}
    for share in DROPOUTS:
        dropped = cell.dropped(share)
        paths: dict[str, Callable[[], Session]] = {
            "fedtune": partial(run_fedtune, cell, dropped, partial(all_real, float("inf")))
        }
        if arguments.peers:
            paths["flower"] = partial(
                run_flower,
                cell.clients,
                cell.neighbours,
                cell.terms.threshold_of(cell.neighbours + 1),
                dropped,
                cell.floats,
                SAMPLE,
                partial(all_real, MOST_BYTES),
            )
        for name, path in paths.items():
            found[name][share] = _repeated(path, arguments.reps)
            _progress(cell, name, share, found[name][share])
    return Result(cell, found["fedtune"], found["flower"], Limit.measured(cell.slots))


def _repeated(path: Callable[[], Session], most: int) -> list[Session]:
    sessions: list[Session] = []
    while len(sessions) < most:
        gc.collect()
        started = time.perf_counter()
        sessions.append(path())
        if time.perf_counter() - started >= BRIEF:
            break
    return sessions


def _progress(cell: Cell, name: str, share: float, sessions: list[Session]) -> None:
    last = sessions[-1]
    client = statistics.median(s for one in sessions for s in one.client_s)
    words = [
        f"{cell.clients} × {cell.slots:,}, {share:.0%} dropped, {name}: client {client:.3g} s",
        f"server {statistics.median(one.server_s for one in sessions):.3g} s, {last.masks} masks",
        "sum right" if last.checked else "copies at the server",
        f"× {len(sessions)}",
    ]
    if name == "flower":
        apart = f"{last.apart_client_s:.3g} + {last.apart_server_s:.3g} s"
        words += [f"quantization apart {apart}", f"off by {last.error_steps:.2f} steps"]
    print(", ".join(words), file=sys.stderr, flush=True)


def show(results: list[Result]) -> None:
    """The table."""
    print("\n| clients | masked with | values | path | client s | masking s ", end="")
    for share in DROPOUTS:
        print(f"| server s, {share:.0%} dropped | unmask s, {share:.0%} ", end="")
    print("| bytes up | × fp16 |\n|" + "---|" * (8 + 2 * len(DROPOUTS)))
    for result in results:
        cell = result.cell
        head = f"| {cell.clients} | {cell.neighbours} | {cell.slots:,} |"
        for path, runs in (("**fedtune**", result.fedtune), ("Flower SecAgg+", result.flower)):
            if runs:
                print(head, path, "|", " | ".join(_figures(cell, runs)), "|")
        print(head, "AES and adding alone |", " | ".join(_floor(result)), "| | |")
    print()
    for limit in {result.cell.slots: result.limit for result in results}.values():
        print(limit)
    for result in results:
        if sessions := [session for found in result.flower.values() for session in found]:
            client = statistics.median(session.apart_client_s for session in sessions)
            server = statistics.median(session.apart_server_s for session in sessions)
            print(
                f"{result.cell.clients} × {result.cell.slots:,}: Flower's quantization, not "
                f"counted: client {_seconds(client)} s, server {_seconds(server)} s"
            )


def _figures(cell: Cell, runs: Runs) -> list[str]:
    clients = [session for sessions in runs.values() for session in sessions]
    figures = [
        _spread(s for session in clients for s in session.client_s),
        _spread(s for session in clients for s in session.masking_s),
    ]
    for sessions in runs.values():
        mark = "" if all(session.checked for session in sessions) else "^"
        figures.append(_spread(session.server_s for session in sessions) + mark)
        figures.append(_spread(session.unmask_s for session in sessions) + mark)
    up = _bytes_up(runs)
    return [*figures, f"{up:,}", f"{up / (2 * cell.slots):.2f}"]


def _floor(result: Result) -> list[str]:
    limit = result.limit
    client = (result.cell.neighbours + 1) * limit.mask_s
    figures = [client, client]
    for share, sessions in result.fedtune.items():
        arrivals = result.cell.clients - len(result.cell.dropped(share))
        unmask = sessions[0].masks * limit.mask_s
        figures += [arrivals * limit.vector_add_s + unmask, unmask]
    return [f"~{_seconds(value)}" for value in figures]


def _spread(values: Iterable[float]) -> str:
    found = list(values)
    middle = _seconds(statistics.median(found))
    return (
        middle if len(found) == 1 else f"{middle} ({_seconds(min(found))}–{_seconds(max(found))})"
    )


def _seconds(value: float) -> str:
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:.{digits}f}" if value >= 0.1 else f"{value:.2g}"


def _bytes_up(runs: Runs) -> int:
    return max(session.bytes_up for sessions in runs.values() for session in sessions)


def _client(runs: Runs) -> float:
    return statistics.median(
        s for sessions in runs.values() for session in sessions for s in session.client_s
    )


def _server(runs: Runs, share: float) -> float:
    return statistics.median(session.server_s for session in runs[share])


def judge(results: list[Result]) -> None:
    """Whether the targets are reached."""
    last = DROPOUTS[-1]
    print()
    for result in results:
        cell, ours, theirs = result.cell, result.fedtune, result.flower
        name = f"{cell.clients} × {cell.slots:,}"
        if (cell.clients, cell.slots) == TARGET_CELL:
            slowest = max(_server(ours, share) for share in DROPOUTS)
            _verdict(f"{name}: client {_client(ours):.2f} s", _client(ours), CLIENT_TARGET)
            _verdict(f"{name}: server {slowest:.1f} s", slowest, SERVER_TARGET)
        if cell.slots >= BYTES_FROM:
            ratio = _bytes_up(ours) / (2 * cell.slots)
            _verdict(f"{name}: {ratio:.2f} × fp16 up", ratio, BYTES_TARGET)
        if theirs:
            _faster(f"{name}: client", _client(theirs) / _client(ours))
            _faster(f"{name}: server, {last:.0%}", _server(theirs, last) / _server(ours, last))


def _verdict(text: str, value: float, most: float) -> None:
    print("PASS" if value <= most else "MISS", f"{text}, target at most {most:g}")


def _faster(text: str, ratio: float) -> None:
    verdict = "PASS" if ratio >= FASTER_TARGET else "MISS"
    print(verdict, f"{text} {ratio:.1f} × as fast as Flower's, target {FASTER_TARGET:g}")


def save(results: list[Result], seconds: float, path: Path) -> None:
    """All raw figures."""

    def plain(runs: Runs) -> dict[str, Any]:
        return {str(share): [asdict(one) for one in found] for share, found in runs.items()}

    cells = [
        {
            **asdict(result.cell),
            "neighbours": result.cell.neighbours,
            "ring_bits": result.cell.ring.bits,
            "threshold": result.cell.terms.threshold_of(result.cell.clients),
            "threshold_flower": result.cell.terms.threshold_of(result.cell.neighbours + 1),
            "fedtune": plain(result.fedtune),
            "flower": plain(result.flower),
            "limit": asdict(result.limit),
        }
        for result in results
    ]
    path.write_text(json.dumps({"seconds": seconds, "cells": cells}, indent=2) + "\n")


def parse_arguments() -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 50, 100])
    parser.add_argument("--sizes", type=int, nargs="+", default=[75_000, 1_000_000, 13_600_000])
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--reps", type=int, default=3, help="of sessions below ten seconds")
    parser.add_argument("--budget", type=float, default=180, help="seconds for all real vectors")
    parser.add_argument("--cpu", type=int, default=max(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, help="a JSON file for all raw figures")
    return parser.parse_args()


def main() -> None:
    """Measure every cell, print table and claims, write the figures."""
    arguments = parse_arguments()
    os.sched_setaffinity(0, {arguments.cpu})  # Flower opens shares in a pool of threads
    started = time.perf_counter()
    warm = Cell(5, 1000)
    run_fedtune(warm, (), lambda _: True)
    if arguments.peers:
        threshold = warm.terms.threshold_of(warm.clients)
        run_flower(5, warm.neighbours, threshold, (), warm.floats, SAMPLE, lambda _: True)
    results = []
    for slots in arguments.sizes:
        for clients in arguments.clients:
            results.append(measure(Cell(clients, slots), arguments))
            if arguments.out:
                save(results, time.perf_counter() - started, arguments.out)
    show(results)
    judge(results)


if __name__ == "__main__":
    main()
