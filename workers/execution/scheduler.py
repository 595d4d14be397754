"""The scheduler: which job goes next on this device. It holds entries, runs nothing, and never sees the database.

    admit ─▶ blocked ──(predecessors end)──▶ eligible ─▶ take ─▶ (running, the executor's) ─▶ ended

An entry is eligible once every job in its `after` has ended, on whichever device that one ran. Eligible entries go by
priority, then by order of submission; a blocked entry lends its priority to what it waits for. Entries of one batch
(runs of one model and shape, small allocations, deallocations) that wait together are taken together.
"""

from __future__ import annotations

import heapq
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from tasks.jobs.model import JobView

#: Ended jobs that are remembered, so that a successor admitted later does not need to ask for them.
REMEMBERED = 20_000


class MessageHandle(Protocol):
    """The message that a job came with, by which Celery learns what became of it."""

    def park(self) -> None:
        """The job waits for another one: the message's slot is freed."""

    def started(self, at: float) -> None:
        """The device began the job `at`, by the monotonic clock."""

    def ended(self, view: JobView) -> None:
        """The job's end is recorded; `view` is the job as callers see it."""

    def dropped(self) -> None:
        """The message was a duplicate, or another worker has its job: nothing is reported."""


@dataclass(slots=True, eq=False)
class Entry:
    """One job in the scheduler. `handle` is None for a job that came without a message."""

    job_id: str
    kind: str
    priority: int
    seq: int
    needs: tuple[str, ...] = ()
    after: set[str] = field(default_factory=set)
    batch_key: Hashable | None = None
    batch_limit: int = 1
    #: How long after its admission a run may wait for others to join it.
    batch_delay_seconds: float = 0.0
    handle: MessageHandle | None = None
    admitted_at: float = field(default_factory=time.monotonic)
    effective: int = -1
    reserved: bool = False

    def __post_init__(self) -> None:
        self.effective = max(self.effective, self.priority)

    @property
    def rank(self) -> tuple[int, int]:
        """Smaller goes first."""
        return (-self.effective, self.seq)


class Scheduler:
    """Entries of one device. Every method may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ready = threading.Condition(self._lock)
        self._entries: dict[str, Entry] = {}
        self._eligible: list[tuple[tuple[int, int], str]] = []
        self._batches: dict[Hashable, OrderedDict[str, None]] = {}
        self._waiting_for: dict[str, set[str]] = {}
        self._taken: set[str] = set()
        self._finishing: set[str] = set()
        self._remembered: OrderedDict[str, None] = OrderedDict()
        self._passed: dict[str, str] = {}
        self._closed = False
        self._woken = False
        #: How many entries wait for nothing but their turn.
        self.eligible = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, job_id: str) -> bool:
        return job_id in self._entries or job_id in self._taken

    def admit(self, entry: Entry) -> bool:
        """Adds an entry; False if the job already waits or runs here, or the scheduler is closed."""
        with self._lock:
            if self._closed or entry.job_id in self._entries or entry.job_id in self._taken:
                return False
            entry.after = {
                job_id
                for job_id in entry.after
                if job_id not in self._remembered and self._passed.get(job_id) not in entry.needs
            }
            self._entries[entry.job_id] = entry
            for job_id in entry.after:
                self._waiting_for.setdefault(job_id, set()).add(entry.job_id)
            if entry.job_id in self._waiting_for:
                lent = [
                    self._entries[waiter].effective
                    for waiter in self._waiting_for[entry.job_id]
                    if waiter in self._entries
                ]
                entry.effective = max([entry.effective, *lent])
            self._lend(entry)
            if not entry.after:
                self._make_eligible(entry)
            return True

    def take(self, timeout_seconds: float | None = None, above: int | None = None) -> list[Entry]:
        """Removes the entries to run next: one, and eligible ones of its batch up to the batch's limit.

        Empty after `timeout_seconds`, after `wake`, or if the scheduler is closed. With `above`, only entries of a
        higher priority than that are taken.
        """
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        with self._lock:
            while True:
                head = self._pop(above)
                if head is not None:
                    return self._out([head, *self._mates(head)])
                remaining = None if deadline is None else deadline - time.monotonic()
                if self._closed or self._woken or (remaining is not None and remaining <= 0):
                    self._woken = False
                    return []
                self._ready.wait(remaining)

    @property
    def most_urgent(self) -> int:
        """An upper bound of the priority that `take` could give; -1 if nothing is eligible. Takes no lock."""
        try:
            return -self._eligible[0][0][0]
        except IndexError:
            return -1

    def take_full(
        self, kinds: Collection[str], needs: tuple[str, ...], limit: int, go_on: Callable[[], bool]
    ) -> list[list[Entry]]:
        """Removes the next whole batches: of one of `kinds`, at most `limit` of those that need `needs`.

        Waits for the first while `go_on` returns true. Empty while a job that is taken may make a more urgent entry
        eligible: the batches are to be prepared while it runs.
        """
        batches: list[list[Entry]] = []
        with self._lock:
            while not self._closed and go_on():
                batch = self._full(kinds)
                while batch:
                    batches.append(batch)
                    batch = self._full(kinds, needs) if batch[0].needs == needs and len(batches) < limit else []
                if batches:
                    break
                self._ready.wait(0.5)
        return batches

    def nudge(self) -> None:
        """Makes a waiting `take_full` ask `go_on` again."""
        with self._lock:
            self._ready.notify_all()

    def mates(self, head: Entry, limit: int) -> list[Entry]:
        """Removes at most `limit` more eligible entries of `head`'s batch; waits for them while `head` may be delayed.

        The wait ends at once if an entry of a higher priority than `head` is eligible, or the scheduler closes.
        """
        until = head.admitted_at + head.batch_delay_seconds
        found: list[Entry] = []
        with self._lock:
            while True:
                found += self._out(self._mates(head, limit - len(found)))
                remaining = until - time.monotonic()
                if len(found) >= limit or remaining <= 0 or self._closed or self._is_urgent(head):
                    return found
                self._ready.wait(remaining)

    def finishing(self, job_ids: Iterable[str]) -> None:
        """Jobs are done and are being recorded: entries that wait for them are about to become eligible."""
        with self._lock:
            self._finishing.update(job_ids)

    def ended(self, job_ids: Iterable[str]) -> None:
        """Jobs have ended, on any device: entries that waited for them may become eligible."""
        with self._lock:
            for job_id in job_ids:
                self._taken.discard(job_id)
                self._finishing.discard(job_id)
                self._passed.pop(job_id, None)
                self._forget_oldest()
                self._remembered[job_id] = None
                gone = self._entries.get(job_id)
                if gone is not None:
                    self._leave(gone)
                for waiter in self._waiting_for.pop(job_id, ()):
                    entry = self._entries.get(waiter)
                    if entry is not None:
                        entry.after.discard(job_id)
                        if not entry.after:
                            self._make_eligible(entry)
            # Also for entries that were held back for a more urgent one that might have become eligible. Without any
            # entry the executor would be woken for nothing after each job of an idle device.
            if self._entries:
                self._ready.notify_all()

    def pass_by(self, job_id: str, resource_id: str) -> None:
        """A running job goes on without `resource_id`: entries that need it no longer wait for this job."""
        with self._lock:
            self._passed[job_id] = resource_id
            waiting = self._waiting_for.get(job_id, set())
            for waiter in list(waiting):
                entry = self._entries.get(waiter)
                if entry is not None and resource_id in entry.needs:
                    waiting.discard(waiter)
                    entry.after.discard(job_id)
                    if not entry.after:
                        self._make_eligible(entry)

    def put_back(self, job_ids: Iterable[str]) -> None:
        """Jobs were taken and neither ran nor ended: they may be admitted again."""
        with self._lock:
            gone = set(job_ids)
            self._taken -= gone
            self._finishing -= gone
            for job_id in gone:
                self._passed.pop(job_id, None)
            self._ready.notify_all()

    def discard(self, job_id: str) -> Entry | None:
        """Removes an entry that will not run here; None if it does not wait here."""
        with self._lock:
            entry = self._entries.get(job_id)
            if entry is not None:
                self._leave(entry)
            return entry

    def foreign(self) -> set[str]:
        """Predecessors that waiting entries name and that are neither here nor known to have ended."""
        with self._lock:
            return {job_id for job_id in self._waiting_for if job_id not in self._entries and job_id not in self._taken}

    def select(self, wanted: Callable[[Entry], bool]) -> list[Entry]:
        """The waiting entries for which `wanted` returns true."""
        with self._lock:
            return [entry for entry in self._entries.values() if wanted(entry)]

    def close(self) -> list[Entry]:
        """Admits and gives nothing more; returns the entries that were waiting."""
        with self._lock:
            self._closed = True
            left = list(self._entries.values())
            self._entries.clear()
            self.eligible = 0
            self._ready.notify_all()
            return left

    def wake(self) -> None:
        """Makes a waiting `take` return nothing, so that the executor can look for other work."""
        with self._lock:
            self._woken = True
            self._ready.notify_all()

    # ---- all below under the lock

    def _make_eligible(self, entry: Entry) -> None:
        self.eligible += 1
        heapq.heappush(self._eligible, (entry.rank, entry.job_id))
        if entry.batch_key is not None:
            self._batches.setdefault(entry.batch_key, OrderedDict())[entry.job_id] = None
        self._ready.notify_all()

    def _out(self, entries: list[Entry]) -> list[Entry]:
        """The entries leave the scheduler for the executor."""
        for entry in entries:
            self._leave(entry)
            self._taken.add(entry.job_id)
        return entries

    def _pop(self, above: int | None) -> Entry | None:
        head = self._head(above, self._finishing)
        if head is not None:
            heapq.heappop(self._eligible)
        return head

    def _full(self, kinds: Collection[str], needs: tuple[str, ...] | None = None) -> list[Entry]:
        """The entries to take next, if they are a whole batch of `kinds`, and need just `needs` if it is given."""
        head = self._head(None, {*self._finishing, *self._taken})
        if head is None or head.kind not in kinds or (needs is not None and head.needs != needs):
            return []
        mates = self._mates(head)
        if len(mates) + 1 < head.batch_limit:
            return []
        heapq.heappop(self._eligible)
        return self._out([head, *mates])

    def _head(self, above: int | None, ending: Collection[str]) -> Entry | None:
        """The entry to take next, at the head of the heap; None where what ends next may let in a more urgent one."""
        while self._eligible:
            rank, job_id = self._eligible[0]
            entry = self._entries.get(job_id)
            # An entry that left, or whose rank has changed since, stands elsewhere in the heap or nowhere.
            if entry is None or entry.rank != rank or entry.after:
                heapq.heappop(self._eligible)
                continue
            if (above is not None and entry.effective <= above) or self._about_to_be_overtaken(entry, ending):
                return None
            return entry
        return None

    def _about_to_be_overtaken(self, head: Entry, ending: Collection[str]) -> bool:
        """Whether a more urgent entry than `head` waits only for jobs that are `ending`."""
        for job_id in ending:
            for waiter in self._waiting_for.get(job_id, ()):
                entry = self._entries.get(waiter)
                if entry is not None and entry.rank < head.rank and entry.after.issubset(ending):
                    return True
        return False

    def _is_urgent(self, head: Entry) -> bool:
        """Whether an entry of a higher priority than `head` could run now."""
        return self._head(head.effective, ()) is not None

    def _mates(self, head: Entry, limit: int | None = None) -> list[Entry]:
        """Eligible entries of the same batch, oldest first."""
        room = head.batch_limit - 1 if limit is None else limit
        same = self._batches.get(head.batch_key) if head.batch_key is not None else None
        if not same or room <= 0:
            return []
        found: list[Entry] = []
        for job_id in same:
            if len(found) == room:
                break
            if job_id != head.job_id:
                found.append(self._entries[job_id])
        return found

    def _leave(self, entry: Entry) -> None:
        if self._entries.pop(entry.job_id, None) is not None and not entry.after:
            self.eligible -= 1
        same = self._batches.get(entry.batch_key) if entry.batch_key is not None else None
        if same is not None:
            same.pop(entry.job_id, None)
            if not same:
                del self._batches[entry.batch_key]

    def _lend(self, entry: Entry) -> None:
        """Raises the entries that `entry` waits for, directly or not, to its own priority."""
        stack: list[tuple[Collection[str], int]] = [(entry.after, entry.effective)]
        while stack:
            job_ids, priority = stack.pop()
            for job_id in job_ids:
                before = self._entries.get(job_id)
                if before is not None and before.effective < priority:
                    before.effective = priority
                    stack.append((before.after, priority))
                    if not before.after:
                        heapq.heappush(self._eligible, (before.rank, before.job_id))

    def _forget_oldest(self) -> None:
        while len(self._remembered) >= REMEMBERED:
            self._remembered.popitem(last=False)
