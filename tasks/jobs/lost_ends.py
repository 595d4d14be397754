"""Ends of jobs that the record does not have, although they happened: lost with the last of PostgreSQL's log.

A lost end leaves its row running; with its claim lost too the row waits again; with its submission lost there is none.
"""

from __future__ import annotations

from collections.abc import Collection

from sqlalchemy import Connection

from device_operations.jobs import RECOVER, State
from tasks.jobs.model import ClaimedRow, ClaimedSince, JobRow
from tasks.jobs.store.claiming import CLAIMED_UNDER
from tasks.jobs.store.columns import ENDED, KEPT, SELECTED
from tasks.records.states import listed
from tasks.statements import row, rows


def _given(name: str) -> str:
    if name == "finished_at":
        return "coalesce(kept.finished_at, clock_timestamp())"
    return f"nullif(kept.{name}, 'null')" if name in ("progress", "result", "error", "celery") else f"kept.{name}"


_RECORD = f"""
    INSERT INTO jobs ({", ".join(KEPT)}, webhook_attempt, webhook_due_at)
    SELECT {", ".join(map(_given, KEPT))}, CASE WHEN kept.webhook_url IS NOT NULL THEN 0 END,
        CASE WHEN kept.webhook_url IS NOT NULL THEN clock_timestamp() END
    FROM jsonb_to_recordset(%(jobs)s::jsonb) AS kept ({", ".join(f"{name} {kind}" for name, kind in KEPT.items())})
    {{where}}
    ON CONFLICT (id) DO UPDATE SET {", ".join(f"{name} = excluded.{name}" for name in ENDED)}, due_at = NULL,
        webhook_attempt = excluded.webhook_attempt, webhook_due_at = excluded.webhook_due_at
    WHERE jobs.state IN {listed(RECOVER.leaving)} {{guard}}
    RETURNING {SELECTED}
"""

_ANNOUNCED = _RECORD.format(where="", guard="")

_UNANNOUNCED = _RECORD.format(
    where="WHERE EXISTS (SELECT 1 FROM devices d WHERE d.device_id = kept.device_id AND d.epoch = kept.epoch "
    "AND NOT d.buried)",
    # As the claim found it. One that a worker's death put back has its attempt, and a death more.
    guard="AND jobs.epoch IS NULL AND jobs.attempt = excluded.attempt - 1 AND jobs.deaths = excluded.deaths",
)


def record_again(connection: Connection, jobs: str) -> list[JobRow]:
    """Records ends that were announced, whatever became of their rows; gives those that had been lost.

    `jobs` is a JSON array of whole rows with their requests. What was announced is final: no epoch is asked for.
    """
    return rows(connection, _ANNOUNCED, {"jobs": jobs})


def record_unclaimed(connection: Connection, jobs: str) -> list[JobRow]:
    """Records ends of jobs whose claim was lost, if the epoch that ran them stands; gives those that ended so.

    The form is the same; `finished_at` may be null, and is now. Nothing changes of a row that was put back, claimed or
    ended since.
    """
    return rows(connection, _UNANNOUNCED, {"jobs": jobs})


def held_by(
    connection: Connection, job_ids: Collection[str], device_id: str, epoch: int, *, ahead: bool
) -> list[ClaimedRow]:
    """Those of `job_ids` that were claimed under `epoch`, for the device or `ahead` of it, as that claim gives them."""
    claimed_at = "clock_timestamp() AS claimed_at," if ahead else ""
    return rows(
        connection,
        f"SELECT request, {claimed_at} {SELECTED} FROM jobs WHERE id = ANY(%(ids)s) AND state = %(state)s "
        "AND device_id = %(device)s AND epoch = %(epoch)s AND finished_at IS NULL",
        {
            "ids": list(job_ids),
            "state": State.RESERVED if ahead else State.RUNNING,
            "device": device_id,
            "epoch": epoch,
        },
    )


def on_disk(connection: Connection, job_id: str) -> JobRow | None:
    """The job's row, which is on the disk now, and all that was recorded before; None where there is none.

    A commit waits until the log is on the disk up to its own end. This one is the row's own, and changes nothing.
    """
    return row(
        connection, f"UPDATE jobs SET priority = priority WHERE id = %(id)s RETURNING {SELECTED}", {"id": job_id}
    )


def flushed(connection: Connection) -> tuple[int, int]:
    """Bytes of PostgreSQL's log that are written so far, and of those on the disk, counted from its beginning."""
    found = row(
        connection,
        "SELECT (pg_current_wal_insert_lsn() - '0/0')::bigint AS written, "
        "(pg_current_wal_flush_lsn() - '0/0')::bigint AS flushed",
    )
    assert found is not None
    return found["written"], found["flushed"]


def claimed(connection: Connection, device_id: str, epoch: int) -> list[ClaimedSince]:
    """What is claimed under `epoch`, begun or not: id, whether it is to be cancelled, and an age.

    `age_seconds` counts from the start, or from the submission where the device has not begun with it.
    """
    return rows(
        connection,
        "SELECT id, cancel_requested, "
        "extract(epoch FROM clock_timestamp() - coalesce(started_at, submitted_at))::float8 AS age_seconds "
        f"FROM jobs WHERE device_id = %(device_id)s AND finished_at IS NULL AND {CLAIMED_UNDER}",
        {"device_id": device_id, "epoch": epoch},
    )
