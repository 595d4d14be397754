"""uvicorn's HTTP within the limits on what a client may send before, between and instead of its requests.

The limits are in `limits`. A connection that closes before a request's body has come is closed for writing first, and
what the client still sends is read and dropped for a while: closed at once, it would be reset, and the client would
lose the answer.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from api_gateway import limits

if TYPE_CHECKING:
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol as AutoHTTPProtocol
else:
    from uvicorn.protocols.http.auto import AutoHTTPProtocol


class Bounded(AutoHTTPProtocol):
    """One connection. `connection_made` must be given a transport whose `close` calls `linger`."""

    max_connections = 1000

    _in_message = _in_head = _begins = False
    #: How many requests have begun on this connection.
    _begun = 0
    #: Of the present request's head: bytes received, bytes of whole lines, lines.
    _head_received = _head_parsed = _head_lines = 0
    #: Of the present request's body: bytes of content, at the last look, and of what frames them.
    _body_came = _body_seen = _framing = 0
    #: Whether the connection may stay after the present request's answer, once its body has come.
    _stays = True
    _shutting_down = False
    #: What is sent once the requests before the one that was refused are answered.
    _last_words: bytes | None = None
    _refused = False
    _lingering = False
    _dropped = 0
    _head_timer: asyncio.TimerHandle | None = None
    _body_timer: asyncio.TimerHandle | None = None
    _linger_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client has connected."""
        super().connection_made(transport)  # type: ignore[arg-type]
        if len(self.connections) > 2 * self.max_connections:
            self.transport.abort()
        elif len(self.connections) > self.max_connections:
            self._refuse(
                "overloaded", f"{self.max_connections} connections are open (HTTP__MAX_CONNECTIONS); try again later"
            )
        else:
            self._time_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        for timer in (self._head_timer, self._body_timer, self._linger_timer):
            if timer is not None:
                timer.cancel()
        self._head_timer = self._body_timer = self._linger_timer = None
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """The server stops: the connection closes once the request in progress is answered."""
        self._shutting_down = True
        if self._lingering:
            self.transport.abort()
        else:
            super().shutdown()

    # ---- what comes

    def data_received(self, data: bytes) -> None:
        """Bytes of requests have come."""
        if self._refused or self._lingering:
            self._drop(len(data))
            return
        was_idle, begun, came = not self._in_message, self._begun, self._body_came
        super().data_received(data)
        if self._refused or self._lingering or self.parser is None:
            return
        if self._in_head:
            if self._begun == begun:
                self._head_received += len(data)
            else:
                # Where in `data` a head behind other requests began is not known; its whole lines are counted.
                self._head_received = len(data) if was_idle and self._begun == begun + 1 else 0
            if self._head_received > limits.HEAD_BYTES:
                self._refuse_head()
                return
        if self._in_message and not self._in_head:
            if self._begun == begun:
                self._framing += len(data) - (self._body_came - came)
                if self._framing > limits.FRAMING_BYTES + limits.FRAMING_SHARE * self._body_came:
                    self._refuse("malformed_request", "the body has more framing than content")
                    return
            if self._body_timer is None:
                self._body_seen = self._body_came
                self._body_timer = self.loop.call_later(limits.BODY_SECONDS, self._look_at_body)
        elif self._in_head or self.cycle is None or self.cycle.response_complete:
            # A head that is not whole, or bytes that belong to none.
            self._time_head()

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self._in_message = self._in_head = True
        self._begun += 1
        self._head_received = self._head_parsed = self._head_lines = 0
        self._body_came = self._framing = 0

    def on_url(self, url: bytes) -> None:
        """Some of the request's target has come."""
        self._head_parsed += len(url)
        if self._head_parsed > limits.HEAD_BYTES:
            raise _RefusedError
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header line has come, or one of a trailer, which is counted and not used."""
        self._head_parsed += len(name) + len(value) + 4
        self._head_lines += 1
        if self._head_parsed > limits.HEAD_BYTES or self._head_lines > limits.HEAD_LINES:
            raise _RefusedError
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """A request's head is whole, and its body may follow."""
        if len(self.pipeline) >= limits.PIPELINED:
            raise _RefusedError
        super().on_headers_complete()
        self._in_head = False
        self._begins = True
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
        # An answer before the whole body has come closes the connection, and says so.
        self._stays = self.cycle.keep_alive and not self._shutting_down
        self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        """Some of a request's body has come."""
        self._body_came += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """A request has come whole."""
        self._in_message = self._begins = False
        if self._body_timer is not None:
            self._body_timer.cancel()
            self._body_timer = None
        if not self.cycle.response_started:
            self.cycle.keep_alive = self._stays and not self._shutting_down
        super().on_message_complete()

    def drains(self, size: int | None) -> None:
        """Notes the present request's size: a small body need not be read for the connection to stay."""
        if size is not None and size <= limits.DRAINED_BYTES and not self.cycle.response_started:
            self.cycle.keep_alive = self._stays

    # ---- time

    def _time_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(limits.HEAD_SECONDS, self._head_is_late)

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self._in_head:
            self._refuse("request_timeout", f"the request's head did not come within {limits.HEAD_SECONDS:g} s")
        elif self.cycle is None or self.cycle.response_complete:
            # No request has come: there is nothing to answer.
            self.transport.close()

    def _look_at_body(self) -> None:
        """Refuses a body that comes too slowly. While it is not read, nothing can come."""
        self._body_timer = None
        if not self._in_message or self._in_head or self.transport.is_closing():
            return
        if not self.flow.read_paused and self._body_came - self._body_seen < limits.BODY_BYTES:
            self._refuse(
                "request_timeout",
                f"the body came too slowly: fewer than {limits.BODY_BYTES} bytes in {limits.BODY_SECONDS:g} s",
            )
            return
        self._body_seen = self._body_came
        self._body_timer = self.loop.call_later(limits.BODY_SECONDS, self._look_at_body)

    # ---- refusing

    def send_400_response(self, msg: str) -> None:
        """Refuses what the parser, or one of the callbacks above, did not take."""
        if self._head_parsed > limits.HEAD_BYTES or self._head_lines > limits.HEAD_LINES:
            self._refuse_head()
        elif len(self.pipeline) >= limits.PIPELINED:
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
        if self._refused or self.transport.is_closing():
            return
        self._refused = True
        words = limits.refusal(code, message)
        own = self._in_message and not self._in_head
        if own and self.pipeline and self.pipeline[0][0] is self.cycle:
            # It waits behind others, and is not to be begun.
            self.pipeline.popleft()
            self._last_words = words
        elif own and not self.pipeline and not self.cycle.response_started:
            # The body's reader sees a client that has left, and cannot answer any more.
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            self._close_with(words)
        elif self.pipeline or (self.cycle is not None and not self.cycle.response_complete):
            self._last_words = words
        else:
            self._close_with(words)

    def on_response_complete(self) -> None:
        """A request is answered."""
        super().on_response_complete()
        if self._last_words is not None and not self.pipeline and not self.transport.is_closing():
            words, self._last_words = self._last_words, None
            if self.cycle.response_complete or self.cycle.disconnected:
                self._unset_keepalive_if_required()
                self._close_with(words)
            else:
                self._last_words = words

    def _close_with(self, words: bytes) -> None:
        self.transport.write(words)
        self.transport.close()

    # ---- closing

    def linger(self, transport: asyncio.Transport) -> bool:
        """Closes for writing only, where the client is still sending; False where the connection may close at once."""
        if self._lingering or transport.is_closing():
            return self._lingering
        if not (self._in_message or self._refused) or not transport.can_write_eof():
            return False
        try:
            transport.write_eof()
        except OSError:
            # The client has reset the connection already.
            return False
        self._lingering = True
        transport.set_protocol(self)
        self.flow.resume_reading()
        self._linger_timer = self.loop.call_later(limits.LINGER_SECONDS, transport.abort)
        return True

    def is_lingering(self) -> bool:
        """Whether the connection is closed for writing, and only read to be dropped."""
        return self._lingering

    def _drop(self, size: int) -> None:
        self._dropped += size
        if self._dropped > limits.LINGER_BYTES:
            self.transport.abort()


class _RefusedError(Exception):
    """Raised out of the parser's callbacks, so that it stops; what is answered is decided after it has."""
