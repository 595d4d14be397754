"""Celery's remote control of this worker: revocations cancel jobs, and `celery inspect` shows recorded jobs too.

Importing this module registers the commands in place of Celery's own.
"""

from __future__ import annotations

from celery.worker.control import Panel, active, query_task, reserved

from device_operations.wire.ids import is_job_id
from device_operations.wire.json_types import JsonObject
from workers.celery_bridge.events import Untyped
from workers.celery_bridge.pool import Note, SchedulerPool
from workers.celery_bridge.revoked import as_stamps


@Panel.register(name="revoke", type="control", variadic="task_id", signature="[id1 [id2 [... [idN]]]]")
def _revoke(panel: Untyped, task_id: Untyped, **_: object) -> dict[str, str]:
    """Cancels jobs, with `terminate` or without: a job stops at its next step, and harms nothing by that."""
    return _flagged(task_id)


def _flagged(task_id: Untyped) -> dict[str, str]:
    task_ids = [task_id] if isinstance(task_id, str) else list(task_id or ())
    SchedulerPool.service.revoke([one for one in task_ids if is_job_id(one)])
    return {"ok": f"tasks {', '.join(map(str, task_ids[:10]))} flagged as revoked"}


@Panel.register(name="terminate", type="control", variadic="task_id", signature="<signal> [id1 [id2 [... [idN]]]]")
def _terminate(panel: Untyped, signal: object, task_id: Untyped, **_: object) -> dict[str, str]:
    """The same; no job has a process of its own that a signal could be sent to."""
    return _flagged(task_id)


@Panel.register(name="revoke_by_stamped_headers", type="control", variadic="headers", signature="[key=value ...]")
def _revoke_by_stamped_headers(panel: Untyped, headers: Untyped, **_: object) -> dict[str, str]:
    """Cancels direct callers' jobs whose messages have any of these stamps."""
    if isinstance(headers, list):
        headers = dict(header.split("=", 1) for header in headers if isinstance(header, str) and "=" in header)
    stamps = {str(header): as_stamps(values) for header, values in headers.items()}
    SchedulerPool.service.revoke_stamped(stamps)
    return {"ok": f"headers {', '.join(sorted(stamps)[:10])} flagged as revoked"}


def _notes(*, running: bool) -> list[Note]:
    held: list[Note] = SchedulerPool.service.notes(running=running)
    return held


@Panel.register(name="active", alias="dump_active", type="inspect")
def _active(panel: Untyped, safe: bool = False, **_: object) -> list[JsonObject]:
    """The tasks that run."""
    return [*active(panel, safe=safe), *(note.info(panel.hostname) for note in _notes(running=True))]


@Panel.register(name="reserved", alias="dump_reserved", type="inspect")
def _reserved(panel: Untyped, **_: object) -> list[JsonObject]:
    """The tasks that wait here."""
    return [*reserved(panel), *(note.info(panel.hostname) for note in _notes(running=False))]


@Panel.register(
    name="query_task", args=[("ids", str)], variadic="ids", signature="[id1 [id2 [... [idN]]]]", type="inspect"
)
def _query_task(panel: Untyped, ids: Untyped, **_: object) -> JsonObject:
    """What is known of tasks by their ids."""
    wanted = {ids} if isinstance(ids, str) else set(ids or ())
    found: JsonObject = dict(query_task(panel, ids))
    for running, said in ((True, "active"), (False, "reserved")):
        for note in _notes(running=running):
            if note.job_id in wanted:
                found[note.job_id] = (said, note.info(panel.hostname))
    return found
