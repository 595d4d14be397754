"""Devices: registration, leases, drain, budgets, samples. Only the database's clock decides whether a lease stands."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

from sqlalchemy import Connection

from device_operations.wire.json_types import FreeJson
from tasks.database import dumps
from tasks.devices.rows import DeviceRow, LapsedDevice, RegisteredDevice, Renewed, SampleRow
from tasks.statements import execute, row, rows

#: A device as callers see it, but for the jobs on it. `state` is derived from lease and drain.
_VIEW = """
    SELECT d.*, b.budget_bytes, b.reserved_bytes, b.peak_bytes, d.lease_until > clock_timestamp() AS alive,
        CASE WHEN d.lease_until <= clock_timestamp() THEN 'offline' WHEN d.draining THEN 'draining' ELSE 'online' END
            AS state
    FROM devices d LEFT JOIN device_budgets b USING (device_id)
"""


def all_devices(connection: Connection) -> list[DeviceRow]:
    """Every device ever registered, by id."""
    return rows(connection, _VIEW + " ORDER BY d.device_id")


def get(connection: Connection, device_id: str) -> DeviceRow | None:
    """One device, or None."""
    return row(connection, _VIEW + " WHERE d.device_id = %(id)s", {"id": device_id})


def lock(connection: Connection, device_id: str) -> RegisteredDevice | None:
    """One device, its row locked until the transaction ends."""
    return row(
        connection,
        "SELECT *, lease_until > clock_timestamp() AS alive FROM devices WHERE device_id = %(id)s FOR UPDATE",
        {"id": device_id},
    )


def register(connection: Connection, device: FreeJson, lease_seconds: float) -> int:
    """Writes the device's row under a new epoch, which is returned. The caller holds its lock and buried the last."""
    found = row(
        connection,
        """
        INSERT INTO devices (device_id, backend, ordinal, node, name, vendor, driver, total_bytes, free_bytes,
            capabilities, providers, epoch, heartbeat_at, lease_until, host, pid, pid_started)
        VALUES (%(device_id)s, %(backend)s, %(ordinal)s, %(node)s, %(name)s, %(vendor)s, %(driver)s, %(total_bytes)s,
            %(free_bytes)s, %(capabilities)s::jsonb, %(providers)s::jsonb, 1, clock_timestamp(),
            clock_timestamp() + make_interval(secs => %(lease)s), %(host)s, %(pid)s, %(pid_started)s)
        ON CONFLICT (device_id) DO UPDATE SET backend = excluded.backend, ordinal = excluded.ordinal,
            node = excluded.node, name = excluded.name, vendor = excluded.vendor, driver = excluded.driver,
            total_bytes = excluded.total_bytes, free_bytes = excluded.free_bytes, capabilities = excluded.capabilities,
            providers = excluded.providers, epoch = devices.epoch + 1, heartbeat_at = excluded.heartbeat_at,
            lease_until = excluded.lease_until, buried = false, host = excluded.host, pid = excluded.pid,
            pid_started = excluded.pid_started, cpu_fallback_ops = NULL
        RETURNING epoch
        """,
        {
            **device,
            "capabilities": dumps(device["capabilities"]),
            "providers": dumps(device["providers"]),
            "lease": lease_seconds,
        },
    )
    assert found is not None
    return int(found["epoch"])


def set_budget(connection: Connection, device_id: str, budget_bytes: int) -> None:
    """Sets how many bytes may be reserved on the device; what is reserved stays reserved."""
    execute(
        connection,
        """
        INSERT INTO device_budgets (device_id, budget_bytes) VALUES (%(id)s, %(budget)s)
        ON CONFLICT (device_id) DO UPDATE SET budget_bytes = excluded.budget_bytes
        """,
        {"id": device_id, "budget": budget_bytes},
    )


def renew(
    connection: Connection, device_id: str, epoch: int, lease_seconds: float, free_bytes: int | None
) -> Renewed | None:
    """Prolongs the lease of `epoch`; None when the epoch no longer stands."""
    return row(
        connection,
        """
        UPDATE devices SET heartbeat_at = clock_timestamp(), free_bytes = coalesce(%(free)s, free_bytes),
            lease_until = clock_timestamp() + make_interval(secs => %(lease)s)
        WHERE device_id = %(id)s AND epoch = %(epoch)s AND NOT buried RETURNING draining
        """,
        {"id": device_id, "epoch": epoch, "lease": lease_seconds, "free": free_bytes},
    )


def release(connection: Connection, device_id: str, epoch: int) -> None:
    """Ends the lease of `epoch` in order."""
    execute(
        connection,
        "UPDATE devices SET lease_until = clock_timestamp() WHERE device_id = %(id)s AND epoch = %(epoch)s",
        {"id": device_id, "epoch": epoch},
    )


def mark_buried(connection: Connection, device_id: str, epoch: int) -> None:
    """Notes that what the epoch held has been declared lost."""
    execute(
        connection,
        "UPDATE devices SET buried = true, lease_until = least(lease_until, clock_timestamp()) "
        "WHERE device_id = %(id)s AND epoch = %(epoch)s",
        {"id": device_id, "epoch": epoch},
    )


def lapsed(connection: Connection) -> list[LapsedDevice]:
    """Devices whose lease has run out and whose last epoch is not buried."""
    return rows(
        connection,
        "SELECT device_id, epoch FROM devices WHERE lease_until <= clock_timestamp() AND NOT buried ORDER BY device_id",
    )


def set_draining(connection: Connection, device_id: str, draining: bool) -> bool:
    """Whether the device exists; it takes new jobs, or none, from now on."""
    return bool(
        execute(
            connection,
            "UPDATE devices SET draining = %(draining)s WHERE device_id = %(id)s",
            {"id": device_id, "draining": draining},
        )
    )


def set_cpu_fallback_ops(connection: Connection, device_id: str, epoch: int, operators: int) -> None:
    """Notes how many operators of the resident models run on the CPU instead of the device."""
    execute(
        connection,
        "UPDATE devices SET cpu_fallback_ops = %(ops)s WHERE device_id = %(id)s AND epoch = %(epoch)s",
        {"id": device_id, "epoch": epoch, "ops": operators},
    )


def reserve(connection: Connection, device_id: str, size_bytes: int) -> bool:
    """Reserves memory if the budget has room, in one guarded UPDATE; False if it has not."""
    return bool(
        execute(
            connection,
            """
            UPDATE device_budgets SET reserved_bytes = reserved_bytes + %(size)s,
                peak_bytes = greatest(peak_bytes, reserved_bytes + %(size)s)
            WHERE device_id = %(id)s AND reserved_bytes + %(size)s <= budget_bytes
            """,
            {"id": device_id, "size": size_bytes},
        )
    )


def lock_budget(connection: Connection, device_id: str) -> tuple[int, int]:
    """The device's budget and what of it is reserved, locked until the transaction ends; 0 and 0 where it has none."""
    found = row(
        connection,
        "SELECT budget_bytes, reserved_bytes FROM device_budgets WHERE device_id = %(id)s FOR UPDATE",
        {"id": device_id},
    )
    return (found["budget_bytes"], found["reserved_bytes"]) if found else (0, 0)


def adjust_reservation(connection: Connection, device_id: str, by_bytes: int) -> None:
    """Gives back (negative) or adds to what is reserved, beyond the budget too: settling an estimate."""
    execute(
        connection,
        """
        UPDATE device_budgets SET reserved_bytes = greatest(0, reserved_bytes + %(by)s),
            peak_bytes = greatest(peak_bytes, reserved_bytes + %(by)s)
        WHERE device_id = %(id)s
        """,
        {"id": device_id, "by": by_bytes},
    )


def add_sample(connection: Connection, device_id: str, sample: Mapping[str, object]) -> None:
    """Adds one point to the device's history."""
    execute(
        connection,
        """
        INSERT INTO device_samples (device_id, used_bytes, free_bytes, busy_share, queue_length)
        VALUES (%(id)s, %(used_bytes)s, %(free_bytes)s, %(busy_share)s, %(queue_length)s)
        """,
        {"id": device_id, **sample},
    )


def samples(connection: Connection, device_id: str, since: datetime | str | None, limit: int) -> list[SampleRow]:
    """The device's history after `since`, oldest first."""
    return rows(
        connection,
        """
        SELECT at AS time, used_bytes, free_bytes, busy_share, queue_length FROM device_samples
        WHERE device_id = %(id)s AND (%(since)s::timestamptz IS NULL OR at > %(since)s::timestamptz)
        ORDER BY at DESC LIMIT %(limit)s
        """,
        {"id": device_id, "since": since, "limit": limit},
    )[::-1]


def forget_samples(connection: Connection, older_than_days: float) -> None:
    """Deletes samples past the retention."""
    execute(
        connection,
        "DELETE FROM device_samples WHERE at < clock_timestamp() - make_interval(secs => %(seconds)s)",
        {"seconds": older_than_days * 86400},
    )
