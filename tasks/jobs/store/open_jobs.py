"""Open jobs that something has to be done about: published again, expired, cancelled, or failed with what they need."""

from __future__ import annotations

from collections.abc import Collection

from sqlalchemy import Connection

from device_operations.jobs import CLAIMABLE, FALL_DUE, OPEN, State
from tasks.jobs.model import CancelRequested, ClaimedRow, FailedPredecessor, JobRow, RequiringRow
from tasks.jobs.store.columns import SELECTED
from tasks.records.states import listed
from tasks.statements import rows


def waiting(connection: Connection, device_id: str, older_than_seconds: float, limit: int) -> list[ClaimedRow]:
    """Jobs of the device that wait for a worker, oldest first: each row is its own outbox."""
    return rows(
        connection,
        f"""
        SELECT request, {SELECTED} FROM jobs
        WHERE device_id = %(device_id)s AND finished_at IS NULL AND state IN ('queued', 'reserved') AND epoch IS NULL
          AND submitted_at < clock_timestamp() - make_interval(secs => %(age)s)
        ORDER BY seq LIMIT %(limit)s
        """,
        {"device_id": device_id, "age": older_than_seconds, "limit": limit},
    )


def make_due(connection: Connection, limit: int) -> list[ClaimedRow]:
    """Scheduled and retrying jobs whose time has come become `queued`, with their requests for publishing."""
    return rows(
        connection,
        f"""
        UPDATE jobs SET state = '{State.QUEUED}', due_at = NULL WHERE id IN (
            SELECT id FROM jobs WHERE due_at <= clock_timestamp() AND finished_at IS NULL
              AND state IN {listed(FALL_DUE.leaving)} ORDER BY due_at LIMIT %(limit)s FOR UPDATE SKIP LOCKED)
          AND state IN {listed(FALL_DUE.leaving)}
        RETURNING request, {SELECTED}
        """,
        {"limit": limit},
    )


def expired(connection: Connection, limit: int) -> list[JobRow]:
    """Jobs that waited past their expiry and that no worker has claimed: a worker ends those that it has itself."""
    return rows(
        connection,
        f"SELECT {SELECTED} FROM jobs WHERE expires_at <= clock_timestamp() AND finished_at IS NULL "
        f"AND state IN {listed(CLAIMABLE)} AND epoch IS NULL LIMIT %(limit)s",
        {"limit": limit},
    )


def expired_among(connection: Connection, job_ids: Collection[str]) -> set[str]:
    """Those of `job_ids` whose expiry is past, by the database's clock."""
    found = rows(
        connection,
        "SELECT id FROM jobs WHERE id = ANY(%(ids)s) AND expires_at <= clock_timestamp()",
        {"ids": list(job_ids)},
    )
    return {job["id"] for job in found}


def open_needing(connection: Connection, resource_ids: Collection[str]) -> list[JobRow]:
    """Jobs that no worker has claimed and that need any of the resources."""
    return rows(
        connection,
        f"""
        SELECT {SELECTED} FROM jobs
        WHERE finished_at IS NULL AND state IN {listed(CLAIMABLE)} AND epoch IS NULL AND needs && %(ids)s::text[]
        ORDER BY seq
        """,
        {"ids": list(resource_ids)},
    )


def open_requiring(connection: Connection, job_ids: Collection[str]) -> list[RequiringRow]:
    """Jobs that no worker has claimed and that require any of `job_ids` to succeed; `requires` names what they do."""
    return rows(
        connection,
        f"""
        SELECT {SELECTED}, requires FROM jobs
        WHERE finished_at IS NULL AND requires IS NOT NULL AND requires && %(ids)s::text[] AND epoch IS NULL
        ORDER BY seq
        """,
        {"ids": list(job_ids)},
    )


def failed_before(connection: Connection, job_ids: Collection[str]) -> dict[str, FailedPredecessor]:
    """For those of `job_ids` that require a job which did not succeed, one such job: id, kind, state and error."""
    found = rows(
        connection,
        """
        SELECT jobs.id AS after_id, before.id, before.kind, before.state, before.error
        FROM jobs JOIN jobs AS before ON before.id = ANY(jobs.requires)
        WHERE jobs.id = ANY(%(ids)s) AND before.finished_at IS NOT NULL AND before.state <> 'succeeded'
        """,
        {"ids": list(job_ids)},
    )
    return {row.pop("after_id"): row for row in found}


def open_ids_needing(connection: Connection, resource_id: str) -> list[str]:
    """Open jobs, running ones too, that need the resource."""
    found = rows(
        connection,
        "SELECT id FROM jobs WHERE finished_at IS NULL AND %(id)s = ANY(needs) ORDER BY seq",
        {"id": resource_id},
    )
    return [job["id"] for job in found]


def open_ids_of(connection: Connection, resource_id: str) -> list[str]:
    """Those of them whose own resource it is: they make it, or take it away."""
    found = rows(
        connection,
        "SELECT id FROM jobs WHERE finished_at IS NULL AND %(id)s = ANY(needs) AND resource_id = %(id)s ORDER BY seq",
        {"id": resource_id},
    )
    return [job["id"] for job in found]


def request_cancel(connection: Connection, job_ids: Collection[str]) -> list[JobRow]:
    """Notes that callers want jobs cancelled; gives those that have not ended."""
    return rows(
        connection,
        f"""
        UPDATE jobs SET cancel_requested = true WHERE id = ANY(%(ids)s) AND state IN {listed(OPEN)} RETURNING {SELECTED}
        """,
        {"ids": list(job_ids)},
    )


def request_cancel_of(connection: Connection, job_ids: Collection[str], *, but_not_of: str) -> list[str]:
    """Notes for jobs among `job_ids` that they are to be cancelled, but for those whose own resource `but_not_of` is.

    Gives those that are open.
    """
    found = rows(
        connection,
        "UPDATE jobs SET cancel_requested = true WHERE id = ANY(%(ids)s) AND resource_id IS DISTINCT FROM %(resource)s "
        f"AND state IN {listed(OPEN)} RETURNING id",
        {"ids": list(job_ids), "resource": but_not_of},
    )
    return [job["id"] for job in found]


def to_be_cancelled(connection: Connection, resource_id: str) -> list[CancelRequested]:
    """Open jobs that need the resource and were asked to be cancelled: id and device."""
    return rows(
        connection,
        "SELECT id, device_id FROM jobs WHERE finished_at IS NULL AND %(id)s = ANY(needs) AND cancel_requested "
        "AND device_id IS NOT NULL ORDER BY seq",
        {"id": resource_id},
    )
