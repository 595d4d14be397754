"""What comes on one connection, read by a parser of its own: where requests begin and end, and how large they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress

import httptools

from api_gateway import limits
from device_operations.wire.bounds import whole_number

_HEAD_END = b"\r\n\r\n"


class RefusedError(Exception):
    """Raised out of the parser's callbacks, so that it stops; what is answered is decided after it has."""


class Incoming:
    """Counts requests and their bytes.

    `on_head` is given the size of the body that follows, in bytes, or None for one in chunks; it may raise
    `RefusedError`. `on_end` is called at the end of each request.
    """

    def __init__(self, on_head: Callable[[int | None], None], on_end: Callable[[], None]) -> None:
        self._on_head = on_head
        self._on_end = on_end
        self._parser = httptools.HttpRequestParser(self)
        # As uvicorn reads them: requests behind one that says `Connection: close` are no error.
        self._parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self._begun = 0
        self.in_head = self.in_body = False
        #: Of the present request: its target, and the size of its body.
        self._target = b""
        self._size: int | None = 0
        #: Of its head: bytes received, bytes of whole lines, lines. A trailer's lines count too.
        self._head_received = self._head_parsed = self._head_lines = 0
        #: Of its body: bytes of content, and bytes that frame it.
        self.body_came = self._framing = 0

    def pieces(self, data: bytes) -> Iterator[bytes]:
        """`data` cut at the ends of heads and of bodies of known size, so that what is refused is not handed on."""
        at = 0
        while at < len(data):
            if self.in_body:
                end = len(data) if self._size is None else at + max(1, self._size - self.body_came)
            else:
                found = data.find(_HEAD_END, at)
                end = len(data) if found < 0 else found + len(_HEAD_END)
            yield data[at:end] if at or end < len(data) else data
            at = end

    def feed(self, piece: bytes) -> None:
        """Counts one of the pieces. Raises `httptools.HttpParserError` for what is no HTTP, or over a limit."""
        begun, came, was_in_body = self._begun, self.body_came, self.in_body
        # uvicorn is set to no other protocol, and answers a request for one in HTTP/1.1.
        with suppress(httptools.HttpParserUpgrade):
            self._parser.feed_data(piece)
        if self.in_head:
            self._head_received += len(piece)
        elif self.in_body and was_in_body and self._begun == begun:
            self._framing += len(piece) - (self.body_came - came)

    def is_head_too_large(self) -> bool:
        """Whether the present head, or a trailer, is over a limit."""
        received = self._head_received if self.in_head else 0
        return max(received, self._head_parsed) > limits.HEAD_BYTES or self._head_lines > limits.HEAD_LINES

    def is_mostly_framing(self) -> bool:
        """Whether the chunks of the present body are too small."""
        return self.in_body and self._framing > limits.FRAMING_BYTES + limits.FRAMING_SHARE * self.body_came

    # ---- the parser's callbacks

    def on_message_begin(self) -> None:
        """A request begins."""
        self.in_head, self.in_body = True, False
        self._begun += 1
        self._target = b""
        self._size = 0
        self._head_received = self._head_parsed = self._head_lines = 0
        self.body_came = self._framing = 0

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
        if self.in_head:
            name = name.lower()
            if name == b"content-length" and self._size is not None:
                self._size = whole_number(value)
            elif name == b"transfer-encoding":
                self._size = None

    def on_headers_complete(self) -> None:
        """A request's head is whole."""
        # What uvicorn would not take: it answers that with text.
        httptools.parse_url(self._target).path.decode("ascii")
        self._on_head(self._size)
        self.in_head, self.in_body = False, True

    def on_body(self, body: bytes) -> None:
        """Some of a request's body has come."""
        self.body_came += len(body)

    def on_message_complete(self) -> None:
        """A request has come whole."""
        self.in_head = self.in_body = False
        self._on_end()

    def _check_head(self) -> None:
        if self.is_head_too_large():
            raise RefusedError
