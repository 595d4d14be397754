"""Claims ahead of the device: the job is a worker's, waits for the device as `reserved`, and has not started.

    claim_ahead ─▶ reserved under the epoch ─▶ (the device begins) ─▶ end_running, or mark_begun where it takes long

Most runs are over a few milliseconds after the device began with them: the statement that ends one also records when
it began. Only what still runs a while later gets a statement of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import datetime

from sqlalchemy import Connection

from device_operations.jobs import BEGIN, CLAIM_AHEAD, State
from tasks.database import dumps
from tasks.jobs.model import ClaimedRow
from tasks.jobs.store.claiming import Claims
from tasks.records.states import listed
from tasks.statements import Prepared

_CLAIM_AHEAD = Claims("claim_jobs_ahead", CLAIM_AHEAD, "started_at = NULL", returns="clock_timestamp() AS claimed_at,")


def claim_ahead(connection: Connection, job_ids: Collection[str], device_id: str, epoch: int) -> list[ClaimedRow]:
    """Claims jobs that the device is to begin with later, under the same conditions as `jobs.claim`.

    Their rows have `claimed_at` besides: the database's clock at the claim, from which the worker counts on.
    """
    return _CLAIM_AHEAD.claim(connection, job_ids, device_id, epoch)


def mark_begun(connection: Connection, started: Mapping[str, datetime], epoch: int) -> None:
    """Notes that the device has begun with jobs that were claimed ahead: when, by the id of each."""
    begun = [{"id": job_id, "started_at": at} for job_id, at in started.items()]
    _MARK_BEGUN.rows(connection, {"begun": dumps(begun), "ids": list(started), "epoch": epoch})


_MARK_BEGUN = Prepared(
    "mark_begun_jobs",
    f"""
    UPDATE jobs SET state = '{State.RUNNING}', attempt = attempt + 1, started_at = begun.started_at
    FROM jsonb_to_recordset(%(begun)s::jsonb) AS begun (id text, started_at timestamptz)
    WHERE jobs.id = ANY(%(ids)s) AND jobs.id = begun.id AND jobs.state IN {listed(BEGIN.leaving)}
      AND jobs.epoch = %(epoch)s
    RETURNING jobs.id
    """,
    {"begun": "jsonb", "ids": "text[]", "epoch": "int"},
)
