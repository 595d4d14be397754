"""A bare Celery application beside a running stack, and a plain Celery worker for what is linked to our tasks.

caller      module    Caller: a bare `celery.Celery` on the stack's Redis, with signatures of our tasks
long_run    module    a run that takes ten seconds or more, and stops soon when it is told to
occupied    function  such a run, which runs while the test does
plain       module    the same with a worker of `tests.direct.plain`, which runs somebody else's tasks
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import redis
from celery import Celery, Signature
from celery.result import AsyncResult

from device_operations.stack import processes
from tests.inference.graphs import busy
from tests.support.graphs import tensor
from tests.support.stack import REPOSITORY, RunningStack, eventually

DEVICE = {"queue": "device.cpu_0"}


class Caller:
    """What a service does that knows Celery, the names of tasks, and nothing else of this project."""

    def __init__(self, stack: RunningStack) -> None:
        self.stack = stack
        self.redis = redis.Redis.from_url(stack.redis_url)
        self.app = Celery("caller", broker=stack.redis_url, backend=stack.redis_url, set_as_current=False)

    def task(self, kind: str, request: dict[str, Any], **options: Any) -> Signature:
        """A mutable signature of a task of ours: Celery passes results on to it."""
        immutable = options.pop("immutable", False)
        job = {"job": options.pop("job")} if "job" in options else {}
        return self.app.signature(
            f"device_operations.{kind}", kwargs={"request": request, **job}, immutable=immutable,
            options={**DEVICE, **options},
        )  # fmt: skip

    def allocate(self, size_bytes: int = 16, **options: Any) -> Signature:
        """An allocation, which takes no result before it."""
        return self.task("memory.allocate", {"size_bytes": size_bytes}, immutable=True, **options)

    def refused(self, **options: Any) -> Signature:
        """A task that fails on every device."""
        return self.task("memory.clear", {"allocation_id": "not-there"}, immutable=True, **options)

    def free(self, path: str = "allocation_id", **options: Any) -> Signature:
        """Frees what a part of the result before it names."""
        return self.task("memory.deallocate", {"allocation_id": {"$previous": path}}, **options)

    def plain(self, name: str, *args: Any, **options: Any) -> Signature:
        """A task of the other service."""
        kwargs = {"by": options.pop("by")} if "by" in options else {}
        return self.app.signature(f"plain.{name}", args=args, kwargs=kwargs, **options)

    def job(self, task_id: str) -> dict[str, Any] | None:
        """The job of a task over HTTP; None if there is none."""
        answer = self.stack.client.get(f"/api/jobs/{task_id}")
        return answer.json() if answer.status_code == 200 else None

    def ended(self, task_id: str, seconds: float = 30) -> dict[str, Any]:
        """The job once it has ended."""
        job: dict[str, Any] = eventually(
            lambda: (found := self.job(task_id)) and found["finished_at"] and found, seconds, interval_seconds=0.02
        )
        return job

    def notes(self) -> list[dict[str, Any]]:
        """What the other service's tasks were called with, in order."""
        return [json.loads(note) for note in self.redis.lrange("plain.notes", 0, -1)]

    def forget_notes(self) -> None:
        self.redis.delete("plain.notes")

    def noted(self, count: int = 1, seconds: float = 30) -> list[dict[str, Any]]:
        """The first `count` of them, once they are there."""
        return eventually(lambda: (found := self.notes()) and len(found) >= count and found, seconds)

    def close(self) -> None:
        # A result that is dropped later would ask for the server that is gone by then.
        gc.collect()
        self.app.backend.result_consumer.stop()
        self.app.close()
        self.redis.close()


@pytest.fixture(scope="module")
def caller(stack: RunningStack) -> Iterator[Caller]:
    made = Caller(stack)
    yield made
    made.close()


@pytest.fixture(scope="module")
def plain(stack: RunningStack, caller: Caller) -> Iterator[Caller]:
    environment = {**os.environ, "PLAIN_REDIS_URL": stack.redis_url}
    command = [sys.executable, "-m", "celery", "-A", "tests.direct.plain", "worker", "-P", "solo", "-Q", "celery,plain",
               "--without-gossip", "--without-mingle", "-l", "WARNING", "-n", "plain@%h"]  # fmt: skip
    process = processes.start(processes.Command("plain", command, environment, REPOSITORY), stack.folder / "plain.log")
    try:
        eventually(lambda: caller.app.control.inspect(["plain@" + os.uname().nodename], timeout=1).ping(), 40)
        yield caller
    finally:
        processes.end_tree(process)


def busy_run(caller: Caller, nodes: int) -> Signature:
    """A run of a model of that many multiplications, which is loaded for it; each run has the device for itself."""
    stack, name = caller.stack, f"busy-{nodes}"
    (stack.folder / "models").mkdir(exist_ok=True)
    (stack.folder / "models" / f"{name}.onnx").write_bytes(busy(nodes, 256))
    body = {"name": name, "source": {"path": f"{name}.onnx"}, "options": {"max_batch_size": 1}}
    assert stack.client.post("/api/inference/load-model", json=body, headers={"Prefer": "wait=30"}).status_code == 200
    run = {"model_name": name, "inputs": {"x": tensor(np.zeros((1, 256, 256), np.float32))}}
    return caller.task("inference.run", run, immutable=True)


@pytest.fixture(scope="module")
def long_run(caller: Caller) -> Signature:
    return busy_run(caller, 20_000)


@pytest.fixture
def occupied(caller: Caller, long_run: Signature) -> Iterator[AsyncResult]:
    running = long_run.apply_async()
    eventually(lambda: running.state == "STARTED")
    yield running
    caller.stack.client.delete(f"/api/jobs/{running.id}")
    caller.ended(running.id)
