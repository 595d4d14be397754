"""Models: recording, settling, looking up.

What locks several models does so in the order of their ids, and after the budget of the device where it takes that too.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from sqlalchemy import Connection

from device_operations.wire.json_types import FreeJson, JsonObject
from tasks.database import dumps
from tasks.inference.facts import ModelFacts
from tasks.inference.rows import EndedModel, LostModel, ModelRow
from tasks.statements import execute, row, rows

#: The states of a model that can be run, or soon can.
LIVE = "('loading', 'loaded', 'lost')"


def insert(connection: Connection, model: FreeJson) -> bool:
    """Records a model as `loading`; False when its name and version are there already with the same load key."""
    return bool(
        execute(
            connection,
            """
            INSERT INTO models (model_id, name, version, model_type, device_id, state, content_key, load_key, sha256,
                source, options, pinned, owner, shared, load_job_id, blob_ids)
            VALUES (%(model_id)s, %(name)s, %(version)s, %(model_type)s, %(device_id)s, 'loading', %(content_key)s,
                %(load_key)s, %(sha256)s, %(source)s::jsonb, %(options)s::jsonb, %(pinned)s, %(owner)s, %(shared)s,
                %(load_job_id)s, %(blob_ids)s)
            ON CONFLICT DO NOTHING
            """,
            {**model, "source": dumps(model["source"]), "options": dumps(model["options"])},
        )
    )


def get(connection: Connection, model_id: str) -> ModelRow | None:
    """One model, or None."""
    return row(connection, "SELECT * FROM models WHERE model_id = %(id)s", {"id": model_id})


def get_many(connection: Connection, model_ids: Collection[str]) -> dict[str, ModelRow]:
    """The models among `model_ids` that exist, by id."""
    found = rows(connection, "SELECT * FROM models WHERE model_id = ANY(%(ids)s)", {"ids": list(model_ids)})
    return {model["model_id"]: model for model in found}


def same_load(
    connection: Connection, device_id: str, owner: str, name: str, version: str, load_key: str
) -> ModelRow | None:
    """The owner's model of that name and version that means the same on that device, and has not been replaced."""
    return row(
        connection,
        f"""
        SELECT * FROM models WHERE device_id = %(device)s AND owner = %(owner)s AND name = %(name)s
          AND version = %(version)s AND load_key = %(key)s AND replaced_by IS NULL AND state IN {LIVE}
        """,
        {"device": device_id, "owner": owner, "name": name, "version": version, "key": load_key},
    )


def load_again(
    connection: Connection,
    model_id: str,
    *,
    source: JsonObject,
    blob_ids: list[str],
    pin: bool | None,
    shared: bool | None,
) -> bool:
    """Notes a further load of the same: from now on its name means it. False where the name means another by now.

    What its files are read from is what was given last. `pin` and `shared` stay as they are where they are None.
    """
    return bool(
        execute(
            connection,
            """
            UPDATE models SET pinned = coalesce(%(pin)s, pinned), shared = coalesce(%(shared)s, shared),
                source = %(source)s::jsonb, blob_ids = %(blob_ids)s, named_at = clock_timestamp()
            WHERE model_id = %(id)s AND replaced_by IS NULL
            """,
            {"id": model_id, "pin": pin, "shared": shared, "source": dumps(source), "blob_ids": blob_ids},
        )
    )


def revive(connection: Connection, model_id: str, job_id: str) -> ModelRow | None:
    """A model that left its device while a load of the same waited is `loading` again."""
    return row(
        connection,
        """
        UPDATE models SET state = 'loading', load_job_id = %(job)s, error = NULL, ended_at = NULL, freed_bytes = NULL
        WHERE model_id = %(id)s AND state IN ('unloaded', 'evicted', 'failed') AND replaced_by IS NULL RETURNING *
        """,
        {"id": model_id, "job": job_id},
    )


def page(
    connection: Connection, *, owner: str | None, device_id: str | None, state: str | None, limit: int
) -> list[ModelRow]:
    """Models, newest first: those of `owner` and those that are shared, or all where it is None."""
    return rows(
        connection,
        """
        SELECT * FROM models WHERE (%(owner)s::text IS NULL OR owner = %(owner)s OR shared)
          AND (%(device)s::text IS NULL OR device_id = %(device)s)
          AND (%(state)s::text IS NULL OR state = %(state)s) ORDER BY created_at DESC LIMIT %(limit)s
        """,
        {"owner": owner, "device": device_id, "state": state, "limit": limit},
    )


def resident(connection: Connection, device_id: str) -> list[ModelRow]:
    """Models that the device was holding when its worker died, oldest first: what a new epoch brings back."""
    return rows(
        connection,
        "SELECT * FROM models WHERE device_id = %(id)s AND state = 'lost' ORDER BY created_at",
        {"id": device_id},
    )


def runnable(connection: Connection) -> list[ModelRow]:
    """Models that can be run or soon can, the last load first."""
    return rows(
        connection,
        f"SELECT * FROM models WHERE state IN {LIVE} ORDER BY named_at DESC, model_id DESC LIMIT 10000",
    )


def settle(connection: Connection, model_id: str, epoch: int, facts: ModelFacts) -> bool:
    """A load ended well: the model is `loaded` under `epoch`, with what was measured; False where it is gone."""
    changed = execute(
        connection,
        """
        UPDATE models SET state = 'loaded', epoch = %(epoch)s, inputs = %(inputs)s::jsonb, outputs = %(outputs)s::jsonb,
            memory_bytes = %(memory_bytes)s, load_ms = %(load_ms)s,
            provider = %(provider)s, cpu_fallback_ops = %(cpu_fallback_ops)s, last_used_at = clock_timestamp(),
            error = NULL, batching = %(batching)s::jsonb, not_offered = %(not_offered)s::jsonb,
            parts = %(parts)s::jsonb
        WHERE model_id = %(id)s AND state IN ('loading', 'lost')
        """,
        {
            **facts,
            "id": model_id,
            "epoch": epoch,
            "inputs": dumps(facts["inputs"]),
            "outputs": dumps(facts["outputs"]),
            "batching": dumps(facts["batching"]),
            "not_offered": dumps(facts["not_offered"]),
            "parts": dumps(facts["parts"]) if "parts" in facts else None,
        },
    )
    return bool(changed)


def set_parts(
    connection: Connection, device_id: str, content_key: str, memory_bytes: int, parts: list[JsonObject]
) -> None:
    """What the models of a pipeline's graph take now, and which of its parts are on the device."""
    execute(
        connection,
        f"UPDATE models SET memory_bytes = %(bytes)s, parts = %(parts)s::jsonb "
        f"WHERE device_id = %(device)s AND content_key = %(key)s AND state IN {LIVE}",
        {"device": device_id, "key": content_key, "bytes": memory_bytes, "parts": dumps(parts)},
    )


def devices_of(connection: Connection, model_ids: Collection[str]) -> list[str]:
    """The devices of models, in order."""
    found = rows(
        connection,
        "SELECT DISTINCT device_id FROM models WHERE model_id = ANY(%(ids)s) ORDER BY device_id",
        {"ids": list(model_ids)},
    )
    return [model["device_id"] for model in found]


def lock(connection: Connection, model_ids: Collection[str]) -> None:
    """Locks models in the order of their ids, as everything that changes several does."""
    rows(
        connection,
        "SELECT 1 FROM models WHERE model_id = ANY(%(ids)s) ORDER BY model_id FOR UPDATE",
        {"ids": list(model_ids)},
    )


def lock_namesakes(connection: Connection, model: ModelRow) -> None:
    """Locks the name and version of an owner, and its models on any device that the end of a load may replace."""
    rows(
        connection,
        "SELECT pg_advisory_xact_lock(hashtextextended(concat_ws(chr(1), %(owner)s, %(name)s, %(version)s), 5))",
        model,
    )
    rows(
        connection,
        """
        SELECT 1 FROM models WHERE owner = %(owner)s AND name = %(name)s AND version = %(version)s
          AND (state IN ('loaded', 'lost') OR model_id = %(model_id)s) ORDER BY model_id FOR UPDATE
        """,
        model,
    )


def replace_namesakes(connection: Connection, owner: str, name: str, version: str) -> list[str]:
    """The last load that has ended is what the name and version mean; gives the models that it replaces.

    Those of the same load key, on other devices, stay. The caller holds `lock_namesakes`.
    """
    found = rows(
        connection,
        """
        WITH meant AS (
            SELECT model_id, load_key FROM models WHERE owner = %(owner)s AND name = %(name)s AND version = %(version)s
              AND state IN ('loaded', 'lost') AND replaced_by IS NULL ORDER BY named_at DESC, model_id DESC LIMIT 1)
        UPDATE models m SET replaced_by = meant.model_id, replaced_at = clock_timestamp() FROM meant
        WHERE m.owner = %(owner)s AND m.name = %(name)s AND m.version = %(version)s
          AND m.state IN ('loaded', 'lost') AND m.replaced_by IS NULL AND m.load_key <> meant.load_key
        RETURNING m.model_id
        """,
        {"owner": owner, "name": name, "version": version},
    )
    return [model["model_id"] for model in found]


def end(
    connection: Connection,
    model_ids: Collection[str],
    state: str,
    *,
    error: JsonObject | None = None,
    freed_bytes: int | None = None,
    leaving: Sequence[str] = ("loading", "loaded", "lost"),
) -> list[EndedModel]:
    """Models leave their device (`failed`, `unloaded`, `evicted`). Gives their ids, devices and content keys."""
    return rows(
        connection,
        """
        WITH leaving AS (
            SELECT model_id FROM models WHERE model_id = ANY(%(ids)s) AND state = ANY(%(leaving)s)
            ORDER BY model_id FOR UPDATE)
        UPDATE models SET state = %(state)s, error = %(error)s::jsonb, freed_bytes = %(freed)s,
            ended_at = clock_timestamp()
        FROM leaving WHERE models.model_id = leaving.model_id
        RETURNING models.model_id, models.device_id, models.content_key
        """,
        {
            "ids": list(model_ids),
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


def lose(connection: Connection, device_id: str) -> list[LostModel]:
    """The device's worker died: what it had loaded is `lost` until the next epoch brings it back."""
    return rows(
        connection,
        """
        WITH held AS (
            SELECT model_id FROM models WHERE device_id = %(id)s AND state = 'loaded' ORDER BY model_id FOR UPDATE)
        UPDATE models SET state = 'lost', epoch = NULL FROM held WHERE models.model_id = held.model_id
        RETURNING models.model_id, models.name
        """,
        {"id": device_id},
    )


def add_runs(connection: Connection, uses: Sequence[JsonObject]) -> None:
    """Adds counts of runs in bulk: `[{model_id, succeeded, failed, statistics: {name: number to add}}]`."""
    execute(
        connection,
        """
        WITH used AS (
            SELECT * FROM jsonb_to_recordset(%(uses)s::jsonb)
                AS used (model_id text, succeeded bigint, failed bigint, statistics jsonb)),
        locked AS (
            SELECT model_id FROM models WHERE model_id IN (SELECT model_id FROM used) ORDER BY model_id FOR UPDATE)
        UPDATE models SET run_count = run_count + used.succeeded, failed_count = failed_count + used.failed,
            last_used_at = clock_timestamp(),
            statistics = models.statistics || (SELECT coalesce(jsonb_object_agg(key,
                coalesce((models.statistics ->> key)::numeric, 0) + value::numeric), '{}')
                FROM jsonb_each_text(used.statistics))
        FROM used, locked WHERE models.model_id = used.model_id AND locked.model_id = used.model_id
        """,
        {"uses": dumps(list(uses))},
    )
