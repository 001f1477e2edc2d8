"""A TCP proxy between one site and the server, that cuts, stalls, delays and truncates.

It sees only the bytes of TLS.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from contextlib import suppress
from typing import Self

_RESET = struct.pack("ii", 1, 0)  # linger on, for no time: closing sends a reset


class FaultyProxy:
    """Carries connections to `127.0.0.1:port`; leave the block to end it."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._door = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._door.getsockname()[1]
        self._loop = asyncio.new_event_loop()
        self._flows = asyncio.Event()
        self._flows.set()
        self._delay, self._truncates = 0.0, False
        self._open: set[asyncio.StreamWriter] = set()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def cut(self) -> None:
        """Reset all connections."""
        self._loop.call_soon_threadsafe(self._reset)

    def stall(self, stalled: bool) -> None:
        """Carry nothing, and close nothing, until told otherwise."""
        self._loop.call_soon_threadsafe(self._flows.clear if stalled else self._flows.set)

    def delay(self, seconds: float) -> None:
        """Carry each piece so much later."""
        self._delay = seconds

    def truncate(self) -> None:
        """Carry one half of the next piece, and reset its connection."""
        self._truncates = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._reset()
        self._door.close()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(asyncio.start_server(self._carry, sock=self._door))
        self._loop.run_forever()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            _abort(writer)
            return
        ends = {writer, far_writer}
        self._open |= ends
        with suppress(OSError):
            await asyncio.gather(self._pump(reader, far_writer), self._pump(far_reader, writer))
        self._open -= ends
        for end in ends:
            _abort(end)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while piece := await reader.read(65536):
            await self._flows.wait()
            if self._delay:
                await asyncio.sleep(self._delay)
            if self._truncates:
                self._truncates = False
                writer.write(piece[: len(piece) // 2])
                await writer.drain()
                raise ConnectionAbortedError
            writer.write(piece)
            await writer.drain()
        writer.write_eof()

    def _reset(self) -> None:
        for writer in list(self._open):
            _abort(writer)


def _abort(writer: asyncio.StreamWriter) -> None:
    found = writer.get_extra_info("socket")
    with suppress(OSError):
        found.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    writer.transport.abort()
