"""Training sessions, their steps and history, and checkpoints."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def _json() -> postgresql.JSONB:
    return postgresql.JSONB(none_as_null=True, astext_type=sa.Text())


def upgrade() -> None:
    op.create_table(
        "training_sessions",
        sa.Column("session_id", sa.Text(), nullable=False),
        sa.Column("device_id", sa.Text(), nullable=False),
        sa.Column("epoch", sa.Integer(), nullable=True),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column("spec", _json(), nullable=False),
        sa.Column("resumed", _json(), nullable=True),
        sa.Column("blob_ids", sa.ARRAY(sa.Text()), server_default=sa.text("'{}'"), nullable=False),
        sa.Column("init_job_id", sa.Text(), nullable=False),
        sa.Column("submitted_sequence", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("applied_sequence", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("step", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("loss", sa.Float(), nullable=True),
        sa.Column("gradient_norm", sa.Float(), nullable=True),
        sa.Column("learning_rate", sa.Float(), nullable=True),
        sa.Column("samples_seen", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("steps_per_second", sa.Float(), nullable=True),
        sa.Column("reserved_bytes", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("memory_bytes", sa.BigInteger(), nullable=True),
        sa.Column("lease_seconds", sa.Float(), nullable=True),
        sa.Column("lease_expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("error", _json(), nullable=True),
        sa.Column("opened_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False),
        sa.Column(
            "last_used_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.Column("ended_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("session_id", name=op.f("pk_training_sessions")),
    )
    op.create_index(
        "ix_training_sessions_open",
        "training_sessions",
        ["device_id"],
        unique=False,
        postgresql_where=sa.text("state IN ('initializing', 'ready', 'restored')"),
    )
    op.create_table(
        "training_steps",
        sa.Column("session_id", sa.Text(), nullable=False),
        sa.Column("sequence", sa.BigInteger(), nullable=False),
        sa.Column("job_id", sa.Text(), nullable=False),
        sa.Column("payload_sha256", sa.Text(), nullable=False),
        sa.Column("applied", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("steps_applied", sa.BigInteger(), nullable=True),
        sa.Column("spooled", _json(), nullable=True),
        sa.Column("blob_ids", sa.ARRAY(sa.Text()), server_default=sa.text("'{}'"), nullable=False),
        sa.Column("kept", sa.Boolean(), server_default=sa.text("true"), nullable=False),
        sa.PrimaryKeyConstraint("session_id", "sequence", name=op.f("pk_training_steps")),
    )
    op.create_index(
        "ix_training_steps_job_id", "training_steps", ["job_id"], unique=False, postgresql_where=sa.text("kept")
    )
    op.create_index(
        "ix_training_steps_blob_ids",
        "training_steps",
        ["blob_ids"],
        unique=False,
        postgresql_using="gin",
        postgresql_where=sa.text("blob_ids <> '{}'::text[]"),
    )
    op.create_table(
        "training_history",
        sa.Column("session_id", sa.Text(), nullable=False),
        sa.Column("step", sa.BigInteger(), nullable=False),
        sa.Column("loss", sa.Float(), nullable=True),
        sa.Column("gradient_norm", sa.Float(), nullable=True),
        sa.Column("learning_rate", sa.Float(), nullable=True),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("session_id", "step", name=op.f("pk_training_history")),
    )
    op.create_table(
        "checkpoints",
        sa.Column("checkpoint_id", sa.Text(), nullable=False),
        sa.Column("session_id", sa.Text(), nullable=False),
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=True),
        sa.Column("job_id", sa.Text(), nullable=True),
        sa.Column("step", sa.BigInteger(), nullable=False),
        sa.Column("sequence", sa.BigInteger(), nullable=False),
        sa.Column("run_job_id", sa.Text(), nullable=True),
        sa.Column("sha256", sa.Text(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("blob_id", sa.Text(), nullable=False),
        sa.Column("onnx_blob_id", sa.Text(), nullable=True),
        sa.Column("damage", _json(), nullable=True),
        sa.Column(
            "created_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.PrimaryKeyConstraint("checkpoint_id", name=op.f("pk_checkpoints")),
    )
    op.create_index("ix_checkpoints_session_id", "checkpoints", ["session_id", "sequence", "step"], unique=False)
    op.create_index("ix_checkpoints_blob_id", "checkpoints", ["blob_id"], unique=False)
    op.create_index(
        "ix_checkpoints_onnx_blob_id",
        "checkpoints",
        ["onnx_blob_id"],
        unique=False,
        postgresql_where=sa.text("onnx_blob_id IS NOT NULL"),
    )


def downgrade() -> None:
    op.drop_table("checkpoints")
    op.drop_table("training_history")
    op.drop_table("training_steps")
    op.drop_table("training_sessions")
