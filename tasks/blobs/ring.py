"""A ring in shared memory: one process puts pieces in, another takes them out; no call waits for the other process.

The taker makes the segment, names it after itself and its epoch, touches every page of it, and removes the name as soon
as the putter is attached: from then on nothing of it outlives the two processes, however they end. What a taker that
died before that left behind is swept by its next epoch.
"""

from __future__ import annotations

import hashlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import shared_memory
from pathlib import Path

import numpy as np
import orjson

from device_operations.wire.json_types import FreeJson, JsonObject

#: Pieces in a ring unless its taker wants more, and the bytes of each: together small enough to stay in the
#: processor's own cache.
SLOTS = 4
SLOT_BYTES = 2 * 2**20

#: The header: counters of 8 bytes first, then the length of each slot's piece, then an error as JSON.
_HEADER_BYTES = 4096
_ATTACHED, _PUT, _TAKEN, _CLOSED, _ERROR, _WITHDRAWN, _SLOTS = range(7)
_LENGTHS = 16
_ERROR_AT = 1024

_NAME = "devop"
_untracked_lock = threading.Lock()


class Ring:
    """One end of a ring. `make` is the taker's, `attach` the putter's."""

    def __init__(self, segment: _Segment, *, mine: bool) -> None:
        self.name = segment.name
        self._segment = segment
        assert segment.buf is not None
        self._bytes: memoryview = segment.buf
        self._mine = mine
        self._named = mine
        self._words = np.frombuffer(self._bytes, np.int64, _HEADER_BYTES // 8)
        self._fence = threading.Lock()
        #: Called once, before this end lets the memory go.
        self.before_close: Callable[[], object] | None = None

    @classmethod
    def make(cls, name: str, slots: int = SLOTS, *, once: bool = False) -> Ring:
        """A new ring, every page of it held. Raises `OSError` where shared memory is too small, or not to be had.

        Its pages are touched beforehand, except where it serves `once`: then that is no sooner done than used.
        """
        size = _HEADER_BYTES + slots * SLOT_BYTES
        with _untracked():
            segment = _Segment(name, create=True, size=size)
        try:
            if hasattr(os, "posix_fallocate"):
                # Without it, a full /dev/shm shows only at the first touch, as a SIGBUS.
                os.posix_fallocate(segment._fd, 0, size)
            ring = cls(segment, mine=True)
            if not (once and hasattr(os, "posix_fallocate")):
                np.frombuffer(ring._bytes, np.uint8, size).fill(0)
            ring._words[_SLOTS] = slots
        except OSError:
            segment.close()
            _unlink(segment)
            raise
        return ring

    @classmethod
    def attach(cls, name: str) -> Ring:
        """The other end of a ring. Raises `OSError` where it is not there, not on this machine, or withdrawn."""
        with _untracked():
            ring = cls(_Segment(name), mine=False)
        ring._words[_ATTACHED] = 1
        ring._settle()
        if ring._words[_WITHDRAWN]:
            ring.close()
            raise FileNotFoundError(f"the ring {name} was withdrawn")
        return ring

    # ---- the putter's end

    def room(self) -> memoryview | None:
        """The next free slot, to be filled and then `put`; None while all are full."""
        if self._words[_PUT] - self._words[_TAKEN] >= self._words[_SLOTS]:
            return None
        return self._slot(int(self._words[_PUT]))

    def put(self, size_bytes: int) -> None:
        """Hands over the slot that `room` gave, with that many bytes in it."""
        self._words[_LENGTHS + int(self._words[_PUT]) % int(self._words[_SLOTS])] = size_bytes
        self._settle()
        self._words[_PUT] += 1

    def fail(self, error: JsonObject) -> None:
        """Tells the taker why nothing more comes."""
        text = orjson.dumps(error)[: _HEADER_BYTES - _ERROR_AT]
        self._bytes[_ERROR_AT : _ERROR_AT + len(text)] = text
        self._settle()
        self._words[_ERROR] = len(text)

    @property
    def closed(self) -> bool:
        """Whether the taker has given up."""
        return bool(self._words[_CLOSED])

    # ---- the taker's end

    def piece(self, ahead: int = 0) -> memoryview | None:
        """The oldest piece, or the one `ahead` of it, valid until `taken`; None while there is none."""
        number = int(self._words[_TAKEN]) + ahead
        if self._words[_PUT] <= number:
            return None
        self._settle()
        return self._slot(number)[: int(self._words[_LENGTHS + number % int(self._words[_SLOTS])])]

    def taken(self) -> None:
        """Gives the oldest piece's slot back."""
        self._settle()
        self._words[_TAKEN] += 1

    @property
    def memory(self) -> memoryview:
        """All of the segment."""
        return self._bytes

    @property
    def attached(self) -> bool:
        """Whether the putter is there."""
        return bool(self._words[_ATTACHED])

    def withdraw(self) -> bool:
        """Revokes the ring: later attaches fail. False if a putter may have attached already.

        Each side writes its own word before it reads the other's, so at least one of the two sees the other.
        """
        self._words[_WITHDRAWN] = 1
        self._settle()
        return not self.attached

    def forget_name(self) -> None:
        """Removes the segment's name, which only an attach needs: call it once the putter is attached."""
        if self._named:
            self._named = False
            _unlink(self._segment)

    def error(self) -> FreeJson | None:
        """What the putter failed with."""
        size = int(self._words[_ERROR])
        if not size:
            return None
        self._settle()
        error: FreeJson = orjson.loads(bytes(self._bytes[_ERROR_AT : _ERROR_AT + size]))
        return error

    def close(self) -> None:
        """Lets this end go; the taker's also says to the putter that nothing more is taken."""
        before, self.before_close = self.before_close, None
        if before is not None:
            before()
        if self._mine:
            self._words[_CLOSED] = 1
            self.forget_name()
        del self._words
        self._segment.close()

    def _slot(self, number: int) -> memoryview:
        start = _HEADER_BYTES + number % int(self._words[_SLOTS]) * SLOT_BYTES
        return self._bytes[start : start + SLOT_BYTES]

    def _settle(self) -> None:
        """What was written before is seen before what is written after, on processors that reorder too: two locks
        taken and given back are a full barrier.
        """
        with self._fence:
            pass
        with self._fence:
            pass


def segment_name(owner: str, epoch: int, number: int) -> str:
    """The name of a taker's segment under an epoch. `owner` distinguishes this taker from any other on the machine."""
    return f"{_prefix(owner)}{epoch}-{number}"


def sweep(owner: str, epoch: int) -> int:
    """Removes the segments of a taker's earlier epochs; gives how many there were. Only Linux can list them."""
    folder = Path("/dev/shm")  # noqa: S108 - where Linux keeps shared memory
    if not sys.platform.startswith("linux") or not folder.is_dir():
        return 0
    prefix = _prefix(owner)
    found = 0
    for path in folder.glob(f"{prefix}*"):
        number = path.name.removeprefix(prefix).partition("-")[0]
        if number.isdigit() and int(number) < epoch:
            path.unlink(missing_ok=True)
            found += 1
    return found


def _prefix(owner: str) -> str:
    # Short: macOS allows 30 characters.
    return f"{_NAME}-{hashlib.sha256(owner.encode()).hexdigest()[:10]}-"


class _Segment(shared_memory.SharedMemory):
    """A segment whose views may outlive it."""

    _fd: int

    def close(self) -> None:
        """Lets it go; where a view of a slot is still held, the mapping goes with the view."""
        try:
            super().close()
        except BufferError:
            self._mmap = None
            descriptor, self._fd = self._fd, -1
            if descriptor >= 0:
                os.close(descriptor)


def _unlink(segment: _Segment) -> None:
    with _untracked():
        try:
            segment.unlink()
        except FileNotFoundError:
            return


@contextmanager
def _untracked() -> Iterator[None]:
    """Keeps Python's resource tracker out of it: until 3.13 it removes, at a process's end, segments of others too."""
    if sys.platform == "win32":
        yield
        return
    tracker = shared_memory.resource_tracker  # type: ignore[attr-defined]
    with _untracked_lock:
        shared_memory.resource_tracker = _NoTracker  # type: ignore[attr-defined]
        try:
            yield
        finally:
            shared_memory.resource_tracker = tracker  # type: ignore[attr-defined]


class _NoTracker:
    @staticmethod
    def register(name: str, rtype: str) -> None:
        """Nothing is noted."""

    @staticmethod
    def unregister(name: str, rtype: str) -> None:
        """Nothing was noted."""
