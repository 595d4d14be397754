"""Models and inference sessions: recording, settling, looking up."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from sqlalchemy import Connection

from tasks.database import dumps
from tasks.store.connection import Row, execute, row, rows


def insert(connection: Connection, model: dict[str, Any]) -> bool:
    """Records a model as `loading`; False when the same content is there already."""
    return bool(
        execute(
            connection,
            """
            INSERT INTO models (model_id, name, version, model_type, device_id, state, content_key, sha256, source,
                options, pinned, owner, load_job_id, blob_ids, reserved_bytes)
            VALUES (%(model_id)s, %(name)s, %(version)s, %(model_type)s, %(device_id)s, 'loading', %(content_key)s,
                %(sha256)s, %(source)s::jsonb, %(options)s::jsonb, %(pinned)s, %(owner)s, %(load_job_id)s,
                %(blob_ids)s, %(reserved_bytes)s)
            ON CONFLICT DO NOTHING
            """,
            {**model, "source": dumps(model["source"]), "options": dumps(model["options"])},
        )
    )


def get(connection: Connection, model_id: str) -> Row | None:
    """One model, or None."""
    return row(connection, "SELECT * FROM models WHERE model_id = %(id)s", {"id": model_id})


def same_content(connection: Connection, device_id: str, content_key: str) -> Row | None:
    """The model that is resident, being loaded, or coming back with that content on that device."""
    return row(
        connection,
        "SELECT * FROM models WHERE device_id = %(device)s AND content_key = %(key)s "
        "AND state IN ('loading', 'loaded', 'lost')",
        {"device": device_id, "key": content_key},
    )


def load_again(connection: Connection, model_id: str, *, name: str, version: str, pin: bool) -> None:
    """Notes a further load of the same content: its name, where that is another, and that it is pinned from now on."""
    execute(
        connection,
        """
        UPDATE models SET pinned = pinned OR %(pin)s,
            aliases = CASE WHEN (name, version) = (%(name)s, %(version)s)
                OR aliases @> jsonb_build_array(jsonb_build_array(%(name)s::text, %(version)s::text)) THEN aliases
                ELSE aliases || jsonb_build_array(jsonb_build_array(%(name)s::text, %(version)s::text)) END
        WHERE model_id = %(id)s
        """,
        {"id": model_id, "name": name, "version": version, "pin": pin},
    )


def revive(connection: Connection, model_id: str, job_id: str, reserved_bytes: int) -> Row | None:
    """A model that left its device while a load of the same content waited is `loading` again."""
    return row(
        connection,
        """
        UPDATE models SET state = 'loading', load_job_id = %(job)s, reserved_bytes = %(reserved)s, error = NULL,
            ended_at = NULL, freed_bytes = NULL
        WHERE model_id = %(id)s AND state IN ('unloaded', 'evicted', 'failed') RETURNING *
        """,
        {"id": model_id, "job": job_id, "reserved": reserved_bytes},
    )


def named(connection: Connection, name: str, version: str | None = None) -> list[Row]:
    """Models of that name that can be run (or soon can), newest first."""
    return rows(
        connection,
        """
        SELECT * FROM models WHERE name = %(name)s AND (%(version)s::text IS NULL OR version = %(version)s)
          AND state IN ('loading', 'loaded', 'lost') ORDER BY created_at DESC
        """,
        {"name": name, "version": version},
    )


def page(connection: Connection, *, device_id: str | None, state: str | None, limit: int) -> list[Row]:
    """Models, newest first."""
    return rows(
        connection,
        """
        SELECT * FROM models WHERE (%(device)s::text IS NULL OR device_id = %(device)s)
          AND (%(state)s::text IS NULL OR state = %(state)s) ORDER BY created_at DESC LIMIT %(limit)s
        """,
        {"device": device_id, "state": state, "limit": limit},
    )


def resident(connection: Connection, device_id: str) -> list[Row]:
    """Models that the device holds or was holding when its worker died, oldest first: what a new epoch brings back."""
    return rows(
        connection,
        "SELECT * FROM models WHERE device_id = %(id)s AND state = 'lost' ORDER BY created_at",
        {"id": device_id},
    )


def settle(connection: Connection, model_id: str, epoch: int, facts: dict[str, Any]) -> Row | None:
    """A load ended well: the model is `loaded` under `epoch`, with what was measured. Gives the row as it was."""
    return row(
        connection,
        """
        UPDATE models SET state = 'loaded', epoch = %(epoch)s, inputs = %(inputs)s::jsonb, outputs = %(outputs)s::jsonb,
            memory_bytes = %(memory_bytes)s, reserved_bytes = %(memory_bytes)s, load_ms = %(load_ms)s,
            provider = %(provider)s, cpu_fallback_ops = %(cpu_fallback_ops)s, last_used_at = clock_timestamp(),
            error = NULL, batching = %(batching)s::jsonb, not_offered = %(not_offered)s::jsonb
        FROM (SELECT model_id, reserved_bytes AS before FROM models WHERE model_id = %(id)s FOR UPDATE) AS old
        WHERE models.model_id = old.model_id AND state IN ('loading', 'lost')
        RETURNING device_id, before
        """,
        {
            **facts,
            "id": model_id,
            "epoch": epoch,
            "inputs": dumps(facts["inputs"]),
            "outputs": dumps(facts["outputs"]),
            "batching": dumps(facts["batching"]),
            "not_offered": dumps(facts["not_offered"]),
        },
    )


def end(
    connection: Connection,
    model_id: str,
    state: str,
    *,
    error: dict[str, Any] | None = None,
    freed_bytes: int | None = None,
    leaving: Sequence[str] = ("loading", "loaded", "lost"),
) -> Row | None:
    """A model leaves its device (`failed`, `unloaded`, `evicted`). Gives its device and what it had reserved."""
    return row(
        connection,
        """
        UPDATE models SET state = %(state)s, error = %(error)s::jsonb, freed_bytes = %(freed)s, reserved_bytes = 0,
            ended_at = clock_timestamp()
        FROM (SELECT model_id, reserved_bytes AS before FROM models WHERE model_id = %(id)s FOR UPDATE) AS old
        WHERE models.model_id = old.model_id AND state = ANY(%(leaving)s)
        RETURNING device_id, before
        """,
        {
            "id": model_id,
            "state": state,
            "error": None if error is None else dumps(error),
            "freed": freed_bytes,
            "leaving": list(leaving),
        },
    )


def set_freed(connection: Connection, model_id: str, freed_bytes: int | None) -> None:
    """Notes what a model that has left its device gave back, as measured."""
    execute(
        connection,
        "UPDATE models SET freed_bytes = %(freed)s WHERE model_id = %(id)s AND state NOT IN ('loading', 'loaded')",
        {"id": model_id, "freed": freed_bytes},
    )


def lose(connection: Connection, device_id: str) -> list[Row]:
    """The device's worker died: what it had loaded is `lost` until the next epoch brings it back."""
    return rows(
        connection,
        "UPDATE models SET state = 'lost', epoch = NULL WHERE device_id = %(id)s AND state = 'loaded' "
        "RETURNING model_id, name",
        {"id": device_id},
    )


def add_runs(connection: Connection, uses: Sequence[dict[str, Any]]) -> None:
    """Adds counts of runs in bulk: `[{model_id, succeeded, failed, statistics: {name: number to add}}]`."""
    execute(
        connection,
        """
        UPDATE models SET run_count = run_count + used.succeeded, failed_count = failed_count + used.failed,
            last_used_at = clock_timestamp(),
            statistics = models.statistics || (SELECT coalesce(jsonb_object_agg(key,
                coalesce((models.statistics ->> key)::numeric, 0) + value::numeric), '{}')
                FROM jsonb_each_text(used.statistics))
        FROM jsonb_to_recordset(%(uses)s::jsonb)
            AS used (model_id text, succeeded bigint, failed bigint, statistics jsonb)
        WHERE models.model_id = used.model_id
        """,
        {"uses": dumps(list(uses))},
    )


def evictable(connection: Connection, device_id: str, idle_seconds: float | None = None) -> list[Row]:
    """Loaded, unpinned models without an open job or session, least recently used first; idle so long, if said."""
    return rows(
        connection,
        """
        SELECT * FROM models m WHERE device_id = %(id)s AND state = 'loaded' AND NOT pinned
          AND NOT EXISTS (SELECT 1 FROM jobs j WHERE j.device_id = m.device_id
                AND j.finished_at IS NULL AND m.model_id = ANY(j.needs))
          AND NOT EXISTS (SELECT 1 FROM inference_sessions s WHERE s.model_id = m.model_id AND s.state = 'active')
          AND (%(idle)s::float8 IS NULL OR last_used_at < clock_timestamp() - make_interval(secs => %(idle)s::float8))
        ORDER BY last_used_at
        """,
        {"id": device_id, "idle": idle_seconds},
    )


def open_session(connection: Connection, session: dict[str, Any], limit: int) -> bool:
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


def get_session(connection: Connection, session_id: str) -> Row | None:
    """One inference session, with how many of its runs are open."""
    return row(connection, f"{_SESSION} WHERE session_id = %(id)s", {"id": session_id})


def page_sessions(connection: Connection, *, owner: str | None, state: str | None, limit: int) -> list[Row]:
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


def open_sessions(connection: Connection, model_id: str) -> list[str]:
    """The open sessions of a model."""
    found = rows(
        connection,
        "SELECT session_id FROM inference_sessions WHERE model_id = %(id)s AND state = 'active' ORDER BY opened_at",
        {"id": model_id},
    )
    return [session["session_id"] for session in found]


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


def runnable(connection: Connection) -> list[Row]:
    """Models that can be run or soon can, newest first."""
    return rows(
        connection,
        "SELECT * FROM models WHERE state IN ('loading', 'loaded', 'lost') ORDER BY created_at DESC LIMIT 10000",
    )
