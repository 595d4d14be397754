"""The supervisor: children come back after a crash, with backoff and a word; none outlives it, however it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from device_operations.stack.errors import StackError
from device_operations.stack.processes import Command, Identity
from device_operations.stack.supervisor import ChildService, Stopped, Supervisor
from tests.support.stack import REPOSITORY, eventually, is_running

#: A child that says where it is and waits; it stops at once when asked.
SLEEPER = "import os, time; print('here', os.getpid(), flush=True); time.sleep(600)"
#: One that starts a child of its own, and ignores being asked to stop.
STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
below = subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(15, 1); time.sleep(600)"])
print("below", below.pid, flush=True)
time.sleep(600)
"""


def python(name: str, code: str, **options: object) -> ChildService:
    return ChildService(Command(name, [sys.executable, "-c", code], grace_seconds=0.3), **options)  # type: ignore[arg-type]


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def supervisor(tmp_path: Path, said: list[str]) -> Iterator[Supervisor]:
    with Supervisor(tmp_path, said.append) as started:
        yield started


def watch_until(supervisor: Supervisor, condition: Callable[[], object], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not so in time"
        supervisor.tick()


def log_of(folder: Path, name: str) -> str:
    return (folder / "logs" / f"{name}.log").read_text()


def test_a_crashed_child_is_started_again_and_said(supervisor: Supervisor, tmp_path: Path, said: list[str]) -> None:
    supervisor.start([python("one", SLEEPER)])
    child = supervisor.children[0]
    watch_until(supervisor, lambda: "here" in log_of(tmp_path, "one"))
    first = child.process
    assert first is not None
    first.kill()
    watch_until(supervisor, lambda: child.process not in (None, first))
    assert len(said) == 1
    ending = "signal SIGKILL" if os.name == "posix" else "exit status 15"
    assert f"one ended ({ending}); starting it again in 0.5 s" in said[0]
    assert f"here {first.pid}" in said[0], "the end of its log helps"


def test_each_crash_doubles_the_wait_up_to_a_limit(supervisor: Supervisor, said: list[str], tmp_path: Path) -> None:
    # It crashes only once it was started: else it may have ended too often before the start has looked.
    crash = tmp_path / "crash"
    code = f"import os, time\nwhile not os.path.exists({str(crash)!r}): time.sleep(0.01)\nraise SystemExit(3)"
    supervisor.start([python("one", code)])
    crash.touch()
    child = supervisor.children[0]
    waits = []
    for _ in range(9):
        watch_until(supervisor, lambda: child.restart_at is not None)
        assert child.restart_at is not None
        waits.append(round(child.restart_at - time.monotonic()))
        child.restart_at = time.monotonic()  # Not waited out here.
        watch_until(supervisor, lambda: child.process is not None)
    assert waits == [0, 1, 2, 4, 8, 16, 30, 30, 30]
    assert "exit status 3" in said[0]


def test_a_child_that_lived_long_starts_over_with_the_shortest_wait(supervisor: Supervisor, said: list[str]) -> None:
    supervisor.start([python("one", SLEEPER)])
    child = supervisor.children[0]
    child.failures, child.started_at = 7, time.monotonic() - 3600
    assert child.process is not None
    child.process.kill()
    watch_until(supervisor, lambda: said)
    assert child.failures == 1


def test_a_service_that_cannot_start_stops_the_start_with_the_end_of_its_log(supervisor: Supervisor) -> None:
    broken = python("one", "raise SystemExit('no such disk')", is_ready=lambda: False, remedy="Mount it.")
    with pytest.raises(StackError) as refused:
        supervisor.start([broken])
    assert "one ended 3 times" in str(refused.value)
    assert "no such disk" in str(refused.value)
    assert "Mount it." in str(refused.value)


def test_a_service_that_is_not_ready_in_time_stops_the_start(supervisor: Supervisor) -> None:
    with pytest.raises(StackError, match=r"one was not ready within 0.2 s"):
        supervisor.start([python("one", SLEEPER, is_ready=lambda: False, ready_within_seconds=0.2)])


def test_a_command_that_fails_says_why(supervisor: Supervisor) -> None:
    supervisor.run(Command("fine", [sys.executable, "-c", "pass"]))
    with pytest.raises(StackError, match=r"migrate failed \(exit status 1\)[\s\S]*no such table"):
        supervisor.run(Command("migrate", [sys.executable, "-c", "raise SystemExit('no such table')"]))


@pytest.mark.skipif(os.name != "posix", reason="signals can only be ignored where there are signals")
def test_stopping_ends_a_stubborn_child_and_its_own_children(supervisor: Supervisor, tmp_path: Path) -> None:
    supervisor.start([python("one", STUBBORN)])
    watch_until(supervisor, lambda: "below" in log_of(tmp_path, "one"))
    pids = [supervisor.children[0].process.pid, int(log_of(tmp_path, "one").split()[1])]  # type: ignore[union-attr]
    supervisor.stop()
    assert not [pid for pid in pids if is_running(pid)]


@pytest.mark.skipif(os.name != "posix", reason="Windows' job objects end orphans")
def test_a_crash_leaves_no_orphans_behind(supervisor: Supervisor, tmp_path: Path, said: list[str]) -> None:
    supervisor.start([python("one", STUBBORN)])
    watch_until(supervisor, lambda: "below" in log_of(tmp_path, "one"))
    orphan = int(log_of(tmp_path, "one").split()[1])
    supervisor.children[0].process.kill()  # type: ignore[union-attr]
    watch_until(supervisor, lambda: said)
    assert not is_running(orphan)


@pytest.mark.skipif(os.name != "posix", reason="Ctrl-Break needs a console, and the code below is for signals")
def test_groups_stop_in_the_opposite_order_of_starting(supervisor: Supervisor, tmp_path: Path) -> None:
    note = tmp_path / "stopped"
    code = (
        "import pathlib, signal, sys, time\n"
        "def stop(*_):\n"
        "    time.sleep(float(sys.argv[2])); open(sys.argv[3], 'a').write(sys.argv[1]); sys.exit()\n"
        "signal.signal(signal.SIGTERM, stop); print('here', flush=True); time.sleep(600)"
    )

    def service(name: str, slowness: float) -> ChildService:
        arguments = [sys.executable, "-c", code, name, str(slowness), str(note)]
        return ChildService(Command(name, arguments), is_ready=lambda: "here" in log_of(tmp_path, name))

    supervisor.start([service("a", 0)], [service("b", 0.2)])
    supervisor.start([service("c", 0.4)])
    supervisor.stop()
    assert note.read_text() == "cba"


def test_asked_twice_it_does_not_wait(supervisor: Supervisor, tmp_path: Path) -> None:
    service = ChildService(Command("one", [sys.executable, "-c", STUBBORN], grace_seconds=60))
    supervisor.start([service])
    watch_until(supervisor, lambda: "below" in log_of(tmp_path, "one"))
    supervisor.ask_to_stop()
    with pytest.raises(Stopped):
        supervisor.watch()
    supervisor.ask_to_stop()
    began = time.monotonic()
    supervisor.stop()
    assert time.monotonic() - began < 10


@pytest.mark.skipif(os.name != "posix", reason="a log that a child writes cannot be cut on Windows")
def test_a_long_log_is_cut_and_goes_on(supervisor: Supervisor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("device_operations.stack.supervisor.LOG_BYTES", 10_000)
    code = "import time\nfor n in range(10**6): print('line', n, 'x' * 1000, flush=True); time.sleep(0.05)"
    supervisor.start([python("one", code)])
    log = tmp_path / "logs" / "one.log"
    watch_until(supervisor, lambda: log.with_name("one.log.1").exists() and 0 < log.stat().st_size < 5_000)
    assert log.read_bytes().startswith(b"line"), "whoever writes must append, or a hole is left"


def supervise(folder: Path) -> subprocess.Popen[str]:
    """A supervisor in a process of its own, with one child, to be killed."""
    code = f"""
import pathlib, sys
from device_operations.stack.processes import Command
from device_operations.stack.supervisor import ChildService, Supervisor
with Supervisor(pathlib.Path({str(folder)!r})) as supervisor:
    supervisor.start([ChildService(Command("one", [sys.executable, "-c", {STUBBORN!r}]))])
    print("started", supervisor.children[0].process.pid, flush=True)
    supervisor.watch()
"""
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)


@pytest.mark.skipif(sys.platform not in ("linux", "win32"), reason="no other system ends what a dead process started")
def test_children_stop_when_their_supervisor_is_killed(tmp_path: Path) -> None:
    code = f"""
import pathlib, sys
from device_operations.stack.processes import Command, start
print(start(Command("one", [sys.executable, "-c", {SLEEPER!r}])).pid, flush=True)
import time; time.sleep(600)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert is_running(child)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    eventually(lambda: not is_running(child))


@pytest.mark.skipif(os.name != "posix", reason="Windows' job objects leave nothing behind")
def test_the_next_start_ends_what_a_killed_supervisor_left(
    tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("device_operations.stack.supervisor.LEFTOVERS_SECONDS", 0.5)
    first = supervise(tmp_path)
    assert first.stdout is not None
    child = int(first.stdout.readline().split()[1])
    below = int(eventually(lambda: "below" in log_of(tmp_path, "one") and log_of(tmp_path, "one").split()[1]))
    first.kill()
    first.wait()
    first.stdout.close()
    assert is_running(child), "this one ignores being asked to stop"
    with Supervisor(tmp_path, said.append):
        assert not is_running(child)
        assert not is_running(below)
    assert said == ["ended what an earlier start had left running: one"]


@pytest.mark.parametrize("difference", ["start time", "data folder"])
def test_a_process_that_only_has_the_same_id_is_left_alone(tmp_path: Path, difference: str, said: list[str]) -> None:
    with subprocess.Popen([sys.executable, "-c", SLEEPER], stdout=subprocess.DEVNULL) as other:
        identity = Identity.of("one", psutil.Process(other.pid))
        entry = {"name": "one", "pid": identity.pid, "started": identity.started, "stop_signal": int(signal.SIGTERM)}
        if difference == "start time":
            entry["started"] = identity.started - 5
        folder = tmp_path / "elsewhere" if difference == "data folder" else tmp_path
        (tmp_path / "processes.json").write_text(json.dumps({"data_dir": str(folder), "processes": [entry]}))
        with Supervisor(tmp_path, said.append):
            assert other.poll() is None
        assert said == []
        other.kill()
