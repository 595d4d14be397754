"""Allocations: what PostgreSQL says of them is the truth that callers see."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Float, Index, Integer, Table, Text, text

from tasks.records.base import Json, Time, metadata

allocations = Table(
    "allocations",
    metadata,
    Column("allocation_id", Text, primary_key=True),
    Column("device_id", Text, nullable=False),
    # The epoch that holds the bytes; null until allocated.
    Column("epoch", Integer),
    # pending -> active -> freed; failed, lost. An ended one's id may be used anew by its owner.
    Column("state", Text, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("dtype", Text),
    Column("shape", Json),
    Column("label", Text),
    Column("owner", Text, nullable=False),
    Column("job_id", Text, nullable=False),
    # Of the request, by which a caller's own allocation_id is known again.
    Column("request_sha256", Text, nullable=False),
    # The deallocation that is under way; what it frees counts as free at admission.
    Column("freeing_job_id", Text),
    # Of all bytes, where a write or read found it and nothing has changed them since.
    Column("sha256", Text),
    Column("error", Json),
    Column("created_at", Time, nullable=False, server_default=text("now()")),
    Column("ttl_seconds", Float),
    Column("expires_at", Time),
    Column("ended_at", Time),
)
Index("ix_allocations_live", allocations.c.device_id, postgresql_where=text("state IN ('pending', 'active')"))
Index(
    "ix_allocations_expires_at",
    allocations.c.expires_at,
    postgresql_where=text("state IN ('pending', 'active') AND expires_at IS NOT NULL"),
)
Index("ix_allocations_created_at", allocations.c.created_at, allocations.c.allocation_id)
