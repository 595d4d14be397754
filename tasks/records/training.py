"""Training sessions, the log of their steps, the history of their losses, and their checkpoints."""

from __future__ import annotations

from sqlalchemy import BigInteger, Boolean, Column, Float, Index, Integer, Table, Text, text

from tasks.records.base import Json, Texts, Time, metadata

#: The states of a session that has not ended, as SQL.
OPEN_SESSION_SQL = "state IN ('initializing', 'ready', 'restored')"

training_sessions = Table(
    "training_sessions",
    metadata,
    Column("session_id", Text, primary_key=True),
    Column("device_id", Text, nullable=False),
    # The epoch that holds the session in memory; null while it is only recorded (not built yet, unloaded, its worker
    # dead). A worker records that a step was applied, or how far it came, only under its own epoch.
    Column("epoch", Integer),
    # initializing -> ready -> ended; failed, lost; a dead worker's: initializing -> restored -> ready.
    # `stepping` is derived: a step of it runs.
    Column("state", Text, nullable=False),
    Column("owner", Text, nullable=False),
    # The request that made it, and the checkpoint that it started from: {checkpoint_id, blob_id, sha256}.
    Column("spec", Json, nullable=False),
    Column("resumed", Json),
    Column("blob_ids", Texts, nullable=False, server_default=text("'{}'")),
    Column("init_job_id", Text, nullable=False),
    # The last sequence number given out, and the last whose step is in the parameters.
    Column("submitted_sequence", BigInteger, nullable=False, server_default=text("0")),
    Column("applied_sequence", BigInteger, nullable=False, server_default=text("0")),
    Column("step", BigInteger, nullable=False, server_default=text("0")),
    Column("loss", Float),
    Column("gradient_norm", Float),
    Column("learning_rate", Float),
    Column("samples_seen", BigInteger, nullable=False, server_default=text("0")),
    Column("steps_per_second", Float),
    # Operators of torch that the device's process runs on the CPU instead, as of the session's last step.
    Column("cpu_fallback_operators", Texts, nullable=False, server_default=text("'{}'")),
    # Each tensor of the model, whether it is trained and why: [{name, shape, dtype, trained, reason}].
    Column("parameters", Json, nullable=False, server_default=text("'[]'")),
    # Estimated until built, then measured; counted against the device's budget while the device holds it.
    Column("reserved_bytes", BigInteger, nullable=False, server_default=text("0")),
    # Null until it was built once.
    Column("memory_bytes", BigInteger),
    Column("lease_seconds", Float),
    Column("lease_expires_at", Time),
    # Why it failed or was lost; while it is open, why its last automatic checkpoint could not be written.
    Column("error", Json),
    Column("opened_at", Time, nullable=False, server_default=text("clock_timestamp()")),
    Column("last_used_at", Time, nullable=False, server_default=text("clock_timestamp()")),
    Column("ended_at", Time),
)
Index("ix_training_sessions_open", training_sessions.c.device_id, postgresql_where=text(OPEN_SESSION_SQL))

#: One row for each number given out. Enough, with the job's request, to make the step again.
training_steps = Table(
    "training_steps",
    metadata,
    Column("session_id", Text, primary_key=True),
    Column("sequence", BigInteger, primary_key=True),
    Column("job_id", Text, nullable=False),
    Column("payload_sha256", Text, nullable=False),
    Column("applied", Boolean, nullable=False, server_default=text("false")),
    # Of a dataset job: how many steps were applied, which is fewer than asked where it was cut short.
    Column("steps_applied", BigInteger),
    # Inputs that lay in allocations, spooled to blobs: {name: tensor}. Everything else is in the job's own request.
    Column("spooled", Json),
    Column("blob_ids", Texts, nullable=False, server_default=text("'{}'")),
    # Whether a replay may still need it; until then its job and its blobs are kept.
    Column("kept", Boolean, nullable=False, server_default=text("true")),
)
Index("ix_training_steps_job_id", training_steps.c.job_id, postgresql_where=text("kept"))
Index(
    "ix_training_steps_blob_ids",
    training_steps.c.blob_ids,
    postgresql_using="gin",
    postgresql_where=text("blob_ids <> '{}'::text[]"),
)

training_history = Table(
    "training_history",
    metadata,
    Column("session_id", Text, primary_key=True),
    Column("step", BigInteger, primary_key=True),
    Column("loss", Float),
    Column("gradient_norm", Float),
    Column("learning_rate", Float),
    Column("at", Time, nullable=False),
)

#: A row is there only once its file is whole in the blob store.
checkpoints = Table(
    "checkpoints",
    metadata,
    Column("checkpoint_id", Text, primary_key=True),
    Column("session_id", Text, nullable=False),
    Column("owner", Text, nullable=False),
    Column("name", Text),
    # The job that made it; null for an automatic one.
    Column("job_id", Text),
    Column("step", BigInteger, nullable=False),
    Column("sequence", BigInteger, nullable=False),
    # The dataset job in the middle of which it was taken.
    Column("run_job_id", Text),
    Column("sha256", Text, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("blob_id", Text, nullable=False),
    Column("onnx_blob_id", Text),
    # Why it could not be read when a session was to be brought back from it.
    Column("damage", Json),
    Column("created_at", Time, nullable=False, server_default=text("clock_timestamp()")),
)
Index("ix_checkpoints_session_id", checkpoints.c.session_id, checkpoints.c.sequence, checkpoints.c.step)
Index("ix_checkpoints_blob_id", checkpoints.c.blob_id)
Index("ix_checkpoints_onnx_blob_id", checkpoints.c.onnx_blob_id, postgresql_where=text("onnx_blob_id IS NOT NULL"))
