"""What ended jobs do to allocations and their reservations."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection

from device_operations.jobs import Kind, State
from tasks.store import allocations, devices
from tasks.store.connection import Row

#: The error of jobs that need an allocation which died with its worker.
LOST = {
    "code": "allocation_lost",
    "message": "An allocation that the job needs was lost with its worker; allocate and write it again.",
    "retryable": False,
    "detail": None,
}


def allocated(connection: Connection, job: Row, facts: dict[str, Any], epoch: int | None) -> list[Any]:
    """A `memory.allocate` ended: the allocation is active, or failed and its reservation given back."""
    if job["state"] == State.SUCCEEDED:
        assert epoch is not None
        allocations.activate(connection, job["resource_id"], epoch)
        return []
    error = job["error"] or {"code": job["state"], "message": f"The allocation's job was {job['state']}."}
    gone = allocations.end(connection, job["resource_id"], "failed", leaving=("pending",), error=error)
    if gone is None:
        return []
    devices.adjust_reservation(connection, gone["device_id"], -gone["size_bytes"])
    return [(job["resource_id"], error)]


def deallocated(connection: Connection, job: Row, facts: dict[str, Any], epoch: int | None) -> list[Any]:
    """A `memory.deallocate` ended: the reservation is free again."""
    if job["state"] == State.SUCCEEDED:
        gone = allocations.end(connection, job["needs"][0], "freed", leaving=("pending", "active"))
        if gone is not None:
            devices.adjust_reservation(connection, gone["device_id"], -gone["size_bytes"])
    return []


def lose(connection: Connection, device_id: str, epoch: int) -> list[str]:
    """A worker died: its allocations are lost, and their reservations given back."""
    gone = allocations.lose(connection, device_id, epoch)
    if gone:
        devices.adjust_reservation(connection, device_id, -sum(row["size_bytes"] for row in gone))
    return [row["allocation_id"] for row in gone]


EFFECTS = {Kind.MEMORY_ALLOCATE.value: allocated, Kind.MEMORY_DEALLOCATE.value: deallocated}
