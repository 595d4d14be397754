"""How requests come and answers leave: uvicorn's HTTP, with fewer copies and fewer ways through the system's network.

What is written to a connection in one turn of the event loop goes out in one piece: uvicorn writes an answer's head and
its body one after the other, and each is sent at once. And a large body that is wanted whole is read from the socket to
where it stays: uvicorn copies it three times, and pauses the connection after every piece of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import httptools
import numpy as np

if TYPE_CHECKING:
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol as AutoHTTPProtocol
else:
    from uvicorn.protocols.http.auto import AutoHTTPProtocol

#: What is held back for the rest of a turn has fewer bytes than this.
HELD_BYTES = 65_536

#: Requests to addresses that end so want their body whole. It is read past uvicorn if so many bytes are still to come
#: and it has no more than those: more than that takes its pace from whoever reads it.
WHOLE_ADDRESS = "/infer"
WHOLE_REST_BYTES, WHOLE_BYTES = 65_536, 16 << 20

#: The key of such a body in the request's scope, a memoryview; there once `receive` has told of the end.
WHOLE_BODY = "device_operations.whole_body"


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
        """Sends what is held, then closes."""
        self._send()
        self._transport.close()

    def _send(self, *more: bytes | bytearray | memoryview) -> None:
        parts, self._parts, self._size = self._parts, [], 0
        if more:
            self._transport.writelines([*parts, *more])
        elif parts and not self._transport.is_closing():
            self._transport.write(b"".join(parts))


class Protocol(AutoHTTPProtocol):
    """uvicorn's HTTP over such connections."""

    _begins = False

    def connection_made(self, transport: Any) -> None:
        """A client has connected."""
        super().connection_made(Held(transport))  # type: ignore[arg-type]

    def on_headers_complete(self) -> None:
        """A request has begun, whose body may follow."""
        super().on_headers_complete()
        self._begins = True

    def data_received(self, data: bytes) -> None:
        """Bytes of requests have come."""
        super().data_received(data)
        if self._begins:
            self._begins = False
            if self.cycle is not None and self.cycle.more_body:
                self._take_whole()

    def _take_whole(self) -> None:
        """Reads what is missing of a body past uvicorn and its parser, where it is large and wanted whole."""
        cycle = self.cycle
        # What waits behind another request is not read at all: uvicorn holds the connection.
        if self.pipeline or not self.scope["path"].endswith(WHOLE_ADDRESS):
            return
        size = next((int(value) for name, value in self.headers if name == b"content-length"), 0)
        came = len(cycle.body)
        if size > WHOLE_BYTES or size - came < WHOLE_REST_BYTES:
            return
        room = np.empty(size, np.uint8).data
        room[:came] = cycle.body
        cycle.body = bytearray()
        cycle.message_event.clear()
        self.flow.resume_reading()
        self.transport.set_protocol(_Body(self, room, came))

    def whole_came(self, body: memoryview) -> None:
        """The body has come, and its bytes are the last that were read of the connection."""
        self.transport.set_protocol(self)
        self.parser = httptools.HttpRequestParser(self)
        self.scope[WHOLE_BODY] = body  # type: ignore[literal-required]
        self.on_message_complete()

    def hears_of_body(self) -> None:
        """Some of the body has come: the connection is not idle."""
        self._unset_keepalive_if_required()


class _Body(asyncio.BufferedProtocol):
    """A connection that reads the rest of one body into its place; all else is for the connection's HTTP."""

    def __init__(self, http: Protocol, room: memoryview, came: int) -> None:
        self._http = http
        self._room = room
        self._came = came

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._room[self._came :]

    def buffer_updated(self, nbytes: int) -> None:
        self._came += nbytes
        self._http.hears_of_body()
        if self._came == len(self._room):
            self._http.whole_came(self._room)

    def connection_lost(self, exc: Exception | None) -> None:
        self._http.connection_lost(exc)

    def pause_writing(self) -> None:
        self._http.pause_writing()

    def resume_writing(self) -> None:
        self._http.resume_writing()
