"""What Redis carries: messages to workers, announcements to gateways, wake-ups. Losing any of it loses no job."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence

import orjson
import redis
import structlog

from device_operations.wire.json_types import FreeJson, JsonObject
from tasks.jobs.model import JobRow, JobView
from tasks.redis import announcements
from tasks.redis.queues import DONE_CHANNEL, control_queue, job_channel, message, redis_key

log = structlog.get_logger(__name__)

#: Announcements travel together up to this many bytes: a message costs every gateway more than a line does.
DONE_BYTES = 1 << 20


def connect(url: str) -> redis.Redis:
    """A client that neither waits for ever nor gives up at the first broken connection."""
    return redis.Redis.from_url(
        url, socket_timeout=10, socket_connect_timeout=5, socket_keepalive=True, health_check_interval=30
    )


class Line:
    """A connection for the commands that go with every job: redis-py's way to one takes longer than such a command."""

    def __init__(self, client: redis.Redis) -> None:
        self._pool = client.connection_pool
        self._lock = threading.Lock()
        self._connection: redis.Connection | None = None

    def send(self, *command: str | bytes) -> object:
        """The answer to one command, which is sent once more over a new connection where the old one is broken."""
        with self._lock:
            if self._connection is None:
                self._connection = self._pool.get_connection()
            try:
                return self._answer(self._connection, command)
            except (redis.ConnectionError, redis.TimeoutError):
                return self._answer(self._connection, command)

    def _answer(self, connection: redis.Connection, command: Sequence[str | bytes]) -> object:
        try:
            connection.send_command(*command)
            return connection.read_response()
        except redis.ResponseError:
            raise
        except BaseException:
            # What is still to come over it would be taken for the next command's answer.
            connection.disconnect()
            raise


class Publisher:
    """Publishes in pipelines. What fails is logged and left to the workers' own look at the records."""

    def __init__(self, client: redis.Redis) -> None:
        self._client = client
        self._line = Line(client)

    def jobs(self, recorded: Sequence[tuple[JobRow, FreeJson]]) -> bool:
        """Puts recorded jobs, with their requests, into their queues; False when Redis did not take them."""
        if not recorded:
            return True
        try:
            # All of one list in one command: a worker that waits for it is woken once, and is given them all.
            lists: dict[str, list[bytes]] = {}
            for job, request in recorded:
                key = redis_key(job["queue"], job["priority"])
                lists.setdefault(key, []).append(message(job, request))
            if len(lists) == 1:
                (key, messages) = lists.popitem()
                self._line.send("LPUSH", key, *messages)
            else:
                with self._client.pipeline(transaction=False) as pipe:
                    for key, messages in lists.items():
                        pipe.lpush(key, *messages)
                    pipe.execute()
        except redis.RedisError as error:
            log.warning("publishing failed; workers will find the jobs in PostgreSQL", error=str(error))
            return False
        return True

    def done(self, views: Iterable[JobView]) -> None:
        """Announces ended jobs to all gateways, each in a line: see `tasks.redis.announcements`."""
        lines = [announcements.line(view) for view in views]
        try:
            for together in _chunks(lines, DONE_BYTES):
                self._line.send("PUBLISH", DONE_CHANNEL, b"\n".join(together))
        except redis.RedisError as error:
            log.warning("announcing failed; waiters read the records at their next look", error=str(error))

    def progress(self, events: Iterable[tuple[str, Mapping[str, object]]]) -> None:
        """Announces states and progress of open jobs: `(job_id, {"event": …, "data": …})`."""
        try:
            with self._client.pipeline(transaction=False) as pipe:
                for job_id, event in events:
                    pipe.publish(job_channel(job_id), orjson.dumps(event, option=orjson.OPT_UTC_Z))
                pipe.execute()
        except redis.RedisError as error:
            log.warning("announcing progress failed", error=str(error))

    def wake(self, device_id: str, asked: JsonObject) -> None:
        """Sends a control message to a device's worker. `tasks.redis.messages.Wake` says what its loss means."""
        body = {
            "body": orjson.dumps(asked).decode(),
            "content-encoding": "utf-8",
            "content-type": "application/json",
            "headers": {},
            "properties": {
                "delivery_mode": 1,
                "delivery_info": {"exchange": "", "routing_key": control_queue(device_id)},
                "delivery_tag": os.urandom(16).hex(),
                "priority": 0,
            },
        }
        try:
            key = control_queue(device_id)
            with self._client.pipeline(transaction=False) as pipe:
                pipe.lpush(key, orjson.dumps(body))
                # A worker that starts later must not find yesterday's messages.
                pipe.expire(key, 60)
                pipe.execute()
        except redis.RedisError as error:
            log.warning("waking the worker failed; it looks by itself within a second", error=str(error))


def _chunks(lines: list[bytes], limit_bytes: int) -> Iterator[list[bytes]]:
    """The lines in order, together up to the limit; a longer line goes alone."""
    together: list[bytes] = []
    size = 0
    for line in lines:
        if together and size + len(line) > limit_bytes:
            yield together
            together, size = [], 0
        together.append(line)
        size += len(line)
    if together:
        yield together
