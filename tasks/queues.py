"""The names on the wire: queues, keys and channels in Redis, and the message that carries a job."""

from __future__ import annotations

import base64
import os
from typing import Any

import orjson

from device_operations.jobs import TASK_PREFIX
from device_operations.queues import ANY_QUEUE, celery_priority, device_queue, short

__all__ = [
    "ANY_QUEUE",
    "DONE_CHANNEL",
    "MESSAGE_BYTES",
    "NOTED",
    "control_queue",
    "device_queue",
    "job_channel",
    "message",
    "redis_key",
    "redis_keys",
]

#: The header that says that a message's job is recorded, and what the lane needs to order it.
NOTED = "device_operations"

#: Bytes of one message in Redis, and of its body unpacked, at most. Bigger payloads are blobs.
MESSAGE_BYTES = 16 << 20

#: Bytes of a recorded job's request in its message at most, in base64.
_BODY_BYTES = MESSAGE_BYTES // 2

#: Where ended jobs are announced, to all gateways.
DONE_CHANNEL = "device-operations.done"

#: Separates queue and priority in kombu's Redis keys; its default, so that plain Celery callers agree.
_SEPARATOR = "\x06\x16"


def control_queue(device_id: str) -> str:
    """The queue that wakes a busy worker: cancellations."""
    return f"device-operations.control.{device_id}"


def job_channel(job_id: str) -> str:
    """Where a job's states and progress are announced while it is open."""
    return f"device-operations.job.{job_id}"


def redis_key(queue: str, priority: int) -> str:
    """The Redis list of a queue for a job's priority. kombu's order runs the other way: 0 is read first."""
    step = celery_priority(priority)
    return f"{queue}{_SEPARATOR}{step}" if step else queue


def redis_keys(queue: str) -> list[str]:
    """The Redis lists of a queue, the highest priority first."""
    return [redis_key(queue, priority) for priority in range(9, -1, -1)]


def message(job: dict[str, Any], request: dict[str, Any], origin: str) -> bytes:
    """One job as Celery's protocol 2 in kombu's Redis envelope.

    `job` is a recorded row. Messages without the header `NOTED` come from direct callers. A request that is too big for
    a message is left to the record: the claim reads it there.
    """
    body = base64.b64encode(orjson.dumps([[], {"request": request}, _NO_CANVAS])).decode()
    if len(body) > _BODY_BYTES:
        body = base64.b64encode(orjson.dumps([[], {"request": {}}, _NO_CANVAS])).decode()
    job_id = job["id"]
    return orjson.dumps(
        {
            "body": body,
            "content-encoding": "utf-8",
            "content-type": "application/json",
            "headers": {
                "lang": "py",
                "task": TASK_PREFIX + job["kind"],
                "id": job_id,
                "root_id": job_id,
                "parent_id": None,
                "group": None,
                "eta": None,
                "expires": None,
                "retries": 0,
                "timelimit": [None, None],
                "argsrepr": "()",
                "kwargsrepr": short(request),
                "origin": origin,
                "ignore_result": not job["wants_result"],
                NOTED: {
                    "seq": job["seq"],
                    "priority": job["priority"],
                    "after": job["after"],
                    "needs": job["needs"],
                },
            },
            "properties": {
                "correlation_id": job_id,
                "reply_to": "",
                "delivery_mode": 2,
                "delivery_info": {"exchange": "", "routing_key": job["queue"]},
                "priority": celery_priority(job["priority"]),
                "body_encoding": "base64",
                "delivery_tag": os.urandom(16).hex(),
            },
        }
    )


_NO_CANVAS = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
