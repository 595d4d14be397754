"""One child process: started so that it cannot outlive us unnoticed, and ended with everything it started.

On Linux a child gets its stop signal when its parent dies, however that dies; on Windows a job object ends it. Where
neither is to be had, the next start ends what is left, by the process id and start time noted here.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil

from device_operations.folders import PRIVATE_UMASK, private_opener
from device_operations.wire.json_types import FreeJson

#: Start times are read from the kernel's clock ticks; two readings of one process may differ by rounding.
_SAME_START_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Account:
    """The unprivileged account that a child runs as, where it must not run as us."""

    name: str
    user_id: int
    group_id: int


@dataclass(frozen=True, slots=True)
class Command:
    """What to run and how to end it; `environment` is the child's whole environment, None for ours."""

    name: str
    arguments: Sequence[str]
    environment: Mapping[str, str] | None = None
    folder: Path | None = None
    account: Account | None = None
    #: What asks it to stop in good order, on POSIX; on Windows that is always Ctrl-Break.
    stop_signal: int = signal.SIGTERM
    #: How long it may take over that before it is killed.
    grace_seconds: float = 20


def start(command: Command, log: Path | None = None) -> psutil.Popen:
    """Starts a command in a session of its own, so that a terminal's Ctrl-C reaches us and not it.

    Its output is appended to `log`. It is sent its stop signal if the thread that called this ends (Linux), or is
    ended with this process (Windows): call it from the main thread.
    """
    with contextlib.ExitStack() as closing:
        output: int | IO[bytes] = (
            subprocess.DEVNULL
            if log is None
            else closing.enter_context(open(log, "ab", buffering=0, opener=private_opener))
        )
        options: FreeJson = {
            "env": None if command.environment is None else dict(command.environment),
            "stdin": subprocess.DEVNULL,
            "stdout": output,
            "stderr": subprocess.STDOUT,
            "cwd": command.folder,
        }
        if os.name == "posix":
            options |= {"start_new_session": True, "preexec_fn": _dies_with_parent(command.stop_signal)}
            options |= {"umask": PRIVATE_UMASK}
            if command.account is not None:
                account = command.account
                options |= {"user": account.user_id, "group": account.group_id, "extra_groups": []}
        else:
            options |= {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}  # type: ignore[attr-defined,unused-ignore]
        process = psutil.Popen(list(command.arguments), **options)
    if os.name != "posix":
        _join_job(process)
    return process


def ask_to_stop(process: psutil.Process, stop_signal: int = signal.SIGTERM) -> None:
    """Sends the stop signal; a process that is gone is fine.

    On Windows that is Ctrl-Break, which needs a console that both share: without one (a service), it is ended.
    """
    with contextlib.suppress(psutil.NoSuchProcess):
        if os.name == "posix":
            process.send_signal(stop_signal)
            return
        try:
            process.send_signal(getattr(signal, "CTRL_BREAK_EVENT"))  # noqa: B009 - only Windows has it
        except (OSError, SystemError):
            process.terminate()


def end_tree(process: psutil.Process, also: Sequence[psutil.Process] = ()) -> None:
    """Kills a process and every process below it, and waits until they are gone."""
    _kill([*descendants(process), *also, process])


def end_session(session_id: int) -> None:
    """Kills what is left of the session that a child led, such as its orphans; Windows' job objects see to that."""
    if os.name != "posix":
        return
    members = []
    for pid in psutil.pids():
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            if os.getsid(pid) == session_id:
                members.append(psutil.Process(pid))
    _kill(members)


def _kill(doomed: Sequence[psutil.Process]) -> None:
    for one in doomed:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    await_end(doomed, seconds=10)


def await_end(ending: Sequence[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Waits until the processes have ended, and answers those that have not."""
    alive = list(ending)
    deadline = time.monotonic() + seconds
    while alive := [process for process in alive if is_alive(process)]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.02)
    return alive


def is_alive(process: psutil.Process) -> bool:
    """Whether it still runs; one that only waits to be reaped, by us (now) or by its new parent, does not."""
    if isinstance(process, psutil.Popen):
        return process.poll() is None
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def descendants(process: psutil.Process) -> list[psutil.Process]:
    """Every process below this one, now; none once it has ended."""
    try:
        return list(process.children(recursive=True))
    except psutil.NoSuchProcess:
        return []


@dataclass(frozen=True, slots=True)
class Identity:
    """A process as it can be found again: the same id and the same start time mean the same process."""

    name: str
    pid: int
    started: float

    @classmethod
    def of(cls, name: str, process: psutil.Process) -> Identity:
        """The identity of a live process."""
        return cls(name, process.pid, process.create_time())

    def find(self) -> psutil.Process | None:
        """The process, if it still lives."""
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.started) < _SAME_START_SECONDS
        except psutil.NoSuchProcess:
            return None
        return process if same and is_alive(process) else None


def end_leftovers(
    identities: Sequence[Identity], patience_seconds: float, stop_signals: Mapping[str, int]
) -> list[str]:
    """Ends what an earlier start left running, in good order first. Gives the names of those found."""
    found = [(identity, process) for identity in identities if (process := identity.find()) is not None]
    below = [child for _, process in found for child in descendants(process)]
    for identity, process in found:
        ask_to_stop(process, stop_signals.get(identity.name, signal.SIGTERM))
    for process in await_end([process for _, process in found] + below, patience_seconds):
        end_tree(process)
    return [identity.name for identity, _ in found]


def wait_until(condition: Callable[[], bool], seconds: float, interval_seconds: float = 0.05) -> bool:
    """Polls until the condition holds; False when the time is up first."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(interval_seconds)
    return True


def last_lines(log: Path, count: int = 5) -> list[str]:
    """The end of a log, for saying why a child ended."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 8192))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return []
    return [line for line in text.splitlines() if line.strip()][-count:]


if sys.platform == "linux":
    import ctypes

    _PR_SET_PDEATHSIG = 1
    _libc = ctypes.CDLL(None, use_errno=True)

    def _dies_with_parent(stop_signal: int) -> Callable[[], None]:
        """Runs between fork and exec, after any change of user (which would clear the setting)."""
        parent = os.getpid()

        def arrange() -> None:
            _libc.prctl(_PR_SET_PDEATHSIG, stop_signal, 0, 0, 0)
            if os.getppid() != parent:  # It died before the line above.
                os.kill(os.getpid(), signal.SIGKILL)

        return arrange
else:

    def _dies_with_parent(stop_signal: int) -> Callable[[], None] | None:
        return None


if sys.platform == "win32":
    from device_operations.stack.windows import join_job as _join_job
else:

    def _join_job(process: psutil.Popen) -> None:
        raise OSError("job objects exist on Windows only")
