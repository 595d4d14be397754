"""Models apart from the graphs that they share: owners, names that are loaded again, memory counted once.

Upgrading makes each further name of a model (`aliases`) a model of its own on the same graph. What is loaded stays
usable by every owner, as it was: it becomes `shared`. Downgrading keeps one model of each graph and makes the names of
the others its aliases.
"""

from __future__ import annotations

import hashlib
import json
import uuid

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

LIVE = "state IN ('loading', 'loaded', 'lost')"


def upgrade() -> None:
    op.create_table(
        "graphs",
        sa.Column("device_id", sa.Text(), nullable=False),
        sa.Column("content_key", sa.Text(), nullable=False),
        sa.Column("reserved_bytes", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("device_id", "content_key", name=op.f("pk_graphs")),
    )
    op.execute(
        "INSERT INTO graphs (device_id, content_key, reserved_bytes, created_at) "
        f"SELECT device_id, content_key, reserved_bytes, created_at FROM models WHERE {LIVE}"
    )
    op.add_column("models", sa.Column("load_key", sa.Text(), server_default=sa.text("''"), nullable=False))
    op.add_column("models", sa.Column("shared", sa.Boolean(), server_default=sa.text("false"), nullable=False))
    op.add_column(
        "models",
        sa.Column("named_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False),
    )
    op.add_column("models", sa.Column("replaced_by", sa.Text(), nullable=True))
    op.add_column("models", sa.Column("replaced_at", sa.DateTime(timezone=True), nullable=True))
    op.execute(f"UPDATE models SET named_at = created_at, shared = {LIVE}")
    op.drop_index("uq_models_content", "models")
    op.drop_index("ix_models_name", "models")
    # Its columns are the first of the new ix_models_graph.
    op.drop_index("ix_models_open", "models")
    _make_aliases_models()
    _write_load_keys()
    op.alter_column("models", "load_key", server_default=None)
    op.drop_column("models", "aliases")
    op.drop_column("models", "reserved_bytes")
    op.create_index(
        "uq_models_load",
        "models",
        ["device_id", "owner", "name", "version", "load_key"],
        unique=True,
        postgresql_where=sa.text(f"{LIVE} AND replaced_by IS NULL"),
    )
    op.create_index("ix_models_name", "models", ["name", "version"], postgresql_where=sa.text(LIVE))
    op.create_index("ix_models_graph", "models", ["device_id", "content_key"], postgresql_where=sa.text(LIVE))


def downgrade() -> None:
    op.add_column(
        "models",
        sa.Column(
            "aliases",
            postgresql.JSONB(none_as_null=True, astext_type=sa.Text()),
            server_default=sa.text("'[]'"),
            nullable=False,
        ),
    )
    op.add_column("models", sa.Column("reserved_bytes", sa.BigInteger(), server_default=sa.text("0"), nullable=False))
    for index in ("uq_models_load", "ix_models_name", "ix_models_graph"):
        op.drop_index(index, "models")
    op.execute(
        f"""
        WITH kept AS (
            SELECT DISTINCT ON (device_id, content_key) model_id, device_id, content_key, name, version
            FROM models WHERE {LIVE} ORDER BY device_id, content_key, replaced_by IS NOT NULL, created_at, model_id),
        names AS (
            SELECT k.model_id, jsonb_agg(DISTINCT jsonb_build_array(m.name, m.version)) AS aliases,
                bool_or(m.pinned) AS pinned
            FROM kept k JOIN models m USING (device_id, content_key)
            WHERE m.{LIVE} AND m.replaced_by IS NULL AND (m.name, m.version) <> (k.name, k.version) GROUP BY 1)
        UPDATE models SET aliases = names.aliases, pinned = models.pinned OR names.pinned
        FROM names WHERE names.model_id = models.model_id
        """
    )
    op.execute(
        f"""
        UPDATE models SET state = 'unloaded', ended_at = clock_timestamp(), freed_bytes = 0
        WHERE {LIVE} AND model_id NOT IN (
            SELECT DISTINCT ON (device_id, content_key) model_id FROM models
            WHERE {LIVE} ORDER BY device_id, content_key, replaced_by IS NOT NULL, created_at, model_id)
        """
    )
    op.execute(
        f"""
        UPDATE models SET reserved_bytes = graphs.reserved_bytes FROM graphs
        WHERE graphs.device_id = models.device_id AND graphs.content_key = models.content_key AND models.{LIVE}
        """
    )
    for column in ("load_key", "shared", "named_at", "replaced_by", "replaced_at"):
        op.drop_column("models", column)
    op.drop_table("graphs")
    op.create_index(
        "uq_models_content", "models", ["device_id", "content_key"], unique=True, postgresql_where=sa.text(LIVE)
    )
    op.create_index("ix_models_open", "models", ["device_id"], postgresql_where=sa.text(LIVE))
    op.create_index(
        "ix_models_name", "models", ["name", "version"], postgresql_where=sa.text("state IN ('loading', 'loaded')")
    )


#: What an alias shares with the model that it was a further name of.
_KEPT = """model_type, device_id, epoch, content_key, sha256, source, options, pinned, owner, shared, load_job_id,
    blob_ids, inputs, outputs, memory_bytes, load_ms, provider, cpu_fallback_ops, batching, created_at, named_at,
    last_used_at"""


def _make_aliases_models() -> None:
    """A model for each alias. One of a load that is under way counts as lost: the next worker brings it back."""
    connection = op.get_bind()
    found = connection.execute(
        sa.text(
            "SELECT model_id, alias ->> 0 AS name, alias ->> 1 AS version "
            f"FROM models, jsonb_array_elements(aliases) AS alias WHERE {LIVE}"
        )
    ).fetchall()
    for model_id, name, version in found:
        connection.execute(
            sa.text(
                f"""
                INSERT INTO models (model_id, name, version, state, {_KEPT})
                SELECT :new_id, :name, :version, CASE state WHEN 'loading' THEN 'lost' ELSE state END, {_KEPT}
                FROM models WHERE model_id = :model_id
                """
            ),
            {"new_id": str(uuid.uuid4()), "name": name, "version": version, "model_id": model_id},
        )


def _write_load_keys() -> None:
    connection = op.get_bind()
    for model_id, content_key, options in connection.execute(
        sa.text("SELECT model_id, content_key, options FROM models")
    ).fetchall():
        whole = {
            name: int(value) if isinstance(value, float) and value.is_integer() else value
            for name, value in options.items()
        }
        text = json.dumps([content_key, whole], sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        connection.execute(
            sa.text("UPDATE models SET load_key = :key WHERE model_id = :id"),
            {"key": hashlib.sha256(text.encode()).hexdigest(), "id": model_id},
        )
