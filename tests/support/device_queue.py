"""A live worker's queue, seen from Redis: what is put into it, what is left, and whether the worker serves on."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any
from uuid import uuid4

import redis
from celery import Celery

from tasks.redis.queues import control_queue, device_queue, redis_keys
from tests.support.stack import RunningStack, eventually

#: Characters of a line of the worker's log at most, whatever it was sent.
LINE_CHARACTERS = 2000


class DeviceQueue:
    """The queue of one device of a running stack."""

    def __init__(self, stack: RunningStack, device_id: str = "cpu_0") -> None:
        self.stack = stack
        self.device_id = device_id
        self.queue = device_queue(device_id)
        self.unacked = f"device-operations.unacked.{device_id}"
        self.unacked_index = f"device-operations.unacked-index.{device_id}"
        self.redis = redis.Redis.from_url(stack.redis_url)
        self._celery = Celery(broker=stack.redis_url, backend=stack.redis_url)

    def close(self) -> None:
        self._celery.close()
        self.redis.close()

    def put(self, messages: Iterable[bytes], priority: int = 9) -> None:
        """Puts raw messages into the queue, oldest first."""
        self.redis.lpush(redis_keys(self.queue)[9 - priority], *messages)

    def left(self) -> dict[str, int]:
        """What is still in the queue, and in the book of unacknowledged messages, by Redis key."""
        keys = [*redis_keys(self.queue), *redis_keys("device.any"), control_queue(self.device_id)]
        with self.redis.pipeline() as pipe:
            for key in keys:
                pipe.llen(key)
            pipe.hlen(self.unacked)
            pipe.zcard(self.unacked_index)
            counts = pipe.execute()
        return {key: count for key, count in zip([*keys, "unacked", "index"], counts, strict=True) if count}

    def settle(self, seconds: float = 30) -> None:
        """Waits until nothing is left."""
        eventually(lambda: not self.left() or None, seconds)

    def serves(self) -> None:
        """A job each way: over HTTP, and by Celery, whose caller is given the result."""
        made = self.stack.client.post(
            "/api/memory/allocate", json={"size_bytes": 16, "device_id": self.device_id}, headers={"Prefer": "wait=30"}
        ).json()
        assert made["state"] == "succeeded", made
        freed = self.send("memory.deallocate", {"allocation_id": made["resource"]["id"]}).get(timeout=30)
        assert freed["freed_bytes"] == 16

    def send(self, kind: str, request: dict[str, Any]) -> Any:
        return self._celery.send_task(
            f"device_operations.{kind}", kwargs={"request": request}, queue=self.queue, task_id=str(uuid4()),
            ignore_result=False,
        )  # fmt: skip

    def result(self, task_id: str) -> Any:
        return self._celery.AsyncResult(task_id)

    def log(self) -> list[dict[str, Any]]:
        """The worker's log so far, one object a line, each of bounded length. Python's own warnings are left out."""
        # A line that is being written has no end yet.
        lines = [line for line in self.stack.log(self.device_id).splitlines(keepends=True) if line.endswith("\n")]
        for line in lines:
            assert len(line) <= LINE_CHARACTERS, line[:LINE_CHARACTERS]
        return [json.loads(line) for line in lines if line.startswith("{")]

    def refusals(self) -> list[dict[str, Any]]:
        """What the log says of refused messages."""
        return [line for line in self.log() if line["event"] == "message refused"]
