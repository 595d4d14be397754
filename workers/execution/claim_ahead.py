"""Claiming ahead: while one batch of runs is on the device, the next whole batches are claimed on another thread.

    device     run ────────────────▶ end, take ─▶ run, take ─▶ run
    other         whole batches? ─▶ claim ──┘

Those of the model that runs are claimed together, as many as keep the device for a few hundredths of a second, and what
came with their requests is read there too. Only whole batches, so that none is claimed before those that would join it
have come; and none while what runs may make something more urgent eligible. An entry that is more
urgent by the time the device is free still goes first.
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

#: Milliseconds of a batch from which on it is worth claiming the next ones meanwhile: a claim takes about one.
LONG_MS = 3.0

#: Milliseconds of the device for which runs are claimed ahead of it, unless one batch alone takes longer.
AHEAD_MS = 50.0

#: The kinds whose batches are claimed ahead.
_KINDS = frozenset(kind for kind, spec in KINDS.items() if spec.claimed_ahead)


class ClaimAhead:
    """The next batches of runs, claimed while another is on the device. `begin`, `end` and `take` are the device's."""

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
        """Begins to claim where `begin` says so."""
        self._thread.start()

    def close(self) -> None:
        """Claims nothing more; what is claimed is still to be taken."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._scheduler.nudge()

    def begin(self, device_ms: float, needs: tuple[str, ...]) -> None:
        """A batch gets the device and keeps it for about so long: the next are claimed meanwhile if that is enough.

        How long others take that need the same is known by that, and so how many of them.
        """
        if self._batches or device_ms < LONG_MS:
            return
        with self._changed:
            if not self._closed:
                self._limit, self._needs = max(1, int(AHEAD_MS / device_ms)), needs
                self._busy = self._looking = True
                self._changed.notify_all()

    def end(self) -> None:
        """The device is free: a claim under way is waited for, and none is begun."""
        if not self._busy:
            return
        self._busy = False
        self._scheduler.nudge()
        with self._changed:
            while self._looking:
                self._changed.wait()

    def peek(self) -> list[ClaimedJob]:
        """The next batch that was claimed, and stays."""
        return self._batches[0] if self._batches else []

    def take(self) -> list[ClaimedJob]:
        """The next batch that was claimed, to be run now."""
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
                # Not claimed is not lost: the records still say that they wait.
                log.exception("claiming ahead failed")
            with self._changed:
                self._batches.extend(batches)
                self._looking = False
                self._changed.notify_all()

    def _goes_on(self) -> bool:
        return self._busy and self._may_claim()

    def _claimed(self, batches: list[list[Entry]]) -> list[list[ClaimedJob]]:
        """What of each batch could be claimed, in one statement for all."""
        works = self._claim([entry for batch in batches for entry in batch]) if batches else []
        self._prepare(works)
        of = {entry.job_id: number for number, batch in enumerate(batches) for entry in batch}
        claimed: list[list[ClaimedJob]] = [[] for _ in batches]
        for work in works:
            claimed[of[work.job_id]].append(work)
        return [batch for batch in claimed if batch]
