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
import socket
import threading

import structlog
from celery import Celery
from celery.worker import state as celery_state
from sqlalchemy.exc import DBAPIError

import workers.celery_bridge.panel  # noqa: F401 - registers the commands of remote control
from device_operations import collector
from device_operations.devices import NamedDevice as Named
from device_operations.errors import OperationError
from device_operations.settings import Settings
from device_operations.wire.json_types import JsonObject
from tasks.app import PREFETCH, make_app
from tasks.blobs.store import BlobStore
from tasks.celery_bridge import transport
from tasks.celery_bridge.outbox import Outbox
from tasks.database import open_engine, until_reachable
from tasks.devices import store as device_store
from tasks.devices.directory import Directory
from tasks.jobs import lifecycle
from tasks.jobs import rescue as rescues
from tasks.planning.context import Context
from tasks.redis.messages import Wake
from tasks.redis.publish import Publisher, connect
from tasks.redis.queues import device_queue
from tasks.statements import transaction
from workers import lease as leases
from workers.celery_bridge.consumer import control_step, restore_unacked, stop_early_on_signals
from workers.celery_bridge.events import SERIALIZER, Dispatcher, EventsInTurns
from workers.celery_bridge.pool import Handle, Note, SchedulerPool
from workers.celery_bridge.revoked import Revoked
from workers.devices import open_device
from workers.execution.completer import Completer
from workers.execution.executor import DEVICE_LOST_STATUS, Executor
from workers.execution.prefetch import Prefetch
from workers.execution.reconcile import Reconciler
from workers.execution.scheduler import Scheduler
from workers.operations.sending import TransferRequest
from workers.operations.training import upkeep as training
from workers.operations.transfers import Transfers
from workers.resident.models import bring_models_back
from workers.resident.residents import Resident
from workers.upkeep import Upkeep

log = structlog.get_logger(__name__)

LEASE_LOST_STATUS = 76
#: The worker ended itself to give memory back that its backend gives back in no other way.
RECYCLED_STATUS = 77

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
        directory = Directory(self._engine, settings)
        self._completer = Completer(
            self._engine, self._publisher, self._scheduler, self.device_id, epoch, self._outbox, directory.expire
        )
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
        self._upkeep = Upkeep(
            self.resident, self._scheduler, self.executor, self._prefetch, self._reconciler, self._recycle
        )

    def run(self) -> int:
        """Runs until stopped, and gives the exit status."""
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
        self._report_rescue()
        restore_unacked(self.app)
        SchedulerPool.service = self
        transport.Transport.take = staticmethod(self._prefetch.receive_recorded)
        transport.Transport.unknown_task = staticmethod(self._prefetch.report_unknown)
        transport.Channel.has_room = staticmethod(lambda: self._scheduler.eligible < PREFETCH)
        Dispatcher.active = staticmethod(lambda: len(self.executor.running()))
        self.app.events.dispatcher_cls = "workers.celery_bridge.events:Dispatcher"
        self.app.conf.event_serializer = SERIALIZER
        self.app.steps["consumer"].add(control_step(self.device_id, self.control))
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
        self.executor.call(lambda: bring_models_back(self.resident))
        self.executor.call(lambda: training.bring_sessions_back(self.resident))
        self.executor.start()
        self._prefetch.start()
        self._upkeep.start()
        collector.spare()

    def receive(self, handle: Handle) -> None:
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
        self._upkeep.stop()
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
        handles = [entry.handle for entry in entries]
        return [handle for handle in handles if isinstance(handle, Note)]

    def standing(self) -> JsonObject:
        """What `celery inspect stats` shows of the scheduler."""
        return {
            "device_id": self.device_id, "epoch": self._lease.epoch, "waiting": len(self._scheduler),
            "running": self.executor.running(), "models": sorted(self.resident.models),
        }  # fmt: skip

    # ---- called by the control queue

    def control(self, wake: Wake) -> None:
        """A message of the control queue: see `Wake`."""
        if wake.send is not None:
            self._transfers.send(TransferRequest(**wake.send))
        if wake.follow is not None:
            self._completer.follow(wake.follow)
        if wake.cancel is not None and not self.executor.cancel(wake.cancel):
            entry = self._scheduler.discard(wake.cancel)
            if entry is not None:
                self._prefetch.unclaimed([entry])

    # ---- beginning and ending

    def _report_rescue(self) -> None:
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

    def _recycle(self) -> None:
        """Ends the process in order, to give memory back; what it held loaded comes back with the next."""
        log.info("worker recycles to give memory back", device_id=self.device_id)
        self._status = RECYCLED_STATUS
        celery_state.should_stop = 0

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
