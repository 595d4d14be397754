"""Waiting for jobs: one Redis subscription for the whole process wakes every request that waits.

The same announcements say that models were loaded or unloaded, through any gateway.

First register, then read the record: an end between the two is not missed. After a broken connection, and every
`LOOK_SECONDS` besides, one statement reads all awaited ids, so a lost announcement delays an answer by seconds. A job
that was recorded without waiting for the disk and is gone was lost with PostgreSQL: its waiters get an error.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

import orjson
import structlog
from redis.asyncio import ConnectionPool
from redis.exceptions import RedisError
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError
from starlette.concurrency import run_in_threadpool

from api_gateway.submission.subscription import Subscription, subscribed
from device_operations.errors import OperationError, failure
from device_operations.jobs import TERMINAL
from device_operations.wire.json_types import FreeJson
from tasks.jobs import store
from tasks.kinds import KINDS
from tasks.redis.announcements import read_lines
from tasks.redis.queues import DONE_CHANNEL, job_channel

log = structlog.get_logger(__name__)

LOOK_SECONDS = 2.0

_DONE = DONE_CHANNEL.encode()

#: The kinds of jobs after which a model is, or is no longer, on its device.
_CHANGING = frozenset(kind.encode() for kind, spec in KINDS.items() if spec.changes_models)


def _is_end(job_id: bytes, announced: FreeJson) -> bool:
    """Whether `announced` is the job with this id as it has ended."""
    state = announced.get("state")
    return announced.get("job_id") == job_id.decode(errors="replace") and type(state) is str and state in TERMINAL


def _event(data: bytes) -> FreeJson | None:
    """What is announced of a followed job: `{"event": "state" | "progress", "data"}`; None if it is not that."""
    announced = _object(data)
    # A tuple, since what is no text may have no hash.
    if announced.get("event") in ("state", "progress") and type(announced.get("data")) is dict:
        return announced
    log.warning("announcement refused", size_bytes=len(data))
    return None


class Awaited(asyncio.Future[bytes]):
    """The end of a job, as JSON bytes. `recorded` is set, by any thread, once PostgreSQL has taken the job."""

    recorded = False
    #: The same as an object, where it has been read on the way; not to be changed.
    job: FreeJson | None = None


def _object(text: bytes) -> FreeJson:
    """The JSON object in `text`, empty where it is none."""
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        return {}
    return value if type(value) is dict else {}


class Waiters:
    """The requests of this process that wait for a job or follow one."""

    def __init__(self, redis_url: str, engine: Engine, on_models_changed: Callable[[], None]) -> None:
        self._connections = ConnectionPool.from_url(
            redis_url, protocol=2, socket_keepalive=True, socket_connect_timeout=5
        )
        self._engine = engine
        #: Called when a model was loaded or unloaded, before the requests that waited for it are woken.
        self._on_models_changed = on_models_changed
        self._subscription: Subscription | None = None
        self._awaited: dict[bytes, set[Awaited]] = {}
        self._followers: dict[bytes, set[asyncio.Queue[FreeJson]]] = {}
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Subscribes and begins to listen."""
        self._tasks = [asyncio.create_task(self._listen()), asyncio.create_task(self._look())]

    async def stop(self) -> None:
        """Ends the subscription; requests that still wait are answered at their time limits."""
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            with suppress(asyncio.CancelledError):
                await task

    @asynccontextmanager
    async def awaiting(self, job_id: str) -> AsyncIterator[Awaited]:
        """A future that is given the ended job as JSON bytes."""
        future = self.expect(job_id)
        try:
            yield future
        finally:
            self.forget(job_id, future)

    def expect(self, job_id: str) -> Awaited:
        """The same without the context: `forget` ends it."""
        future = Awaited()
        self._awaited.setdefault(job_id.encode(), set()).add(future)
        return future

    def forget(self, job_id: str, future: Awaited) -> None:
        """Ends the wait for `future`."""
        key = job_id.encode()
        waiting = self._awaited.get(key)
        if waiting is not None:
            waiting.discard(future)
            if not waiting:
                del self._awaited[key]

    @asynccontextmanager
    async def following(self, job_id: str) -> AsyncIterator[asyncio.Queue[FreeJson]]:
        """A queue of `{"event", "data"}` while the job goes on, on the same subscription."""
        channel = job_channel(job_id).encode()
        announced: asyncio.Queue[FreeJson] = asyncio.Queue()
        followers = self._followers.setdefault(channel, set())
        followers.add(announced)
        if len(followers) == 1 and self._subscription is not None:
            self._subscription.add(channel)
        try:
            yield announced
        finally:
            followers.discard(announced)
            if not followers:
                self._followers.pop(channel, None)
                if self._subscription is not None:
                    self._subscription.drop(channel)

    async def _listen(self) -> None:
        wait_seconds = 0.05
        while True:
            try:
                async with subscribed(self._connections, self._hand_over) as subscription:
                    self._subscription = subscription
                    subscription.add(_DONE, *self._followers)
                    self._on_models_changed()  # announcements in between were lost
                    await self._read_awaited()
                    wait_seconds = 0.05
                    raise await subscription.ended
            except (RedisError, OSError) as error:
                log.warning("subscription broken", error=str(error), retry_in_seconds=wait_seconds)
            finally:
                self._subscription = None
            await asyncio.sleep(wait_seconds)
            wait_seconds = min(2.0, wait_seconds * 2)

    def _hand_over(self, channel: bytes, data: bytes) -> None:
        """Wakes the requests that an announcement is for. Anything else is dropped: the record is read all the same."""
        if channel != _DONE:
            announced = _event(data)
            if announced is not None:
                for follower in self._followers.get(channel, ()):
                    follower.put_nowait(announced)
            return
        for end in read_lines(data):
            if end.kind in _CHANGING:
                self._on_models_changed()
            waiting = self._awaited.get(end.job_id)
            if not waiting:
                continue
            text = end.text
            job = _object(text)
            if not _is_end(end.job_id, job):
                log.warning("announcement refused", size_bytes=len(text))
                continue
            for future in waiting:
                if not future.done():
                    future.job = job
                    future.set_result(text)

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            await self._read_awaited()

    async def _read_awaited(self) -> None:
        """One read of all awaited jobs."""
        ids = [job_id.decode() for job_id in self._awaited]
        if not ids:
            return
        recorded = [
            (job_id.decode(), future)
            for job_id, futures in self._awaited.items()
            for future in futures
            if future.recorded
        ]

        def read() -> FreeJson:
            with self._engine.connect() as connection:
                return store.get_many(connection, ids)

        try:
            found = await run_in_threadpool(read)
        except DBAPIError as error:
            log.warning("awaited jobs could not be read", error=str(error.orig).strip())
            return
        for job_id, future in recorded:
            if job_id not in found and not future.done():
                future.set_exception(lost())
        for job_id, row in found.items():
            if row["state"] in TERMINAL:
                text = orjson.dumps(store.view(row), option=orjson.OPT_UTC_Z)
                for future in self._awaited.get(job_id.encode(), ()):
                    if not future.done():
                        future.set_result(text)


def lost() -> OperationError:
    """What a caller is answered whose job PostgreSQL lost before it was promised."""
    return failure(
        "database_unavailable",
        "PostgreSQL stopped before the job was on its disk, and the record of it is lost; submit it again",
        retry_after_seconds=2,
    )
