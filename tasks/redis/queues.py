"""The names on the wire: queues, keys and channels in Redis, and the message that carries a job."""

from __future__ import annotations

import orjson

from device_operations.jobs import TASK_PREFIX
from device_operations.queues import ANY_QUEUE, celery_priority, device_queue, is_device_queue, short
from device_operations.wire.json_types import FreeJson
from tasks.jobs.model import JobRow

__all__ = [
    "ANY_QUEUE",
    "DONE_CHANNEL",
    "MESSAGE_BYTES",
    "NOTED",
    "control_queue",
    "device_queue",
    "is_device_queue",
    "job_channel",
    "message",
    "redis_key",
    "redis_keys",
]

#: The header that says that a message's job is recorded, and what the scheduler needs to order it.
NOTED = "device_operations"

#: Bytes of one message in Redis, and of its body unpacked, at most. Bigger payloads are blobs.
MESSAGE_BYTES = 16 << 20

#: Bytes of a recorded job's message at most, with its request.
_RECORDED_BYTES = MESSAGE_BYTES // 2

#: Where ended jobs are announced, to all gateways.
DONE_CHANNEL = "device-operations.done"

#: Separates queue and priority in kombu's Redis keys; its default, so that plain Celery callers agree.
_SEPARATOR = "\x06\x16"


def control_queue(device_id: str) -> str:
    """The queue that a worker reads while it is busy: each message is a `tasks.redis.messages.Wake`."""
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


def message(job: JobRow, request: FreeJson) -> bytes:
    """A recorded job's message, which this project's workers alone read: the request, and the headers that they use.

    `job` is a recorded row. Messages without the header `NOTED` come from direct callers, in Celery's own form. A
    request that is too big for a message is left to the record: the claim reads it there.
    """
    headers = {
        "task": TASK_PREFIX + job["kind"],
        "id": job["id"],
        "argsrepr": "()",
        "kwargsrepr": short(request),
        NOTED: {"seq": job["seq"], "priority": job["priority"], "after": job["after"], "needs": job["needs"]},
    }
    made = orjson.dumps({"headers": headers, "request": request})
    return made if len(made) <= _RECORDED_BYTES else orjson.dumps({"headers": headers, "request": {}})
