"""Celery's revocations: jobs that wait or run are cancelled, and a task whose message comes later does not run.

Every worker hears of each. They are remembered in PostgreSQL, so that a worker that starts later knows them too.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from queue import SimpleQueue

import structlog
from celery.worker import state
from sqlalchemy import Engine

from tasks import lifecycle
from tasks.database import until_reachable
from tasks.outbox import Outbox
from tasks.publish import Publisher
from tasks.store import celery as store

log = structlog.get_logger(__name__)


class Revoked:
    """The revoked tasks. `in` may be asked from any thread, and `cancel` and `revoke` called."""

    def __init__(self, engine: Engine, publisher: Publisher, outbox: Outbox) -> None:
        self._engine = engine
        self._publisher = publisher
        self._outbox = outbox
        #: Celery's own, which `inspect revoked` shows.
        self._known = state.revoked
        self._queue: SimpleQueue[tuple[list[str], bool] | None] = SimpleQueue()
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
        self._queue.put((list(task_ids), True))

    def cancel(self, task_ids: Sequence[str]) -> None:
        """Cancels jobs of tasks that were revoked before they were recorded."""
        self._queue.put((list(task_ids), False))

    def _revoke_until_stopped(self) -> None:
        while True:
            asked = self._queue.get()
            if asked is None:
                return
            try:
                until_reachable(lambda asked=asked: self._revoke(*asked), stop=self._stopping.is_set)  # type: ignore[misc]
            except Exception:
                log.exception("tasks could not be revoked", tasks=len(asked[0]))

    def _revoke(self, task_ids: list[str], new: bool) -> None:
        # Remembered before jobs are looked for, while a task is recorded before it is looked for here: one is found.
        if new:
            with self._engine.connect() as connection:
                store.remember_revoked(connection, task_ids)
        self._outbox.cancelled(lifecycle.cancel(self._engine, self._publisher, task_ids))
