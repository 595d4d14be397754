"""Celery's pool that feeds the scheduler: it takes messages in, and reports to Celery what became of them.

A direct caller's message comes from Celery's worker, by `strategy`; a recorded job's comes from the transport itself
(`tasks.celery_bridge.transport`), since making a request of each would cost more than a small run does. Nothing runs
here: the message becomes an entry of the scheduler (`workers.execution.prefetch`). It is reported as started when the
device begins with its job, and as succeeded, failed or revoked when its outcome is recorded, so Flower and `celery
inspect` show what happened.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import structlog
from celery import Celery
from celery.concurrency.base import BasePool
from celery.worker import state
from celery.worker.request import Request, create_request_cls

from device_operations.errors import from_job_error
from device_operations.jobs import TASK_PREFIX
from device_operations.wire.json_types import JsonObject
from tasks.celery_bridge.results import owed
from tasks.jobs.model import JobView
from tasks.redis.queues import NOTED
from workers.celery_bridge.events import Dispatcher, Untyped

log = structlog.get_logger(__name__)


class Handle:
    """One message's way back to Celery. Each step is taken at most once, from any thread."""

    __slots__ = ("_accepted", "_done", "_request", "_started_at")

    def __init__(self, request: Untyped) -> None:
        self._request = request
        self._accepted = False
        self._done = False
        self._started_at = time.monotonic()

    @property
    def job_id(self) -> str:
        """The task id, which is the job's."""
        return str(self._request.id)

    @property
    def task_name(self) -> str:
        """The task's name; the request's own `name` is what the caller wants to be shown."""
        return str(self._request.type)

    @property
    def priority(self) -> int | None:
        """The job's priority if the message has one; kombu counts the other way, and its 0 is also its default."""
        given = (self._request.delivery_info or {}).get("priority")
        return 9 - given if isinstance(given, int) and 0 < given <= 9 else None

    def payload(self) -> tuple[Untyped, Untyped]:
        """The task's positional and named arguments, as they came."""
        args, kwargs, _ = self._request._payload
        return args, kwargs

    def header(self, name: str) -> Untyped:
        """A header of the message, which was checked; None where it is absent."""
        return self._request.request_dict.get(name)

    def owed(self) -> JsonObject | None:
        """What Celery is given once the task has ended (`tasks.celery_bridge.outbox`); None if that is nothing."""
        return owed(self._request.request_dict, self._request._payload[2])

    def park(self) -> None:
        """Acknowledges without a start: PostgreSQL holds the job, and the message's slot is needed by others."""
        self._guarded(self._request.acknowledge)

    def started(self, at: float) -> None:
        """The device began with the job `at`, by the monotonic clock: the message is acknowledged and that reported."""
        if not self._accepted:
            self._accepted = True
            self._started_at = at
            self._guarded(lambda: self._request.on_accepted(None, self._started_at))

    def ended(self, view: JobView) -> None:
        """The job's outcome is recorded: Celery's events and, where the caller wants it, Celery's result."""
        if self._done:
            return
        self._done = True
        self._guarded(lambda: self._report(view))

    def dropped(self) -> None:
        """The message was a duplicate, or another worker has its job: nothing is reported."""
        if not self._done:
            self._done = True
            self._guarded(self._forget)

    def _report(self, view: JobView) -> None:
        if not self._accepted:
            self._accepted = True
            self._request.acknowledge()
        runtime = time.monotonic() - self._started_at
        if view["state"] == "succeeded":
            self._request.on_success((0, _brief(view), runtime))
        elif view["state"] == "failed":
            self._request.on_success((1, Failure(from_job_error(view["error"] or {})), runtime))
        else:
            self._request.send_event("task-revoked", terminated=False, signum=None, expired=view["state"] == "expired")
            self._forget()

    def _forget(self) -> None:
        self._request.acknowledge()
        state.task_ready(self._request)

    def _guarded(self, step: Callable[[], object]) -> None:
        """Celery's side may fail with its connection; the records are right all the same, so it is only logged."""
        try:
            step()
        except Exception as error:  # noqa: BLE001 - no exception of the broker's client may stop the scheduler
            log.warning("reporting to Celery failed", job_id=self.job_id, error=f"{type(error).__name__}: {error}")


class Note:
    """The same for a recorded job's message: Celery has no request of it, and learns of it by events alone."""

    __slots__ = ("_headers", "_reported", "job_id", "started_at")

    def __init__(self, headers: Mapping[str, Untyped]) -> None:
        self.job_id: str = headers["id"]
        self._headers = headers
        self._reported = False
        self.started_at: float | None = None

    @property
    def kind(self) -> str:
        """The job's kind."""
        return str(self._headers["task"]).removeprefix(TASK_PREFIX)

    def received(self) -> None:
        """The job is in the scheduler."""
        headers = self._headers
        Dispatcher.note(
            "task-received", self.job_id, name=headers["task"], args=headers["argsrepr"], kwargs=headers["kwargsrepr"],
            root_id=self.job_id, parent_id=None, retries=0, eta=None, expires=None,
        )  # fmt: skip

    def park(self) -> None:
        """Its message has no slot that others would need."""

    def started(self, at: float) -> None:
        """The device began with the job `at`, by the monotonic clock."""
        self.started_at = time.time() - (time.monotonic() - at)
        state.total_count[self._headers["task"]] += 1
        state.all_total_count[0] += 1
        Dispatcher.note("task-started", self.job_id, timestamp=self.started_at)

    def ended(self, view: JobView) -> None:
        """The job's outcome is recorded."""
        if self._reported:
            return
        self._reported = True
        runtime = 0.0 if self.started_at is None else time.time() - self.started_at
        if view["state"] == "succeeded":
            Dispatcher.note("task-succeeded", self.job_id, result=_brief(view), runtime=runtime)
        elif view["state"] == "failed":
            exception = repr(from_job_error(view["error"] or {}))
            Dispatcher.note("task-failed", self.job_id, retry=False, exception=exception, traceback="")
        else:
            expired = view["state"] == "expired"
            Dispatcher.note("task-revoked", self.job_id, terminated=False, signum=None, expired=expired)

    def dropped(self) -> None:
        """The message was a duplicate, or another worker has its job: nothing is reported."""
        self._reported = True

    def info(self, hostname: str) -> JsonObject:
        """The job as `celery inspect` shows a task."""
        headers = self._headers
        return {
            "id": self.job_id, "name": headers["task"], "args": headers["argsrepr"], "kwargs": headers["kwargsrepr"],
            "type": headers["task"], "hostname": hostname, "time_start": self.started_at, "acknowledged": True,
            "delivery_info": {"priority": headers[NOTED]["priority"]}, "worker_pid": os.getpid(),
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Failure:
    """A recorded error as Celery's request reports it. Its own `ExceptionInfo` would hide the code in Flower."""

    exception: BaseException
    traceback: str = ""


def _brief(view: JobView) -> str:
    """What Flower shows as the result: the facts, not the tensors."""
    result = view["result"] or {}
    return str({key: value for key, value in result.items() if isinstance(value, (int, float, str, bool))})[:200]


class PoolService(Protocol):
    """What the pool and Celery's remote control need of the worker's service."""

    def start(self, app: Celery) -> None:
        """Celery's worker is up."""

    def stop(self, *, cold: bool = False) -> None:
        """The worker stops; `cold` cancels running jobs."""

    def receive(self, handle: Handle) -> None:
        """A direct caller's message."""

    def revoke(self, task_ids: list[str]) -> None:
        """Tasks are revoked."""

    def revoke_stamped(self, stamps: dict[str, set[str]]) -> None:
        """Tasks with any of these stamps are revoked."""

    def notes(self, *, running: bool) -> list[Note]:
        """The recorded jobs that run, or that wait."""

    def standing(self) -> JsonObject:
        """What `celery inspect stats` shows."""


class SchedulerPool(BasePool):
    """A pool without processes or threads of its own."""

    body_can_be_buffer = True
    signal_safe = False
    task_join_will_block = False

    #: The worker's service, which sets this before Celery makes the pool.
    service: PoolService

    def on_start(self) -> None:
        """Begins with the worker's consumer."""
        type(self).service.start(self.app)

    def on_stop(self) -> None:
        """A warm stop: what runs is finished, what was not claimed is left to the next worker."""
        type(self).service.stop()

    def on_terminate(self) -> None:
        """A cold stop: running jobs are cancelled."""
        type(self).service.stop(cold=True)

    def terminate_job(self, pid: object, signal: object = None) -> None:
        """Celery's `revoke(terminate=True)` reaches jobs by the control queue; a pid names none of them."""
        log.warning("terminate by pid is not supported; cancel the job with DELETE /api/jobs/{job_id}")

    def _get_info(self) -> JsonObject:
        return {**super()._get_info(), "scheduler": type(self).service.standing()}


def strategy(task: Untyped, app: Untyped, consumer: Untyped, **_: object) -> Callable[..., None]:
    """Celery's execution strategy of each kind's task: what its consumer does with a direct caller's message.

    Celery's own would keep a task with an ETA in this process, and end an expired or a revoked one without a job.
    """
    eventer = consumer.event_dispatcher
    made = create_request_cls(Request, task, consumer.pool, consumer.hostname, eventer, app=app)

    def receive(
        message: Untyped, body: Untyped, ack: Untyped, reject: Untyped, callbacks: Untyped, **_: object
    ) -> None:
        request = made(
            message, on_ack=ack, on_reject=reject, app=app, hostname=consumer.hostname, eventer=eventer, task=task,
            connection_errors=consumer.connection_errors, body=message.payload, headers=message.headers, decoded=True,
        )  # fmt: skip
        request.send_event(
            "task-received", name=request.name, args=request.argsrepr, kwargs=request.kwargsrepr,
            root_id=request.root_id, parent_id=request.parent_id, retries=request.request_dict.get("retries", 0),
            eta=request.request_dict.get("eta"), expires=request.request_dict.get("expires"),
        )  # fmt: skip
        state.task_reserved(request)
        SchedulerPool.service.receive(Handle(request))

    return receive


# ---- Celery's remote control: jobs are revoked by their ids, whatever they came as


# ---- what `celery inspect` shows: Celery's own requests, and the recorded jobs that are none
