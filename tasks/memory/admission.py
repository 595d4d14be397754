"""Admission: memory is reserved against a device's budget in the transaction that records the job.

What idle models hold that are unpinned or replaced counts as free, since the worker evicts them; so does what queued
deallocations free.
The scheduler checks again: what was counted on and did not come fails the job there with `insufficient_memory`.
"""

from __future__ import annotations

from sqlalchemy import Connection

from device_operations.errors import failure
from tasks.devices import store as devices
from tasks.inference import idle
from tasks.memory import allocations


def reserve(connection: Connection, device_id: str, size_bytes: int, what: str) -> list[str]:
    """Reserves memory for `what`; gives the ids of all queued deallocations to wait for, if the room is not there yet.

    Raises `insufficient_memory` naming what is needed, what is free and the remedy. Safe with any number of callers:
    the total is one row, changed under its lock.
    """
    if devices.reserve(connection, device_id, size_bytes):
        return []
    budget, reserved = devices.lock_budget(connection, device_id)
    free = max(0, budget - reserved)
    freeing = allocations.being_freed(connection, device_id)
    coming = sum(row["size_bytes"] for row in freeing)
    evictable = sum(graph["reserved_bytes"] for graph in idle.evictable_graphs(connection, device_id))
    if reserved - coming - evictable + size_bytes > budget:
        raise failure(
            "insufficient_memory",
            f"{what} needs {size_bytes} bytes; {device_id} has {free} of {budget} bytes free, {evictable} in idle "
            f"models and {coming} in queued deallocations; free allocations, unload models, or name another device",
            detail={
                "device_id": device_id,
                "needed_bytes": size_bytes,
                "free_bytes": free,
                "budget_bytes": budget,
                "evictable_bytes": evictable,
                "freeing_bytes": coming,
            },
        )
    devices.adjust_reservation(connection, device_id, size_bytes)
    return sorted({row["freeing_job_id"] for row in freeing})
