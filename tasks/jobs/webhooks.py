"""Webhooks: which are to be delivered, and what came of them. Their facts are columns of the job itself."""

from __future__ import annotations

from sqlalchemy import Connection

from tasks.jobs.model import WebhookRow
from tasks.jobs.store.columns import SELECTED
from tasks.statements import execute, rows


def due(connection: Connection, limit: int, lease_seconds: float) -> list[WebhookRow]:
    """Webhooks to deliver now; each is put off by `lease_seconds`, so that another gateway leaves it alone."""
    return rows(
        connection,
        f"""
        UPDATE jobs SET webhook_attempt = webhook_attempt + 1,
            webhook_due_at = clock_timestamp() + make_interval(secs => %(lease)s)
        WHERE id IN (SELECT id FROM jobs WHERE webhook_due_at <= clock_timestamp() ORDER BY webhook_due_at
            LIMIT %(limit)s FOR UPDATE SKIP LOCKED)
        RETURNING webhook_attempt, {SELECTED}
        """,
        {"limit": limit, "lease": lease_seconds},
    )


def settle(connection: Connection, job_id: str, retry_in_seconds: float | None) -> None:
    """A webhook was delivered or given up (None), or is to be tried again in `retry_in_seconds`."""
    execute(
        connection,
        """
        UPDATE jobs SET webhook_due_at = clock_timestamp() + make_interval(secs => %(seconds)s),
            webhook_attempt = CASE WHEN %(seconds)s IS NULL THEN NULL ELSE webhook_attempt END
        WHERE id = %(id)s
        """,
        {"id": job_id, "seconds": retry_in_seconds},
    )
