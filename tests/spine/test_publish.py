"""Publishing: what goes with every job has a connection of its own, which may break."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
import redis

from device_operations.jobs import new_id
from tasks.redis.announcements import read_lines
from tasks.redis.publish import Line, Publisher, connect
from tasks.redis.queues import DONE_CHANNEL, redis_key


@pytest.fixture
def client(redis_url: str) -> Any:
    made = connect(redis_url)
    yield made
    made.close()


def job(job_id: str, queue: str) -> dict[str, Any]:
    """A recorded job, as far as its message tells of it."""
    return {
        "id": job_id, "kind": "inference.run", "queue": queue, "priority": 5, "seq": 1, "after": [], "needs": [],
        "celery": None,
    }  # fmt: skip


def test_jobs_are_published_though_the_connection_was_cut(client: Any) -> None:
    publisher, queue = Publisher(client), f"device.{new_id()}"
    first, second = new_id(), new_id()
    assert publisher.jobs([(job(first, queue), {})])
    client.client_kill_filter(_type="normal", skipme=True)
    assert publisher.jobs([(job(second, queue), {})])
    messages = client.lrange(redis_key(queue, 5), 0, -1)
    assert [orjson.loads(message)["headers"]["id"] for message in messages] == [second, first]


def test_ends_are_announced_though_the_connection_was_cut(client: Any, redis_url: str) -> None:
    publisher = Publisher(client)
    publisher.done([{"job_id": "before", "kind": "memory.read"}])
    client.client_kill_filter(_type="normal", skipme=True)
    with connect(redis_url).pubsub(ignore_subscribe_messages=True) as heard:
        heard.subscribe(DONE_CHANNEL)
        assert heard.get_message(timeout=5) is None
        publisher.done([{"job_id": "one", "kind": "memory.read"}, {"job_id": "two", "kind": "memory.read"}])
        told = next(message for message in iter(lambda: heard.get_message(timeout=5), None) if message)
    assert [announced.job_id for announced in read_lines(told["data"])] == [b"one", b"two"]


def test_without_redis_publishing_says_no_and_does_not_raise() -> None:
    publisher = Publisher(connect("redis://127.0.0.1:1/0"))
    assert not publisher.jobs([(job(new_id(), "device.nowhere"), {})])
    publisher.done([{"job_id": "nobody hears", "kind": "memory.copy"}])


def test_a_refused_command_leaves_the_connection_as_it_was(client: Any) -> None:
    line = Line(client)
    line.send("SET", "text", "a")
    with pytest.raises(redis.ResponseError):
        line.send("LPUSH", "text", "b")
    assert line.send("GET", "text") == b"a"
