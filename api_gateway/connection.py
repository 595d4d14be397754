"""A connection that sends what is written in one turn of the event loop in one piece.

uvicorn writes an answer's head and its body one after the other, and each would be sent at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any

#: What is held back for the rest of a turn has fewer bytes than this.
HELD_BYTES = 65_536


class BufferedConnection:
    """A connection whose small writes wait for the end of the event loop's turn; all else is the transport's own."""

    def __init__(
        self, transport: asyncio.Transport, lingers: Callable[[asyncio.Transport], bool] | None = None
    ) -> None:
        self._transport = transport
        #: Called before the connection closes; True if it stays open for reading for a while.
        self._lingers = lingers
        self._is_lingering = False
        self._loop = asyncio.get_running_loop()
        self._parts: list[bytes] = []
        self._size = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Sends `data` at the end of this turn; now where it is much, or memory that may change meanwhile."""
        self._size += len(data)
        if self._size >= HELD_BYTES or type(data) is not bytes:
            self._send(data)
            return
        if not self._parts:
            self._loop.call_soon(self._send)
        self._parts.append(data)

    def writelines(self, parts: Iterable[bytes | bytearray | memoryview]) -> None:
        """The same for several, in order."""
        for part in parts:
            self.write(part)

    def write_eof(self) -> None:
        """Sends what is held, then the end of what this side sends."""
        self._send()
        self._transport.write_eof()

    def close(self) -> None:
        """Sends what is held, then closes; for writing only, where the client is still sending."""
        self._send()
        self._is_lingering = self._lingers is not None and self._lingers(self._transport)
        if not self._is_lingering:
            self._transport.close()

    def is_closing(self) -> bool:
        """Whether nothing more can be sent."""
        return self._is_lingering or self._transport.is_closing()

    def _send(self, *more: bytes | bytearray | memoryview) -> None:
        parts, self._parts, self._size = self._parts, [], 0
        if more:
            self._transport.writelines([*parts, *more])
        elif parts and not self._transport.is_closing():
            self._transport.write(b"".join(parts))
