"""What a client may send before, between and instead of its requests, and how a connection is refused.

    head        64 KiB and 100 lines, whole within 20 s: else 431 or 408
    body        10,000 bytes in each 20 s while it is read: else 408; no more framing than content
    pipeline    100 requests behind the one that is answered
    connections `max_connections`: what comes beyond is answered 503

Every refusal is a problem document with `Connection: close`. Both HTTP paths hold these limits: `fast_path.bounded`
inside uvicorn's parser, `plain_path` with a parser of its own.
"""

from __future__ import annotations

from http import HTTPStatus

from starlette.responses import Response

from api_gateway import problems
from device_operations.errors import failure

#: A request's head, from its first byte to the empty line: bytes, header lines, and seconds until it is whole.
HEAD_BYTES, HEAD_LINES, HEAD_SECONDS = 65_536, 100, 20.0

#: In each window of so many seconds a body that is being read grows by at least so many bytes, or ends.
BODY_SECONDS, BODY_BYTES = 20.0, 10_000

#: What chunk sizes, extensions and trailers may take: bytes, and bytes for each byte of content.
FRAMING_BYTES, FRAMING_SHARE = 65_536, 16

#: Requests that may wait on one connection behind the one that is being answered.
PIPELINED = 100

#: A body of at most so many bytes that was not read is dropped as it comes, and the connection stays.
DRAINED_BYTES = 65_536

#: How long, and for how many bytes, a closed connection is read so that the client gets to read its answer.
LINGER_SECONDS, LINGER_BYTES = 5.0, 64 << 20


def refusal_response(code: str, message: str) -> Response:
    """The refusal of a request that the application may not answer any more."""
    response = problems.answer(failure(code, message), "")
    response.headers["connection"] = "close"
    return response


def refusal(code: str, message: str) -> bytes:
    """The same as the bytes of a whole response."""
    response = refusal_response(code, message)
    lines = [f"HTTP/1.1 {response.status_code} {HTTPStatus(response.status_code).phrase}".encode()]
    lines += [name + b": " + value for name, value in response.raw_headers]
    return b"\r\n".join([*lines, b"", bytes(response.body)])
