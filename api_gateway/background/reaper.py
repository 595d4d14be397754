"""The reaper: what no worker will do. One gateway at a time is the leader, by an advisory lock of PostgreSQL.

    due jobs are published · expired jobs end · lapsed leases are buried · sessions, blobs and old jobs go
    ended jobs that Celery was not given are · messages of devices that do not exist fail

Nothing is buried until one lease period after PostgreSQL became reachable, or after this process or its machine stood
still: a database that was away, or a sleep, expired every lease at once, and the workers behind them are well.
"""

from __future__ import annotations

import threading
import time

import structlog
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError

from api_gateway.background.awake import Awake
from api_gateway.background.unconsumed import Unconsumed
from api_gateway.background.webhooks import Webhooks
from device_operations.jobs import CLAIMABLE, State
from device_operations.settings import Settings
from tasks.blobs import records as blob_store
from tasks.blobs.store import BlobStore
from tasks.blobs.transients import Transients
from tasks.celery_bridge import store as celery_store
from tasks.celery_bridge.outbox import Outbox
from tasks.database import is_disconnect
from tasks.devices import store as device_store
from tasks.inference import session_store
from tasks.jobs import lifecycle, store, submit
from tasks.jobs import rescue as rescues
from tasks.jobs.store import Ending
from tasks.memory import allocations as allocation_store
from tasks.memory import plan as memory
from tasks.redis.publish import Publisher
from tasks.statements import row, transaction
from tasks.training import sessions as training_store

log = structlog.get_logger(__name__)

#: The advisory lock that the leader holds; any fixed number does.
LEADER_LOCK = 7_235_002

#: Seconds between two rounds, and between two that also delete what is past its retention.
ROUND_SECONDS = 0.25
SLOW_SECONDS = 10.0

#: How much one round does at most of each thing.
AT_ONCE = 500


class Reaper:
    """A thread of the gateway."""

    def __init__(
        self, engine: Engine, publisher: Publisher, blobs: BlobStore, settings: Settings, outbox: Outbox
    ) -> None:
        self._engine = engine
        self._publisher = publisher
        self._blobs = blobs
        self._settings = settings
        self._outbox = outbox
        self._unconsumed = Unconsumed(engine, settings.require_redis_url(), publisher, outbox)
        self._webhooks = Webhooks(engine, settings)
        self._awake = Awake()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._reap_until_stopped, name="reaper", daemon=True)

    def start(self) -> None:
        """Begins; does nothing while another gateway leads."""
        self._awake.start()
        self._thread.start()

    def stop(self) -> None:
        """Ends after the round in progress."""
        self._stopping.set()
        self._thread.join(timeout=10)
        self._awake.stop()
        self._webhooks.stop()

    def _reap_until_stopped(self) -> None:
        while not self._stopping.is_set():
            try:
                with self._engine.connect() as leadership:
                    self._lead(leadership)
            except DBAPIError as error:
                if not is_disconnect(error):
                    log.error("reaper failed", error=str(error))
                self._stopping.wait(1.0)
            except Exception:
                log.exception("reaper failed")
                self._stopping.wait(1.0)

    def _lead(self, leadership: Connection) -> None:
        """Rounds while this connection holds the lock; a broken one loses it, and reachability is counted anew."""
        while not self._stopping.is_set():
            held = row(leadership, "SELECT pg_try_advisory_lock(%(lock)s) AS held", {"lock": LEADER_LOCK})
            if held and held["held"]:
                break
            self._stopping.wait(2.0)
        reachable_since = time.monotonic()
        slow_at = 0.0
        while not self._stopping.wait(ROUND_SECONDS):
            row(leadership, "SELECT 1")
            self._publish_due()
            self._expire()
            self._give_celery()
            self._unconsumed.look()
            self._webhooks.deliver_due()
            self._free_expired()
            self._expire_sessions()
            if time.monotonic() - reachable_since > self._settings.lease_seconds:
                self._bury()
            if time.monotonic() - slow_at > SLOW_SECONDS:
                slow_at = time.monotonic()
                self._forget()

    def _publish_due(self) -> None:
        with self._engine.connect() as connection:
            due = store.make_due(connection, AT_ONCE)
        self._publisher.jobs([(job, job["request"]) for job in sorted(due, key=lambda job: job["seq"])])

    def _expire(self) -> None:
        with self._engine.connect() as connection:
            overdue = store.expired(connection, AT_ONCE)
        if overdue:
            endings = [Ending(job["id"], State.EXPIRED.value, error=lifecycle.expired(job)) for job in overdue]
            ended = lifecycle.end(self._engine, endings, sorted(CLAIMABLE))
            lifecycle.announce(self._publisher, ended)
            self._outbox.ended_unseen(ended)

    def _give_celery(self) -> None:
        """What ended and was not given to Celery by the process that ended it: it died, or Redis was away.

        A process that died may have died before it had logged the end, too.
        """
        with self._engine.connect() as connection:
            pending = celery_store.pending(connection, AT_ONCE)
        for job in self._outbox.ended_unseen(pending):
            lifecycle.log_end(job)

    def _expire_sessions(self) -> None:
        """Ends sessions that were idle too long; the workers free their state when they next look at the records."""
        with self._engine.connect() as connection:
            expired = session_store.expire_sessions(connection)
        if expired:
            log.info("sessions expired", sessions=expired)

    def _free_expired(self) -> None:
        """Allocations whose time is up get a deallocation like any other: after the jobs submitted before."""
        with self._engine.connect() as connection:
            expired = allocation_store.expired(connection, AT_ONCE)
        plans = [memory.plan_expiry(row) for row in expired]
        if plans:
            log.info("allocations expire", allocations=len(plans))
            submit.submit(self._engine, self._publisher, plans)

    def _bury(self) -> None:
        with self._engine.connect() as connection:
            lapsed = device_store.lapsed(connection)
        for device in lapsed:
            with transaction(self._engine) as connection:
                current = device_store.lock(connection, device["device_id"])
                if current is None or current["alive"] or current["buried"]:
                    continue
                # Asked after the look at the lease: a pause between the two is one before this.
                if self._awake.seconds() <= self._settings.lease_seconds:
                    return
                rescue = rescues.rescue(connection, device["device_id"], current["epoch"])
            log.warning(
                "a worker is lost", device_id=device["device_id"], epoch=device["epoch"], ended=len(rescue.ended),
                requeued=len(rescue.requeued), lost_allocations=len(rescue.lost_allocations),
            )  # fmt: skip
            lifecycle.announce(self._publisher, rescue.ended)
            self._outbox.ended_unseen(rescue.ended)
            self._outbox.requeued(rescue.requeued)
            self._publisher.jobs([(job, job["request"]) for job in rescue.requeued])

    def _forget(self) -> None:
        days = self._settings.jobs.retention_days
        with self._engine.connect() as connection:
            expired = blob_store.take_expired(connection, AT_ONCE)
            store.forget(connection, days, 10 * AT_ONCE)
            allocation_store.forget(connection, days, 10 * AT_ONCE)
            training_store.forget(connection, days, AT_ONCE)
            device_store.forget_samples(connection, days)
            celery_store.forget_revoked(connection)
        for blob_id in expired:
            self._blobs.delete(blob_id)
        self._blobs.sweep()
        Transients(self._blobs).sweep(self._settings.blobs.ttl_hours * 3600)
