"""The worker service: one device, one lease, one scheduler, and Celery's own worker in front of it.

    open the device ─▶ take the lease ─▶ start Celery's worker with our pool ─▶ bring back models and training sessions
    ─▶ run jobs ─▶ stop ─▶ give the device back

Messages are received while models come back, and their jobs wait in the scheduler.

Exit status: 0 after an orderly stop, 75 when the device was lost (the supervisor starts it again), 76 when the lease
was lost to another worker, 77 when it ended to give memory back (it is started again too). `workers.__main__` adds 2
for wrong settings or an unknown device, and 69 for a device that cannot be taken.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from typing import Any

import structlog
from celery import Celery, bootsteps
from celery.worker import state
from celery.worker import state as celery_state
from kombu.entity import Queue
from kombu.messaging import Consumer
from sqlalchemy.exc import DBAPIError

from device_operations import collector
from device_operations.devices import NamedDevice as Named
from device_operations.errors import OperationError
from device_operations.settings import Settings
from tasks.app import PREFETCH, make_app
from tasks.blobs.store import BlobStore
from tasks.celery_bridge import transport
from tasks.celery_bridge.outbox import Outbox
from tasks.database import is_disconnect, open_engine, until_reachable
from tasks.devices import store as device_store
from tasks.devices.directory import Directory
from tasks.jobs import lifecycle
from tasks.jobs import lost_ends as ends
from tasks.jobs import rescue as rescues
from tasks.planning.context import Context
from tasks.redis.messages import Wake, read_wake
from tasks.redis.publish import Publisher, connect
from tasks.redis.queues import control_queue, device_queue
from tasks.statements import transaction
from workers import lease as leases
from workers.celery_bridge.events import SERIALIZER, Dispatcher, EventsInTurns
from workers.celery_bridge.pool import Note, SchedulerPool
from workers.celery_bridge.revoked import Revoked
from workers.devices import open_device
from workers.execution.completer import Completer
from workers.execution.executor import DEVICE_LOST_STATUS, Executor
from workers.execution.prefetch import Prefetch
from workers.execution.reconcile import Reconciler
from workers.execution.scheduler import Scheduler
from workers.operations.training import upkeep as training
from workers.operations.transfers import Transfers
from workers.resident.models import bring_back, let_replaced_go, look_after, replaced
from workers.resident.residents import Resident

log = structlog.get_logger(__name__)

LEASE_LOST_STATUS = 76
#: The worker ended itself to give memory back that its backend gives back in no other way.
RECYCLED_STATUS = 77

#: Seconds between two looks at the records: orphans, cancellations, samples.
SWEEP_SECONDS = 1.0
SAMPLE_SECONDS = 5.0

#: The share of a device's memory that may be reserved where its backend names no budget of its own.
BUDGET_SHARE = 0.9


class Service:
    """Everything that one worker process is made of. `run` returns the exit status."""

    def __init__(self, settings: Settings, named: Named) -> None:
        self._settings = settings
        self.device_id = named.device_id
        self._engine = open_engine(settings.require_database_url(), pool_size=6, max_overflow=4)
        self._redis = connect(settings.require_redis_url())
        self._publisher = Publisher(self._redis)
        self._status = 0
        self._started = False
        self._stopping = threading.Event()
        self._stopped = threading.Lock()
        device = open_device(named.backend, named.ordinal)
        about = device.describe()
        reading = device.memory()
        facts = {
            "device_id": self.device_id, "backend": named.backend, "ordinal": named.ordinal, "node": settings.node,
            "name": about.name, "vendor": about.vendor, "driver": about.driver, "total_bytes": about.total_bytes,
            "free_bytes": reading.free_bytes, "capabilities": dict(about.capabilities),
            "providers": list(about.providers),
        }  # fmt: skip
        budget = reading.budget_bytes or int((about.total_bytes or 0) * BUDGET_SHARE)
        self._lease, self._rescue = until_reachable(
            lambda: leases.take(self._engine, facts, budget, settings.lease_seconds)
        )
        epoch = self._lease.epoch
        blobs = BlobStore(str(settings.blobs.url))
        self._scheduler = Scheduler()
        self.app = make_app(settings, self.device_id)
        self.resident = Resident(self.device_id, epoch, device, self._engine, settings, blobs)
        self.resident.extend_lease = self._lease.extended
        self._outbox = Outbox(self._engine, settings.require_redis_url())
        self._revoked = Revoked(self._engine, self._publisher, self._outbox)
        self._completer = Completer(self._engine, self._publisher, self._scheduler, self.device_id, epoch, self._outbox)
        directory = Directory(self._engine, settings)
        self._completer.on_models_changed = directory.expire
        context = Context(self._engine, settings, directory, blobs, "default", device_id=self.device_id)
        self._prefetch = Prefetch(
            self._scheduler, self._completer, self.resident, context, self._engine, self._publisher, self._redis,
            self._revoked, self._outbox, lambda: self._lease.draining or not self._lease.safe,
        )  # fmt: skip
        self.executor = Executor(
            self._scheduler, self._lease, self.resident, self._completer, self._engine,
            on_unclaimed=self._prefetch.unclaimed, on_device_lost=self._device_lost,
        )  # fmt: skip
        self._reconciler = Reconciler(
            self._engine, self.device_id, epoch,
            lambda job_id: job_id in self._scheduler or job_id in self._completer.unflushed, self._announce,
        )  # fmt: skip
        self.resident.transfers = self._transfers = Transfers(
            self.resident, self._publisher, settings.require_database_url(), self._scheduler.wake
        )
        self._sweeper = threading.Thread(target=self._sweep_until_stopped, name="sweep", daemon=True)

    def run(self) -> int:
        """Runs until told to stop, and gives the exit status."""
        try:
            self._serve()
        finally:
            self.stop()
        return self._status

    def _serve(self) -> None:
        stop_early_on_signals()
        log.info("worker starts", device_id=self.device_id, epoch=self._lease.epoch, pid=os.getpid())
        self._lease.keep(
            free_bytes=lambda: self.resident.device.memory().free_bytes,
            on_lost=lambda: self._leave(LEASE_LOST_STATUS),
            on_drain=lambda draining: log.info("draining" if draining else "resumed", device_id=self.device_id),
        )
        self._tell_rescue()
        restore_unacked(self.app)
        SchedulerPool.prefetch = self
        transport.Transport.take = staticmethod(self._prefetch.receive_recorded)
        transport.Transport.unknown_task = staticmethod(self._prefetch.report_unknown)
        transport.Channel.has_room = staticmethod(lambda: self._scheduler.eligible < PREFETCH)
        Dispatcher.active = staticmethod(lambda: len(self.executor.running()))
        self.app.events.dispatcher_cls = "workers.celery_bridge.events:Dispatcher"
        self.app.conf.event_serializer = SERIALIZER
        self.app.steps["consumer"].add(control_step(self))
        self.app.steps["consumer"].add(EventsInTurns)
        self.app.Worker(
            hostname=f"{self.device_id}@{socket.gethostname()}",
            pool_cls="workers.celery_bridge.pool:SchedulerPool", concurrency=PREFETCH,
            queues=[device_queue(self.device_id)],
            without_gossip=True, without_mingle=True, task_events=True, loglevel="WARNING", quiet=True,
        ).start()  # fmt: skip

    # ---- called by the pool

    def start(self, app: Celery) -> None:
        """Celery's worker is up: what the last epoch had loaded comes back first, then jobs."""
        self._started = True
        self._outbox.start()
        self._completer.start()
        self._revoked.start()
        self.resident.record, self.resident.announce = self._completer.note, self._completer.announce
        self.executor.call(lambda: bring_back(self.resident))
        self.executor.call(lambda: training.bring_back(self.resident))
        self.executor.start()
        self._prefetch.start()
        self._sweeper.start()
        collector.spare()

    def receive(self, handle: Any) -> None:
        """One message."""
        self._prefetch.receive(handle)

    def revoke(self, task_ids: list[str]) -> None:
        """Tasks are revoked by Celery's remote control."""
        self._revoked.revoke(task_ids)

    def revoke_stamped(self, stamps: dict[str, set[str]]) -> None:
        """Tasks with any of these stamps are revoked."""
        self._revoked.revoke_stamped(stamps)

    def stop(self, *, cold: bool = False) -> None:
        """Finishes what runs, records it, declares the epoch over, and gives the device back. Twice is no harm."""
        with self._stopped:
            if self._stopping.is_set():
                return
            self._stopping.set()
        self._prefetch.stop()
        left = self._scheduler.close()
        if self._started:
            self.executor.stop(cold=cold)
            self._transfers.close()
            self._revoked.stop()
            self._completer.stop()
            self._outbox.stop()
        log.info("worker stops", device_id=self.device_id, left_to_the_next=len(left))
        self._lease.stop_renewing()
        if not self._lease.lost.is_set():
            try:
                with transaction(self._engine) as connection:
                    device_store.lock(connection, self.device_id)
                    rescue = rescues.rescue(connection, self.device_id, self._lease.epoch, self.executor.running())
                self._announce(rescue)
            except DBAPIError as error:
                log.warning("the epoch could not be closed; it ends with its lease", error=str(error.orig).strip())
        self._lease.release()

    def notes(self, *, running: bool) -> list[Note]:
        """The recorded jobs that run, or that wait in the scheduler, for `celery inspect`."""
        entries = self.executor.entries(running=running)
        if not running:
            entries += self._scheduler.select(lambda _: True)
        return [entry.handle for entry in entries if isinstance(entry.handle, Note)]

    def standing(self) -> dict[str, Any]:
        """What `celery inspect stats` shows of the scheduler."""
        return {
            "device_id": self.device_id, "epoch": self._lease.epoch, "waiting": len(self._scheduler),
            "running": self.executor.running(), "models": sorted(self.resident.models),
        }  # fmt: skip

    # ---- called by the control queue

    def control(self, wake: Wake) -> None:
        """A message of the control queue: see `Wake`."""
        if wake.send is not None:
            self._transfers.send(wake.send)
        if wake.follow is not None:
            self._completer.follow(wake.follow)
        if wake.cancel is not None and not self.executor.cancel(wake.cancel):
            entry = self._scheduler.discard(wake.cancel)
            if entry is not None:
                self._prefetch.unclaimed([entry])

    # ---- looking after

    def _tell_rescue(self) -> None:
        if self._rescue is not None:
            rescue = self._rescue
            log.info(
                "took over", device_id=self.device_id, requeued=len(rescue.requeued), ended=len(rescue.ended),
                lost_allocations=len(rescue.lost_allocations), lost_models=len(rescue.lost_models),
                lost_sessions=len(rescue.lost_sessions),
            )  # fmt: skip
            self._announce(rescue)

    def _announce(self, rescue: rescues.Rescue) -> None:
        lifecycle.announce(self._publisher, rescue.ended)
        self._outbox.ended_unseen(rescue.ended)
        self._outbox.requeued(rescue.requeued)
        self._publisher.jobs([(row, row["request"]) for row in rescue.requeued])

    def _sweep_until_stopped(self) -> None:
        sampled_at, busy_before = time.monotonic(), 0.0
        swept_at = looked_at = 0.0
        idle_seconds = self.resident.settings.inference.session_timeout_minutes * 60
        look_seconds = min(5.0, max(0.25, idle_seconds / 4))
        while not self._stopping.wait(0.05):
            self.executor.check_deadlines()
            now = time.monotonic()
            if now - looked_at >= look_seconds:
                looked_at = now
                self.executor.call(lambda: look_after(self.resident))
                self.executor.call(lambda: training.look_after(self.resident))
                self._recycle_if_asked()
            if now - swept_at < SWEEP_SECONDS:
                continue
            swept_at = now
            try:
                self._sweep()
                if now - sampled_at >= SAMPLE_SECONDS:
                    busy = self.executor.busy_seconds
                    self._sample(min(1.0, (busy - busy_before) / (now - sampled_at)))
                    sampled_at, busy_before = now, busy
            except DBAPIError as error:
                if not is_disconnect(error):
                    log.error("sweep failed", error=str(error))
            except Exception:
                log.exception("sweep failed")

    def _sweep(self) -> None:
        self._prefetch.sweep()
        with self._engine.connect() as connection:
            running = ends.claimed(connection, self.device_id, self._lease.epoch)
            outdated = bool(self.resident.models) and replaced(connection, self.device_id)
        for job in running:
            if job["cancel_requested"]:
                self.executor.cancel(job["id"])
        self._reconciler.look(running)
        if outdated:
            self.executor.call(lambda: let_replaced_go(self.resident))

    def _recycle_if_asked(self) -> None:
        """Ends the process in good order once it is idle; what it held loaded comes back with the next."""
        if self.resident.recycle and not len(self._scheduler) and not len(self.executor.held):
            log.info("worker recycles to give memory back", device_id=self.device_id)
            self._status = RECYCLED_STATUS
            celery_state.should_stop = 0

    def _sample(self, busy_share: float) -> None:
        reading = self.resident.device.memory()
        sample = {
            "used_bytes": reading.used_bytes, "free_bytes": reading.free_bytes,
            "busy_share": round(busy_share, 4), "queue_length": len(self._scheduler),
        }  # fmt: skip
        with self._engine.connect() as connection:
            device_store.add_sample(connection, self.device_id, sample)
            device_store.set_cpu_fallback_ops(
                connection, self.device_id, self._lease.epoch, self.resident.cpu_fallback_ops()
            )

    def _device_lost(self, error: OperationError) -> None:
        log.error("device lost; the worker ends and is to be started again", error=error.message)
        self._leave(DEVICE_LOST_STATUS)

    def _leave(self, status: int) -> None:
        """Ends the process with `status` once everything handed over is recorded."""
        self._status = status

        def leave() -> None:
            self._completer.stop()
            self._outbox.stop()
            if status == DEVICE_LOST_STATUS:
                with transaction(self._engine) as connection:
                    device_store.lock(connection, self.device_id)
                    rescue = rescues.rescue(connection, self.device_id, self._lease.epoch, self.executor.running())
                self._announce(rescue)
            os._exit(status)

        # The device's own thread may be the caller, and a driver that lost its device may never let Celery stop.
        threading.Thread(target=leave, name="leave", daemon=False).start()


def stop_early_on_signals() -> None:
    """Stops in order also before Celery listens to signals itself; and on Windows, which sends Ctrl-Break, after."""

    def leave(*_: Any) -> None:
        raise SystemExit(0)

    def stop_warm(*_: Any) -> None:
        state.should_stop = 0

    for name in ("SIGTERM", "SIGINT"):
        signal.signal(getattr(signal, name), leave)
    if hasattr(signal, "SIGBREAK"):
        signal.signal(signal.SIGBREAK, stop_warm)


def control_step(service: Service) -> type[bootsteps.ConsumerStep]:
    """Celery's consumer step that reads the device's control queue, on a channel of its own."""

    class Control(bootsteps.ConsumerStep):
        def get_consumers(self, channel: Any) -> list[Consumer]:
            queue = Queue(control_queue(service.device_id), durable=False, no_ack=True)
            return [Consumer(channel, [queue], callbacks=[self.on_message], accept=["json"], no_ack=True)]

        def on_message(self, body: Any, message: Any) -> None:
            service.control(read_wake(body))

    return Control


def restore_unacked(app: Celery) -> None:
    """Puts back what the device's last worker had received and not acknowledged: kombu keeps it by device."""
    with app.connection_for_read() as connection:
        connection.default_channel.qos.restore_all()
