"""The names that every Celery caller shares: queues, priorities as kombu orders them, and what Flower shows."""

from __future__ import annotations

from device_operations.wire.json_types import FreeJson

#: The queue for work that any device may take: direct callers only, since the gateway places every job.
ANY_QUEUE = "device.any"

#: Every priority has a Redis list of its own; kombu's default has only four.
PRIORITY_STEPS = list(range(10))


def device_queue(device_id: str) -> str:
    """The queue that a device's worker reads."""
    return f"device.{device_id}"


def is_device_queue(queue: str) -> bool:
    """Whether a queue is a device's, or the one for any device."""
    return queue.startswith("device.")


def celery_priority(priority: int) -> int:
    """A job's priority as kombu's Redis transport counts, where 0 is read first."""
    return 9 - priority


#: Fields of requests that say what a job is about; everything else may be long, or is not to show in Flower.
_TELLING = (
    "model_name",
    "model_id",
    "name",
    "session_id",
    "allocation_id",
    "size_bytes",
    "sequence",
    "mode",
    "blob_id",
)


def short(request: FreeJson) -> str:
    """A request in at most 120 characters, for Flower and logs: the ids it names, never its data."""
    said = ", ".join(f"{name}={request[name]!r}" for name in _TELLING if request.get(name) is not None)
    return "{" + (said if len(said) <= 118 else said[:117] + "…") + "}"
