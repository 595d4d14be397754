"""Models resident on devices, and callers' sessions with them."""

from __future__ import annotations

from sqlalchemy import BigInteger, Boolean, Column, Float, Index, Integer, Table, Text, text

from tasks.records.base import Json, Texts, Time, metadata

models = Table(
    "models",
    metadata,
    Column("model_id", Text, primary_key=True),
    Column("name", Text, nullable=False),
    Column("version", Text, nullable=False),
    # [name, version] of later loads of the same content under other names.
    Column("aliases", Json, nullable=False, server_default=text("'[]'")),
    Column("model_type", Text, nullable=False),
    Column("device_id", Text, nullable=False),
    Column("epoch", Integer),
    # loading -> loaded -> unloaded, evicted; failed; lost -> loading (brought back by the next epoch)
    Column("state", Text, nullable=False),
    # sha256 over the content and the options that shape the session: the same key on one device is the same model.
    Column("content_key", Text, nullable=False),
    Column("sha256", Text),
    Column("source", Json, nullable=False),
    Column("options", Json, nullable=False),
    Column("pinned", Boolean, nullable=False, server_default=text("false")),
    Column("owner", Text, nullable=False),
    Column("load_job_id", Text, nullable=False),
    Column("blob_ids", Texts, nullable=False, server_default=text("'{}'")),
    Column("inputs", Json),
    Column("outputs", Json),
    # Estimated until loaded, then measured; counted against the device's budget.
    Column("reserved_bytes", BigInteger, nullable=False, server_default=text("0")),
    Column("memory_bytes", BigInteger),
    Column("freed_bytes", BigInteger),
    Column("load_ms", Float),
    Column("provider", Text),
    Column("cpu_fallback_ops", Integer),
    # {"enabled", "reason", "largest_difference"}: whether runs may be joined, as the worker found out.
    Column("batching", Json),
    # [{"name", "side", "reason"}]: inputs and outputs that callers cannot give or get, as the worker found out.
    Column("not_offered", Json),
    Column("run_count", BigInteger, nullable=False, server_default=text("0")),
    Column("failed_count", BigInteger, nullable=False, server_default=text("0")),
    Column("statistics", Json, nullable=False, server_default=text("'{}'")),
    Column("error", Json),
    Column("created_at", Time, nullable=False, server_default=text("now()")),
    Column("last_used_at", Time),
    Column("ended_at", Time),
)
Index(
    "uq_models_content",
    models.c.device_id,
    models.c.content_key,
    unique=True,
    postgresql_where=text("state IN ('loading', 'loaded', 'lost')"),
)
Index("ix_models_name", models.c.name, models.c.version, postgresql_where=text("state IN ('loading', 'loaded')"))
Index("ix_models_open", models.c.device_id, postgresql_where=text("state IN ('loading', 'loaded', 'lost')"))

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
