"""How requests come and answers leave: uvicorn's HTTP, with fewer copies and fewer ways through the system's network.

What is written to a connection in one turn of the event loop goes out in one piece: uvicorn writes an answer's head and
its body one after the other, and each is sent at once. And a large body that is wanted whole is read from the socket to
where it stays: uvicorn copies it three times, and pauses the connection after every piece of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import httptools
import numpy as np

from api_gateway.fast_path.bounded import Bounded
from device_operations.bounds import whole_number

if TYPE_CHECKING:
    from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

#: What is held back for the rest of a turn has fewer bytes than this.
HELD_BYTES = 65_536

#: Requests to addresses that end so want their body whole. It is read past uvicorn if so many bytes are still to come
#: and it has no more than those: more than that takes its pace from whoever reads it.
WHOLE_ADDRESS = "/infer"
WHOLE_REST_BYTES, WHOLE_BYTES = 65_536, 16 << 20

#: The key of such a body in the request's scope, a memoryview; there once `receive` has told of the end.
WHOLE_BODY = "device_operations.whole_body"

#: The key of what `take_whole` calls.
_TAKE_WHOLE = "device_operations.take_whole"


def take_whole(scope: Any) -> None:
    """Lets the rest of a request's body be read past uvicorn, where it is large and wanted whole.

    For a request whose caller is known: the memory for all of it is taken at once.
    """
    take = scope.pop(_TAKE_WHOLE, None)
    if take is not None:
        take()


class BufferedConnection:
    """A connection whose small writes wait for the end of the event loop's turn; all else is the transport's own."""

    def __init__(
        self, transport: asyncio.Transport, lingers: Callable[[asyncio.Transport], bool] | None = None
    ) -> None:
        self._transport = transport
        #: Asked before the connection closes: whether it is to be read for a while yet.
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


class Protocol(Bounded):
    """uvicorn's HTTP, with bounds, over such connections."""

    @classmethod
    def limited_to(cls, max_connections: int) -> type[Protocol]:
        """The same for a gateway that takes so many connections at once."""
        return type("Protocol", (cls,), {"max_connections": max_connections})

    def connection_made(self, transport: Any) -> None:
        """A client has connected."""
        super().connection_made(BufferedConnection(transport, self.linger))  # type: ignore[arg-type]

    def data_received(self, data: bytes) -> None:
        """Bytes of requests have come."""
        super().data_received(data)
        if self._begins:
            self._begins = False
            # Asked for by whoever reads the body, and before anything of the request is carried out.
            size = next((whole_number(value) for name, value in self.headers if name == b"content-length"), None)
            self.drains(size)
            if size is not None and not self.pipeline and self.scope["path"].endswith(WHOLE_ADDRESS):
                self.scope[_TAKE_WHOLE] = partial(self._take_whole, self.cycle, size)  # type: ignore[literal-required]

    def _take_whole(self, cycle: RequestResponseCycle, size: int) -> None:
        """Reads what is missing of a body past uvicorn and its parser, where it is large and wanted whole."""
        # What waits behind another request is not read at all: uvicorn holds the connection.
        if cycle is not self.cycle or self.pipeline or self.transport.is_closing() or not cycle.more_body:
            return
        came = len(cycle.body)
        if size > WHOLE_BYTES or size - came < WHOLE_REST_BYTES or self._body_came != came:
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

    def hears_of_body(self, size: int) -> None:
        """So many bytes of the body have come: the connection is not idle."""
        self._body_came += size
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
        self._http.hears_of_body(nbytes)
        if self._came == len(self._room):
            self._http.whole_came(self._room)

    def connection_lost(self, exc: Exception | None) -> None:
        self._http.connection_lost(exc)

    def pause_writing(self) -> None:
        self._http.pause_writing()

    def resume_writing(self) -> None:
        self._http.resume_writing()
