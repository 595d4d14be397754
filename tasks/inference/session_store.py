"""Inference sessions as recorded: opened, used, ended, looked up."""

from __future__ import annotations

from collections.abc import Collection

from sqlalchemy import Connection

from device_operations.wire.json_types import FreeJson
from tasks.database import dumps
from tasks.inference.rows import OpenSessionRow, SessionRow
from tasks.statements import execute, row, rows


def open_session(connection: Connection, session: FreeJson, limit: int) -> bool:
    """Records a session unless `limit` are open on its device, which is counted under the device's budget row lock."""
    execute(
        connection,
        "SELECT 1 FROM device_budgets WHERE device_id = %(device_id)s FOR UPDATE",
        session,
    )
    return bool(
        execute(
            connection,
            """
            INSERT INTO inference_sessions (session_id, model_id, device_id, state, owner, state_map, initial, blob_ids,
                expires_at)
            SELECT %(session_id)s, %(model_id)s, %(device_id)s, 'active', %(owner)s, %(state_map)s::jsonb,
                %(initial)s::jsonb, %(blob_ids)s, clock_timestamp() + make_interval(secs => %(timeout_seconds)s)
            WHERE (SELECT count(*) FROM inference_sessions WHERE device_id = %(device_id)s AND state = 'active')
                < %(limit)s
            """,
            {
                **session,
                "limit": limit,
                "state_map": dumps(session["state_map"]),
                "initial": dumps(session["initial"]),
            },
        )
    )


#: A session, with how many of its runs are open.
_SESSION = """
    SELECT s.*, (SELECT count(*) FROM jobs j WHERE j.device_id = s.device_id
        AND j.finished_at IS NULL
        AND s.session_id = ANY(j.needs)) AS running
    FROM inference_sessions s"""


def get_session(connection: Connection, session_id: str) -> SessionRow | None:
    """One inference session, with how many of its runs are open."""
    return row(connection, f"{_SESSION} WHERE session_id = %(id)s", {"id": session_id})


def page_sessions(connection: Connection, *, owner: str | None, state: str | None, limit: int) -> list[SessionRow]:
    """Inference sessions, newest first; `state` as it is recorded: active, closed, expired or lost."""
    return rows(
        connection,
        f"""{_SESSION}
        WHERE (%(owner)s::text IS NULL OR owner = %(owner)s) AND (%(state)s::text IS NULL OR state = %(state)s)
        ORDER BY opened_at DESC LIMIT %(limit)s
        """,
        {"owner": owner, "state": state, "limit": limit},
    )


def use_session(
    connection: Connection, session_id: str, job_id: str, epoch: int | None, *, succeeded: int, failed: int,
    timeout_seconds: float,
) -> None:  # fmt: skip
    """Counts a run of the session and prolongs it. `epoch` is where its state lies from now on."""
    execute(
        connection,
        """
        UPDATE inference_sessions SET succeeded = succeeded + %(succeeded)s, failed = failed + %(failed)s,
            last_job_id = %(job)s, last_used_at = clock_timestamp(), epoch = coalesce(%(epoch)s, epoch),
            expires_at = clock_timestamp() + make_interval(secs => %(timeout)s)
        WHERE session_id = %(id)s AND state = 'active'
        """,
        {
            "id": session_id, "job": job_id, "epoch": epoch, "succeeded": succeeded, "failed": failed,
            "timeout": timeout_seconds,
        },
    )  # fmt: skip


def end_sessions(connection: Connection, session_ids: Collection[str], state: str) -> list[str]:
    """Open sessions become `closed`, `expired` or `lost`."""
    found = rows(
        connection,
        """
        UPDATE inference_sessions SET state = %(state)s, ended_at = clock_timestamp()
        WHERE session_id = ANY(%(ids)s) AND state = 'active' RETURNING session_id
        """,
        {"ids": list(session_ids), "state": state},
    )
    return [session["session_id"] for session in found]


def expire_sessions(connection: Connection) -> list[str]:
    """Open sessions past their expiry without an open run are `expired`: their ids."""
    found = rows(
        connection,
        """
        UPDATE inference_sessions s SET state = 'expired', ended_at = clock_timestamp()
        WHERE state = 'active' AND expires_at <= clock_timestamp()
          AND NOT EXISTS (SELECT 1 FROM jobs j WHERE j.device_id = s.device_id
                AND j.finished_at IS NULL
                AND s.session_id = ANY(j.needs))
        RETURNING session_id
        """,
    )
    return [session["session_id"] for session in found]


def open_sessions(connection: Connection, model_id: str) -> list[OpenSessionRow]:
    """The open sessions of a model: id and owner."""
    return rows(
        connection,
        "SELECT session_id, owner FROM inference_sessions WHERE model_id = %(id)s AND state = 'active' "
        "ORDER BY opened_at",
        {"id": model_id},
    )


def still_open(connection: Connection, session_ids: Collection[str]) -> set[str]:
    """Those of `session_ids` that are open."""
    found = rows(
        connection,
        "SELECT session_id FROM inference_sessions WHERE session_id = ANY(%(ids)s) AND state = 'active'",
        {"ids": list(session_ids)},
    )
    return {session["session_id"] for session in found}


def stateful_sessions(connection: Connection, device_id: str, epoch: int) -> list[str]:
    """Open sessions whose state tensors lay on the device in epochs up to `epoch`."""
    found = rows(
        connection,
        "SELECT session_id FROM inference_sessions WHERE device_id = %(id)s AND state = 'active' "
        "AND epoch <= %(epoch)s AND state_map <> '{}'::jsonb",
        {"id": device_id, "epoch": epoch},
    )
    return [session["session_id"] for session in found]
