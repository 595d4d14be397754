"""What a client may send before, between and instead of its requests: bounded in bytes, in lines and in time."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest

from api_gateway import limits
from api_gateway.fast_path.wire import Protocol
from api_gateway.plain_path.protocol import PlainProtocol
from tests.support.reading import Reader, answered, asked, reading
from tests.support.stack import eventually


@pytest.fixture(params=["uvloop", "asyncio"])
def loop(request: pytest.FixtureRequest) -> str:
    if request.param == "uvloop":
        pytest.importorskip("uvloop", reason="there is none for Windows")
    return str(request.param)


Path = type[Protocol] | type[PlainProtocol]


@pytest.fixture(params=[Protocol, PlainProtocol], ids=["fast", "plain"])
def path(request: pytest.FixtureRequest) -> Path:
    """How HTTP is served: with `HTTP__FAST_PATH`, and without it."""
    return request.param


@pytest.fixture
def served(loop: str, path: Path) -> Iterator[tuple[Reader, int]]:
    with reading(loop, path.limited_to(1000)) as server:
        yield server


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), 30)


def rest(client: socket.socket) -> bytes:
    """Everything until the other side closes its end."""
    got = b""
    with suppress(ConnectionResetError):
        while piece := client.recv(65_536):
            got += piece
    return got


def problem(answer: bytes) -> tuple[int, str, dict[str, Any]]:
    """Status, whether it says that it closes, and the document of one whole answer."""
    head, _, body = answer.partition(b"\r\n\r\n")
    lines = head.decode().lower().split("\r\n")
    assert "content-type: application/problem+json" in lines
    return int(lines[0].split()[1]), next(line for line in lines if line.startswith("connection")), json.loads(body)


def refused(client: socket.socket) -> tuple[int, str]:
    """Status and code of the refusal, after which the connection ends."""
    status, closes, document = problem(rest(client))
    assert closes == "connection: close"
    assert document["status"] == status
    return status, document["code"]


def send_until_refused(client: socket.socket, piece: bytes, most: int) -> int:
    """Sends the same again and again until the server does not take any more; gives how many bytes were sent."""
    sent = 0
    client.settimeout(0.05)
    with suppress(OSError):
        while sent < most:
            sent += client.send(piece)
            with suppress(TimeoutError):
                if client.recv(1, socket.MSG_PEEK):
                    break
    client.settimeout(30)
    return sent


@pytest.mark.parametrize(
    ("start", "piece"),
    [
        (b"GET / HTTP/1.1\r\nX-Long: ", b"a" * 8000),
        (b"GET / HTTP/1.1\r\n", b"X" * 8000),
        (b"GET /", b"a" * 8000),
        (b"GET / HTTP/1.1\r\n", b"X-Many: 1\r\n" * 40),
    ],
    ids=["value", "name", "target", "lines"],
)
def test_a_head_that_never_ends_is_refused_at_some_tens_of_kilobytes(
    served: tuple[Reader, int], start: bytes, piece: bytes
) -> None:
    _, port = served
    with connect(port) as client:
        client.sendall(start)
        assert send_until_refused(client, piece, 10_000_000) < 400_000
        assert refused(client) == (431, "header_too_large")
    with connect(port) as client:
        client.sendall(asked(b"well"))
        assert answered(client) == (200, b"pieces:well")


def test_a_whole_head_in_one_piece_is_held_to_the_same(served: tuple[Reader, int]) -> None:
    _, port = served
    for more in ("X: " + "a" * 70_000 + "\r\n", "X: 1\r\n" * 101):
        with connect(port) as client:
            client.sendall(asked(b"", more=more))
            assert refused(client) == (431, "header_too_large")
    with connect(port) as client:
        client.sendall(asked(b"ok", more="X: " + "a" * 60_000 + "\r\n" + "Y: 1\r\n" * 90))
        assert answered(client) == (200, b"pieces:ok")


def test_a_head_behind_another_request_is_held_to_the_same_and_answered_after_it(served: tuple[Reader, int]) -> None:
    app, port = served
    with connect(port) as client:
        client.sendall(asked(b"first", "/x?hold") + b"GET / HTTP/1.1\r\nX: ")
        with suppress(OSError):
            client.sendall(b"a" * 400_000)
        time.sleep(0.3)
        app.go_on.set()
        assert answered(client) == (200, b"pieces:first")
        assert refused(client) == (431, "header_too_large")


def test_trailers_and_chunk_extensions_are_bounded_too(served: tuple[Reader, int]) -> None:
    _, port = served
    chunked = b"POST /x HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    for start, piece in (
        (b"1;x=", b"a" * 8000),
        (b"1\r\nx\r\n0\r\nX: ", b"a" * 8000),
        (b"1\r\nx\r\n0\r\n", b"X: 1\r\n" * 30),
    ):
        with connect(port) as client:
            client.sendall(chunked + start)
            assert send_until_refused(client, piece, 10_000_000) < 400_000
            assert refused(client)[0] in (400, 431)
    with connect(port) as client:
        client.sendall(chunked + b"1\r\nx\r\n" * 20_000 + b"0\r\nAfter: 1\r\n\r\n")
        assert answered(client) == (200, b"pieces:" + b"x" * 20_000)


def test_a_head_has_twenty_seconds(served: tuple[Reader, int], monkeypatch: pytest.MonkeyPatch) -> None:
    assert limits.HEAD_SECONDS == 20
    monkeypatch.setattr(limits, "HEAD_SECONDS", 1.0)
    _, port = served
    with connect(port) as slow, connect(port) as silent, connect(port) as kept:
        kept.sendall(asked(b"one"))
        assert answered(kept) == (200, b"pieces:one")
        began = time.monotonic()
        slow.sendall(b"GET / HTTP/1.1\r\n")
        slow.settimeout(0.2)
        got = b""
        while not got and time.monotonic() - began < 20:
            with suppress(TimeoutError):
                slow.sendall(b"X: 1\r\n")
                got = slow.recv(65_536)
        assert time.monotonic() - began < 10
        assert problem(got + rest(slow))[:2] == (408, "connection: close")
        assert rest(silent) == b""
        # Between requests a connection may rest for longer.
        kept.sendall(asked(b"two"))
        assert answered(kept) == (200, b"pieces:two")
        # Not where it sends bytes that begin no request.
        kept.settimeout(0.2)
        began = time.monotonic()
        with suppress(ConnectionError):
            while time.monotonic() - began < 20:
                with suppress(TimeoutError):
                    kept.sendall(b"\r\n")
                    if kept.recv(1) == b"":
                        break
        assert time.monotonic() - began < 10


def test_a_body_that_comes_too_slowly_is_refused(loop: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BODY_SECONDS", 0.5)
    with reading(loop, path) as (app, port):
        for address in ("/v2/models/m/infer", "/x"):
            with connect(port) as client:
                began = time.monotonic()
                client.sendall(asked(bytes(1_000_000), address)[:500_000])
                with suppress(OSError):
                    while time.monotonic() - began < 3:
                        client.sendall(b"x")
                        time.sleep(0.05)
                assert refused(client) == (408, "request_timeout")
        # One that is read slowly by the server is not the client's fault.
        with connect(port) as client:
            body = bytes(30_000_000)
            client.sendall(asked(body, "/x")[:-10])
            time.sleep(0.2)
            client.sendall(body[-10:])
            assert answered(client) == (200, b"pieces:" + body)
        eventually(lambda: app.cut_off == 2)


def test_an_answer_before_a_large_body_says_that_it_closes_and_can_be_read(served: tuple[Reader, int]) -> None:
    _, port = served
    message = asked(bytes(20_000_000), "/x?refuse")
    with connect(port) as client:
        with suppress(OSError):
            client.sendall(message)
        got = rest(client)
        assert got.startswith(b"HTTP/1.1 401")
        assert b"\r\nconnection: close\r\n" in got.lower()
    with connect(port) as client:
        client.sendall(b"POST /x?refuse HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n")
        assert b"\r\nconnection: close\r\n" in rest(client).lower()


def test_a_closed_connection_is_not_read_for_ever(served: tuple[Reader, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "LINGER_SECONDS", 0.5)
    monkeypatch.setattr(limits, "LINGER_BYTES", 5_000_000)
    _, port = served
    with connect(port) as much, connect(port) as slow:
        for client in (much, slow):
            client.sendall(asked(bytes(900_000_000), "/x?refuse")[:200_000])
        with pytest.raises(OSError):
            for _ in range(2000):
                much.sendall(bytes(100_000))
        with pytest.raises(OSError):
            for _ in range(100):
                slow.sendall(b"x")
                time.sleep(0.1)


def test_what_is_no_http_is_answered_with_a_problem(served: tuple[Reader, int]) -> None:
    app, port = served
    for message in (
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET / HTTP/1.1\r\nContent-Length: \xb2\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n",
        b"GET /\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nX: a\x00b\r\n\r\n",
    ):
        with connect(port) as client:
            client.sendall(message)
            assert refused(client) == (400, "malformed_request"), message[:40]
    with connect(port) as client:
        client.sendall(asked(b"first", "/x?hold") + b"no HTTP at all\r\n\r\n")
        time.sleep(0.2)
        app.go_on.set()
        assert answered(client) == (200, b"pieces:first")
        assert refused(client) == (400, "malformed_request")


def test_a_body_that_breaks_off_its_framing_is_refused_while_it_is_read(served: tuple[Reader, int]) -> None:
    app, port = served
    with connect(port) as client:
        client.sendall(b"POST /x HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n")
        time.sleep(0.1)
        client.sendall(b"zzzz\r\n")
        assert refused(client) == (400, "malformed_request")
    eventually(lambda: app.cut_off == 1)


def test_no_more_requests_wait_on_a_connection_than_a_limit(served: tuple[Reader, int]) -> None:
    app, port = served
    with connect(port) as client:
        client.sendall(asked(b"first", "/x?hold") + asked(b"a") * 1000)
        time.sleep(0.3)
        app.go_on.set()
        assert answered(client) == (200, b"pieces:first")
        for _ in range(limits.PIPELINED):
            assert answered(client) == (200, b"pieces:a")
        assert refused(client) == (400, "malformed_request")


def test_connections_beyond_the_limit_are_refused_and_closed(loop: str, path: Path) -> None:
    with reading(loop, path.limited_to(3)) as (_, port):
        held = [connect(port) for _ in range(3)]
        for client in held:
            client.sendall(asked(b"in"))
            assert answered(client) == (200, b"pieces:in")
        with connect(port) as client:
            client.sendall(asked(b"too many"))
            got = rest(client)
            assert problem(got)[:2] == (503, "connection: close")
            assert b"retry-after: 1" in got.lower()
        held.pop().close()
        for _ in range(100):
            with connect(port) as client:
                client.sendall(asked(b"again"))
                if answered(client) == (200, b"pieces:again"):
                    break
                time.sleep(0.05)
        else:
            pytest.fail("the place that was left was not given to another")
        for client in held:
            client.close()
