"""Claiming ahead: while one batch of runs is on the device, the next batches are claimed on another thread.

    device     run ────────────────▶ end, take ─▶ run, take ─▶ run
    other         whole batches? ─▶ claim ──┘

Batches of the model that runs are claimed together, as many as keep the device busy for AHEAD_MS, and their inputs are
read there too. Only whole batches are claimed, so that runs that arrive in time can still join; none is claimed while a
running job may make a more urgent entry eligible. When the device is free, a more urgent entry still goes first.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

import structlog

from tasks.kinds import KINDS
from workers.execution.claimed_job import ClaimedJob
from workers.execution.scheduler import Entry, Scheduler

log = structlog.get_logger(__name__)

#: A batch of at least so many milliseconds is worth claiming the next ones meanwhile: a claim takes about one.
LONG_MS = 3.0

#: Milliseconds of work that are claimed ahead, unless one batch alone takes longer.
AHEAD_MS = 50.0

#: The kinds whose batches are claimed ahead.
_KINDS = frozenset(kind for kind, spec in KINDS.items() if spec.claimed_ahead)


class ClaimAhead:
    """The next batches of runs. `begin`, `end`, `peek` and `take` are called by the device's thread alone."""

    def __init__(
        self,
        scheduler: Scheduler,
        claim: Callable[[list[Entry]], list[ClaimedJob]],
        prepare: Callable[[list[ClaimedJob]], None],
        may_claim: Callable[[], bool],
    ) -> None:
        self._scheduler = scheduler
        self._claim = claim
        self._prepare = prepare
        self._may_claim = may_claim
        self._changed = threading.Condition()
        self._busy = self._looking = self._closed = False
        self._limit = 1
        self._needs: tuple[str, ...] = ()
        self._batches: deque[list[ClaimedJob]] = deque()
        self._thread = threading.Thread(target=self._look_until_closed, name="ahead", daemon=True)

    def start(self) -> None:
        """Starts the thread, which claims after each `begin`."""
        self._thread.start()

    def close(self) -> None:
        """Claims nothing more; batches that are claimed are still to be taken."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._scheduler.nudge()

    def begin(self, device_ms: float, needs: tuple[str, ...]) -> None:
        """A batch gets the device for about `device_ms`: if that is long enough, the next ones are claimed meanwhile.

        Batches that need the same take as long, which gives how many are claimed.
        """
        if self._batches or device_ms < LONG_MS:
            return
        with self._changed:
            if not self._closed:
                self._limit, self._needs = max(1, int(AHEAD_MS / device_ms)), needs
                self._busy = self._looking = True
                self._changed.notify_all()

    def end(self) -> None:
        """The device is free: waits for a claim under way; none is begun after it."""
        if not self._busy:
            return
        self._busy = False
        self._scheduler.nudge()
        with self._changed:
            while self._looking:
                self._changed.wait()

    def peek(self) -> list[ClaimedJob]:
        """The next claimed batch, which stays; empty if there is none."""
        return self._batches[0] if self._batches else []

    def take(self) -> list[ClaimedJob]:
        """Removes the next claimed batch, to be run now."""
        return self._batches.popleft()

    def _look_until_closed(self) -> None:
        while True:
            with self._changed:
                while not self._looking and not self._closed:
                    self._changed.wait()
                if not self._looking:
                    return
            batches: list[list[ClaimedJob]] = []
            try:
                batches = self._claimed(self._scheduler.take_full(_KINDS, self._needs, self._limit, self._goes_on))
            except Exception:
                # The jobs are not lost: the records still say that they wait.
                log.exception("claiming ahead failed")
            with self._changed:
                self._batches.extend(batches)
                self._looking = False
                self._changed.notify_all()

    def _goes_on(self) -> bool:
        return self._busy and self._may_claim()

    def _claimed(self, batches: list[list[Entry]]) -> list[list[ClaimedJob]]:
        """The jobs of each batch that could be claimed, in one statement for all."""
        works = self._claim([entry for batch in batches for entry in batch]) if batches else []
        self._prepare(works)
        of = {entry.job_id: number for number, batch in enumerate(batches) for entry in batch}
        claimed: list[list[ClaimedJob]] = [[] for _ in batches]
        for work in works:
            claimed[of[work.job_id]].append(work)
        return [batch for batch in claimed if batch]
