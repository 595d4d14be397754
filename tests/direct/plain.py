"""Somebody else's service: a Celery application and worker that import nothing of this project.

Every task notes what it was called with in the Redis list `plain.notes`, so that tests see how often and with what.
"""

from __future__ import annotations

import json
import os
from typing import Any

import redis
from celery import Celery, signature

URL = os.environ.get("PLAIN_REDIS_URL", "redis://127.0.0.1:1/0")

app = Celery("plain", broker=URL, backend=URL)
app.conf.update(broker_connection_retry_on_startup=True, worker_hijack_root_logger=False)


def _note(self: Any, args: Any, kwargs: Any) -> None:
    note = {
        "task": self.request.task, "id": self.request.id, "parent_id": self.request.parent_id,
        "root_id": self.request.root_id, "group": self.request.group, "stamps": self.request.stamps,
        "args": args, "kwargs": kwargs,
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
def total(self: Any, made: Any) -> dict[str, Any]:
    """The sum of the sizes of allocations' results, however nested, in the form of one."""
    _note(self, [made], {})
    return {"size_bytes": _summed(made)}


def _summed(made: Any) -> int:
    return sum(map(_summed, made)) if isinstance(made, list) else int(made["size_bytes"])


@app.task(name="plain.replaced", bind=True)
def replaced(self: Any, *args: Any, by: dict[str, Any]) -> Any:
    """Another task runs in its place."""
    _note(self, args, {})
    return self.replace(signature(by, app=app))


@app.task(name="plain.adds", bind=True)
def adds(self: Any, more: list[dict[str, Any]]) -> dict[str, Any]:
    """Adds tasks to the chord whose header it is in."""
    for task in more:
        self.add_to_chord(signature(task, app=app))
    return {"size_bytes": 0}


@app.task(name="plain.retried", bind=True)
def retried(self: Any, *args: Any) -> Any:
    """Fails once, and is retried; gives back what it was given first."""
    if not self.request.retries:
        raise self.retry(countdown=0)
    _note(self, args, {})
    return args[0]


@app.task(name="plain.newer")
def newer(request: Any, error: Any, traceback: Any) -> None:
    """A callback for errors of Celery's newer form, which the worker of a failed task calls itself if it has it."""
