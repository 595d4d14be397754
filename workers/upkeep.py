"""A worker's regular work between its jobs: deadlines, orphans, cancellations, idle models and sessions, samples."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import structlog
from sqlalchemy.exc import DBAPIError

from tasks.database import is_disconnect
from tasks.devices import store as device_store
from tasks.jobs import lost_ends as ends
from workers.execution.executor import Executor
from workers.execution.prefetch import Prefetch
from workers.execution.reconcile import Reconciler
from workers.execution.scheduler import Scheduler
from workers.operations.training import upkeep as training
from workers.resident.models import let_replaced_go, look_after_models, replaced
from workers.resident.residents import Resident

log = structlog.get_logger(__name__)

#: Seconds between two looks at the records (orphans, cancellations), and between two samples of the device.
SWEEP_SECONDS = 1.0
SAMPLE_SECONDS = 5.0

#: Seconds between two looks at deadlines.
TICK_SECONDS = 0.05


class Upkeep:
    """The thread of one worker's regular work. `on_recycle` is called when the process is to end for its memory."""

    def __init__(
        self,
        resident: Resident,
        scheduler: Scheduler,
        executor: Executor,
        prefetch: Prefetch,
        reconciler: Reconciler,
        on_recycle: Callable[[], None],
    ) -> None:
        self._resident = resident
        self._scheduler = scheduler
        self._executor = executor
        self._prefetch = prefetch
        self._reconciler = reconciler
        self._on_recycle = on_recycle
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run_until_stopped, name="upkeep", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Begins nothing more."""
        self._stopping.set()

    def _run_until_stopped(self) -> None:
        sampled_at, busy_before = time.monotonic(), 0.0
        swept_at = looked_at = 0.0
        idle_seconds = self._resident.settings.inference.session_timeout_minutes * 60
        look_seconds = min(5.0, max(0.25, idle_seconds / 4))
        while not self._stopping.wait(TICK_SECONDS):
            self._executor.check_deadlines()
            now = time.monotonic()
            if now - looked_at >= look_seconds:
                looked_at = now
                self._executor.call(lambda: look_after_models(self._resident))
                self._executor.call(lambda: training.look_after_sessions(self._resident))
                self._recycle_if_asked()
            if now - swept_at < SWEEP_SECONDS:
                continue
            swept_at = now
            try:
                self._sweep()
                if now - sampled_at >= SAMPLE_SECONDS:
                    busy = self._executor.busy_seconds
                    self._sample(min(1.0, (busy - busy_before) / (now - sampled_at)))
                    sampled_at, busy_before = now, busy
            except DBAPIError as error:
                if not is_disconnect(error):
                    log.error("sweep failed", error=str(error))
            except Exception:
                log.exception("sweep failed")

    def _sweep(self) -> None:
        resident = self._resident
        self._prefetch.sweep()
        with resident.engine.connect() as connection:
            running = ends.claimed(connection, resident.device_id, resident.epoch)
            outdated = bool(resident.models) and replaced(connection, resident.device_id)
        for job in running:
            if job["cancel_requested"]:
                self._executor.cancel(job["id"])
        self._reconciler.look(running)
        if outdated:
            self._executor.call(lambda: let_replaced_go(resident))

    def _recycle_if_asked(self) -> None:
        """Ends the process if it is idle and its backend gives memory back in no other way."""
        if self._resident.recycle and not len(self._scheduler) and not len(self._executor.held):
            self._on_recycle()

    def _sample(self, busy_share: float) -> None:
        resident = self._resident
        reading = resident.device.memory()
        sample = {
            "used_bytes": reading.used_bytes, "free_bytes": reading.free_bytes,
            "busy_share": round(busy_share, 4), "queue_length": len(self._scheduler),
        }  # fmt: skip
        with resident.engine.connect() as connection:
            device_store.add_sample(connection, resident.device_id, sample)
            device_store.set_cpu_fallback_ops(
                connection, resident.device_id, resident.epoch, resident.cpu_fallback_ops()
            )
