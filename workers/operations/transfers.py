"""Bytes from one device's allocation to another device's worker: through a ring on one machine, a blob between two.

    taker: fetch ─▶ asks by the source's control queue ─▶ takes pieces as they come, and looks whether the source lives
    source: send ─▶ noted ─▶ serve, a few pieces between two jobs of its own

Only the executor's thread touches devices, on both sides. Neither side ever waits for the other inside a call: two
devices that copy to each other at the same time both go on.
"""

from __future__ import annotations

import itertools
import socket
import time
from collections.abc import Callable, Generator
from dataclasses import asdict
from typing import TYPE_CHECKING

import structlog

from device_operations.errors import from_job_error
from device_operations.jobs import new_id
from tasks.blobs import records as blob_store
from tasks.blobs.ring import SLOTS, Ring, segment_name, sweep
from tasks.blobs.store import CHUNK_BYTES
from tasks.devices import store as device_store
from tasks.redis.publish import Publisher
from tasks.statements import Row
from workers import lease
from workers.execution.claimed_job import Progress
from workers.operations.sending import PAUSE_SECONDS, Sender, TransferRequest, source_lost

if TYPE_CHECKING:
    from workers.resident.residents import Resident

log = structlog.get_logger(__name__)

#: Seconds between two looks whether the source lives and whether a blob came instead; and between two askings.
LOOK_SECONDS = 0.25
ASK_SECONDS = 2.0

#: Bytes between two reports of progress.
REPORT_BYTES = 64 * 2**20

#: Takes the bytes at a place of the range.
Sink = Callable[[int, memoryview], None]


class Transfers:
    """Both sides of one worker. `send` may be called from any thread, all else from the executor's."""

    def __init__(self, resident: Resident, publisher: Publisher, database_url: str, wake: Callable[[], None]) -> None:
        self._resident = resident
        self._publisher = publisher
        # One machine may run several installations whose devices have the same names and epochs.
        self._owner = f"{database_url} {resident.device_id}"
        self._sender = Sender(resident, wake)
        self._numbers = itertools.count(1)
        self._idle: dict[tuple[str, int], list[Ring]] = {}
        swept = sweep(self._owner, resident.epoch)
        if swept:
            log.info("segments of earlier epochs removed", device_id=resident.device_id, segments=swept)

    # ---- taking

    def fetch(
        self, job_id: str, device_id: str, allocation_id: str, offset: int, size_bytes: int, sink: Sink
    ) -> Generator[Progress, None, str]:
        """Brings a range of another device's allocation piece by piece into `sink`; returns "ring" or "blob".

        Raises `worker_lost` where the source's worker dies, and what the source fails with.
        """
        source = self._source(device_id)
        here = source["host"] == socket.gethostname()
        ring = self._ring((device_id, source["epoch"])) if here else None
        asked = TransferRequest(
            key=f"{job_id}-{next(self._numbers)}-{self._resident.epoch}", to=self._resident.device_id,
            allocation_id=allocation_id, offset=offset, size_bytes=size_bytes, blob_id=new_id(),
            ring=ring.name if ring else None,
        )  # fmt: skip
        whole = False
        try:
            via = yield from self._take(source, asked, ring, sink)
            whole = True
            return via
        finally:
            if ring is not None and whole and ring.attached:
                self._idle.setdefault((device_id, source["epoch"]), []).append(ring)
            elif ring is not None:
                ring.close()

    def fetch_now(self, device_id: str, allocation_id: str, offset: int, size_bytes: int) -> bytearray:
        """The same at once, for work that cannot pause; what others ask of this device meanwhile goes on."""
        data = bytearray(size_bytes)

        def keep(start: int, piece: memoryview) -> None:
            data[start : start + len(piece)] = piece

        for _ in self.fetch(new_id(), device_id, allocation_id, offset, size_bytes, keep):
            self.serve()
        return data

    def _take(
        self, source: Row, asked: TransferRequest, ring: Ring | None, sink: Sink
    ) -> Generator[Progress, None, str]:
        size, done, reported = asked.size_bytes, 0, 0
        looked_at = asked_at = time.monotonic()
        self._publisher.wake(source["device_id"], {"send": asdict(asked)})
        while done < size:
            piece = ring.piece() if ring is not None else None
            if piece is not None and ring is not None:
                ring.forget_name()
                sink(done, piece)
                done += len(piece)
                piece.release()
                ring.taken()
                if done - reported >= REPORT_BYTES and done < size:
                    reported = done
                    yield Progress({"done_bytes": done, "total_bytes": size})
                elif done % (SLOTS * 2**20) == 0:
                    yield Progress()
                continue
            error = ring.error() if ring is not None else None
            if error is not None:
                raise from_job_error(error)
            now = time.monotonic()
            if now - looked_at > LOOK_SECONDS:
                looked_at = now
                self._require_alive(source)
                if not (ring is not None and ring.attached):
                    if self._resident.blobs.size(asked.blob_id) is not None:
                        yield from self._take_blob(asked, sink)
                        return "blob"
                    if now - asked_at > ASK_SECONDS:
                        asked_at = now
                        self._publisher.wake(source["device_id"], {"send": asdict(asked)})
            time.sleep(PAUSE_SECONDS if ring is not None else LOOK_SECONDS / 10)
            yield Progress()
        return "ring"

    def _take_blob(self, asked: TransferRequest, sink: Sink) -> Generator[Progress, None, None]:
        size, blob_id = asked.size_bytes, asked.blob_id
        staging = memoryview(bytearray(min(size, CHUNK_BYTES)))
        for start in range(0, size, CHUNK_BYTES):
            piece = staging[: min(CHUNK_BYTES, size - start)]
            self._resident.blobs.read_into(blob_id, start, piece)
            sink(start, piece)
            yield Progress({"done_bytes": start + len(piece), "total_bytes": size})
        with self._resident.engine.connect() as connection:
            blob_store.delete(connection, blob_id)
        self._resident.blobs.delete(blob_id)

    def _source(self, device_id: str) -> Row:
        with self._resident.engine.connect() as connection:
            source = device_store.get(connection, device_id)
        if source is None or source["buried"] or not source["alive"]:
            raise source_lost(device_id)
        return source

    def _require_alive(self, source: Row) -> None:
        """The epoch that holds the source still stands, and its process is there if it is one of this machine."""
        current = self._source(source["device_id"])
        if current["epoch"] != source["epoch"] or lease.is_gone(current):
            raise source_lost(source["device_id"])

    def _ring(self, key: tuple[str, int]) -> Ring | None:
        """A ring for a source's epoch: one that has served before is warm."""
        for other in [known for known in self._idle if known[0] == key[0] and known != key]:
            for ring in self._idle.pop(other):
                ring.close()
        idle = self._idle.get(key)
        if idle:
            return idle.pop()
        try:
            ring = Ring.make(segment_name(self._owner, self._resident.epoch, next(self._numbers)))
        except OSError as error:
            log.warning("no shared memory for a copy between devices; it goes through a blob", error=str(error))
            return None
        ring.before_close = self._resident.device.pin(ring.memory)
        return ring

    # ---- sending

    def send(self, asked: TransferRequest) -> None:
        """Another device's worker wants bytes of this one."""
        self._sender.send(asked)

    def serve(self) -> bool:
        """Sends what can be sent at once; whether more is left to send."""
        return self._sender.serve()

    def close(self) -> None:
        """The worker stops: takers are given the failure, shared memory is removed."""
        self._sender.close()
        for rings in self._idle.values():
            for ring in rings:
                ring.close()
        self._idle.clear()
