"""Celery's pool that feeds the lane: it takes messages in, and tells Celery what became of them.

Celery's worker calls `on_apply` for each message it received. Nothing runs here: the message becomes an entry of the
lane (`workers.intake`). The message is acknowledged and reported as started when its job is claimed, and reported as
succeeded, failed or revoked when its outcome is recorded, so Flower and `celery inspect` show what really happened.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import structlog
from celery.concurrency.base import BasePool

from device_operations.errors import from_job_error

log = structlog.get_logger(__name__)


class Handle:
    """One message's way back to Celery. Each step is taken at most once, whoever takes it."""

    __slots__ = ("_accepted", "_done", "_request", "_started_at", "headers", "ignore_result")

    def __init__(self, request: Any) -> None:
        self._request = request
        self._accepted = False
        self._done = False
        self._started_at = time.monotonic()
        self.headers: dict[str, Any] = request.request_dict
        self.ignore_result = bool(self.headers.get("ignore_result"))

    @property
    def job_id(self) -> str:
        """The task id, which is the job's."""
        return str(self._request.id)

    @property
    def task_name(self) -> str:
        """The task's name."""
        return str(self._request.name)

    @property
    def device_operations(self) -> dict[str, Any] | None:
        """What the gateway noted in the message; None for direct callers."""
        found = self.headers.get("device_operations")
        return found if isinstance(found, dict) else None

    @property
    def priority(self) -> int | None:
        """The job's priority if the message has one; kombu counts the other way, and its 0 is also its default."""
        given = (self._request.delivery_info or {}).get("priority")
        return 9 - given if isinstance(given, int) and 0 < given <= 9 else None

    def payload(self) -> tuple[Any, Any]:
        """The task's positional and named arguments, as they came."""
        args, kwargs, _ = self._request._payload
        return args, kwargs

    def park(self) -> None:
        """Acknowledges without a start: PostgreSQL holds the job, and the message's slot is needed by others."""
        self._guarded(self._request.acknowledge)

    def started(self) -> None:
        """The job is claimed: the message is acknowledged and the task reported as started."""
        if not self._accepted:
            self._accepted = True
            self._started_at = time.monotonic()
            self._guarded(lambda: self._request.on_accepted(None, self._started_at))

    def ended(self, view: dict[str, Any]) -> None:
        """The job's outcome is recorded: Celery's events and, where the caller wants it, Celery's result."""
        if self._done:
            return
        self._done = True
        self._guarded(lambda: self._report(view))

    def dropped(self) -> None:
        """The message was a duplicate, or its job is somebody else's: nothing is reported."""
        if not self._done:
            self._done = True
            self._guarded(self._forget)

    def _report(self, view: dict[str, Any]) -> None:
        if not self._accepted:
            self._accepted = True
            self._request.acknowledge()
        runtime = time.monotonic() - self._started_at
        if view["state"] == "succeeded":
            self._request.on_success((0, _brief(view), runtime))
        elif view["state"] == "failed":
            self._request.on_success((1, Failure(from_job_error(view["error"])), runtime))
        else:
            self._request.send_event("task-revoked", terminated=False, signum=None, expired=view["state"] == "expired")
            self._forget()

    def _forget(self) -> None:
        from celery.worker import state

        self._request.acknowledge()
        state.task_ready(self._request)

    def _guarded(self, step: Any) -> None:
        """Celery's side may fail with its connection; the records are right all the same, so it is only logged."""
        try:
            step()
        except Exception as error:  # noqa: BLE001 - whatever the broker's client raises must not stop the lane
            log.warning("Celery could not be told", job_id=self.job_id, error=f"{type(error).__name__}: {error}")


@dataclass(frozen=True, slots=True)
class Failure:
    """A recorded error as Celery's request reports it. Its own `ExceptionInfo` would hide the code in Flower."""

    exception: BaseException
    traceback: str = ""


def _brief(view: dict[str, Any]) -> str:
    """What Flower shows as the result: the facts, not the tensors."""
    result = view["result"] or {}
    return str({key: value for key, value in result.items() if isinstance(value, (int, float, str, bool))})[:200]


class LanePool(BasePool):
    """A pool without processes or threads of its own."""

    body_can_be_buffer = True
    signal_safe = False
    task_join_will_block = False

    #: Set by `workers.service` before Celery makes the pool: takes each message in.
    intake: Any = None

    def on_start(self) -> None:
        """Begins with the worker's consumer."""
        type(self).intake.start(self.app)

    def on_stop(self) -> None:
        """A warm stop: what runs is finished, what was not claimed is left to the next worker."""
        type(self).intake.stop()

    def on_terminate(self) -> None:
        """A cold stop: what runs is told to end."""
        type(self).intake.stop(cold=True)

    def on_apply(
        self, target: Any, args: Any = None, kwargs: Any = None, accept_callback: Any = None, **_: Any
    ) -> None:
        """Takes one message in."""
        type(self).intake.receive(Handle(accept_callback.__self__))

    def terminate_job(self, pid: Any, signal: Any = None) -> None:
        """Celery's `revoke(terminate=True)` reaches jobs by the control queue; a pid names none of them."""
        log.warning("terminate by pid is not supported; cancel the job with DELETE /api/jobs/{job_id}")

    def _get_info(self) -> dict[str, Any]:
        return {**super()._get_info(), "lane": type(self).intake.standing()}
