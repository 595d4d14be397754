"""How long this process has been awake: since it started, or since it or its machine last stood still.

A machine that slept wakes its processes in any order, each seeing leases that ran out while they could not be renewed.
"""

from __future__ import annotations

import threading
import time

#: Seconds between two ticks, and by how many more a tick may come late before the process counts as having stood still.
TICK_SECONDS = 0.25
LATE_SECONDS = 1.0


class Awake:
    """A thread that ticks. What it misses, by the machine's clock or by the time of day, was a pause.

    The monotonic clock stands still while Linux sleeps and goes on while a process is stopped; the time of day tells
    of both, and of clocks that are set, which looks the same and costs a lease of patience.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._since = time.monotonic()
        self._ticked = (time.monotonic(), time.time())
        self._thread = threading.Thread(target=self._tick_until_stopped, name="awake", daemon=True)

    def start(self) -> None:
        """Begins to tick."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread."""
        self._stopping.set()
        self._thread.join(timeout=1)

    def seconds(self) -> float:
        """Seconds since the last pause, up to this very moment."""
        with self._lock:
            now = (time.monotonic(), time.time())
            missed = max(now[0] - self._ticked[0], now[1] - self._ticked[1])
            if missed > TICK_SECONDS + LATE_SECONDS:
                self._since = now[0]
            self._ticked = now
            return now[0] - self._since

    def _tick_until_stopped(self) -> None:
        while not self._stopping.wait(TICK_SECONDS):
            self.seconds()
