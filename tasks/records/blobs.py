"""Blobs: immutable bytes in the blob store, recorded with their size, hash, owner and expiry."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Index, Table, Text, text

from tasks.records.base import Time, metadata

blobs = Table(
    "blobs",
    metadata,
    Column("blob_id", Text, primary_key=True),
    Column("sha256", Text),
    Column("size_bytes", BigInteger, nullable=False),
    Column("owner", Text, nullable=False),
    Column("created_at", Time, nullable=False, server_default=text("now()")),
    # Not before then, and not while anything open refers to it.
    Column("expires_at", Time),
)
Index("ix_blobs_expires_at", blobs.c.expires_at)
