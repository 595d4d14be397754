"""What the gateway writes to a connection: in one piece where it may wait, at once where it may not."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from api_gateway.wire import HELD_BYTES, Held


@asynccontextmanager
async def connection() -> AsyncIterator[tuple[Held, socket.socket]]:
    """A held connection, and the socket of its other end."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    transport, _ = await asyncio.get_running_loop().connect_accepted_socket(asyncio.Protocol, ours)
    with theirs:
        yield Held(transport), theirs
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
