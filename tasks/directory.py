"""What gateways and workers know of devices and models without asking each time: a snapshot, at most a second old.

It is read anew as soon as a load or an unload is known to have ended: a name may stand for another model since. Placing
a job reads the snapshot instead of the database. What it says may be past: the worker that takes the job checks again,
and the record is what counts.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Engine

from device_operations.errors import failure
from device_operations.settings import Settings
from tasks.owners import Asker, may_see
from tasks.store import devices as device_store
from tasks.store import jobs as job_store
from tasks.store import models as model_store
from tasks.store import training as training_store
from tasks.store.connection import Row

#: Seconds after which a snapshot is read anew by whoever needs one.
MAX_AGE_SECONDS = 1.0

#: How many training sessions are remembered.
REMEMBERED_SESSIONS = 10_000


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Devices with their queues, and the models that can be run or soon can."""

    devices: dict[str, Row] = field(default_factory=dict)
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    models: dict[str, Row] = field(default_factory=dict)
    read_at: float = float("-inf")
    #: What this process has placed since: else everything would go to one device until the next read.
    placed: Counter[str] = field(default_factory=Counter)

    def named(self, name: str, version: str | None = None) -> list[Row]:
        """The models of that name, newest first."""
        return [model for model in self.models.values() if _is_called(model, name, version)]

    def queued(self, device_id: str) -> int:
        """How many jobs wait for the device."""
        return self.counts.get(device_id, {}).get("queued", 0)

    def load_of(self, device_id: str) -> int:
        """How many jobs wait for the device or run on it, with those that this process has placed there since."""
        return sum(self.counts.get(device_id, {}).values()) + self.placed[device_id]


def _is_called(model: Row, name: str, version: str | None) -> bool:
    """Whether the model was loaded under that name, at first or again."""
    calls = [(model["name"], model["version"]), *map(tuple, model["aliases"])]
    return any(called == name and version in (None, of) for called, of in calls)


class Directory:
    """Keeps the snapshot. Safe to use from any thread."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self._engine = engine
        self._settings = settings
        self._lock = threading.Lock()
        self._snapshot = Snapshot()
        self._changed_at = float("-inf")
        self._training_sessions: OrderedDict[str, Row] = OrderedDict()

    def snapshot(self, max_age_seconds: float = MAX_AGE_SECONDS) -> Snapshot:
        """The snapshot, read anew where it is older than `max_age_seconds`."""
        current = self._snapshot
        if self._counts(current, max_age_seconds):
            return current
        return self.refresh()

    def expire(self) -> None:
        """Something was loaded or unloaded: no snapshot whose read began before now counts any more."""
        self._changed_at = time.monotonic()

    def _counts(self, snapshot: Snapshot, max_age_seconds: float) -> bool:
        return snapshot.read_at > self._changed_at and time.monotonic() - snapshot.read_at <= max_age_seconds

    def training_session(self, session_id: str, asker: Asker) -> Row | None:
        """What never changes of a training session: its id, owner and device. None where there is none.

        Another owner's is read each time, as one that does not exist is: neither takes longer than the other.
        """
        known = self._training_sessions.get(session_id)
        if known is None or not may_see(asker, known):
            with self._engine.connect() as connection:
                found = training_store.get(connection, session_id)
            if found is None:
                return None
            known = self.remember_training(found)
        return known

    def remember_training(self, session: Row) -> Row:
        """Notes a training session that was read, or is about to be recorded: nobody names it before it is."""
        known = {name: session[name] for name in ("session_id", "owner", "device_id")}
        with self._lock:
            while len(self._training_sessions) >= REMEMBERED_SESSIONS:
                self._training_sessions.popitem(last=False)
            self._training_sessions[session["session_id"]] = known
        return known

    def knows_training(self, session_id: str | None, asker: Asker) -> bool:
        """Whether `training_session` gives that one without a read."""
        known = self._training_sessions.get(session_id or "")
        return known is not None and may_see(asker, known)

    def is_fresh(self) -> bool:
        """Whether the snapshot can be used without a read."""
        return self._counts(self._snapshot, MAX_AGE_SECONDS)

    def refresh(self) -> Snapshot:
        """Reads the snapshot anew. Callers that wait for the lock meanwhile share one read, begun after they asked."""
        asked_at = time.monotonic()
        with self._lock:
            if self._snapshot.read_at >= asked_at:
                return self._snapshot
            read_at = time.monotonic()
            with self._engine.connect() as connection:
                devices = {row["device_id"]: row for row in device_store.all_devices(connection)}
                counts = job_store.counts(connection)
                models = {row["model_id"]: row for row in model_store.runnable(connection)}
            self._snapshot = Snapshot(devices, counts, models, read_at)
            return self._snapshot

    # ---- placing

    def device(self, device_id: str) -> Row:
        """The device, which must exist and take jobs: `device_not_found`, `device_unavailable`, `device_draining`."""
        found = self.snapshot().devices.get(device_id)
        if found is None or found["state"] != "online":
            found = self.refresh().devices.get(device_id)
        if found is None:
            known = ", ".join(sorted(self.snapshot().devices)) or "none has ever come online"
            raise failure("device_not_found", f"there is no device {device_id!r}; there are: {known}")
        return self.require_online(found)

    def require_online(self, device: Row) -> Row:
        """The device itself, or the reason why it takes no jobs."""
        if device["state"] == "draining":
            raise failure(
                "device_draining", f"{device['device_id']} is draining and takes no new jobs; resume it or name another"
            )
        if device["state"] == "offline":
            raise failure(
                "device_unavailable",
                f"{device['device_id']} is offline: no worker holds it; start `device-operations worker --device "
                f"{device['device_id']}`",
                retry_after_seconds=int(self._settings.lease_seconds) + 1,
            )
        return device

    def choose(self, size_bytes: int = 0, holding: list[str] | None = None) -> Row:
        """The device for a request that names none.

        With `ENABLE_GPU_SCHEDULING`: the first of `holding` (devices that hold what the job needs) that takes jobs,
        else the one with room for `size_bytes`, most free budget and the shortest queue. Without it, `DEFAULT_DEVICE`.
        """
        snapshot = self.snapshot()
        online = [device for device in snapshot.devices.values() if device["state"] == "online"]
        if not self._settings.enable_gpu_scheduling:
            default = self._settings.default_device
            if default in snapshot.devices:
                return self.device(default)
            first = min(snapshot.devices, default=None)
            return self.device(first if first is not None else default)
        if not online:
            snapshot = self.refresh()
            online = [device for device in snapshot.devices.values() if device["state"] == "online"]
        if not online:
            draining = next((d for d in snapshot.devices.values() if d["state"] == "draining"), None)
            if draining is not None:
                return self.require_online(draining)
            raise failure(
                "device_unavailable",
                "no device is online; start `device-operations worker --device …` or `device-operations up`",
                retry_after_seconds=5,
            )
        held = [device for device in online if device["device_id"] in (holding or [])]
        return min(held or online, key=lambda device: _rank(device, snapshot, size_bytes))

    def model(self, model_id: str) -> Row | None:
        """The model, if it can be run or soon can."""
        found = self.snapshot().models.get(model_id)
        return found if found is not None else self.refresh().models.get(model_id)

    def models_named(self, name: str, version: str | None = None) -> list[Row]:
        """The models of that name that can be run or soon can, newest first."""
        return self.snapshot().named(name, version) or self.refresh().named(name, version)


def _rank(device: Row, snapshot: Snapshot, size_bytes: int) -> tuple[Any, ...]:
    free = (device["budget_bytes"] or 0) - (device["reserved_bytes"] or 0)
    # Free memory in eighths of the budget: a byte more or less free must not outweigh a queue of a hundred jobs.
    share = 8 * free // max(device["budget_bytes"] or 1, 1)
    return (free < size_bytes, snapshot.load_of(device["device_id"]), -share, device["device_id"])
