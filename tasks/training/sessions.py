"""Training sessions: recording, numbering and applying steps, bringing sessions back. Not their checkpoints."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from sqlalchemy import Connection

from device_operations.jobs import Kind
from device_operations.json_types import FreeJson, JsonObject
from tasks.database import dumps
from tasks.jobs.model import Ending, JobRow
from tasks.jobs.store.columns import SELECTED_OF_JOBS
from tasks.jobs.store.ending import SET_ENDED
from tasks.records.training import OPEN_SESSION_SQL
from tasks.statements import Prepared, execute, row, rows
from tasks.training.facts import AppliedStep, SessionFacts, Standing
from tasks.training.rows import (
    HeldRow,
    HistoryRow,
    LoggedStep,
    ReservedBefore,
    SessionStanding,
    StepRow,
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


# ---- numbering


def take_number(
    connection: Connection, session_id: str, sequence: int | None, job_id: str, sha256: str, blob_ids: Sequence[str]
) -> int | None:
    """Gives a step its number (the next one where `sequence` is None) and logs it; None where that number is not next.

    None also where the session is not open any more. The order of the session's jobs is locked by the caller.
    """
    found = row(
        connection,
        f"""
        WITH numbered AS (
            UPDATE training_sessions SET submitted_sequence = submitted_sequence + 1
            WHERE session_id = %(id)s AND {OPEN_SESSION_SQL}
              AND submitted_sequence + 1 = coalesce(%(sequence)s::bigint, submitted_sequence + 1)
            RETURNING submitted_sequence)
        INSERT INTO training_steps (session_id, sequence, job_id, payload_sha256, blob_ids)
        SELECT %(id)s, submitted_sequence, %(job)s, %(sha)s, %(blobs)s FROM numbered
        RETURNING sequence
        """,
        {"id": session_id, "sequence": sequence, "job": job_id, "sha": sha256, "blobs": list(blob_ids)},
    )
    return int(found["sequence"]) if found else None


def numbered(connection: Connection, session_id: str, sequence: int) -> StepRow | None:
    """The logged step of that number, or None."""
    return row(
        connection,
        "SELECT * FROM training_steps WHERE session_id = %(id)s AND sequence = %(sequence)s",
        {"id": session_id, "sequence": sequence},
    )


def free_numbers(connection: Connection, session_id: str, sequence: int, job_id: str) -> list[int]:
    """A step ended unapplied: its number and all higher ones are free again. Gives them; nothing where it has none."""
    found = rows(
        connection,
        """
        WITH own AS (SELECT 1 FROM training_steps WHERE session_id = %(id)s AND sequence = %(sequence)s
                AND job_id = %(job)s AND NOT applied),
        freed AS (DELETE FROM training_steps WHERE session_id = %(id)s AND sequence >= %(sequence)s AND NOT applied
                AND EXISTS (SELECT 1 FROM own) RETURNING sequence),
        back AS (UPDATE training_sessions SET submitted_sequence = %(sequence)s - 1
            WHERE session_id = %(id)s AND EXISTS (SELECT 1 FROM own))
        SELECT sequence FROM freed ORDER BY sequence
        """,
        {"id": session_id, "sequence": sequence, "job": job_id},
    )
    return [step["sequence"] for step in found]


# ---- applying

#: History rows as they come from a worker; a step made again after a death writes the same figures again.
_HISTORY = """
    INSERT INTO training_history (session_id, step, loss, gradient_norm, learning_rate, at)
    SELECT %(id)s, h.step, h.loss, h.gradient_norm, h.learning_rate, to_timestamp(h.at)
    FROM jsonb_to_recordset(%(history)s::jsonb)
        AS h (step bigint, loss float8, gradient_norm float8, learning_rate float8, at float8)
    WHERE EXISTS (SELECT 1 FROM moved)
    ON CONFLICT (session_id, step) DO UPDATE SET loss = excluded.loss, gradient_norm = excluded.gradient_norm,
        learning_rate = excluded.learning_rate, at = excluded.at
"""

#: What a session's row says of where it stands.
_STANDING = """
    step = %(step)s, loss = coalesce(%(loss)s, loss), gradient_norm = coalesce(%(gradient_norm)s, gradient_norm),
    learning_rate = coalesce(%(learning_rate)s, learning_rate), samples_seen = %(samples_seen)s,
    steps_per_second = coalesce(%(steps_per_second)s, steps_per_second),
    cpu_fallback_operators = %(cpu_fallback_operators)s, last_used_at = clock_timestamp(),
    lease_expires_at = clock_timestamp() + make_interval(secs => lease_seconds)
"""


_END_APPLIED = Prepared(
    "end_applied_step",
    f"""
    WITH mine AS (SELECT id FROM jobs WHERE id = %(job)s AND state = 'running' AND epoch = %(epoch)s FOR UPDATE),
    moved AS (
        UPDATE training_sessions SET applied_sequence = %(sequence)s, state = 'ready', {_STANDING}
        WHERE session_id = %(id)s AND applied_sequence = %(sequence)s - 1 AND epoch = %(epoch)s
          AND EXISTS (SELECT 1 FROM mine) AND EXISTS (SELECT 1 FROM training_steps
            WHERE session_id = %(id)s AND sequence = %(sequence)s AND job_id = %(job)s)
        RETURNING session_id),
    logged AS (
        UPDATE training_steps SET applied = true, steps_applied = %(steps_applied)s,
            spooled = %(spooled)s, blob_ids = blob_ids || %(spooled_ids)s
        WHERE session_id = %(id)s AND sequence = %(sequence)s AND EXISTS (SELECT 1 FROM moved)),
    told AS ({_HISTORY}),
    ended AS (
        UPDATE jobs SET {SET_ENDED} FROM (SELECT %(state)s AS state, %(result)s AS result, %(error)s AS error,
            %(device_ms)s AS device_ms) AS ended
        WHERE jobs.id = %(job)s AND EXISTS (SELECT 1 FROM mine) AND EXISTS (SELECT 1 FROM moved)
        RETURNING {SELECTED_OF_JOBS})
    SELECT (SELECT count(*) FROM mine) AS held, ended.* FROM (SELECT 1) AS one LEFT JOIN ended ON true
    """,
    {
        "job": "text", "epoch": "int", "id": "text", "sequence": "bigint", "step": "bigint", "loss": "float8",
        "gradient_norm": "float8", "learning_rate": "float8", "samples_seen": "bigint", "steps_per_second": "float8",
        "steps_applied": "bigint", "spooled": "jsonb", "spooled_ids": "text[]", "history": "jsonb", "state": "text",
        "result": "jsonb", "error": "jsonb", "device_ms": "float8", "cpu_fallback_operators": "text[]",
    },
)  # fmt: skip


def end_applied(connection: Connection, ending: Ending, epoch: int, applied: AppliedStep) -> tuple[bool, JobRow | None]:
    """Records a step that was applied: its number, the session's standing, the history and its job's end, as one.

    Gives whether the job was running under `epoch`, and its row as it ended. The row is None, and nothing was changed,
    if it was not, or the number is not the next one, or `epoch` no longer holds the session. A step is never claimed
    ahead of its device, so its job is `running`. One statement, since every step costs it, and a prepared one, since
    planning it takes longer than running it.
    """
    (found,) = _END_APPLIED.rows(
        connection,
        {
            **applied,
            "id": applied["session_id"],
            "job": ending.id,
            "epoch": epoch,
            "state": ending.state,
            "result": dumps(ending.result),
            "error": dumps(ending.error),
            "device_ms": ending.device_ms,
            "spooled": dumps(applied["spooled"]) if applied["spooled"] else None,
            "history": dumps(applied["history"]),
        },
    )
    held = bool(found.pop("held"))
    return held, found if found["id"] else None


def advance(connection: Connection, session_id: str, epoch: int, standing: Standing) -> None:
    """Notes how far a long job has come, with the history since the last note; nothing unless `epoch` holds it."""
    execute(
        connection,
        f"""
        WITH moved AS (UPDATE training_sessions SET {_STANDING} WHERE session_id = %(id)s AND epoch = %(epoch)s
            RETURNING session_id)
        {_HISTORY}
        """,
        {**standing, "id": session_id, "epoch": epoch, "history": dumps(standing["history"])},
    )


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


# ---- coming and going


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
    """The sessions that are recorded as held by `epoch`, with whether their lease is over and nobody needs them."""
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
    """Notes what of the device's budget is set aside for a session that is about to come back."""
    execute(
        connection,
        "UPDATE training_sessions SET reserved_bytes = %(bytes)s WHERE session_id = %(id)s",
        {"id": session_id, "bytes": reserved_bytes},
    )


def set_error(connection: Connection, session_id: str, error: JsonObject | None) -> None:
    """Notes of an open session what went wrong beside its steps, or that it is well again."""
    execute(
        connection,
        f"UPDATE training_sessions SET error = %(error)s::jsonb WHERE session_id = %(id)s AND {OPEN_SESSION_SQL}",
        {"id": session_id, "error": None if error is None else dumps(error)},
    )


def log_since(connection: Connection, session_id: str, after: int, until: int) -> list[LoggedStep]:
    """The applied steps with numbers above `after` up to `until`, in order, each with its job's request."""
    return rows(
        connection,
        """
        SELECT s.sequence, s.steps_applied, s.spooled, s.job_id, j.request
        FROM training_steps s LEFT JOIN jobs j ON j.id = s.job_id
        WHERE s.session_id = %(id)s AND s.sequence > %(after)s AND s.sequence <= %(until)s AND s.applied AND s.kept
        ORDER BY s.sequence
        """,
        {"id": session_id, "after": after, "until": until},
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
