"""Claiming jobs under a device's epoch, and putting back what was claimed."""

from __future__ import annotations

from collections.abc import Collection

from sqlalchemy import Connection

from device_operations.jobs import CLAIM, CLAIMED, RECEIVE, REQUEUE, RETRY, State, Transition
from device_operations.wire.json_types import JsonObject
from tasks.database import dumps
from tasks.jobs.model import ClaimedRow, JobRow
from tasks.jobs.store.columns import SELECTED
from tasks.records.states import listed
from tasks.statements import Prepared, execute, row, rows

#: Which jobs among `ids` may be claimed. An open job has an epoch exactly while a worker holds a claim on it, so that
#: what was claimed ahead of its device, and is still `reserved`, is not claimed twice.
_MAY_BE_CLAIMED = """id = ANY(%(ids)s) AND state = ANY(%(leaving)s) AND epoch IS NULL AND NOT cancel_requested
      AND (expires_at IS NULL OR expires_at > clock_timestamp())
      AND EXISTS (SELECT 1 FROM devices WHERE device_id = %(device_id)s AND epoch = %(epoch)s)"""

#: Jobs that require no other to succeed (nearly all), and jobs for which all that they require have succeeded. Two
#: statements, since the second condition would make each claim a quarter more expensive.
REQUIRES_NONE = "requires IS NULL"
REQUIRES_WHAT_SUCCEEDED = """requires IS NOT NULL AND NOT EXISTS (
      SELECT 1 FROM jobs AS before WHERE before.id = ANY(jobs.requires) AND before.state <> 'succeeded')"""

#: The jobs that a worker has claimed under its epoch: those that its device has begun, and those claimed ahead of it.
CLAIMED_UNDER = f"jobs.state IN {listed(CLAIMED)} AND jobs.epoch = %(epoch)s"


class Claims:
    """A way to claim jobs: its transition, what else it sets, and what it returns besides a request and a row."""

    def __init__(self, name: str, transition: Transition, sets: str, returns: str = "") -> None:
        types = {"ids": "text[]", "epoch": "int", "device_id": "text", "leaving": "text[]"}
        (state,) = transition.entering
        self._leaving = sorted(transition.leaving)
        statement = f"""
            UPDATE jobs SET state = '{state}', {sets}, epoch = %(epoch)s, device_id = %(device_id)s, due_at = NULL
            WHERE {_MAY_BE_CLAIMED} AND {{}} RETURNING request, {returns} {SELECTED}
        """
        self._usual = Prepared(name, statement.format(REQUIRES_NONE), types)
        self._requiring = Prepared(f"{name}_requiring", statement.format(REQUIRES_WHAT_SUCCEEDED), types)

    def claim(self, connection: Connection, job_ids: Collection[str], device_id: str, epoch: int) -> list[ClaimedRow]:
        """The rows of what could be claimed."""
        parameters = {"epoch": epoch, "device_id": device_id, "leaving": self._leaving}
        claimed: list[ClaimedRow] = self._usual.rows(connection, {**parameters, "ids": list(job_ids)})
        if len(claimed) < len(job_ids):
            left = sorted(set(job_ids) - {row["id"] for row in claimed})
            claimed += self._requiring.rows(connection, {**parameters, "ids": left})
        return claimed


_CLAIM = Claims("claim_jobs", CLAIM, "attempt = attempt + 1, started_at = clock_timestamp()")


def claim(connection: Connection, job_ids: Collection[str], device_id: str, epoch: int) -> list[ClaimedRow]:
    """Claims jobs for one attempt under `epoch`, with their requests. Jobs that were not claimed are not returned.

    A job is not claimed if another claim holds it, if it was asked to be cancelled, has expired, or requires a job that
    has not succeeded (`after_success`), or if the epoch no longer stands. The statement does not look at `after`: the
    worker's scheduler claims only jobs whose predecessors have ended.
    """
    return _CLAIM.claim(connection, job_ids, device_id, epoch)


def mark_reserved(connection: Connection, job_ids: Collection[str]) -> None:
    """Notes in bulk that a worker holds these jobs in its scheduler."""
    execute(
        connection,
        f"UPDATE jobs SET state = '{State.RESERVED}' WHERE id = ANY(%(ids)s) AND state IN {listed(RECEIVE.leaving)}",
        {"ids": list(job_ids)},
    )


def set_progress(connection: Connection, job_id: str, epoch: int, progress: JsonObject) -> None:
    """Notes how far a running job is."""
    execute(
        connection,
        f"UPDATE jobs SET progress = %(progress)s::jsonb WHERE id = %(id)s AND {CLAIMED_UNDER}",
        {"id": job_id, "epoch": epoch, "progress": dumps(progress)},
    )


def retry(
    connection: Connection, claimed: JobRow, epoch: int, error: JsonObject, delay_seconds: float
) -> JobRow | None:
    """Puts a job back for another attempt after `delay_seconds`; its last error stays readable meanwhile.

    `claimed` is its row as the worker has it, whose attempts count.
    """
    return row(
        connection,
        f"""
        UPDATE jobs SET state = '{State.RETRYING}', error = %(error)s::jsonb, attempt = %(attempt)s, epoch = NULL,
            started_at = NULL, due_at = clock_timestamp() + make_interval(secs => %(delay)s)
        WHERE id = %(id)s AND state IN {listed(RETRY.leaving)} AND epoch = %(epoch)s RETURNING {SELECTED}
        """,
        {**claimed, "epoch": epoch, "error": dumps(error), "delay": delay_seconds},
    )


def claimed_under(connection: Connection, device_id: str, epoch: int) -> list[JobRow]:
    """Jobs that a device's epochs up to `epoch` have claimed and not ended, locked."""
    return rows(
        connection,
        f"""
        SELECT {SELECTED} FROM jobs
        WHERE device_id = %(device_id)s AND finished_at IS NULL AND state IN {listed(CLAIMED)}
          AND epoch <= %(epoch)s
        ORDER BY seq FOR UPDATE
        """,
        {"device_id": device_id, "epoch": epoch},
    )


def requeue(connection: Connection, job_ids: Collection[str], *, died: bool) -> list[ClaimedRow]:
    """Claimed jobs become `queued` again, with their requests; `died` counts a worker's death against each.

    What its worker did not live to end was no attempt.
    """
    return rows(
        connection,
        f"""
        UPDATE jobs SET state = '{State.QUEUED}', deaths = deaths + %(died)s,
            attempt = attempt - (state = '{State.RUNNING}')::int,
            started_at = NULL, epoch = NULL, progress = NULL
        WHERE id = ANY(%(ids)s) AND state IN {listed(REQUEUE.leaving)} RETURNING request, {SELECTED}
        """,
        {"ids": list(job_ids), "died": int(died)},
    )
