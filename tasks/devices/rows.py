"""The rows of devices, as PostgreSQL gives them."""

from __future__ import annotations

from datetime import datetime
from typing import TypedDict

from device_operations.wire.json_types import FreeJson


class RegisteredDevice(TypedDict):
    """A row of `devices`, with whether its lease stands."""

    device_id: str
    backend: str
    ordinal: int
    node: str | None
    name: str
    vendor: str | None
    driver: str | None
    total_bytes: int | None
    free_bytes: int | None
    capabilities: FreeJson
    providers: list[str]
    cpu_fallback_ops: int | None
    epoch: int
    draining: bool
    heartbeat_at: datetime
    #: The worker owns the device until then. Claims and ends of its jobs are guarded by the epoch besides.
    lease_until: datetime
    #: Whether what the epoch held has been declared lost (or it ended in order).
    buried: bool
    host: str
    pid: int
    #: The process's start, so that a reused pid is not taken for it.
    pid_started: float
    alive: bool


class DeviceRow(RegisteredDevice):
    """A device as callers see it, but for its jobs: with its budget, and a state that comes from lease and drain."""

    #: None until a worker has set a budget; so are the next two, which have a meaning only with it.
    budget_bytes: int | None
    reserved_bytes: int
    peak_bytes: int
    #: online, draining, offline
    state: str


class LapsedDevice(TypedDict):
    """A device whose lease has run out, and the epoch whose jobs are to be rescued."""

    device_id: str
    epoch: int


class SampleRow(TypedDict):
    """A point of a device's history."""

    time: datetime
    used_bytes: int | None
    free_bytes: int | None
    #: The share of time in which the device had a job, 0 to 1.
    busy_share: float | None
    queue_length: int


class Renewed(TypedDict):
    """What a worker learns when it renews its lease."""

    draining: bool
