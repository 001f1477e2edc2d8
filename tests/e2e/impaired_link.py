"""Two network namespaces, and between them a link that delays, loses and narrows, or is down.

Each namespace has a TUN device; a thread here carries their packets. It is what `tc netem` does,
for kernels that are built without it, and TCP cannot tell the difference.
"""

from __future__ import annotations

import fcntl
import os
import random
import secrets
import select
import struct
import subprocess
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import Self

SERVER_ADDRESS, SITE_ADDRESS = "10.87.0.1", "10.87.0.2"
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_MTU, _QUEUED_BYTES = 1500, 200_000


@dataclass(frozen=True)
class Impairment:
    """One way's delay and its spread in seconds, share of packets lost, bytes per second."""

    delay: float
    jitter: float
    loss: float
    rate: float


class LinkRefused(Exception):
    """This machine does not allow network namespaces."""


class ImpairedLink:
    """A pair of namespaces, `server` and `sites`; leave the block to take them away."""

    def __init__(self, impairment: Impairment, seed: int) -> None:
        self.up = True
        self.carried = self.lost = 0
        self._impairment, self._random = impairment, random.Random(seed)
        self._ended = threading.Event()
        unique = secrets.token_hex(3)
        self.server, self.sites = f"fedtune-{unique}-a", f"fedtune-{unique}-b"
        self._devices: list[int] = []
        try:
            for name, address in ((self.server, SERVER_ADDRESS), (self.sites, SITE_ADDRESS)):
                _ip("netns", "add", name)
                self._devices.append(_device(name, address))
        except BaseException:
            self._remove()
            raise
        self._thread = threading.Thread(target=self._carry, daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._ended.set()
        self._thread.join()
        self._remove()

    def _remove(self) -> None:
        for device in self._devices:
            os.close(device)
        for name in (self.server, self.sites):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)

    def _carry(self) -> None:
        one, other = self._devices
        ways = {one: _Way(other), other: _Way(one)}
        while not self._ended.is_set():
            now = time.monotonic()
            due = min(way.deliver(now) for way in ways.values())
            ready, _, _ = select.select(list(ways), [], [], min(0.05, max(0.0, due - now)))
            for device in ready:
                self._take(ways[device], os.read(device, _MTU + 100))

    def _take(self, way: _Way, packet: bytes) -> None:
        full = sum(len(item) for _, item in way.queue) > _QUEUED_BYTES
        if not self.up or full or self._random.random() < self._impairment.loss:
            self.lost += 1
            return
        self.carried += 1
        link, now = self._impairment, time.monotonic()
        way.free_at = max(now, way.free_at) + len(packet) / link.rate
        spread = self._random.uniform(-link.jitter, link.jitter)
        way.queue.append((way.free_at + link.delay + spread, packet))


class _Way:
    """Packets on their way in one direction; none overtakes another."""

    def __init__(self, to: int) -> None:
        self.queue: deque[tuple[float, bytes]] = deque()
        self.free_at = 0.0
        self._to = to

    def deliver(self, now: float) -> float:
        """Deliver what is due; when the next one is."""
        while self.queue and self.queue[0][0] <= now:
            os.write(self._to, self.queue.popleft()[1])
        return self.queue[0][0] if self.queue else float("inf")


def _device(namespace: str, address: str) -> int:
    name = f"ft{secrets.token_hex(4)}"
    device = os.open("/dev/net/tun", os.O_RDWR)
    try:
        request = struct.pack("16sH", name.encode(), _IFF_TUN | _IFF_NO_PI)
        fcntl.ioctl(device, _TUNSETIFF, request)
        _ip("link", "set", name, "netns", namespace)
        _ip("-n", namespace, "address", "add", f"{address}/24", "dev", name)
        for link in ("lo", name):
            _ip("-n", namespace, "link", "set", link, "up")
    except BaseException:
        os.close(device)
        raise
    return device


def _ip(*arguments: str) -> None:
    try:
        found = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise LinkRefused("there is no `ip` command (iproute2)") from error
    if found.returncode:
        raise LinkRefused(f"ip {' '.join(arguments)}: {found.stderr.strip()}")
