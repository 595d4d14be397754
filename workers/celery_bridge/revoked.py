"""Celery's revocations: jobs that wait or run are cancelled, and a task whose message comes later does not run.

Every worker hears of each. They are remembered in PostgreSQL, so that a worker that starts later knows them too.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from queue import SimpleQueue

import structlog
from celery.worker import state
from sqlalchemy import Engine

from tasks.celery_bridge import store
from tasks.celery_bridge.outbox import Outbox
from tasks.database import until_reachable
from tasks.jobs import lifecycle
from tasks.jobs import store as jobs
from tasks.redis.publish import Publisher

log = structlog.get_logger(__name__)


class Revoked:
    """The revoked tasks. `in` may be asked from any thread, and `cancel` and `revoke` called."""

    def __init__(self, engine: Engine, publisher: Publisher, outbox: Outbox) -> None:
        self._engine = engine
        self._publisher = publisher
        self._outbox = outbox
        #: Celery's own, which `inspect revoked` shows.
        self._known = state.revoked
        self._stamps: dict[str, set[str]] = {}
        self._queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._revoke_until_stopped, name="revoke", daemon=True)

    def __contains__(self, task_id: str) -> bool:
        return task_id in self._known

    def start(self) -> None:
        """Learns what was revoked before, and begins."""
        with self._engine.connect() as connection:
            self._known.update(store.revoked(connection))
        self._thread.start()

    def stop(self) -> None:
        """Takes nothing more."""
        self._stopping.set()
        self._queue.put(None)

    def revoke(self, task_ids: Sequence[str]) -> None:
        """Tasks are revoked. Nothing here waits."""
        self._known.update(task_ids)
        self._queue.put(lambda: self._revoke(list(task_ids)))

    def revoke_stamped(self, stamps: Mapping[str, set[str]]) -> None:
        """Tasks with any of these stamps, by header, are revoked. Those to come are known to this process alone."""
        for header, values in stamps.items():
            self._stamps.setdefault(header, set()).update(values)
        self._queue.put(lambda: self._cancel_stamped(stamps))

    def is_stamped(self, stamps: Mapping[str, object] | None) -> bool:
        """Whether a message's stamps, by header, are among those revoked."""
        return bool(stamps and self._stamps) and _have_common(stamps or {}, self._stamps)

    def cancel(self, task_ids: Sequence[str]) -> None:
        """Cancels jobs of tasks that were revoked before they were recorded."""
        self._queue.put(lambda: self._cancel(task_ids))

    def _revoke_until_stopped(self) -> None:
        while True:
            step = self._queue.get()
            if step is None:
                return
            try:
                until_reachable(step, stop=self._stopping.is_set)
            except Exception:
                log.exception("tasks could not be revoked")

    def _revoke(self, task_ids: Sequence[str]) -> None:
        # Remembered before jobs are looked for, while a task is recorded before it is looked for here: one is found.
        with self._engine.connect() as connection:
            store.remember_revoked(connection, task_ids)
        self._cancel(task_ids)
        with self._engine.connect() as connection:
            known = jobs.states(connection, task_ids)
        self._outbox.revoked(task_id for task_id in task_ids if task_id not in known)

    def _cancel(self, task_ids: Sequence[str]) -> None:
        self._outbox.cancelled(lifecycle.cancel(self._engine, self._publisher, task_ids))

    def _cancel_stamped(self, stamps: Mapping[str, set[str]]) -> None:
        with self._engine.connect() as connection:
            stamped = store.stamped(connection)
        self._cancel([job["id"] for job in stamped if _have_common(job["stamps"], stamps)])


def as_stamps(values: object) -> set[str]:
    """The stamps of one header, which Celery has as one value or several."""
    several = values if isinstance(values, (list, tuple, set)) else [values]
    return {str(value) for value in several if value is not None}


def _have_common(stamps: Mapping[str, object], revoked: Mapping[str, set[str]]) -> bool:
    return any(not as_stamps(values).isdisjoint(revoked.get(header, ())) for header, values in stamps.items())
