"""How answers leave: what is written to a connection in one turn of the event loop goes out in one piece.

uvicorn writes an answer's head and its body one after the other, and each is sent at once: twice the way through the
system's network, and a client that is woken twice.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol as AutoHTTPProtocol
else:
    from uvicorn.protocols.http.auto import AutoHTTPProtocol

#: What is held back for the rest of a turn has fewer bytes than this.
HELD_BYTES = 65_536


class Held:
    """A connection whose small writes wait for the end of the event loop's turn; all else is the transport's own."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._loop = asyncio.get_running_loop()
        self._parts: list[bytes] = []
        self._size = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Sends `data` at the end of this turn; now where it is much, or memory that may change meanwhile."""
        self._size += len(data)
        if self._size >= HELD_BYTES or type(data) is not bytes:
            self._send()
            self._transport.write(data)
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
        """Sends what is held, then closes."""
        self._send()
        self._transport.close()

    def _send(self) -> None:
        parts, self._parts, self._size = self._parts, [], 0
        if parts and not self._transport.is_closing():
            self._transport.write(b"".join(parts))


class Protocol(AutoHTTPProtocol):
    """uvicorn's HTTP over such connections."""

    def connection_made(self, transport: Any) -> None:
        """A client has connected."""
        super().connection_made(Held(transport))  # type: ignore[arg-type]
