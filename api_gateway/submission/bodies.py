"""Reads the bodies of requests, and bounds how many bytes of them a gateway holds at once.

A body of known length waits for room before it is read (the client is held back by its connection); one of unknown
length takes room as it comes, and is refused when no room is left. Small bodies are not counted: the connection has
them in its buffer already.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from fastapi import Request

from api_gateway.fast_path.whole_body import WHOLE_BODY, take_whole
from device_operations.errors import OperationError, failure
from device_operations.wire.bounds import is_number_above, whole_number

#: Bytes of a body.
Raw = bytes | bytearray | memoryview

#: Bodies of at most so many bytes are not counted.
SMALL_BYTES = 65_536

#: Room that a body of unknown length takes at a time.
STEP_BYTES = 1 << 20

#: Seconds that a body waits for room before it is refused.
WAIT_SECONDS = 10.0

#: The key of a request's `Room` in its scope.
ROOM = "device_operations.room"


class Bodies:
    """The room for bodies in one gateway process; used on its event loop only."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @property
    def held_bytes(self) -> int:
        """Bytes that are taken now."""
        return self._held

    async def take(self, size: int) -> None:
        """Takes room, after the requests before it. `overloaded` if none is free in time."""
        if not self._waiting and self.grow(size):
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((size, turn))
        try:
            # Not `wait_for`, which in Python 3.11 forgets a cancellation that comes together with the turn.
            async with asyncio.timeout(WAIT_SECONDS):
                await turn
        except (TimeoutError, asyncio.CancelledError) as error:
            given = turn.done() and not turn.cancelled()
            turn.cancel()
            # Also for those behind, which may need less.
            self.give_back(size if given else 0)
            if isinstance(error, TimeoutError):
                raise self._full() from None
            raise

    def grow(self, size: int) -> bool:
        """Takes room if there is some now."""
        if self._held + size > self._limit:
            return False
        self._held += size
        return True

    def give_back(self, size: int) -> None:
        """Gives room back to the requests that wait, in their order."""
        self._held -= size
        while self._waiting:
            wanted, turn = self._waiting[0]
            if not turn.done():
                if not self.grow(wanted):
                    return
                turn.set_result(None)
            self._waiting.popleft()

    def clip(self, size: int) -> int:
        """No more than all the room there is: a larger body waits until it is the only one."""
        return min(size, self._limit)

    def _full(self) -> Exception:
        return failure(
            "overloaded",
            f"the gateway holds {self._held} bytes of requests' bodies (HTTP__MAX_BODY_BYTES_IN_FLIGHT is "
            f"{self._limit}); try again later",
            retry_after_seconds=1,
        )


class Room:
    """What one request's body takes of it."""

    def __init__(self, bodies: Bodies) -> None:
        self._bodies = bodies
        self._taken = 0

    async def announced(self, content_length: str | None, most: int) -> None:
        """Waits for room for a body, at most `most` bytes of which are held; none is taken for an unknown length."""
        size = min(whole_number(content_length) or 0, most)
        if size > SMALL_BYTES:
            size = self._bodies.clip(size)
            await self._bodies.take(size)
            self._taken += size

    def came(self, size: int) -> None:
        """So many bytes of the body are held now. `overloaded` where that is more than there is room for."""
        if size <= SMALL_BYTES or size <= self._taken:
            return
        step = max(size - self._taken, STEP_BYTES)
        if not self._bodies.grow(step):
            if self._taken == self._bodies.clip(size):
                return
            raise self._bodies._full()
        self._taken += step

    def close(self) -> None:
        """The request is over."""
        if self._taken:
            self._bodies.give_back(self._taken)
            self._taken = 0


def room_of(request: Request) -> Room:
    """The room of a request's body."""
    room = request.scope[ROOM]
    assert isinstance(room, Room)
    return room


async def read_whole(request: Request, limit: int, too_large: Callable[[int], OperationError]) -> Raw:
    """The body as it was sent, at most `limit` bytes: the one reader of bodies that are wanted whole.

    Raises `too_large(limit)`, `overloaded` where there is no room, `malformed_request` where the client leaves.
    """
    announced = request.headers.get("content-length")
    room = None
    # Of four digits and fewer, as nearly all are, it needs no room.
    if announced is None or len(announced) > 4:
        room = room_of(request)
        if is_number_above(announced or "", limit):
            raise too_large(limit)
        await room.announced(announced, limit)
        take_whole(request.scope)
    chunks: list[bytes] = []
    size = 0
    more = True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise failure("malformed_request", "the body was cut off")
        chunks.append(message.get("body", b""))
        size += len(chunks[-1])
        if size > limit:
            raise too_large(limit)
        if room is not None:
            room.came(size)
        more = message.get("more_body", False)
    whole: Raw | None = request.scope.pop(WHOLE_BODY, None)
    return whole or (chunks[0] if len(chunks) == 1 else b"".join(chunks))
