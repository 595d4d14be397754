"""The lease: this process's right to use a device, for a limited time that it prolongs.

    take ─▶ held (safe) ─▶ unsafe ─▶ held again, or lost
              │  ▲ │
              │  └─┘ renewed RENEWALS_PER_LEASE times in its length, from a thread of its own
              └─▶ released, in order

**Epoch.** Each take gives the device a new epoch. Every claim and every end is guarded by it in the database, so a
process that is late can change nothing once another has taken over. `take` also rescues what the last epoch left: its
running jobs are requeued or ended, its allocations, models and sessions declared lost or brought back.

**Trust window.** Only the database's clock decides whether a lease stands. By its own monotonic clock, counted from
before the last renewal was sent, the worker decides when it stops to trust it: while less than 1 - STOP_AT_SHARE of the
lease's usual length is left, `safe` is false. Then no job is claimed; claimed and running ones go on. The share left is
for a claim under way and for clocks that differ in speed.

**Failures.** A renewal that fails because the database is away leaves the lease as it is: the worker becomes unsafe,
and safe again with the next renewal that finds its epoch. A renewal that finds another epoch means that another worker
holds the device or its jobs were given up: `lost`, for good, and the process ends. A holder that died is replaced when
its lease has run out, or at once if it ran on the same machine and its process is gone.

**A library that holds the interpreter** keeps the renewing thread from running: `extended` asks for a longer lease
before such a call, and gives the time back after it.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil
import structlog
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError

from device_operations.errors import failure
from tasks.devices import store
from tasks.jobs import rescue as rescues
from tasks.jobs.rescue import Rescue
from tasks.statements import Row, transaction

log = structlog.get_logger(__name__)

#: How many times the lease is renewed in its own length.
RENEWALS_PER_LEASE = 4

#: The share of the lease after which, unrenewed, the scheduler stops: well before the database could call it expired.
STOP_AT_SHARE = 0.75


class Lease:
    """One epoch of one device, held by this process."""

    def __init__(self, engine: Engine, device_id: str, epoch: int, lease_seconds: float) -> None:
        self.device_id = device_id
        self.epoch = epoch
        self.draining = False
        self.lost = threading.Event()
        self._engine = engine
        self._lease_seconds = lease_seconds
        #: What `extended` adds at present. Each renewal reads it under the lock, so that none shortens the lease again.
        self._extra_seconds = 0.0
        self._renewing = threading.Lock()
        self._renewed_at, self._granted_seconds = time.monotonic(), lease_seconds
        self._stop = threading.Event()
        self._free_bytes: Callable[[], int | None] = lambda: None
        self._on_lost: Callable[[], None] = lambda: None
        self._on_drain: Callable[[bool], None] = lambda _draining: None
        self._thread = threading.Thread(target=self._renew_until_stopped, name="lease", daemon=True)

    def keep(
        self,
        free_bytes: Callable[[], int | None],
        on_lost: Callable[[], None],
        on_drain: Callable[[bool], None],
    ) -> None:
        """Starts renewing. `on_lost` is called once when another worker holds the device; `on_drain` on each change."""
        self._free_bytes = free_bytes
        self._on_lost = on_lost
        self._on_drain = on_drain
        self._thread.start()

    @property
    def safe(self) -> bool:
        """Whether the lease cannot have run out yet, by our own clock: only then may a new job be claimed."""
        lasts = self._granted_seconds - self._lease_seconds * (1 - STOP_AT_SHARE)
        return not self.lost.is_set() and time.monotonic() - self._renewed_at < lasts

    @contextmanager
    def extended(self, seconds: float) -> Iterator[None]:
        """While inside, the lease lasts `seconds` longer from each renewal, the first of them now; then as before.

        For calls during which no other thread of this process runs. If the database cannot be reached, the body runs
        all the same, under the lease as it was.
        """
        self._extra_seconds = seconds
        self._renew()
        try:
            yield
        finally:
            self._extra_seconds = 0.0
            # At once: otherwise a worker that dies now would be replaced only after the longer time.
            self._renew()

    def stop_renewing(self) -> None:
        """Renews no more: before the epoch is declared over, which a renewal would take for a loss."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    def release(self) -> None:
        """Stops renewing and gives the device back: the next worker need not wait for the lease to run out."""
        self.stop_renewing()
        if not self.lost.is_set():
            with transaction(self._engine) as connection:
                row = store.lock(connection, self.device_id)
                if row is not None and row["epoch"] == self.epoch:
                    store.release(connection, self.device_id, self.epoch)

    def _renew_until_stopped(self) -> None:
        interval = self._lease_seconds / RENEWALS_PER_LEASE
        while not self._stop.wait(interval if self.safe else 0.2):
            self._renew()
            if self.lost.is_set():
                return

    def _renew(self) -> None:
        """Prolongs the lease, from any thread; `on_lost` is called once."""
        with self._renewing:
            if self._stop.is_set() or self.lost.is_set():
                return
            asked_at = time.monotonic()
            seconds = self._lease_seconds + self._extra_seconds
            try:
                with self._engine.connect() as connection:
                    row = store.renew(connection, self.device_id, self.epoch, seconds, self._free_bytes())
            except DBAPIError as error:
                log.warning("lease not renewed", device_id=self.device_id, error=str(error.orig).strip())
                return
            if row is None:
                log.error("lease lost: another worker holds the device, or its jobs were given up", epoch=self.epoch)
                self.lost.set()
                self._on_lost()
                return
            # The database counts from when it ran the statement, which is not before we asked.
            self._renewed_at, self._granted_seconds = asked_at, seconds
            if row["draining"] != self.draining:
                self.draining = row["draining"]
                self._on_drain(self.draining)


def take(engine: Engine, facts: Row, budget_bytes: int, lease_seconds: float) -> tuple[Lease, Rescue | None]:
    """Takes the device over under a new epoch, declaring lost what the last one held.

    Raises `device_unavailable` while a live worker holds it: until its lease has run out, or its process is gone if it
    ran on this machine.
    """
    device_id = facts["device_id"]
    own = {"host": socket.gethostname(), "pid": os.getpid(), "pid_started": psutil.Process().create_time()}
    with transaction(engine) as connection:
        row = store.lock(connection, device_id)
        rescue = None
        if row is not None:
            if row["alive"] and not is_gone(row):
                raise failure(
                    "device_unavailable",
                    f"{device_id} is held by a worker that is alive: pid {row['pid']} on {row['host']}, epoch "
                    f"{row['epoch']}; stop it, or wait until its lease has run out",
                    detail={"pid": row["pid"], "host": row["host"], "lease_until": row["lease_until"].isoformat()},
                )
            if not row["buried"]:
                rescue = rescues.rescue(connection, device_id, row["epoch"])
        epoch = store.register(connection, {**facts, **own}, lease_seconds)
        store.set_budget(connection, device_id, budget_bytes)
    return Lease(engine, device_id, epoch, lease_seconds), rescue


def is_gone(row: Row) -> bool:
    """Whether the holder ran on this machine and is no longer there; a reused pid has another start time."""
    if row["host"] != socket.gethostname():
        return False
    try:
        return bool(abs(psutil.Process(row["pid"]).create_time() - row["pid_started"]) > 1.0)
    except psutil.NoSuchProcess:
        return True
