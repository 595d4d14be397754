"""What the gateway writes to a connection: in one piece where it may wait, at once where it may not.

And what it reads: large bodies that are wanted whole, past uvicorn's own way.
"""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from threading import Thread

import pytest

from api_gateway.connection import HELD_BYTES, BufferedConnection
from api_gateway.fast_path.wire import WHOLE_BYTES, WHOLE_REST_BYTES, Protocol
from api_gateway.plain_path.protocol import PlainProtocol
from tests.support.reading import Reader, answered, asked, reading
from tests.support.stack import eventually


@asynccontextmanager
async def connection() -> AsyncIterator[tuple[BufferedConnection, socket.socket]]:
    """A held connection, and the socket of its other end."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    transport, _ = await asyncio.get_running_loop().connect_accepted_socket(asyncio.Protocol, ours)
    with theirs:
        yield BufferedConnection(transport), theirs
        transport.abort()


def arrived(there: socket.socket) -> bytes:
    """What can be read without waiting."""
    try:
        return there.recv(4 * HELD_BYTES)
    except BlockingIOError:
        return b""


def test_head_and_body_leave_together_at_the_end_of_the_turn() -> None:
    async def scenario() -> None:
        async with connection() as (held, there):
            held.write(b"head ")
            held.write(b"body")
            assert arrived(there) == b""
            await asyncio.sleep(0)
            assert arrived(there) == b"head body"
            held.write(b"the next answer")
            held.close()
            assert arrived(there) == b"the next answer"

    asyncio.run(scenario())


def test_every_way_to_write_keeps_the_order() -> None:
    async def scenario() -> None:
        async with connection() as (held, there):
            held.write(b"one ")
            held.writelines([b"two ", memoryview(b"three ")])
            held.write(b"four")
            held.write_eof()
            assert arrived(there) == b"one two three four"
            assert arrived(there) == b"", "the end"

    asyncio.run(scenario())


def test_what_may_change_is_sent_at_once_and_in_order() -> None:
    async def scenario() -> None:
        async with connection() as (held, there):
            piece = bytearray(b"as it was")
            held.write(b"head ")
            held.write(memoryview(piece))
            piece[:] = b"as it is!"
            await asyncio.sleep(0)
            assert arrived(there) == b"head as it was"

    asyncio.run(scenario())


def test_no_more_is_held_than_a_socket_takes_at_once() -> None:
    async def scenario() -> None:
        async with connection() as (held, there):
            for _ in range(5):
                held.write(bytes(HELD_BYTES // 4))
            # Else who streams without a pause would never hear that the client does not keep up.
            assert len(arrived(there)) == HELD_BYTES

    asyncio.run(scenario())


# ---- bodies that are read whole


@pytest.fixture(params=[Protocol, PlainProtocol], ids=["fast", "plain"])
def path(request: pytest.FixtureRequest) -> type[Protocol] | type[PlainProtocol]:
    """How HTTP is served: with `HTTP__FAST_PATH`, and without it."""
    return request.param


@pytest.fixture
def whole(path: type) -> bytes:
    """How a large body comes that is wanted whole."""
    return b"whole" if path is Protocol else b"pieces"


@pytest.fixture(params=["uvloop", "asyncio"])
def served(request: pytest.FixtureRequest, path: type[Protocol] | type[PlainProtocol]) -> Iterator[tuple[Reader, int]]:
    if request.param == "uvloop":
        pytest.importorskip("uvloop", reason="there is none for Windows")
    with reading(request.param, path) as server:
        yield server


def test_bodies_of_every_size_arrive_as_they_were_sent_on_one_connection(
    served: tuple[Reader, int], whole: bytes
) -> None:
    _, port = served
    numbers = random.Random(5)
    large = [WHOLE_REST_BYTES + 1, 3_000_000, WHOLE_BYTES, WHOLE_BYTES + 1]
    with socket.create_connection(("127.0.0.1", port), 10) as client:
        for size in [0, 1, 5000, WHOLE_REST_BYTES - 1, *large, 70_000, 12, 2_000_000]:
            body = numbers.randbytes(size)
            head, rest = asked(body)[:-size] if size else asked(body), body
            client.sendall(head)
            client.sendall(rest)
            status, got = answered(client)
            way, _, came = got.partition(b":")
            assert (status, came) == (200, body)
            # In between it is a matter of how much came with the head.
            if size < WHOLE_REST_BYTES or size > WHOLE_BYTES:
                assert way == b"pieces"
            elif size > 1_000_000:
                assert way == whole


def test_requests_that_are_sent_behind_a_large_body_are_answered_in_order(served: tuple[Reader, int]) -> None:
    _, port = served
    bodies = [random.Random(seed).randbytes(size) for seed, size in enumerate([900_000, 10, 700_000, 800_000, 20])]
    with socket.create_connection(("127.0.0.1", port), 10) as client:
        sender = Thread(target=client.sendall, args=(b"".join(map(asked, bodies)),))
        sender.start()
        assert [answered(client)[1].partition(b":")[2] for _ in bodies] == bodies
        sender.join()


def test_no_more_is_read_of_a_connection_whose_first_request_waits_for_its_answer(served: tuple[Reader, int]) -> None:
    app, port = served
    large = asked(bytes(1_000_000))
    with socket.create_connection(("127.0.0.1", port), 10) as client:
        client.sendall(asked(b"", "/v2/models/m/infer?hold"))
        client.settimeout(1)
        sent = 0
        with suppress(TimeoutError):
            while sent < 60 * len(large):
                sent += client.send(large[sent % len(large) :])
        # What fits into the buffers between the two.
        assert sent < 20_000_000
        app.go_on.set()
        client.settimeout(10)
        assert answered(client) == (200, b"pieces:")
        assert answered(client)[1].endswith(bytes(1_000_000))


def test_a_body_that_trickles_or_waits_to_be_asked_for_arrives_whole(served: tuple[Reader, int], whole: bytes) -> None:
    _, port = served
    body = random.Random(1).randbytes(300_000)
    with socket.create_connection(("127.0.0.1", port), 10) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        message = asked(body)
        for at in range(0, len(message), 7001):
            client.sendall(message[at : at + 7001])
        assert answered(client) == (200, whole + b":" + body)
        head = asked(body, more="Expect: 100-continue\r\n")[: -len(body)]
        client.sendall(head)
        client.settimeout(10)
        assert client.recv(25, socket.MSG_PEEK).startswith(b"HTTP/1.1 100")
        client.sendall(body)
        assert answered(client) == (200, whole + b":" + body)


def test_an_answer_before_a_small_body_has_come_leaves_the_connection_usable(served: tuple[Reader, int]) -> None:
    _, port = served
    with socket.create_connection(("127.0.0.1", port), 10) as client:
        message = asked(bytes(60_000), "/v2/models/m/infer?refuse")
        client.sendall(message[:1000])
        assert answered(client)[0] == 401
        client.sendall(message[1000:])
        client.sendall(asked(b"next"))
        assert answered(client) == (200, b"pieces:next")


def test_a_client_that_leaves_in_the_middle_of_a_body_is_noticed(served: tuple[Reader, int]) -> None:
    app, port = served
    for came in (10, 500_000):
        with socket.create_connection(("127.0.0.1", port), 10) as client:
            message = asked(bytes(1_000_000))
            client.sendall(message[: came + len(message) - 1_000_000])
    with socket.create_connection(("127.0.0.1", port), 10) as client:
        client.sendall(asked(b"after"))
        assert answered(client) == (200, b"pieces:after")
    eventually(lambda: app.cut_off == 2)


def test_bodies_for_other_addresses_and_in_chunks_go_the_usual_way(served: tuple[Reader, int]) -> None:
    _, port = served
    body = bytes(500_000)
    with socket.create_connection(("127.0.0.1", port), 10) as client:
        client.sendall(asked(body, "/api/blobs"))
        assert answered(client) == (200, b"pieces:" + body)
        chunked = b"".join(b"%x\r\n%s\r\n" % (100_000, body[:100_000]) for _ in range(5)) + b"0\r\n\r\n"
        client.sendall(b"POST /v2/models/m/infer HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked)
        assert answered(client) == (200, b"pieces:" + body)
