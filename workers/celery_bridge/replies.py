"""What Celery is given of tasks that ended without having run here: its events, and the results that it is owed."""

from __future__ import annotations

from tasks.celery_bridge.outbox import Outbox
from tasks.jobs import store
from tasks.statements import Row
from workers.celery_bridge.events import Dispatcher
from workers.celery_bridge.pool import Handle
from workers.execution.scheduler import MessageHandle


class CeleryReplies:
    """Replies by the outbox and by messages' handles. Any thread may call."""

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox

    def ended(self, row: Row, handle: MessageHandle | None) -> None:
        """A job ended and did not run here: its events, and its result if its caller is owed one."""
        self._outbox.ended([row])
        if handle is not None:
            handle.ended(store.view(row))

    def ended_before(self, row: Row, handle: Handle) -> None:
        """A direct caller's message came after its job's end."""
        if row["celery"] is not None:
            self._outbox.ended([row])
        elif not handle.header("ignore_result"):
            self._outbox.ended_before(row)
        handle.ended(store.view(row))

    def unknown(self, task_id: str, task: str) -> None:
        """The failure of a task that no worker has, as Celery's own worker reports it."""
        self._outbox.unknown(task_id, task)
        Dispatcher.note("task-failed", task_id, retry=False, exception=f"NotRegistered({task!r})", traceback="")
