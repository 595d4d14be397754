"""Celery messages that are published once, however often a process tries: with a mark in Redis, in one transaction.

A process that dies after the transaction has published them and left the mark; one that dies before has done neither.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, cast

import orjson
from celery import Celery
from kombu.transport import redis as kombu_redis
from kombu.utils.json import dumps
from redis.client import Pipeline

from device_operations.jobs import TASK_PREFIX
from device_operations.wire.json_types import JsonObject
from tasks.app import result_options
from tasks.redis.publish import connect
from tasks.redis.queues import ANY_QUEUE, is_device_queue, redis_key

#: Seconds for which Redis remembers that messages were published. An outbox is emptied within seconds.
MARK_SECONDS = 86_400


class _Channel(kombu_redis.Channel):
    """Collects messages in a block of `Once.once`, whose transaction sends them; else sends them itself."""

    def _put(self, queue: str, message: JsonObject, **options: object) -> None:
        priority = self._get_message_priority(message, reverse=False)
        # Devices' queues have a list for each priority, others those few that Celery's own workers read by default.
        key = redis_key(queue, 9 - priority) if is_device_queue(queue) else self._q_for_pri(queue, priority)
        collected = _collected.get()
        if collected is None:
            with self.conn_or_acquire() as client:
                client.lpush(key, dumps(message))
        else:
            collected.append((key, dumps(message)))


class OnceTransport(kombu_redis.Transport):
    """The transport of an application whose messages are published once."""

    Channel = _Channel


_collected: ContextVar[list[tuple[str, str]] | None] = ContextVar("collected", default=None)


@dataclass(slots=True)
class Sent:
    """The results, in the tuples that Celery writes, of what was published under a mark."""

    children: list[object] = field(default_factory=list)


class Once:
    """A Celery application without tasks of its own: what it sends runs elsewhere.

    `app` publishes as any does; what is sent in a block of `once` is published once.
    """

    def __init__(self, redis_url: str) -> None:
        self.app = Celery("device_operations.outbox", broker=redis_url, backend=redis_url, set_as_current=False)
        self.app.conf.update(
            accept_content=["json"],
            task_serializer="json",
            result_serializer="json",
            broker_transport="tasks.celery_bridge.once:OnceTransport",
            broker_transport_options={"socket_timeout": 10, "socket_connect_timeout": 5, "socket_keepalive": True},
            # Celery's own default queue for tasks that name none; ours go to whichever device is free.
            task_routes={f"{TASK_PREFIX}*": {"queue": ANY_QUEUE}},
            **result_options(),
        )
        self._redis = connect(redis_url)

    def close(self) -> None:
        """Closes the application's connections."""
        self.app.close()

    @contextmanager
    def once(self, mark: str) -> Iterator[Sent]:
        """Publishes what is sent in the block, unless that was done under the same mark before, by any process.

        The block fills in `children`; if it was done before, they are those of that time.
        """
        sent = Sent()
        messages: list[tuple[str, str]] = []
        token = _collected.set(messages)
        try:
            yield sent
        finally:
            _collected.reset(token)
        if not messages:
            return
        key = f"device-operations.sent.{mark}"

        def publish(pipe: Pipeline) -> bytes | None:
            before = cast("bytes | None", pipe.get(key))
            pipe.multi()
            if before is None:
                for queue, message in messages:
                    pipe.lpush(queue, message)
                pipe.set(key, orjson.dumps(sent.children), ex=MARK_SECONDS)
            return before

        before: Any = self._redis.transaction(publish, key, value_from_callable=True)  # type: ignore[arg-type]
        if before is not None:
            sent.children = orjson.loads(before)
