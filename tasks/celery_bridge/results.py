"""What Celery's own worker does at a task's end, done for a job: callbacks, the result, a chord's part, events.

All of it is made by Celery's canvas and result backend. Results, chords' parts and events bear being given twice;
messages are published once (`tasks.celery_bridge.once`).
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import groupby

from celery import Signature, group, signature
from celery.app.task import Context
from celery.backends.base import Backend
from celery.exceptions import NotRegistered
from celery.result import ResultBase, result_from_tuple

from device_operations.errors import from_job_error
from device_operations.jobs import TASK_PREFIX, State
from device_operations.wire.json_types import FreeJson
from tasks.celery_bridge.once import Once
from tasks.jobs.model import JobRow

#: The headers and the parts of a message's body of which Celery's result, callbacks and chords are made.
_OWED_HEADERS = ("root_id", "parent_id", "group", "group_index", "stamped_headers", "stamps")
_OWED_PARTS = frozenset({"callbacks", "errbacks", "chain", "chord"})


def owed(headers: FreeJson, embedded: FreeJson) -> FreeJson | None:
    """What Celery is to be given once a direct caller's task has ended, which its job keeps; None if nothing.

    `headers` and `embedded`, the third part of the body, are of a checked message (`tasks.redis.messages`).
    """
    kept = {name: headers[name] for name in _OWED_HEADERS if headers.get(name) is not None}
    kept |= {name: embedded[name] for name in sorted(_OWED_PARTS) if embedded.get(name)}
    if headers.get("ignore_result"):
        return {**kept, "ignore_result": True} if kept.keys() & _OWED_PARTS else None
    return kept


class CeleryResults:
    """Writes to Celery's result backend and publishes what follows. Calls wait for Redis, and raise its errors.

    `row` is always a job's, with what it owes in `celery`.
    """

    def __init__(self, redis_url: str) -> None:
        self._once = Once(redis_url)
        self._app = self._once.app

    def close(self) -> None:
        """Closes the connections."""
        self._once.close()

    def publish_next(self, row: JobRow) -> list[object]:
        """Publishes a succeeded task's callbacks and the next of its chain; gives the tuples of their results."""
        about = self._about(row)
        with self._once.once(row["id"]) as sent:
            sent.children = [made.as_tuple() for made in self._next(row, about)]
        return sent.children

    def store(self, row: JobRow, children: Sequence[object] = ()) -> None:
        """Stores the result, returns a chord's part, and publishes what is linked to an error."""
        about = self._about(row)
        backend, stores = self._app.backend, not about.ignore_result
        about._children = [result_from_tuple(child, app=self._app) for child in children]
        # What decides is `store_result`; Celery would leave a chord's part out as well.
        about.ignore_result = False
        with self._chords_once(backend):
            if row["state"] == State.SUCCEEDED:
                backend.mark_as_done(row["id"], row["result"], request=about, store_result=stores)
            elif row["state"] == State.FAILED:
                with self._once.once(f"{row['id']}.failed"):
                    raised = from_job_error(row["error"] or {})
                    backend.mark_as_failure(row["id"], raised, request=about, store_result=stores)
            else:
                backend.mark_as_revoked(row["id"], reason=row["state"], request=about, store_result=stores)

    def store_if_lost(self, row: JobRow) -> None:
        """Stores the result of a job that ended before, if the backend has none."""
        if self._app.backend.get_state(row["id"]) == "PENDING":
            self.store({**row, "celery": {}})

    def set_state(self, row: JobRow, state: str) -> None:
        """Shows an open job's task as `STARTED` or `PENDING`."""
        self._app.backend.store_result(row["id"], None, state, request=self._about(row))

    def set_retry(self, row: JobRow, error: FreeJson) -> None:
        """Shows a task as `RETRY`, which failed with `error` and is tried again."""
        self._app.backend.mark_as_retry(row["id"], from_job_error(error), request=self._about(row))

    def set_revoked(self, task_id: str) -> None:
        """Shows a task of which nothing is known as `REVOKED`."""
        if self._app.backend.get_state(task_id) == "PENDING":
            self._app.backend.mark_as_revoked(task_id, reason=State.CANCELLED.value)

    def set_unknown(self, task_id: str, task: str) -> None:
        """Shows a task that no worker here has as failed."""
        self._app.backend.mark_as_failure(task_id, NotRegistered(task))

    def send_events(self, rows: Sequence[JobRow]) -> None:
        """Reports ends to Flower, and to any other reader of Celery's events."""
        for device_id, together in groupby(rows, key=lambda row: row["device_id"]):
            # Flower keeps tasks by the worker that it heard of them from.
            hostname = f"{device_id or 'gateway'}@{socket.gethostname()}"
            with self._app.events.default_dispatcher(hostname=hostname) as dispatcher:
                for row in together:
                    dispatcher.send(**_event(row))

    def _about(self, row: JobRow) -> Context:
        """The request as Celery's backend and canvas ask for it."""
        given = row["celery"] or {}
        return Context(
            {
                "id": row["id"], "task": TASK_PREFIX + row["kind"], "args": [], "kwargs": {}, "retries": 0,
                "delivery_info": {}, "root_id": row["id"], "callbacks": None, "errbacks": None, "chain": None,
                "chord": None, "group": None, "group_index": None, "ignore_result": False,
                **{name: value for name, value in given.items() if name != "published"},
            }
        )  # fmt: skip

    def _next(self, row: JobRow, about: Context) -> Iterator[ResultBase]:
        related = {"parent_id": row["id"], "root_id": about.root_id}
        callbacks = [signature(callback, app=self._app) for callback in about.callbacks or ()]
        groups = [callback for callback in callbacks if isinstance(callback, group)]
        others = [callback for callback in callbacks if not isinstance(callback, group)]
        for callback in groups if len(callbacks) > 1 else callbacks:
            yield callback.apply_async((row["result"],), **related)
        if len(callbacks) > 1 and others:
            yield group(others, app=self._app).apply_async((row["result"],), **related)
        if about.chain:
            *rest, following = about.chain
            yield signature(following, app=self._app).apply_async((row["result"],), chain=rest, **related)

    @contextmanager
    def _chords_once(self, backend: Backend) -> Iterator[None]:
        """In the block, a chord's body, or what is linked to its error, is published once, whichever part comes last.

        Both while Celery still knows the chord: a process that dies then is followed by another.
        """
        return_part, fail = backend.on_chord_part_return, backend.chord_error_from_stack

        def return_part_once(request: Context, *arguments: object, **options: object) -> object:
            if request.chord is not None:
                request.chord = body = signature(request.chord, app=self._app)
                body.mark, publish = f"{request.group}.chord", body.delay

                def publish_once(*results: object) -> None:
                    with self._once.once(body.mark):
                        publish(*results)

                body.delay = publish_once
            return return_part(request, *arguments, **options)

        def fail_once(body: Signature, *arguments: object, **options: object) -> object:
            # One without a mark is a chord in the body of another that fails, which has one.
            with self._once.once(body.mark) if hasattr(body, "mark") else nullcontext():
                return fail(body, *arguments, **options)

        backend.on_chord_part_return, backend.chord_error_from_stack = return_part_once, fail_once
        try:
            yield
        finally:
            del backend.on_chord_part_return, backend.chord_error_from_stack


def _event(row: JobRow) -> FreeJson:
    """Celery's event of a job that ended without a worker's report, or whose worker died with it."""
    about = {"uuid": row["id"], "name": TASK_PREFIX + row["kind"]}
    if row["state"] == State.SUCCEEDED:
        return {"type": "task-succeeded", **about, "result": "{}", "runtime": (row["device_ms"] or 0.0) / 1000}
    if row["state"] == State.FAILED:
        exception = repr(from_job_error(row["error"] or {}))
        return {"type": "task-failed", **about, "exception": exception, "traceback": "", "retry": False}
    expired = row["state"] == State.EXPIRED
    return {"type": "task-revoked", **about, "terminated": False, "signum": None, "expired": expired}
