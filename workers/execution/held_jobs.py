"""The jobs that this worker has claimed: which the device has begun, and which still wait for it.

    add ─▶ waiting ─▶ begin ─▶ begun ─▶ discard
              └─▶ withdraw: cancelled, or past its expiry; the device never begins with it

Either the device begins with a job or it is withdrawn, never both: one lock decides.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from datetime import timedelta

from device_operations.jobs import State
from workers.execution.claimed_job import ClaimedJob


class HeldJobs:
    """Claimed jobs by id. Any thread may call."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: dict[str, ClaimedJob] = {}
        self._begun: dict[str, ClaimedJob] = {}
        self._closed = False

    def __len__(self) -> int:
        return len(self._waiting) + len(self._begun)

    def add(self, works: Iterable[ClaimedJob]) -> None:
        """Jobs were claimed: ahead of the device, or by the device itself, which begins with them."""
        with self._lock:
            for work in works:
                (self._begun if work.ahead is None else self._waiting)[work.job_id] = work

    def begin(self, works: list[ClaimedJob]) -> list[ClaimedJob]:
        """The device begins with those of `works` that this gives; the others were withdrawn, or are past expiry."""
        if all(work.ahead is None for work in works):
            return works
        with self._lock:
            if self._closed:
                return [work for work in works if work.job_id in self._begun]
            for work in works:
                if work.job_id in self._waiting and not _is_overdue(work):
                    self._begun[work.job_id] = self._waiting.pop(work.job_id)
                    _note_start(work)
            return [work for work in works if work.job_id in self._begun]

    def withdraw(self, job_id: str) -> ClaimedJob | None:
        """Takes back a job that waits for the device, which will not begin with it; None if it does not wait."""
        with self._lock:
            return self._waiting.pop(job_id, None)

    def withdraw_overdue(self) -> list[ClaimedJob]:
        """Takes back the jobs that wait and whose expiry is past."""
        if not self._waiting:
            return []
        with self._lock:
            overdue = [work for work in self._waiting.values() if _is_overdue(work)]
            for work in overdue:
                del self._waiting[work.job_id]
            return overdue

    def close(self) -> None:
        """From now on the device begins with nothing that waits: the next worker is to run it."""
        with self._lock:
            self._closed = True

    def discard(self, works: Iterable[ClaimedJob]) -> None:
        """Jobs have their outcomes."""
        with self._lock:
            for work in works:
                self._begun.pop(work.job_id, None)

    def begun(self) -> list[ClaimedJob]:
        """The jobs that the device has begun, those between two steps included."""
        with self._lock:
            return list(self._begun.values())

    def waiting(self) -> list[ClaimedJob]:
        """The jobs that are claimed and wait for the device."""
        with self._lock:
            return list(self._waiting.values())

    def get_begun(self, job_id: str) -> ClaimedJob | None:
        """The job, if the device has begun it."""
        return self._begun.get(job_id)


def _is_overdue(work: ClaimedJob) -> bool:
    """Whether the expiry is past, by the database's clock as it has gone on since the claim."""
    expires_at = work.row["expires_at"]
    if expires_at is None or work.ahead is None:
        return False
    return bool(work.ahead + timedelta(seconds=time.perf_counter() - work.claimed) >= expires_at)


def _note_start(work: ClaimedJob) -> None:
    """The job's row as it is from now on: what is recorded with its end, or earlier if it runs long."""
    assert work.ahead is not None
    waited = timedelta(seconds=time.perf_counter() - work.claimed)
    work.row["state"] = State.RUNNING.value
    work.row["started_at"] = work.ahead + waited
    work.row["attempt"] += 1
