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

from sqlalchemy import Engine

from device_operations.errors import failure
from device_operations.settings import Settings
from tasks.devices import store as device_store
from tasks.devices.rows import DeviceRow
from tasks.inference import models as model_store
from tasks.inference.rows import ModelRow
from tasks.jobs import store as job_store
from tasks.owners import Asker, may_see
from tasks.training import sessions as training_store
from tasks.training.rows import SessionPlace

#: Seconds after which a snapshot is read anew by the next that needs one.
MAX_AGE_SECONDS = 1.0

#: How many training sessions are remembered.
REMEMBERED_SESSIONS = 10_000


@dataclass(frozen=True, slots=True)
class DirectorySnapshot:
    """Devices with their queues, and the models that can be run or soon can."""

    devices: dict[str, DeviceRow] = field(default_factory=dict)
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    models: dict[str, ModelRow] = field(default_factory=dict)
    #: Models by name, the last load first, without those that were replaced: what names stand for.
    by_name: dict[str, list[ModelRow]] = field(default_factory=dict)
    read_at: float = float("-inf")
    #: What this process has placed since: else everything would go to one device until the next read.
    placed: Counter[str] = field(default_factory=Counter)

    def visible(self, asker: Asker, model_id: str) -> ModelRow | None:
        """The model of that id, if it is the asker's to run."""
        found = self.models.get(model_id)
        return found if found is not None and may_see(asker, found, shared=True) else None

    def named(self, asker: Asker, name: str, version: str | None = None) -> list[ModelRow]:
        """The models of that name that are the asker's to run: its own; else the last one shared and its namesakes.

        For an admin who has none and with whom none is shared, any owner's. The last load first; of one owner only.
        """
        known = [
            model
            for model in self.by_name.get(name, ())
            if version in (None, model["version"]) and may_see(asker, model, shared=True)
        ]
        if not known:
            return known
        owner = min(known, key=lambda model: _distance(asker, model))["owner"]
        return [model for model in known if model["owner"] == owner]

    def meant(self, asker: Asker, name: str, version: str | None = None) -> list[ModelRow]:
        """The model that the name stands for, on each device that holds it: of `named`, the last load that has ended.

        While none has ended, the last that is under way. Empty where the asker can run none of that name.
        """
        named = self.named(asker, name, version)
        if len(named) < 2:
            return named
        last = next((model for model in named if model["state"] != "loading"), named[0])
        same = (last["version"], last["load_key"])
        return [model for model in named if (model["version"], model["load_key"]) == same]

    def names(self, asker: Asker) -> list[tuple[str, str]]:
        """Each name and version that stands for a model that the asker can run, in order."""
        return sorted(
            {
                (name, model["version"])
                for name, models in self.by_name.items()
                for model in models
                if may_see(asker, model, shared=True)
            }
        )

    def queued(self, device_id: str) -> int:
        """How many jobs wait for the device."""
        return self.counts.get(device_id, {}).get("queued", 0)

    def load_of(self, device_id: str) -> int:
        """How many jobs wait for the device or run on it, with those that this process has placed there since."""
        return sum(self.counts.get(device_id, {}).values()) + self.placed[device_id]


def _distance(asker: Asker, model: ModelRow) -> int:
    """Own models come before shared ones, and those before what only an admin may use."""
    return 0 if model["owner"] == asker.owner else 1 if model["shared"] else 2


class Directory:
    """Keeps the snapshot. Safe to use from any thread."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self._engine = engine
        self._settings = settings
        self._lock = threading.Lock()
        self._snapshot = DirectorySnapshot()
        self._changed_at = float("-inf")
        self._training_sessions: OrderedDict[str, SessionPlace] = OrderedDict()

    def snapshot(self, max_age_seconds: float = MAX_AGE_SECONDS) -> DirectorySnapshot:
        """The snapshot, read anew where it is older than `max_age_seconds`."""
        current = self._snapshot
        if self._counts(current, max_age_seconds):
            return current
        return self.refresh()

    def expire(self) -> None:
        """Something was loaded or unloaded: no snapshot whose read began before now counts any more."""
        self._changed_at = time.monotonic()

    def _counts(self, snapshot: DirectorySnapshot, max_age_seconds: float) -> bool:
        return snapshot.read_at > self._changed_at and time.monotonic() - snapshot.read_at <= max_age_seconds

    def training_session(self, session_id: str, asker: Asker) -> SessionPlace | None:
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

    def remember_training(self, session: SessionPlace) -> SessionPlace:
        """Notes a training session that was read, or is about to be recorded; no caller knows its id before."""
        known: SessionPlace = {
            "session_id": session["session_id"], "device_id": session["device_id"], "owner": session["owner"],
        }  # fmt: skip
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

    def refresh(self) -> DirectorySnapshot:
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
            by_name: dict[str, list[ModelRow]] = {}
            for row in models.values():
                if row["replaced_by"] is None:
                    by_name.setdefault(row["name"], []).append(row)
            self._snapshot = DirectorySnapshot(devices, counts, models, by_name, read_at)
            return self._snapshot

    # ---- placing

    def device(self, device_id: str) -> DeviceRow:
        """The device, which must exist and take jobs: `device_not_found`, `device_unavailable`, `device_draining`."""
        found = self.snapshot().devices.get(device_id)
        if found is None or found["state"] != "online":
            found = self.refresh().devices.get(device_id)
        if found is None:
            known = ", ".join(sorted(self.snapshot().devices)) or "none has ever come online"
            raise failure("device_not_found", f"there is no device {device_id!r}; there are: {known}")
        return self.require_online(found)

    def require_online(self, device: DeviceRow) -> DeviceRow:
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

    def choose(self, size_bytes: int = 0, holding: list[str] | None = None) -> DeviceRow:
        """The device for a request that names none.

        With `ENABLE_GPU_SCHEDULING`: the first of `holding` (devices that hold what the job needs) that takes jobs,
        else, of those with room for `size_bytes`, the one with the shortest queue, and of equal ones the one with the
        most free budget. Without it, `DEFAULT_DEVICE`, or the first device where there is none of that name.
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

    def model(self, asker: Asker, model_id: str) -> ModelRow | None:
        """The model, if it can be run or soon can, and is the asker's to run."""
        return self.snapshot().visible(asker, model_id) or self.refresh().visible(asker, model_id)

    def meant(self, asker: Asker, name: str, version: str | None = None) -> list[ModelRow]:
        """The model that the name stands for, on each device that holds it; empty where the asker can run none."""
        return self.snapshot().meant(asker, name, version) or self.refresh().meant(asker, name, version)


def _rank(device: DeviceRow, snapshot: DirectorySnapshot, size_bytes: int) -> tuple[bool, int, int, str]:
    free = (device["budget_bytes"] or 0) - (device["reserved_bytes"] or 0)
    # Free memory in eighths of the budget: a few bytes more or less must not decide.
    share = 8 * free // max(device["budget_bytes"] or 1, 1)
    return (free < size_bytes, snapshot.load_of(device["device_id"]), -share, device["device_id"])
