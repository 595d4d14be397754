"""The sending side of copies between devices: serves the bytes that other devices' workers ask of this one.

send ─▶ noted ─▶ serve, a few pieces between two jobs of this device
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from device_operations.errors import OperationError, failure
from tasks.blobs import records as blob_store
from tasks.blobs.ring import SLOTS, Ring
from tasks.blobs.store import CHUNK_BYTES, BlobWriter

if TYPE_CHECKING:
    from workers.devices.arrays import Buffer
    from workers.resident.residents import Resident

log = structlog.get_logger(__name__)

#: Seconds slept if nothing could be sent: less than a piece takes.
PAUSE_SECONDS = 0.00005

#: Seconds that a blob on its way between machines is kept if its taker dies.
PASSING_SECONDS = 3600.0

#: The owner of these blobs: no caller's name, so that no caller can ask for them.
OWNER = "(a copy between devices)"


@dataclass(frozen=True, slots=True)
class TransferRequest:
    """What a taker asks of a source's worker, as the control queue carries it."""

    #: The transfer's own id: a request that is repeated is served once.
    key: str
    #: The taker's device.
    to: str
    allocation_id: str
    offset: int
    size_bytes: int
    blob_id: str
    #: The name of the taker's ring; None if the bytes go through the blob.
    ring: str | None


@dataclass(slots=True, eq=False)
class _Sending:
    """A transfer that is being served."""

    asked: TransferRequest
    buffer: Buffer
    ring: Ring | None
    writer: BlobWriter | None = None
    done: int = 0


class Sender:
    """The transfers that one worker serves. `send` may be called from any thread, all else from the executor's."""

    def __init__(self, resident: Resident, wake: Callable[[], None]) -> None:
        self._resident = resident
        self._wake = wake
        self._asked: deque[TransferRequest] = deque()
        self._sending: list[_Sending] = []
        self._known: deque[str] = deque(maxlen=1000)
        self._attached: dict[str, tuple[str, Ring]] = {}

    def send(self, asked: TransferRequest) -> None:
        """Another device's worker wants bytes of this one."""
        self._asked.append(asked)
        self._wake()

    def serve(self) -> bool:
        """Sends what can be sent at once; whether more is left to send."""
        while self._asked:
            self._begin(self._asked.popleft())
        moved = False
        for sending in list(self._sending):
            try:
                before = sending.done
                if self._advance(sending):
                    self._sending.remove(sending)
                moved = moved or sending.done > before
            except Exception as error:  # noqa: BLE001 - its taker is given the failure
                self._sending.remove(sending)
                _give_up(sending.asked, sending.ring, sending.writer, self._resident.device.classify(error))
        if self._sending and not moved:
            time.sleep(PAUSE_SECONDS)
        return bool(self._sending)

    def close(self) -> None:
        """The worker stops: takers are given the failure, shared memory is let go."""
        for sending in self._sending:
            _give_up(sending.asked, sending.ring, sending.writer, source_lost(self._resident.device_id))
        self._sending.clear()
        for _, ring in self._attached.values():
            ring.close()
        self._attached.clear()

    def _begin(self, asked: TransferRequest) -> None:
        if asked.key in self._known:
            return
        self._known.append(asked.key)
        ring = self._attach(asked.to, asked.ring) if asked.ring else None
        buffer = self._resident.allocations.get(asked.allocation_id)
        if buffer is None:
            missing = failure(
                "allocation_not_found", f"{self._resident.device_id} holds no allocation {asked.allocation_id!r}"
            )
            _give_up(asked, ring, None, missing)
            return
        self._sending.append(_Sending(asked, buffer, ring))

    def _attach(self, to: str, name: str) -> Ring | None:
        """The ring of a taker; one that an earlier epoch of it made is let go."""
        known = self._attached.get(name)
        if known is not None:
            return known[1]
        epoch = name.rsplit("-", 2)[-2]
        for other in [key for key, (device_id, _) in self._attached.items() if device_id == to]:
            if other.rsplit("-", 2)[-2] != epoch or self._attached[other][1].closed:
                self._attached.pop(other)[1].close()
        try:
            ring = Ring.attach(name)
        except OSError as error:
            log.warning("shared memory not reached; the copy goes through a blob", segment=name, error=str(error))
            return None
        ring.before_close = self._resident.device.pin(ring.memory)
        self._attached[name] = (to, ring)
        return ring

    def _advance(self, sending: _Sending) -> bool:
        """One round of a transfer; whether it is over."""
        device = self._resident.device
        if sending.ring is None:
            return self._advance_blob(sending)
        for _ in range(SLOTS):
            if sending.done == sending.asked.size_bytes or sending.ring.closed:
                return True
            slot = sending.ring.room()
            if slot is None:
                return False
            step = min(len(slot), sending.asked.size_bytes - sending.done)
            device.read(sending.buffer, sending.asked.offset + sending.done, step, slot[:step])
            slot.release()
            sending.ring.put(step)
            sending.done += step
        return sending.done == sending.asked.size_bytes

    def _advance_blob(self, sending: _Sending) -> bool:
        if sending.writer is None:
            row = {
                "blob_id": sending.asked.blob_id,
                "sha256": None,
                "size_bytes": sending.asked.size_bytes,
                "owner": OWNER,
            }
            with self._resident.engine.connect() as connection:
                blob_store.insert(connection, row, PASSING_SECONDS)
            # The bytes pass from one worker to another: their hash is not asked for.
            sending.writer = self._resident.blobs.writer(sending.asked.blob_id, sha256="0" * 64)
        step = min(CHUNK_BYTES, sending.asked.size_bytes - sending.done)
        sending.writer.write(self._resident.device.read(sending.buffer, sending.asked.offset + sending.done, step))
        sending.done += step
        if sending.done < sending.asked.size_bytes:
            return False
        sending.writer.finish()
        return True


def _give_up(asked: TransferRequest, ring: Ring | None, writer: BlobWriter | None, error: OperationError) -> None:
    log.warning("a transfer to another device failed", allocation_id=asked.allocation_id, error=error.message)
    if ring is not None:
        ring.fail(error.as_job_error())
    if writer is not None:
        writer.abort()


def source_lost(device_id: str) -> OperationError:
    return failure(
        "worker_lost",
        f"the worker of {device_id}, which holds the source, was lost during the copy; allocate and write it again",
        detail={"device_id": device_id},
    )
