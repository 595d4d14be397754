"""Training sessions as recorded: made, settled, ended, brought back. Not their steps, and not their checkpoints."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from sqlalchemy import Connection

from device_operations.jobs import Kind
from device_operations.wire.json_types import FreeJson, JsonObject
from tasks.database import dumps
from tasks.records.training import OPEN_SESSION_SQL
from tasks.statements import Prepared, execute, row, rows
from tasks.training.facts import SessionFacts
from tasks.training.rows import (
    HeldRow,
    HistoryRow,
    ReservedBefore,
    SessionStanding,
    TrainingSessionRow,
)

OPEN = ("initializing", "ready", "restored")


def insert(connection: Connection, session: FreeJson) -> None:
    """Records a session as `initializing`; `sequence` and `step` are those of the checkpoint that it starts from."""
    execute(
        connection,
        """
        INSERT INTO training_sessions (session_id, device_id, state, owner, spec, resumed, blob_ids, init_job_id,
            submitted_sequence, applied_sequence, step, reserved_bytes, lease_seconds)
        VALUES (%(session_id)s, %(device_id)s, 'initializing', %(owner)s, %(spec)s::jsonb, %(resumed)s::jsonb,
            %(blob_ids)s, %(init_job_id)s, %(sequence)s, %(sequence)s, %(step)s, %(reserved_bytes)s, %(lease_seconds)s)
        """,
        {
            **session,
            "spec": dumps(session["spec"]),
            "resumed": None if session["resumed"] is None else dumps(session["resumed"]),
        },
    )


def get(connection: Connection, session_id: str) -> TrainingSessionRow | None:
    """One session, or None."""
    return row(connection, "SELECT * FROM training_sessions WHERE session_id = %(id)s", {"id": session_id})


def standing(connection: Connection, session_id: str) -> SessionStanding | None:
    """Where a session stands: its state, what ended it, and the number of the last step applied."""
    found = _STANDS.rows(connection, {"id": session_id})
    return found[0] if found else None


_STANDS = Prepared(
    "training_standing",
    "SELECT session_id, state, error, applied_sequence FROM training_sessions WHERE session_id = %(id)s",
    {"id": "text"},
)


def lock(connection: Connection, session_id: str) -> TrainingSessionRow | None:
    """One session, its row locked until the transaction ends."""
    return row(connection, "SELECT * FROM training_sessions WHERE session_id = %(id)s FOR UPDATE", {"id": session_id})


def is_stepping(connection: Connection, session: TrainingSessionRow) -> bool:
    """Whether a step of the session runs."""
    found = row(
        connection,
        "SELECT 1 AS one FROM jobs WHERE device_id = %(device_id)s AND finished_at IS NULL AND state = 'running' "
        f"AND kind = '{Kind.TRAINING_STEP}' AND %(session_id)s = ANY(needs) LIMIT 1",
        session,
    )
    return found is not None


def touch(connection: Connection, session_id: str) -> None:
    """The session was used: its lease counts from now."""
    _TOUCH.rows(connection, {"id": session_id})


_TOUCH = Prepared(
    "touch_training",
    f"""
        UPDATE training_sessions SET last_used_at = clock_timestamp(),
            lease_expires_at = clock_timestamp() + make_interval(secs => lease_seconds)
        WHERE session_id = %(id)s AND {OPEN_SESSION_SQL}
        RETURNING session_id
    """,
    {"id": "text"},
)


def settle(connection: Connection, session_id: str, epoch: int, facts: SessionFacts) -> ReservedBefore | None:
    """The session is in memory under `epoch`, as measured; what the history has beyond its step is gone.

    Its `parameters` are listed where `facts` has them. Gives what it had reserved; None where it is not open any more,
    or the epoch no longer stands.
    """
    listed = facts.get("parameters")
    return row(
        connection,
        f"""
        WITH old AS (SELECT session_id, reserved_bytes AS before FROM training_sessions WHERE session_id = %(id)s
            FOR UPDATE),
        beyond AS (DELETE FROM training_history WHERE session_id = %(id)s AND step > %(step)s)
        UPDATE training_sessions SET epoch = %(epoch)s, state = %(state)s, step = %(step)s,
            applied_sequence = %(sequence)s, samples_seen = %(samples_seen)s, learning_rate = %(learning_rate)s,
            memory_bytes = %(memory_bytes)s, reserved_bytes = %(memory_bytes)s, error = NULL,
            parameters = coalesce(%(parameters)s::jsonb, training_sessions.parameters),
            last_used_at = clock_timestamp(),
            lease_expires_at = clock_timestamp() + make_interval(secs => lease_seconds)
        FROM old
        WHERE training_sessions.session_id = old.session_id AND {OPEN_SESSION_SQL}
          AND EXISTS (SELECT 1 FROM devices d WHERE d.device_id = training_sessions.device_id AND d.epoch = %(epoch)s)
        RETURNING device_id, before
        """,
        {**facts, "id": session_id, "epoch": epoch, "parameters": dumps(listed) if listed is not None else None},
    )


def end(
    connection: Connection,
    session_id: str,
    state: str,
    *,
    error: JsonObject | None = None,
    leaving: Sequence[str] = OPEN,
) -> ReservedBefore | None:
    """A session is over (`ended`, `failed`, `lost`) and its log with it. Gives its device and what it had reserved."""
    gone = row(
        connection,
        """
        UPDATE training_sessions SET state = %(state)s, epoch = NULL, reserved_bytes = 0, error = %(error)s::jsonb,
            blob_ids = '{}', lease_expires_at = NULL, ended_at = clock_timestamp()
        FROM (SELECT session_id, reserved_bytes AS before FROM training_sessions WHERE session_id = %(id)s
            FOR UPDATE) AS old
        WHERE training_sessions.session_id = old.session_id AND state = ANY(%(leaving)s)
        RETURNING device_id, before
        """,
        {
            "id": session_id,
            "state": state,
            "error": None if error is None else dumps(error),
            "leaving": list(leaving),
        },
    )
    if gone is not None:
        execute(connection, "DELETE FROM training_steps WHERE session_id = %(id)s", {"id": session_id})
    return gone


def lose(connection: Connection, device_id: str, epoch: int) -> list[str]:
    """A worker died: its sessions are to be brought back by the next epoch. They keep their reservations."""
    found = rows(
        connection,
        """
        UPDATE training_sessions SET state = 'initializing', epoch = NULL
        WHERE device_id = %(id)s AND epoch <= %(epoch)s AND state IN ('ready', 'restored') RETURNING session_id
        """,
        {"id": device_id, "epoch": epoch},
    )
    return [session["session_id"] for session in found]


def to_bring_back(connection: Connection, device_id: str) -> list[TrainingSessionRow]:
    """Sessions that the device held when its worker died, oldest first."""
    return rows(
        connection,
        "SELECT * FROM training_sessions WHERE device_id = %(id)s AND state = 'initializing' AND epoch IS NULL "
        "AND memory_bytes IS NOT NULL ORDER BY opened_at",
        {"id": device_id},
    )


def still_held(connection: Connection, device_id: str, epoch: int) -> dict[str, HeldRow]:
    """The sessions that are recorded as held by `epoch`, with whether their lease is over and no job needs them."""
    found = rows(
        connection,
        """
        SELECT s.session_id, s.applied_sequence, s.lease_expires_at <= clock_timestamp() AND NOT EXISTS (
            SELECT 1 FROM jobs j WHERE j.device_id = s.device_id
                AND j.finished_at IS NULL
                AND s.session_id = ANY(j.needs)) AS idle
        FROM training_sessions s WHERE device_id = %(id)s AND epoch = %(epoch)s
        """,
        {"id": device_id, "epoch": epoch},
    )
    return {session["session_id"]: session for session in found}


def unload(connection: Connection, session_id: str, epoch: int) -> int | None:
    """An idle session leaves the device's memory: what it had reserved; None where it is needed, or not held, now."""
    found = row(
        connection,
        """
        UPDATE training_sessions s SET epoch = NULL, reserved_bytes = 0, state = 'ready'
        FROM (SELECT session_id, reserved_bytes AS before FROM training_sessions WHERE session_id = %(id)s
            FOR UPDATE) AS old
        WHERE s.session_id = old.session_id AND s.epoch = %(epoch)s AND s.lease_expires_at <= clock_timestamp()
          AND NOT EXISTS (SELECT 1 FROM jobs j WHERE j.device_id = s.device_id
                AND j.finished_at IS NULL
                AND s.session_id = ANY(j.needs))
        RETURNING old.before
        """,
        {"id": session_id, "epoch": epoch},
    )
    return int(found["before"]) if found else None


def set_reserved(connection: Connection, session_id: str, reserved_bytes: int) -> None:
    """Notes what of the device's budget is reserved for a session that is about to come back."""
    execute(
        connection,
        "UPDATE training_sessions SET reserved_bytes = %(bytes)s WHERE session_id = %(id)s",
        {"id": session_id, "bytes": reserved_bytes},
    )


def set_error(connection: Connection, session_id: str, error: JsonObject | None) -> None:
    """Notes of an open session what went wrong outside of its steps, or that it is well again."""
    execute(
        connection,
        f"UPDATE training_sessions SET error = %(error)s::jsonb WHERE session_id = %(id)s AND {OPEN_SESSION_SQL}",
        {"id": session_id, "error": None if error is None else dumps(error)},
    )


def forget(connection: Connection, older_than_days: float, limit: int) -> int:
    """Deletes sessions that ended longer ago than the retention and have no checkpoint left, with their history."""
    gone = rows(
        connection,
        """
        DELETE FROM training_sessions WHERE session_id IN (SELECT session_id FROM training_sessions s
            WHERE ended_at < clock_timestamp() - make_interval(secs => %(seconds)s)
              AND NOT EXISTS (SELECT 1 FROM checkpoints c WHERE c.session_id = s.session_id) LIMIT %(limit)s)
        RETURNING session_id
        """,
        {"seconds": older_than_days * 86400, "limit": limit},
    )
    ids: Collection[str] = [session["session_id"] for session in gone]
    if ids:
        execute(connection, "DELETE FROM training_history WHERE session_id = ANY(%(ids)s)", {"ids": ids})
    return len(gone)


def history(connection: Connection, session_id: str, limit: int) -> list[HistoryRow]:
    """The last `limit` steps, oldest first."""
    return rows(
        connection,
        """
        SELECT step, loss, gradient_norm, learning_rate, at AS time FROM training_history
        WHERE session_id = %(id)s ORDER BY step DESC LIMIT %(limit)s
        """,
        {"id": session_id, "limit": limit},
    )[::-1]
