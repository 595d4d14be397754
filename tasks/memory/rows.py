"""The rows of allocations, as PostgreSQL gives them."""

from __future__ import annotations

from datetime import datetime
from typing import TypedDict

from device_operations.wire.json_types import FreeJson


class AllocationRow(TypedDict):
    """A row of `allocations`."""

    allocation_id: str
    device_id: str
    #: The epoch that holds the bytes; null until allocated.
    epoch: int | None
    #: pending -> active -> freed; failed, lost. An ended one's id may be used anew by its owner.
    state: str
    size_bytes: int
    dtype: str | None
    shape: list[int] | None
    label: str | None
    owner: str
    job_id: str
    #: Of the request, by which a caller's own allocation_id is known again.
    request_sha256: str
    #: The deallocation that is under way; what it frees counts as free at admission.
    freeing_job_id: str | None
    #: Of all bytes, where a write or read found it and nothing has changed them since.
    sha256: str | None
    error: FreeJson | None
    created_at: datetime
    ttl_seconds: float | None
    expires_at: datetime | None
    ended_at: datetime | None


class FreedAllocation(TypedDict):
    """What is known of an allocation that has just left its device."""

    allocation_id: str
    device_id: str
    size_bytes: int


class LostAllocation(TypedDict):
    """An allocation that was lost with its worker."""

    allocation_id: str
    size_bytes: int


class AllocationBeingFreed(TypedDict):
    """A live allocation whose deallocation waits or runs."""

    allocation_id: str
    size_bytes: int
    freeing_job_id: str


class MemoryStanding(TypedDict):
    """The memory of one device. What the device cannot measure, and what an offline one no longer reports, is None."""

    device_id: str
    state: str
    total_bytes: int | None
    free_bytes: int | None
    budget_bytes: int | None
    #: Of the budget, with what is about to be made.
    reserved_bytes: int | None
    #: Admitted beyond the budget, against memory that is about to be freed.
    awaiting_bytes: int | None
    #: What allocations, models and training sessions hold.
    used_bytes: int
    peak_bytes: int | None
    allocated_bytes: int
    models_bytes: int
    training_bytes: int
    allocation_count: int
    by_owner: dict[str, int]


class HeldRow(TypedDict):
    """What lies on a device or is about to: an allocation, a model or a training session."""

    type: str
    id: str
    size_bytes: int
    label: str | None
    owner: str
    since: datetime
    state: str


class KnownAllocation(TypedDict):
    """What planning knows of an allocation: recorded, or made by an earlier entry. `AllocationRow` has it all."""

    allocation_id: str
    device_id: str
    state: str
    size_bytes: int
    owner: str
    error: FreeJson | None
