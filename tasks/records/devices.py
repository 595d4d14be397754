"""Devices with their leases, their memory budgets, and the samples that a device monitor shows."""

from __future__ import annotations

from sqlalchemy import BigInteger, Boolean, CheckConstraint, Column, Float, Identity, Index, Integer, Table, Text, text

from tasks.records.base import Json, Time, metadata

devices = Table(
    "devices",
    metadata,
    Column("device_id", Text, primary_key=True),
    Column("backend", Text, nullable=False),
    Column("ordinal", Integer, nullable=False),
    Column("node", Text),
    Column("name", Text, nullable=False),
    Column("vendor", Text),
    Column("driver", Text),
    Column("total_bytes", BigInteger),
    Column("free_bytes", BigInteger),
    Column("capabilities", Json, nullable=False),
    Column("providers", Json, nullable=False),
    Column("cpu_fallback_ops", Integer),
    Column("epoch", Integer, nullable=False),
    Column("draining", Boolean, nullable=False, server_default=text("false")),
    Column("heartbeat_at", Time, nullable=False),
    # The worker owns the device until then. Claims and ends of its jobs are guarded by the epoch besides.
    Column("lease_until", Time, nullable=False),
    # Whether what the epoch held has been declared lost (or it ended in order).
    Column("buried", Boolean, nullable=False, server_default=text("false")),
    Column("host", Text, nullable=False),
    Column("pid", Integer, nullable=False),
    # The process's start, so that a reused pid is not taken for it.
    Column("pid_started", Float, nullable=False),
)

#: Reservations against a device's memory: one guarded total, apart from the heartbeat's row.
device_budgets = Table(
    "device_budgets",
    metadata,
    Column("device_id", Text, primary_key=True),
    Column("budget_bytes", BigInteger, nullable=False),
    Column("reserved_bytes", BigInteger, nullable=False, server_default=text("0")),
    Column("peak_bytes", BigInteger, nullable=False, server_default=text("0")),
    CheckConstraint("reserved_bytes >= 0", name="reserved_not_negative"),
)

device_samples = Table(
    "device_samples",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("device_id", Text, nullable=False),
    Column("at", Time, nullable=False, server_default=text("clock_timestamp()")),
    Column("used_bytes", BigInteger),
    Column("free_bytes", BigInteger),
    # Share of the time since the last sample in which the device worked, 0 to 1.
    Column("busy_share", Float),
    Column("queue_length", Integer, nullable=False),
)
Index("ix_device_samples_device_id", device_samples.c.device_id, device_samples.c.at)
