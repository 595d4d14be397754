"""Somebody else's service: a Celery application and worker that import nothing of this project.

Every task notes what it was called with in the Redis list `plain.notes`, so that tests see how often and with what.
"""

from __future__ import annotations

import json
import os
from typing import Any

import redis
from celery import Celery

URL = os.environ.get("PLAIN_REDIS_URL", "redis://127.0.0.1:1/0")

app = Celery("plain", broker=URL, backend=URL)
app.conf.update(broker_connection_retry_on_startup=True, worker_hijack_root_logger=False)


def _note(self: Any, args: Any, kwargs: Any) -> None:
    note = {
        "task": self.request.task, "id": self.request.id, "parent_id": self.request.parent_id,
        "root_id": self.request.root_id, "args": args, "kwargs": kwargs,
    }  # fmt: skip
    redis.Redis.from_url(URL).rpush("plain.notes", json.dumps(note))


@app.task(name="plain.note", bind=True)
def note(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Gives back what it was given first."""
    _note(self, args, kwargs)
    return args[0] if args else None


@app.task(name="plain.fail", bind=True)
def fail(self: Any, *args: Any, **kwargs: Any) -> None:
    """Fails."""
    _note(self, args, kwargs)
    raise ValueError("plain failure")


@app.task(name="plain.size", bind=True)
def size(self: Any, made: Any) -> dict[str, Any]:
    """From an allocation's result, a request that a next task takes a part of."""
    _note(self, [made], {})
    return {"next": {"allocation_id": made["allocation_id"]}}


@app.task(name="plain.total", bind=True)
def total(self: Any, made: list[dict[str, Any]]) -> dict[str, Any]:
    """The sum of the sizes of allocations' results, in the form of one."""
    _note(self, [made], {})
    return {"size_bytes": sum(one["size_bytes"] for one in made)}
