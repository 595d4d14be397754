"""Ending jobs: those that a worker has claimed, and those that no worker will end. Deleting them past the retention."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from typing import TypedDict

from sqlalchemy import Connection

from device_operations.jobs import FINISH, WITHDRAW, State
from device_operations.wire.json_types import FreeJson
from tasks.database import dumps
from tasks.jobs.model import ClaimedRow, Ending, JobRow
from tasks.jobs.store.columns import SELECTED_OF_JOBS
from tasks.records.states import listed
from tasks.statements import Prepared, rows

#: The jobs that their worker may end.
FINISH_GUARD = f"jobs.state IN {listed(FINISH.leaving)} AND jobs.epoch = %(epoch)s"


def end_running(
    connection: Connection, endings: Sequence[Ending], epoch: int, claimed: Mapping[str, ClaimedRow] | None = None
) -> list[JobRow]:
    """Ends jobs claimed under `epoch`. Jobs that are not returned had been ended, or put back, by another process.

    `claimed` are the rows as they were claimed: with them, only the columns that an end changes are read.
    """
    recorded = dumps(list(endings))
    # `dumps` replaces NUL, which PostgreSQL refuses: such a result or error is read back as it was recorded.
    if claimed is None or "\\ufffd" in recorded or not all(ending.id in claimed for ending in endings):
        return _end(connection, endings, FINISH_GUARD, {"epoch": epoch})
    ids = [ending.id for ending in endings]
    end = _END_RUNNING if all(ending.started_at is None for ending in endings) else _END_AHEAD
    stamped = end.rows(connection, {"endings": recorded, "ids": ids, "epoch": epoch})
    by_id = {ending.id: ending for ending in endings}
    return [_ended(claimed[one["id"]], one, by_id[one["id"]]) for one in stamped]


class _Stamped(TypedDict):
    """What PostgreSQL gives of a job that a worker has ended."""

    id: str
    state: str
    device_ms: float | None
    finished_at: datetime
    cancel_requested: bool
    progress: FreeJson | None


def _ended(claimed: ClaimedRow, stamped: _Stamped, ending: Ending) -> ClaimedRow:
    return {**claimed, **stamped, "result": ending.result, "error": ending.error}


def end_open(
    connection: Connection, endings: Sequence[Ending], leaving: Collection[str] = WITHDRAW.leaving
) -> list[JobRow]:
    """Ends jobs from any of the states `leaving`, claimed or not. No job succeeds in this way."""
    states = {"leaving": sorted(WITHDRAW.leaving & set(leaving)), "entering": sorted(WITHDRAW.entering)}
    return _end(connection, endings, "jobs.state = ANY(%(leaving)s) AND ended.state = ANY(%(entering)s)", states)


#: How a job's row ends, from a row `ended` that says how.
SET_ENDED = """state = ended.state, result = nullif(ended.result, 'null'), error = nullif(ended.error, 'null'),
            device_ms = coalesce(ended.device_ms, jobs.device_ms), finished_at = clock_timestamp(),
            webhook_attempt = CASE WHEN webhook_url IS NOT NULL THEN 0 END,
            webhook_due_at = CASE WHEN webhook_url IS NOT NULL THEN clock_timestamp() END"""

_ENDINGS = """jsonb_to_recordset(%(endings)s::jsonb)
            AS ended (id text, state text, result jsonb, error jsonb, device_ms float8)"""


def _end_claimed(name: str, sets: str, endings: str) -> Prepared:
    return Prepared(
        name,
        f"""
        UPDATE jobs SET {sets} FROM {endings}
        WHERE jobs.id = ANY(%(ids)s) AND jobs.id = ended.id AND {FINISH_GUARD}
        RETURNING jobs.id, jobs.state, jobs.device_ms, jobs.finished_at, jobs.cancel_requested, jobs.progress
        """,
        {"endings": "jsonb", "ids": "text[]", "epoch": "int"},
    )


_END_RUNNING = _end_claimed("end_running_jobs", SET_ENDED, _ENDINGS)

#: The same for jobs that were claimed ahead of the device: when it began with them may not be recorded yet.
_SET_ENDED_AHEAD = f"""{SET_ENDED}, started_at = coalesce(jobs.started_at, ended.started_at),
            attempt = jobs.attempt + (jobs.state = '{State.RESERVED}' AND ended.started_at IS NOT NULL)::int"""

_ENDINGS_AHEAD = """jsonb_to_recordset(%(endings)s::jsonb)
            AS ended (id text, state text, result jsonb, error jsonb, device_ms float8, started_at timestamptz)"""

_END_AHEAD = _end_claimed("end_jobs_claimed_ahead", _SET_ENDED_AHEAD, _ENDINGS_AHEAD)


def _end(
    connection: Connection, endings: Sequence[Ending], guard: str, parameters: Mapping[str, object]
) -> list[JobRow]:
    return rows(
        connection,
        f"""
        UPDATE jobs SET {_SET_ENDED_AHEAD} FROM {_ENDINGS_AHEAD} WHERE jobs.id = ended.id AND {guard}
        RETURNING {SELECTED_OF_JOBS}
        """,
        {"endings": dumps(list(endings)), **parameters},
    )
