"""HTTP without the fast path: uvicorn through its public interfaces only, within the same limits.

    socket ─▶ PlainProtocol ─▶ uvicorn's protocol ─▶ PlainPath ─▶ the gateway
              a parser of its own counts             `Connection: close`, refusals while a body is read

uvicorn offers a class of protocol (`http=`), asyncio's callbacks on it, `scope["state"]` and ASGI. With these alone
the limits of `limits` need a second parser, which sees each request before uvicorn does; that is what this path costs,
besides one copy more of large bodies. `HTTP__FAST_PATH=false` selects it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING

import httptools
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api_gateway import limits
from api_gateway.connection import BufferedConnection
from device_operations.bounds import whole_number

if TYPE_CHECKING:
    from uvicorn.config import Config
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol as AutoHTTPProtocol
    from uvicorn.server import ServerState
else:
    from uvicorn.protocols.http.auto import AutoHTTPProtocol

#: The key of a request's `PlainProtocol` in `scope["state"]`.
CONNECTION = "device_operations.connection"

_HEAD_END = b"\r\n\r\n"


class Exchange:
    """One request whose head has come, and its answer."""

    def __init__(self, size: int | None) -> None:
        #: The body's size as announced, in bytes; None for a body in chunks.
        self.size = size
        self.is_whole = self.response_started = False
        #: The answer in place of the application's.
        self.refusal: Response | None = None
        self._asgi: tuple[Scope, Receive, Send] | None = None

    def begin(self, scope: Scope, receive: Receive, send: Send) -> None:
        """uvicorn has handed the request to the application."""
        self._asgi = (scope, receive, send)

    @property
    def has_begun(self) -> bool:
        """Whether the application has the request."""
        return self._asgi is not None

    def stays(self) -> bool:
        """Whether the connection may stay after an answer now."""
        return self.is_whole or (self.size is not None and self.size <= limits.DRAINED_BYTES)

    async def refuse(self) -> None:
        """Sends the refusal; uvicorn then gives the application `http.disconnect`, and closes."""
        if self._asgi is not None and self.refusal is not None:
            await self.refusal(*self._asgi)


class PlainPath:
    """The outermost application on this path."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hands on, unless the request was refused while it waited behind others."""
        connection: PlainProtocol | None = scope.get("state", {}).pop(CONNECTION, None)
        if connection is None or scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = connection.next_exchange()

        async def send_last(message: Message) -> None:
            await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                connection.answered(exchange)

        async def send_unless_refused(message: Message) -> None:
            if exchange.refusal is not None:
                return
            if message["type"] == "http.response.start":
                exchange.response_started = True
                if not exchange.stays():
                    message = {**message, "headers": [*message.get("headers", ()), (b"connection", b"close")]}
            await send_last(message)

        exchange.begin(scope, receive, send_last)
        if exchange.refusal is not None:
            await exchange.refuse()
            return
        await self._app(scope, receive, send_unless_refused)


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
        self._parser = httptools.HttpRequestParser(self)
        # As uvicorn reads them: requests behind one that says `Connection: close` are no error.
        self._parser.set_dangerous_leniencies(lenient_data_after_close=True)
        #: Those whose head has come and whose answer is not complete, in order; the first `_started` have begun.
        self._exchanges: deque[Exchange] = deque()
        self._started = 0
        self._is_connected = False
        self._in_message = self._in_head = False
        self._begun = 0
        #: Of the present request's head: its target, bytes received, bytes of whole lines, lines.
        self._target = b""
        self._size: int | None = 0
        self._head_received = self._head_parsed = self._head_lines = 0
        #: Of the present request's body: bytes of content, the same at the last look, bytes that frame it.
        self._body_came = self._body_seen = self._framing = 0
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
        for piece in self._pieces(data):
            begun, came, was_in_message = self._begun, self._body_came, self._in_message
            try:
                self._parser.feed_data(piece)
            except httptools.HttpParserUpgrade:
                pass  # uvicorn is set to no other protocol, and answers in HTTP/1.1
            except httptools.HttpParserError:
                self._refuse_parsed()
                return
            if self._in_head:
                self._head_received += len(piece)
                if self._head_received > limits.HEAD_BYTES:
                    self._refuse_head()
                    return
            self._http.data_received(piece)
            if self._transport.is_closing():
                return
            if self._in_message and not self._in_head and was_in_message and self._begun == begun and self._exchanges:
                self._framing += len(piece) - (self._body_came - came)
                if self._size is None and self._framing > (
                    limits.FRAMING_BYTES + limits.FRAMING_SHARE * self._body_came
                ):
                    self._refuse("malformed_request", "the body has more framing than content")
                    return
        self._time()

    def _pieces(self, data: bytes) -> Iterator[bytes]:
        """`data` cut at the ends of heads and of bodies of known size, so that what is refused is not handed on."""
        at = 0
        while at < len(data):
            if not self._in_message or self._in_head:
                found = data.find(_HEAD_END, at)
                end = len(data) if found < 0 else found + len(_HEAD_END)
            else:
                end = len(data) if self._size is None else at + max(1, self._size - self._body_came)
            yield data[at:end] if at or end < len(data) else data
            at = end

    # ---- the parser's callbacks

    def on_message_begin(self) -> None:
        """A request begins."""
        self._in_message = self._in_head = True
        self._begun += 1
        self._target = b""
        self._size = 0
        self._head_received = self._head_parsed = self._head_lines = 0
        self._body_came = self._framing = 0

    def on_url(self, url: bytes) -> None:
        """Some of the request's target has come."""
        self._head_parsed += len(url)
        self._check_head()
        self._target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header line has come, or one of a trailer."""
        self._head_parsed += len(name) + len(value) + 4
        self._head_lines += 1
        self._check_head()
        if self._in_head:
            name = name.lower()
            if name == b"content-length" and self._size is not None:
                self._size = whole_number(value)
            elif name == b"transfer-encoding":
                self._size = None

    def on_headers_complete(self) -> None:
        """A request's head is whole."""
        if len(self._exchanges) > limits.PIPELINED:
            raise _RefusedError
        # What uvicorn would not take: it answers that with text.
        httptools.parse_url(self._target).path.decode("ascii")
        self._in_head = False
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
        self._exchanges.append(Exchange(self._size))

    def on_body(self, body: bytes) -> None:
        """Some of a request's body has come."""
        self._body_came += len(body)

    def on_message_complete(self) -> None:
        """A request has come whole."""
        self._in_message = False
        if self._body_timer is not None:
            self._body_timer.cancel()
            self._body_timer = None
        # Not where it is answered already.
        if self._exchanges:
            self._exchanges[-1].is_whole = True

    def _check_head(self) -> None:
        if self._head_parsed > limits.HEAD_BYTES or self._head_lines > limits.HEAD_LINES:
            raise _RefusedError

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
        if self._in_message and not self._in_head:
            if self._body_timer is None:
                self._body_seen = self._body_came
                self._body_timer = self._loop.call_later(limits.BODY_SECONDS, self._look_at_body)
        elif self._in_head or not self._exchanges:
            # A head that is not whole, or bytes that belong to none.
            self._time_head()

    def _time_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self._loop.call_later(limits.HEAD_SECONDS, self._head_is_late)

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self._in_head:
            self._refuse("request_timeout", f"the request's head did not come within {limits.HEAD_SECONDS:g} s")
        elif not self._exchanges:
            # No request has come: there is nothing to answer.
            self._connection.close()

    def _look_at_body(self) -> None:
        """Refuses a body that comes too slowly. While it is not read, nothing can come."""
        self._body_timer = None
        if not self._in_message or self._in_head or self._connection.is_closing():
            return
        if self._transport.is_reading() and self._body_came - self._body_seen < limits.BODY_BYTES:
            self._refuse(
                "request_timeout",
                f"the body came too slowly: fewer than {limits.BODY_BYTES} bytes in {limits.BODY_SECONDS:g} s",
            )
            return
        self._body_seen = self._body_came
        self._body_timer = self._loop.call_later(limits.BODY_SECONDS, self._look_at_body)

    # ---- refusing and closing

    def _refuse_parsed(self) -> None:
        """Refuses what the parser, or one of its callbacks, did not take."""
        if self._head_parsed > limits.HEAD_BYTES or self._head_lines > limits.HEAD_LINES:
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
        own = self._exchanges[-1] if self._exchanges and self._in_message and not self._in_head else None
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
        if not (self._in_message or self._refused) or not transport.can_write_eof():
            return False
        self._lingering = True
        transport.write_eof()
        if not transport.is_reading():
            transport.resume_reading()
        self._linger_timer = self._loop.call_later(limits.LINGER_SECONDS, transport.abort)
        return True

    def _drop(self, size: int) -> None:
        self._dropped += size
        if self._dropped > limits.LINGER_BYTES:
            self._transport.abort()


class _RefusedError(Exception):
    """Raised out of the parser's callbacks, so that it stops; what is answered is decided after it has."""
