"""A subscription to Redis whose messages are taken in the turn of the event loop that reads them.

redis-py's own wakes a task, and goes through eight calls, for each message: more than waking who waits for it takes.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import hiredis
from redis import exceptions
from redis.asyncio import ConnectionPool


class Subscription(asyncio.Protocol):
    """A connection that redis-py has made, and that only subscribes from now on.

    `take` is given each message's channel and data. `ended` is the error that ended the connection.
    """

    def __init__(self, connection: Any, take: Callable[[bytes, bytes], None]) -> None:
        self._pack = connection.pack_command
        self._take = take
        self._answers = hiredis.Reader(protocolError=exceptions.InvalidResponse, replyError=exceptions.ResponseError)
        self._transport = connection._writer.transport
        # redis-py's, which it waits for when it closes the connection.
        self._closing = self._transport.get_protocol()
        self.ended: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()
        self._transport.set_protocol(self)

    def add(self, *channels: bytes) -> None:
        """Subscribes to more channels."""
        self._send("SUBSCRIBE", *channels)

    def drop(self, channel: bytes) -> None:
        """Unsubscribes from a channel."""
        self._send("UNSUBSCRIBE", channel)

    def _send(self, *command: str | bytes) -> None:
        if not self._transport.is_closing():
            self._transport.writelines(self._pack(*command))

    def data_received(self, data: bytes) -> None:
        """Answers have come, or parts of them."""
        self._answers.feed(data)
        try:
            while (answer := self._answers.gets()) is not False:
                if isinstance(answer, exceptions.ResponseError):
                    raise answer
                if answer[0] == b"message":
                    self._take(answer[1], answer[2])
        except exceptions.RedisError as error:
            self._end(error)
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        self._closing.connection_lost(exc)
        self._end(exc or exceptions.ConnectionError("Redis closed the connection"))

    def _end(self, error: Exception) -> None:
        if not self.ended.done():
            self.ended.set_result(error)


@asynccontextmanager
async def subscribed(pool: ConnectionPool, take: Callable[[bytes, bytes], None]) -> AsyncIterator[Subscription]:
    """A subscription over a connection of its own. Raises redis-py's errors where there is none."""
    connection: Any = pool.make_connection()
    try:
        await connection.connect()
        yield Subscription(connection, take)
    finally:
        await connection.disconnect(nowait=True)
