"""What callers loaded (models), what lies on devices for them (graphs), and callers' sessions with models."""

from __future__ import annotations

from sqlalchemy import BigInteger, Boolean, Column, Float, Index, Integer, Table, Text, text

from tasks.records.base import Json, Texts, Time, metadata

models = Table(
    "models",
    metadata,
    Column("model_id", Text, primary_key=True),
    Column("name", Text, nullable=False),
    Column("version", Text, nullable=False),
    Column("model_type", Text, nullable=False),
    Column("device_id", Text, nullable=False),
    Column("epoch", Integer),
    # loading -> loaded, failed; loaded -> unloaded, evicted, lost (its worker died); lost -> loaded (the next epoch
    # brought it back), failed, unloaded; unloaded, evicted, failed -> loading (a load of the same was waiting).
    Column("state", Text, nullable=False),
    # sha256 over the content and the options that shape the session: the models of one key on one device share a graph.
    Column("content_key", Text, nullable=False),
    # sha256 over the content key and all options: a name and version loaded with the same key means the same as before.
    Column("load_key", Text, nullable=False),
    Column("sha256", Text),
    Column("source", Json, nullable=False),
    Column("options", Json, nullable=False),
    Column("pinned", Boolean, nullable=False, server_default=text("false")),
    Column("owner", Text, nullable=False),
    # Whether other owners may run it and read what it is.
    Column("shared", Boolean, nullable=False, server_default=text("false")),
    Column("load_job_id", Text, nullable=False),
    Column("blob_ids", Texts, nullable=False, server_default=text("'{}'")),
    Column("inputs", Json),
    Column("outputs", Json),
    # What its graph takes, as measured.
    Column("memory_bytes", BigInteger),
    # What unloading it gave back: 0 where its graph stayed for another model.
    Column("freed_bytes", BigInteger),
    Column("load_ms", Float),
    Column("provider", Text),
    Column("cpu_fallback_ops", Integer),
    # Whether runs may be joined, as the worker found out: the fields of `workers.resident.batching.Batching`.
    Column("batching", Json),
    # [{"name", "side", "reason"}]: inputs and outputs that callers cannot give or get, as the worker found out.
    Column("not_offered", Json),
    # Of a pipeline, [{"name", "memory_bytes", "file_bytes", "dtype", "load_ms"}]; of a single graph, nothing.
    Column("parts", Json),
    Column("run_count", BigInteger, nullable=False, server_default=text("0")),
    Column("failed_count", BigInteger, nullable=False, server_default=text("0")),
    Column("statistics", Json, nullable=False, server_default=text("'{}'")),
    Column("error", Json),
    Column("created_at", Time, nullable=False, server_default=text("now()")),
    # When the last load of it was submitted: of the models of one name, the newest is meant.
    Column("named_at", Time, nullable=False, server_default=text("clock_timestamp()")),
    # The model that its name and version mean since `replaced_at`: it takes no new runs and leaves once it is idle.
    Column("replaced_by", Text),
    Column("replaced_at", Time),
    Column("last_used_at", Time),
    Column("ended_at", Time),
)
Index(
    "uq_models_load",
    models.c.device_id,
    models.c.owner,
    models.c.name,
    models.c.version,
    models.c.load_key,
    unique=True,
    postgresql_where=text("state IN ('loading', 'loaded', 'lost') AND replaced_by IS NULL"),
)
Index(
    "ix_models_name",
    models.c.name,
    models.c.version,
    postgresql_where=text("state IN ('loading', 'loaded', 'lost')"),
)
Index(
    "ix_models_graph",
    models.c.device_id,
    models.c.content_key,
    postgresql_where=text("state IN ('loading', 'loaded', 'lost')"),
)

#: A graph that lies on a device or is about to. The row stays as long as a model of its key is loading, loaded or lost.
graphs = Table(
    "graphs",
    metadata,
    Column("device_id", Text, primary_key=True),
    Column("content_key", Text, primary_key=True),
    # Estimated until loaded, then measured; counted against the device's budget, once for all its models.
    Column("reserved_bytes", BigInteger, nullable=False),
    Column("created_at", Time, nullable=False, server_default=text("now()")),
)

inference_sessions = Table(
    "inference_sessions",
    metadata,
    Column("session_id", Text, primary_key=True),
    Column("model_id", Text, nullable=False),
    Column("device_id", Text, nullable=False),
    Column("epoch", Integer),
    # active, expired, closed, lost; `idle` is derived: active without a run under way
    Column("state", Text, nullable=False),
    Column("owner", Text, nullable=False),
    # {output name: input name}
    Column("state_map", Json, nullable=False, server_default=text("'{}'")),
    # {input name: tensor} of the first run
    Column("initial", Json, nullable=False, server_default=text("'{}'")),
    Column("blob_ids", Texts, nullable=False, server_default=text("'{}'")),
    Column("succeeded", BigInteger, nullable=False, server_default=text("0")),
    Column("failed", BigInteger, nullable=False, server_default=text("0")),
    Column("last_job_id", Text),
    Column("opened_at", Time, nullable=False, server_default=text("now()")),
    Column("last_used_at", Time, nullable=False, server_default=text("now()")),
    Column("expires_at", Time, nullable=False),
    Column("ended_at", Time),
)
Index("ix_inference_sessions_open", inference_sessions.c.device_id, postgresql_where=text("state = 'active'"))
