"""Queues that no device reads: what direct callers put there fails with `device_not_found`, and is recorded so.

A caller's Celery may name any queue, and Redis keeps what is put there. A message of a device that is known waits for
its worker, however long that is away; one for an unknown device would wait for ever.
"""

from __future__ import annotations

import time
from typing import Any

import structlog
from redis.exceptions import RedisError
from sqlalchemy import Engine

from device_operations.errors import failure
from device_operations.jobs import TASK_PREFIX, State
from device_operations.queues import ANY_QUEUE, device_queue
from tasks.celery_bridge.outbox import Outbox
from tasks.celery_bridge.results import owed
from tasks.devices import store as device_store
from tasks.jobs import lifecycle, store
from tasks.jobs.store import NewJob
from tasks.redis import messages
from tasks.redis.message_fields import Unreadable
from tasks.redis.messages import Direct
from tasks.redis.publish import Publisher, connect

log = structlog.get_logger(__name__)

#: Seconds between two looks. A queue is taken at the second one that finds it, so that a device that is just being
#: made has its row by then.
LOOK_SECONDS = 2.0

#: Keys of Redis that one step of a look goes through, and how many steps one look takes at most.
KEYS_AT_ONCE = 1000
STEPS = 100

#: Messages of one queue that one look fails at most.
AT_ONCE = 200


class Unconsumed:
    """The leading gateway's. `look` is called in turns by the reaper."""

    def __init__(self, engine: Engine, redis_url: str, publisher: Publisher, outbox: Outbox) -> None:
        self._engine = engine
        self._publisher = publisher
        self._outbox = outbox
        self._redis = connect(redis_url)
        self._looked_at = 0.0
        self._cursor = 0
        self._seen: set[bytes] = set()

    def look(self) -> None:
        """Looks for such queues, if the last look was long enough ago. Redis may be away."""
        if time.monotonic() - self._looked_at < LOOK_SECONDS:
            return
        self._looked_at = time.monotonic()
        try:
            self._look()
        except RedisError as error:
            log.warning("queues cannot be looked through", error=str(error))

    def _look(self) -> None:
        found = self._queues()
        if not found:
            self._seen.clear()
            return
        with self._engine.connect() as connection:
            known = {device_queue(device["device_id"]) for device in device_store.all_devices(connection)}
        unread = {key for key in found if _queue_of(key) not in known}
        for key in unread & self._seen:
            self._fail(key)
        self._seen = unread

    def _queues(self) -> set[bytes]:
        """The lists of Redis that are named as devices' queues are; of very many keys the next part at each look."""
        found: set[Any] = set()
        for _ in range(STEPS):
            keys: list[Any]
            self._cursor, keys = self._redis.scan(self._cursor, match="device.*", count=KEYS_AT_ONCE, _type="list")
            found.update(keys)
            if self._cursor == 0:
                break
        return {key for key in found if _queue_of(key) != ANY_QUEUE}

    def _fail(self, key: bytes) -> None:
        """Records a queue's messages as failed jobs, oldest first. Each leaves Redis once its job is recorded."""
        queue = _queue_of(key)
        waiting: list[Any] = self._redis.lrange(key, -AT_ONCE, -1)
        for raw in reversed(waiting):
            try:
                message = messages.read(raw)
                if isinstance(message, Direct):
                    self._record(message, queue)
            except messages.UnknownTask as error:
                self._outbox.unknown(error.job_id, error.task)
            except Unreadable as error:
                messages.refuse(raw, queue, error)
            self._redis.lrem(key, -1, raw)

    def _record(self, message: Direct, queue: str) -> None:
        device_id = queue.removeprefix("device.")[:100]
        error = failure(
            "device_not_found",
            f"no device {device_id!r} has ever been here, so nothing reads the queue {queue[:110]!r}; "
            "GET /api/devices lists the devices",
        )
        job = NewJob(
            id=message.headers["id"], kind=message.headers["task"].removeprefix(TASK_PREFIX), device_id=None,
            queue=queue[:200], request={}, owner="default", state=State.FAILED.value, error=error.as_job_error(),
            celery=owed(message.headers, message.embed),
        )  # fmt: skip
        with self._engine.connect() as connection:
            rows = store.insert(connection, [job])
        lifecycle.announce(self._publisher, rows)
        self._outbox.ended_unseen(rows)


def _queue_of(key: bytes) -> str:
    """The queue whose list, for one priority, has this key."""
    return key.decode("utf-8", "replace").partition("\x06\x16")[0]
