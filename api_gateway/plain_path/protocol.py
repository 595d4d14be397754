"""The socket side of the plain path: one connection, held to the limits before uvicorn reads it."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING

import httptools

from api_gateway import limits
from api_gateway.connection import BufferedConnection
from api_gateway.plain_path.application import CONNECTION, Exchange
from api_gateway.plain_path.incoming import Incoming, RefusedError

if TYPE_CHECKING:
    from uvicorn.config import Config
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol as AutoHTTPProtocol
    from uvicorn.server import ServerState
else:
    from uvicorn.protocols.http.auto import AutoHTTPProtocol


class PlainProtocol(asyncio.Protocol):
    """One connection: counts what comes, hands it on to uvicorn's own protocol, refuses what is over a limit."""

    max_connections = 1000
    _open: set[PlainProtocol] = set()  # noqa: RUF012 - one set for each class that `limited_to` makes

    @classmethod
    def limited_to(cls, max_connections: int) -> type[PlainProtocol]:
        """The same for a gateway that takes so many connections at once."""
        return type("PlainProtocol", (cls,), {"max_connections": max_connections, "_open": set()})

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, object],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        self._http = AutoHTTPProtocol(
            config=config, server_state=server_state, app_state={**app_state, CONNECTION: self}, _loop=_loop
        )
        self._loop = _loop or asyncio.get_running_loop()
        self._incoming = Incoming(self._head_came, self._request_came)
        #: Those whose head has come and whose answer is not complete, in order; the first `_started` have begun.
        self._exchanges: deque[Exchange] = deque()
        self._started = 0
        self._is_connected = False
        #: Bytes of the present request's body at the last look.
        self._body_seen = 0
        self._last_words: bytes | None = None
        self._refused = self._lingering = False
        self._dropped = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._body_timer: asyncio.TimerHandle | None = None
        self._linger_timer: asyncio.TimerHandle | None = None

    # ---- asyncio's callbacks

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected."""
        self._transport = transport
        self._connection = BufferedConnection(transport, self._linger)
        self._open.add(self)
        if len(self._open) > 2 * self.max_connections:
            transport.abort()
        elif len(self._open) > self.max_connections:
            self._refuse(
                "overloaded", f"{self.max_connections} connections are open (HTTP__MAX_CONNECTIONS); try again later"
            )
        else:
            self._is_connected = True
            self._http.connection_made(self._connection)  # type: ignore[arg-type]
            self._time_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        self._open.discard(self)
        for timer in (self._head_timer, self._body_timer, self._linger_timer):
            if timer is not None:
                timer.cancel()
        if self._is_connected:
            self._http.connection_lost(exc)

    def eof_received(self) -> None:
        """The client sends nothing more."""
        if self._is_connected:
            self._http.eof_received()

    def pause_writing(self) -> None:
        """The client reads more slowly than is written."""
        if self._is_connected:
            self._http.pause_writing()

    def resume_writing(self) -> None:
        """The client has read."""
        if self._is_connected:
            self._http.resume_writing()

    def data_received(self, data: bytes) -> None:
        """Bytes of requests have come: each piece is counted first, and reaches uvicorn within the limits only."""
        if self._refused or self._lingering:
            self._drop(len(data))
            return
        incoming = self._incoming
        for piece in incoming.pieces(data):
            try:
                incoming.feed(piece)
            except httptools.HttpParserError:
                self._refuse_parsed()
                return
            if incoming.in_head and incoming.is_head_too_large():
                self._refuse_head()
                return
            self._http.data_received(piece)
            if self._transport.is_closing():
                return
            if incoming.is_mostly_framing():
                self._refuse("malformed_request", "the body has more framing than content")
                return
        self._time()

    def _head_came(self, size: int | None) -> None:
        if len(self._exchanges) > limits.PIPELINED:
            raise RefusedError
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
        self._exchanges.append(Exchange(size))

    def _request_came(self) -> None:
        if self._body_timer is not None:
            self._body_timer.cancel()
            self._body_timer = None
        # Not if it is answered already.
        if self._exchanges:
            self._exchanges[-1].is_whole = True

    # ---- the application's side

    def next_exchange(self) -> Exchange:
        """The request that uvicorn hands to the application now."""
        self._started += 1
        return self._exchanges[self._started - 1]

    def answered(self, exchange: Exchange) -> None:
        """An answer is complete."""
        self._exchanges.remove(exchange)
        self._started -= 1
        if self._last_words is not None and not self._exchanges and not self._connection.is_closing():
            self._close_with(self._last_words)

    # ---- time

    def _time(self) -> None:
        if self._incoming.in_body:
            if self._body_timer is None:
                self._body_seen = self._incoming.body_came
                self._body_timer = self._loop.call_later(limits.BODY_SECONDS, self._look_at_body)
        elif self._incoming.in_head or not self._exchanges:
            # A head that is not whole, or bytes that belong to none.
            self._time_head()

    def _time_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self._loop.call_later(limits.HEAD_SECONDS, self._head_is_late)

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self._incoming.in_head:
            self._refuse("request_timeout", f"the request's head did not come within {limits.HEAD_SECONDS:g} s")
        elif not self._exchanges:
            # No request has come: there is nothing to answer.
            self._connection.close()

    def _look_at_body(self) -> None:
        """Refuses a body that comes too slowly. While it is not read, nothing can come."""
        self._body_timer = None
        if not self._incoming.in_body or self._connection.is_closing():
            return
        if self._transport.is_reading() and self._incoming.body_came - self._body_seen < limits.BODY_BYTES:
            self._refuse(
                "request_timeout",
                f"the body came too slowly: fewer than {limits.BODY_BYTES} bytes in {limits.BODY_SECONDS:g} s",
            )
            return
        self._body_seen = self._incoming.body_came
        self._body_timer = self._loop.call_later(limits.BODY_SECONDS, self._look_at_body)

    # ---- refusing and closing

    def _refuse_parsed(self) -> None:
        """Refuses what the parser, or one of its callbacks, did not take."""
        if self._incoming.is_head_too_large():
            self._refuse_head()
        elif len(self._exchanges) > limits.PIPELINED:
            self._refuse("malformed_request", f"more than {limits.PIPELINED} requests wait on this connection")
        else:
            self._refuse("malformed_request", "this is not HTTP/1.1")

    def _refuse_head(self) -> None:
        self._refuse(
            "header_too_large",
            f"a request's head may have {limits.HEAD_BYTES} bytes and {limits.HEAD_LINES} header lines",
        )

    def _refuse(self, code: str, message: str) -> None:
        """Answers the request that is being received and closes, once the requests before it are answered."""
        if self._refused or self._connection.is_closing():
            return
        self._refused = True
        own = self._exchanges[-1] if self._exchanges and self._incoming.in_body else None
        if own is not None and not own.response_started:
            own.refusal = limits.refusal_response(code, message)
            if own.has_begun:
                self._refusing = self._loop.create_task(own.refuse())
        elif self._exchanges:
            self._last_words = limits.refusal(code, message)
        else:
            self._close_with(limits.refusal(code, message))

    def _close_with(self, words: bytes) -> None:
        self._connection.write(words)
        self._connection.close()

    def _linger(self, transport: asyncio.Transport) -> bool:
        """Closes for writing only, where the client is still sending; False where the connection may close at once."""
        if self._lingering or transport.is_closing():
            return self._lingering
        if not (self._incoming.in_head or self._incoming.in_body or self._refused) or not transport.can_write_eof():
            return False
        try:
            transport.write_eof()
        except OSError:
            # The client has reset the connection already.
            return False
        self._lingering = True
        if not transport.is_reading():
            transport.resume_reading()
        self._linger_timer = self._loop.call_later(limits.LINGER_SECONDS, transport.abort)
        return True

    def _drop(self, size: int) -> None:
        self._dropped += size
        if self._dropped > limits.LINGER_BYTES:
            self._transport.abort()
