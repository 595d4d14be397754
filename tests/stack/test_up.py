"""`up` as a user runs it: everything comes up, heals, says so, and leaves no process behind however it ends."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import psycopg2
import pytest
import redis

from device_operations.settings import Settings, stack_file
from device_operations.stack import services, state
from device_operations.stack.errors import StackError
from device_operations.stack.up import _port
from tests.support.accounts import as_nobody
from tests.support.folders import reachable_folder
from tests.support.stack import REPOSITORY, eventually, is_running


class Up:
    """One `device-operations up --json`, and what it has printed so far."""

    def __init__(self, data_dir: Path, options: dict[str, Any] | None = None, **settings: object) -> None:
        own = {"DATA_DIR": data_dir, "HTTP__PORT": 0, "FLOWER__PORT": 0, "DEVICES": "cpu:1"} | settings
        started_with = {"python": [sys.executable], "env": dict(os.environ)} | (options or {})
        python = started_with.pop("python")
        started_with["env"] = services.environment(own, base=started_with["env"])
        self.data_dir = data_dir
        self.process = psutil.Popen(
            [*python, "-m", "device_operations", "up", "--json"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
            start_new_session=os.name == "posix",
            **started_with,
        )
        self.events: list[dict[str, Any]] = []
        self.errors = ""
        self._readers = [threading.Thread(target=read) for read in (self._read_events, self._read_errors)]
        for reader in self._readers:
            reader.start()

    def _read_events(self) -> None:
        for line in self.process.stdout:
            self.events.append(json.loads(line))

    def _read_errors(self) -> None:
        self.errors = self.process.stderr.read()

    def wait_ready(self, seconds: float = 60) -> dict[str, Any]:
        def ready() -> dict[str, Any] | None:
            assert self.process.poll() is None, f"up ended: {self.wait()}"
            return next((event for event in self.events if event["event"] == "ready"), None)

        return eventually(ready, seconds)

    def said(self) -> str:
        return "\n".join(event["message"] for event in self.events if event["event"] == "message")

    def children(self) -> dict[str, int]:
        record = json.loads((self.data_dir / "processes.json").read_text())
        return {entry["name"]: entry["pid"] for entry in record["processes"]}

    def all_below(self) -> list[int]:
        return [child.pid for child in self.process.children(recursive=True)]

    def wait(self, seconds: float = 40) -> str:
        """Waits for the end; answers what it complained about."""
        self.process.wait(seconds)
        for reader in self._readers:
            reader.join()
        self.process.stdout.close()
        self.process.stderr.close()
        return self.errors

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        with contextlib.suppress(psutil.TimeoutExpired):
            self.wait()
        if self.process.poll() is None:
            for child in [*self.process.children(recursive=True), self.process]:
                child.kill()
            self.wait()


@pytest.fixture
def folder() -> Iterator[Path]:
    with reachable_folder() as made:
        yield made / "data"


@pytest.fixture(scope="module")
def running_up() -> Iterator[Up]:
    """One that runs for all tests that leave it running."""
    with reachable_folder() as made:
        started = Up(made / "data")
        try:
            started.wait_ready()
            yield started
        finally:
            started.stop()


@contextlib.contextmanager
def up(folder: Path, options: dict[str, Any] | None = None, **settings: object) -> Iterator[Up]:
    started = Up(folder, options, **settings)
    try:
        yield started
    finally:
        started.stop()


@pytest.mark.skipif(os.name != "posix", reason="Windows has no such permissions")
def test_what_it_writes_is_its_own_accounts_alone(running_up: Up) -> None:
    folder = running_up.data_dir
    top, cluster = folder.stat(), (folder / "postgres").stat()
    # PostgreSQL does not run as root: its account passes through to the one folder that is its own.
    is_root = os.geteuid() == 0
    assert stat.S_IMODE(top.st_mode) == (0o711 if is_root else 0o700)
    assert stat.S_IMODE(cluster.st_mode) == 0o700
    assert (cluster.st_uid == os.geteuid()) is not is_root
    modes = {}
    for path in folder.rglob("*"):
        if "postgres" not in path.relative_to(folder).parts:
            with contextlib.suppress(FileNotFoundError):  # written beside and renamed meanwhile
                modes[path] = (path.is_dir(), stat.S_IMODE(path.lstat().st_mode))
    assert {"stack.json", "remembered.json", "processes.json", "up.lock", "gateway.log", "valkey.conf"} <= {
        path.name for path in modes
    }
    assert [f"{path} {mode:o}" for path, (is_dir, mode) in modes.items() if mode != (0o700 if is_dir else 0o600)] == []


def test_everything_is_up_when_it_says_ready(running_up: Up) -> None:
    ready = running_up.wait_ready()
    url = ready["url"]
    assert httpx.get(f"{url}/readyz").status_code == 200
    assert httpx.get(f"{url}/docs").status_code == 200
    devices = httpx.get(f"{url}/api/devices").json()["devices"]
    assert [(one["device_id"], one["state"]) for one in devices] == [("cpu_0", "online")]
    login = (ready["flower_user"], ready["flower_password"])
    assert httpx.get(ready["flower_url"]).status_code == 401
    assert httpx.get(f"{ready['flower_url']}/api/workers", auth=login).status_code == 200
    assert set(running_up.children()) == {"postgresql", "valkey", "gateway", "worker-cpu_0", "flower"}


def test_other_commands_find_the_stack_by_its_data_folder(running_up: Up) -> None:
    environment = services.environment({"DATA_DIR": running_up.data_dir})
    command = [sys.executable, "-m", "device_operations", "settings", "DATABASE_URL"]
    done = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    with contextlib.closing(psycopg2.connect(done.stdout.strip())) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM devices")


@pytest.mark.skipif(os.name != "posix", reason="Windows has access lists, not modes")
def test_passwords_are_in_files_that_only_we_may_read(running_up: Up) -> None:
    assert stack_file(running_up.data_dir).stat().st_mode & 0o777 == 0o600
    assert running_up.data_dir.joinpath("logs").stat().st_mode & 0o777 == 0o700
    password = running_up.wait_ready()["flower_password"]
    assert not [one.pid for one in psutil.process_iter(["cmdline"]) if password in " ".join(one.info["cmdline"] or [])]


def test_a_second_up_on_the_same_folder_is_refused(running_up: Up) -> None:
    with up(running_up.data_dir) as second:
        complaint = json.loads(second.wait())["error"]
    assert second.process.returncode == 1
    assert f"process {running_up.process.pid}" in complaint["message"]
    assert "DEVICE_OPERATIONS_DATA_DIR" in complaint["message"]
    assert httpx.get(f"{running_up.wait_ready()['url']}/readyz").status_code == 200, "the first one goes on"


@pytest.mark.parametrize("name", ["worker-cpu_0", "gateway", "valkey", "postgresql", "flower"])
def test_whatever_is_killed_comes_back_and_is_said(running_up: Up, name: str) -> None:
    url = running_up.wait_ready()["url"]
    before = running_up.children()[name]
    psutil.Process(before).kill()
    eventually(lambda: f"{name} ended (signal SIGKILL); starting it again in" in running_up.said())

    def healed() -> bool:
        children = running_up.children()
        if set(children) != {"postgresql", "valkey", "gateway", "worker-cpu_0", "flower"} or children[name] == before:
            return False
        try:
            return httpx.get(f"{url}/readyz").status_code == 200
        except httpx.HTTPError:
            return False

    eventually(healed, 60)


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("way", ["SIGTERM", "SIGHUP", "Ctrl-C"])
def test_stopping_leaves_no_process_and_no_address_behind(folder: Path, way: str) -> None:
    with up(folder) as started:
        started.wait_ready()
        below = started.all_below()
        assert len(below) > 5
        if way == "Ctrl-C":  # A terminal sends it to the whole foreground group.
            os.killpg(started.process.pid, signal.SIGINT)
        else:
            started.process.send_signal(getattr(signal, way))
        complaint = started.wait()
    assert (started.process.returncode, complaint) == (0, "")
    assert not [pid for pid in below if is_running(pid)]
    assert not stack_file(folder).exists()
    assert not (folder / "processes.json").exists()
    assert "did not stop in time" not in started.said()


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("processes", [1, 4, 12])
def test_stopping_in_the_middle_of_the_start_leaves_nothing_behind(folder: Path, processes: int) -> None:
    with up(folder) as started:
        below: set[int] = set()

        def seen() -> bool:
            below.update(started.all_below())
            return len(below) >= processes

        eventually(seen, 60, interval_seconds=0.01)
        started.process.send_signal(signal.SIGINT)
        started.wait()
    assert not [pid for pid in below if is_running(pid)]


@pytest.mark.slow
def test_after_kill_9_the_next_up_starts_as_if_nothing_had_happened(folder: Path) -> None:
    with up(folder) as first:
        password = first.wait_ready()["flower_password"]
        below = first.all_below()
        first.process.kill()
        with up(folder) as second:
            assert second.wait_ready()["flower_password"] == password
            assert not [pid for pid in below if is_running(pid)]


def test_given_urls_are_used_and_nothing_of_our_own_is_started(folder: Path, database_url: str, redis_url: str) -> None:
    with up(folder, DATABASE_URL=database_url, REDIS_URL=redis_url) as started:
        started.wait_ready()
        assert set(started.children()) == {"gateway", "worker-cpu_0", "flower"}
    with redis.Redis.from_url(redis_url) as client:
        assert client.ping(), "what is not ours is not stopped"


def test_a_worker_for_each_device_is_started(folder: Path, database_url: str, redis_url: str) -> None:
    with up(folder, DEVICES="cpu:2", NODE="n", DATABASE_URL=database_url, REDIS_URL=redis_url) as started:
        url = started.wait_ready()["url"]
        assert {"worker-n.cpu_0", "worker-n.cpu_1"} <= set(started.children())

        def online() -> bool:
            devices = httpx.get(f"{url}/api/devices").json()["devices"]
            return {"n.cpu_0", "n.cpu_1"} <= {one["device_id"] for one in devices if one["state"] == "online"}

        eventually(online)


def test_a_taken_port_that_was_asked_for_is_an_error_with_its_holder(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with up(folder, HTTP__PORT=port) as started:
            complaint = started.wait()
    assert started.process.returncode == 1
    assert f"DEVICE_OPERATIONS_HTTP__PORT is {port}, and that port is taken" in complaint
    assert f"process {os.getpid()}" in complaint


def test_a_taken_port_that_nobody_asked_for_gives_way_to_another() -> None:
    said: list[str] = []
    with socket.create_server(("127.0.0.1", state.free_port())) as taken:
        port = taken.getsockname()[1]
        other = _port("HTTP__PORT", "127.0.0.1", port, False, said.append)
        assert port < other <= port + 20
        assert f"port {port} is taken" in said[0]
        with pytest.raises(StackError):
            _port("HTTP__PORT", "127.0.0.1", port, True, said.append)


@pytest.mark.parametrize(
    ("name", "value", "allowed"), [("LEASE_SECONDS", "soon", "1 to 3600"), ("DEVICES", "tpu:0", "cpu:2")]
)
def test_a_wrong_setting_stops_it_with_name_value_and_what_is_allowed(
    folder: Path, name: str, value: str, allowed: str
) -> None:
    with up(folder, **{name: value}) as started:
        complaint = started.wait()
    assert started.process.returncode == 2
    assert all(part in complaint for part in (f"DEVICE_OPERATIONS_{name}", value, allowed))
    assert not folder.exists(), "nothing was begun"


def test_a_gateway_that_refuses_its_settings_stops_it_with_the_reason(
    folder: Path, database_url: str, redis_url: str
) -> None:
    with up(folder, HTTP__HOST="0.0.0.0", DATABASE_URL=database_url, REDIS_URL=redis_url) as started:
        complaint = started.wait()
    assert started.process.returncode == 1
    assert "gateway refuses its settings" in complaint
    assert "DEVICE_OPERATIONS_API_KEYS" in complaint


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="it takes root to become somebody else")
def test_an_ordinary_user_runs_all_of_it(folder: Path) -> None:
    folder.parent.chmod(0o777)
    with up(folder, as_nobody()) as started:
        url = started.wait_ready()["url"]
        assert httpx.get(f"{url}/readyz").status_code == 200
        assert {psutil.Process(pid).username() for pid in started.children().values()} == {"nobody"}
        below = started.all_below()
    assert not [pid for pid in below if is_running(pid)]


def test_settings_of_a_stack_that_is_gone_are_not_taken_for_given(folder: Path, settings: Any) -> None:
    folder.mkdir()
    stack_file(folder).write_text(
        json.dumps({"database_url": "postgresql://a@127.0.0.1:1/x", "redis_url": "redis://127.0.0.1:1/0"})
    )
    found: Settings = settings(DATA_DIR=folder)
    assert found.database_url == "postgresql://a@127.0.0.1:1/x"
    with up(folder) as started:
        started.wait_ready()
        assert "postgresql" in started.children()
