"""Claiming ahead: while one batch of runs is on the device, the next whole one is claimed on a thread beside.

    device     run ───────────────▶ end, take ─▶ run
    beside        whole batch? ─▶ claim ──┘

What came with its requests is read there too. Only whole batches, so that none is claimed before those that would join
it have come; and none while what runs may make something more urgent eligible. Whatever is more urgent by the time the
device is free goes first all the same.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import structlog

from device_operations.jobs import Kind
from workers.lane import Entry, Lane
from workers.work import Work

log = structlog.get_logger(__name__)


class Ahead:
    """The next batch of runs, claimed while another is on the device. `begin`, `end` and `take` are the device's."""

    def __init__(
        self,
        lane: Lane,
        claim: Callable[[list[Entry]], list[Work]],
        prepare: Callable[[list[Work]], None],
        may_claim: Callable[[], bool],
    ) -> None:
        self._lane = lane
        self._claim = claim
        self._prepare = prepare
        self._may_claim = may_claim
        self._changed = threading.Condition()
        self._busy = self._looking = self._closed = False
        self._works: list[Work] = []
        self._thread = threading.Thread(target=self._look_until_closed, name="ahead", daemon=True)

    def start(self) -> None:
        """Begins to claim where `begin` says so."""
        self._thread.start()

    def close(self) -> None:
        """Claims nothing more; what is claimed is still to be taken."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._lane.nudge()

    def begin(self) -> None:
        """A batch gets the device, and keeps it long enough to claim the next meanwhile."""
        with self._changed:
            if not self._works and not self._closed:
                self._busy = self._looking = True
                self._changed.notify_all()

    def end(self) -> None:
        """The device is free: a claim under way is waited for, and none is begun."""
        if not self._busy:
            return
        self._busy = False
        self._lane.nudge()
        with self._changed:
            while self._looking:
                self._changed.wait()

    def peek(self) -> list[Work]:
        """What was claimed, and stays."""
        return self._works

    def take(self) -> list[Work]:
        """What was claimed, to be run now."""
        works, self._works = self._works, []
        return works

    def _look_until_closed(self) -> None:
        while True:
            with self._changed:
                while not self._looking and not self._closed:
                    self._changed.wait()
                if not self._looking:
                    return
            works: list[Work] = []
            try:
                entries = self._lane.take_full(Kind.INFERENCE_RUN.value, lambda: self._busy and self._may_claim())
                works = self._claim(entries) if entries else []
                self._prepare(works)
            except Exception:
                # Not claimed is not lost: the records still say that they wait.
                log.exception("claiming ahead failed")
            with self._changed:
                self._works = works
                self._looking = False
                self._changed.notify_all()
