"""What Celery is still to be given of ended jobs, and the tasks that were revoked."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TypedDict

from sqlalchemy import Connection

from device_operations.wire.json_types import FreeJson
from tasks.database import dumps
from tasks.jobs.model import JobRow
from tasks.jobs.store.columns import SELECTED
from tasks.statements import execute, rows

#: How many revoked tasks are remembered, and for how long: Celery's own numbers.
REVOKED_TASKS = 50_000
REVOKED_SECONDS = 10_800.0

#: Seconds after its end in which the process that ended a job gives it to Celery itself. Only a worker's end, which
#: has an epoch, takes the longer way through its completer.
WORKER_SECONDS = 2.0
OTHER_SECONDS = 0.5


class PendingRow(JobRow):
    """The row of an ended job that Celery was not given, with the seconds since its end."""

    age_seconds: float


class StampedJob(TypedDict):
    """An open job whose Celery message was stamped, and the stamps by header."""

    id: str
    stamps: FreeJson


def pending(connection: Connection, limit: int) -> list[PendingRow]:
    """Jobs that ended some time ago and that Celery was not given, oldest first; `age_seconds` counts from the end."""
    return rows(
        connection,
        f"""
        SELECT extract(epoch FROM clock_timestamp() - finished_at)::float8 AS age_seconds, {SELECTED} FROM jobs
        WHERE celery IS NOT NULL AND finished_at IS NOT NULL
          AND finished_at < clock_timestamp() - make_interval(secs => CASE WHEN epoch IS NULL THEN %(other)s
              ELSE %(worker)s END)
        ORDER BY finished_at LIMIT %(limit)s
        """,
        {"worker": WORKER_SECONDS, "other": OTHER_SECONDS, "limit": limit},
    )


def note_published(connection: Connection, job_id: str, children: Sequence[object]) -> None:
    """Notes that a job's callbacks, or what is linked to its error, were published, with their results' tuples."""
    execute(
        connection,
        """
        UPDATE jobs SET celery = celery - '{callbacks,chain,errbacks}'::text[]
            || jsonb_build_object('published', %(children)s::jsonb)
        WHERE id = %(id)s AND celery IS NOT NULL AND finished_at IS NOT NULL
        """,
        {"id": job_id, "children": dumps(children)},
    )


def settle(connection: Connection, job_ids: Collection[str]) -> None:
    """Notes that Celery was given all of these jobs."""
    execute(
        connection,
        "UPDATE jobs SET celery = NULL WHERE id = ANY(%(ids)s) AND finished_at IS NOT NULL",
        {"ids": list(job_ids)},
    )


def stamped(connection: Connection) -> list[StampedJob]:
    """The open jobs of direct callers whose messages were stamped: their ids, and `stamps` by header."""
    return rows(
        connection,
        "SELECT id, celery -> 'stamps' AS stamps FROM jobs WHERE finished_at IS NULL "
        "AND jsonb_typeof(celery -> 'stamps') = 'object'",
    )


def remember_revoked(connection: Connection, task_ids: Collection[str]) -> None:
    """Remembers revoked tasks, among them those that no job is known of yet."""
    execute(
        connection,
        "INSERT INTO revoked_tasks (task_id) SELECT DISTINCT unnest(%(ids)s::text[]) ON CONFLICT DO NOTHING",
        {"ids": list(task_ids)},
    )


def revoked(connection: Connection) -> list[str]:
    """The revoked tasks that are remembered, oldest first."""
    found = rows(
        connection,
        """
        SELECT task_id FROM (SELECT task_id, revoked_at FROM revoked_tasks
            WHERE revoked_at > clock_timestamp() - make_interval(secs => %(seconds)s)
            ORDER BY revoked_at DESC LIMIT %(limit)s) AS newest ORDER BY revoked_at
        """,
        {"seconds": REVOKED_SECONDS, "limit": REVOKED_TASKS},
    )
    return [task["task_id"] for task in found]


def forget_revoked(connection: Connection) -> None:
    """Forgets revoked tasks that are remembered no longer."""
    execute(
        connection,
        """
        DELETE FROM revoked_tasks WHERE revoked_at < clock_timestamp() - make_interval(secs => %(seconds)s)
          OR task_id IN (SELECT task_id FROM revoked_tasks ORDER BY revoked_at DESC OFFSET %(limit)s)
        """,
        {"seconds": REVOKED_SECONDS, "limit": REVOKED_TASKS},
    )
