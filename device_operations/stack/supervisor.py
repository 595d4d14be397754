"""The children of one stack: started and awaited, restarted with backoff when they crash, stopped in order.

    Service      what to run, and how to see that it is ready
    Child        a service with its process and its backoff
    Supervisor   all of them; starts groups in order, watches, stops them in the opposite order

A child that ends is always a crash here: what should end (a migration) is `Supervisor.run`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import psutil

from device_operations.folders import private_folder
from device_operations.stack import processes
from device_operations.stack.errors import StackError
from device_operations.stack.processes import Command, Identity
from device_operations.stack.state import read_private, write_private

#: Restarts come after 0.5 s, 1 s, 2 s … up to this, and from the beginning once a child has lived this long.
LONGEST_BACKOFF_SECONDS = 30.0
STEADY_SECONDS = 60.0

#: The exit status of a program that refuses its settings: trying again does not help.
REFUSED_STATUS = 2

#: How long what a killed supervisor left may take to stop, before it is killed.
LEFTOVERS_SECONDS = 20

#: A log is cut at this size; the one before is kept as `NAME.log.1`.
LOG_BYTES = 32 * 2**20

#: On Windows a child's handle does not append: after a cut it would write on where it was, behind a hole.
_CUTS_LOGS = os.name == "posix"

_TICK_SECONDS = 0.1


class Stopped(Exception):
    """Raised out of `start`, `run` and `watch` once `ask_to_stop` was called."""


@dataclass(frozen=True, slots=True)
class ChildService:
    """One service: what runs it, its URL, whether it is ready (at once, if it has no check), and what helps if not."""

    command: Command
    is_ready: Callable[[], bool] = lambda: True
    url: str = ""
    remedy: str = ""
    ready_within_seconds: float = 60
    #: Ended so often in a row before all is ready, it will not come up.
    failed_starts: int = 3


@dataclass(slots=True)
class Child:
    """A service and its process now. `running -- crashed (waits out its backoff) -> running`, until it is stopped."""

    service: ChildService
    log: Path
    process: psutil.Popen | None = None
    started_at: float = 0.0
    failures: int = 0
    last_status: int | None = None
    restart_at: float | None = None

    @property
    def name(self) -> str:
        """The service's name."""
        return self.service.command.name


class Supervisor:
    """Starts services and keeps them running. Use it as a context manager: leaving it stops them all."""

    def __init__(self, data_dir: Path, say: Callable[[str], None] = lambda _: None) -> None:
        self._record = data_dir / "processes.json"
        self._data_dir = data_dir
        self._logs = private_folder(data_dir / "logs")
        self._say = say
        self._groups: list[list[Child]] = []
        self._stop_requests = 0

    def __enter__(self) -> Self:
        self._end_leftovers()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def children(self) -> list[Child]:
        """Every child, in the order of starting."""
        return [child for group in self._groups for child in group]

    def start(self, *groups: Sequence[ChildService]) -> None:
        """Starts services side by side and returns once all are ready; groups matter for the order of stopping.

        Raises `StackError` for one that keeps ending or is not ready in its time, `Stopped` when asked to stop.
        """
        started = [[Child(one, self._logs / f"{one.command.name}.log") for one in group] for group in groups]
        self._groups += started
        waiting = [child for group in started for child in group]
        for child in waiting:
            self._spawn(child)
        began = time.monotonic()
        while waiting := [child for child in waiting if not self._is_ready(child)]:
            self.tick()
            self.check()
            for child in waiting:
                if time.monotonic() - began > child.service.ready_within_seconds:
                    raise StackError(_never_ready(child))

    def check(self) -> None:
        """Raises `StackError` for a child that has ended so often in a row, or refuses its settings."""
        for child in self.children:
            if child.failures >= child.service.failed_starts or child.last_status == REFUSED_STATUS:
                raise StackError(_never_ready(child))

    def _is_ready(self, child: Child) -> bool:
        return child.process is not None and child.process.poll() is None and child.service.is_ready()

    def run(self, command: Command) -> None:
        """Runs a command that ends, such as a migration. Raises `StackError` with its last lines where it fails."""
        log = self._logs / f"{command.name}.log"
        process = processes.start(command, log)
        try:
            while process.poll() is None:
                self.tick()
        finally:
            processes.end_tree(process)
        if process.returncode != 0:
            lines = "\n  ".join(processes.last_lines(log, 15))
            raise StackError(f"{command.name} failed ({_ending(process.returncode)}), see {log}:\n  {lines}")

    def watch(self) -> None:
        """Keeps the children running until it is stopped. Raises `Stopped` then, and nothing else."""
        while True:
            self.tick()

    def ask_to_stop(self) -> int:
        """Safe in a signal handler: once, stop in good order; twice, at once. Gives how often it was called."""
        self._stop_requests += 1
        return self._stop_requests

    def stop(self) -> None:
        """Stops every child, the last started first, and leaves no process of theirs behind."""
        for group in reversed(self._groups):
            self._stop_group([child for child in group if child.process is not None])
        self._groups.clear()
        self._record.unlink(missing_ok=True)

    def _end_leftovers(self) -> None:
        """Ends what an earlier supervisor of this data folder, killed before it could stop, left running."""
        recorded = read_private(self._record)
        if recorded.get("data_dir") != str(self._data_dir):  # A copied folder names the original's processes.
            return
        found = processes.end_leftovers(
            [Identity(entry["name"], entry["pid"], entry["started"]) for entry in recorded["processes"]],
            patience_seconds=LEFTOVERS_SECONDS,
            stop_signals={entry["name"]: entry["stop_signal"] for entry in recorded["processes"]},
        )
        if found:
            self._say(f"ended what an earlier start had left running: {', '.join(found)}")
        self._record.unlink(missing_ok=True)

    def _spawn(self, child: Child) -> None:
        child.restart_at = None
        child.started_at = time.monotonic()
        child.process = processes.start(child.service.command, child.log)
        self._write_record()

    def _write_record(self) -> None:
        entries = [
            asdict(Identity.of(child.name, child.process)) | {"stop_signal": int(child.service.command.stop_signal)}
            for child in self.children
            if child.process is not None and child.process.poll() is None
        ]
        write_private(self._record, {"data_dir": str(self._data_dir), "processes": entries})

    def tick(self) -> None:
        """One round: logs the services that ended, restarts those whose backoff is over, cuts long logs, sleeps."""
        if self._stop_requests:
            raise Stopped
        for child in self.children:
            if child.process is None:
                if child.restart_at is not None and time.monotonic() >= child.restart_at:
                    self._spawn(child)
            elif child.process.poll() is not None:
                self._note_crash(child, child.process)
            if _CUTS_LOGS and child.log.exists() and child.log.stat().st_size > LOG_BYTES:
                _cut(child.log)
        time.sleep(_TICK_SECONDS)

    def _note_crash(self, child: Child, process: psutil.Popen) -> None:
        processes.end_session(process.pid)
        now = time.monotonic()
        child.failures = 1 if now - child.started_at > STEADY_SECONDS else child.failures + 1
        backoff = min(LONGEST_BACKOFF_SECONDS, 0.5 * 2 ** (child.failures - 1))
        child.process, child.restart_at = None, now + backoff
        child.last_status = process.returncode
        said = processes.last_lines(child.log, 1)
        self._say(
            f"{child.name} ended ({_ending(process.returncode)}); starting it again in {backoff:g} s; "
            f"see {child.log}" + (f": {said[0][:300]}" if said else "")
        )

    def _stop_group(self, group: Sequence[Child]) -> None:
        below = [child for one in group if one.process for child in processes.descendants(one.process)]
        for child in group:
            if child.process is not None:
                processes.ask_to_stop(child.process, child.service.command.stop_signal)
        deadline = time.monotonic() + max((child.service.command.grace_seconds for child in group), default=0)
        while alive := [child for child in group if child.process is not None and child.process.poll() is None]:
            if time.monotonic() > deadline or self._stop_requests > 1:
                break
            time.sleep(0.02)
        for child in alive:
            self._say(f"{child.name} did not stop in time and is ended")
        for child in group:
            if child.process is not None:
                processes.end_tree(child.process, also=below)
                processes.end_session(child.process.pid)
                child.process = None


def _never_ready(child: Child) -> str:
    lines = "\n  ".join(processes.last_lines(child.log, 15))
    seconds = child.service.ready_within_seconds
    if child.last_status == REFUSED_STATUS:
        what = "refuses its settings"
    else:
        what = f"ended {child.failures} times" if child.failures else f"was not ready within {seconds:g} s"
    remedy = f"\n{child.service.remedy}" if child.service.remedy else ""
    return f"{child.name} {what}, see {child.log}:\n  {lines}{remedy}"


def _ending(status: int) -> str:
    if status < 0:
        with contextlib.suppress(ValueError):
            return f"signal {signal.Signals(-status).name}"
    return f"exit status {status}"


def _cut(log: Path) -> None:
    """Keeps a log short while its writer, which appends, has it open."""
    with contextlib.suppress(OSError):
        shutil.copy(log, log.with_name(f"{log.name}.1"))
        os.truncate(log, 0)
