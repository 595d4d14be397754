"""How requests come and answers leave: uvicorn's HTTP, with fewer copies and fewer ways through the system's network.

What is written to a connection in one turn of the event loop goes out in one piece: uvicorn writes an answer's head and
its body one after the other, and each is sent at once. And a large body that is wanted whole is read from the socket to
where it stays: uvicorn copies it three times, and pauses the connection after every piece of it.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING

import httptools
import numpy as np

from api_gateway.connection import BufferedConnection
from api_gateway.fast_path.bounded import Bounded
from api_gateway.fast_path.whole_body import TAKE_WHOLE, WHOLE_BODY
from device_operations.wire.bounds import whole_number

if TYPE_CHECKING:
    from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

#: Requests to addresses that end so want their body whole. It is read past uvicorn if so many bytes are still to come
#: and it has no more than those: a larger body takes its pace from its reader.
WHOLE_ADDRESS = "/infer"
WHOLE_REST_BYTES, WHOLE_BYTES = 65_536, 16 << 20


class Protocol(Bounded):
    """uvicorn's HTTP, with bounds, over such connections."""

    @classmethod
    def limited_to(cls, max_connections: int) -> type[Protocol]:
        """The same for a gateway that takes so many connections at once."""
        return type("Protocol", (cls,), {"max_connections": max_connections})

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client has connected."""
        super().connection_made(BufferedConnection(transport, self.linger))  # type: ignore[arg-type]

    def data_received(self, data: bytes) -> None:
        """Bytes of requests have come."""
        super().data_received(data)
        if self._begins:
            self._begins = False
            # Used by the reader of the body, before anything of the request is carried out.
            size = next((whole_number(value) for name, value in self.headers if name == b"content-length"), None)
            self.drains(size)
            if size is not None and not self.pipeline and self.scope["path"].endswith(WHOLE_ADDRESS):
                self.scope[TAKE_WHOLE] = partial(self._take_whole, self.cycle, size)  # type: ignore[literal-required]

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

    def count_body(self, size: int) -> None:
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
        self._http.count_body(nbytes)
        if self._came == len(self._room):
            self._http.whole_came(self._room)

    def connection_lost(self, exc: Exception | None) -> None:
        self._http.connection_lost(exc)

    def pause_writing(self) -> None:
        self._http.pause_writing()

    def resume_writing(self) -> None:
        self._http.resume_writing()
