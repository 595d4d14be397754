"""The whole product as child processes of a test: gateways and workers that can be killed and started one by one."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import psutil
import psycopg2

from device_operations.devices import name_devices, parse_devices
from device_operations.settings.api_keys import parse_api_keys
from device_operations.stack import processes, services
from device_operations.stack.state import free_port
from device_operations.stack.supervisor import ChildService

REPOSITORY = Path(__file__).parents[2]


class RunningStack:
    """A gateway (or several) and one worker per device on their own database, as a user would run them.

    Parts go by name: `gateway` (`gateway-2`, …) and the devices' ids. Their logs are kept in `folder`.

        http_url, gateway_urls      where the gateways listen
        database_url, redis_url     its own database and its own Valkey database
        device_ids                  ["cpu_0", …]
        client                      an httpx.Client on the first gateway, with the first API key if there are any
        environment                 what every part was given
    """

    def __init__(
        self,
        folder: Path,
        database_url: str,
        redis_url: str,
        devices: str = "cpu:1",
        gateways: int = 1,
        settings: dict[str, object] | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.database_url, self.redis_url = database_url, redis_url
        given = settings or {}
        own: dict[str, object] = {
            "DATABASE_URL": database_url,
            "REDIS_URL": redis_url,
            "DATA_DIR": folder / "data",
            "MODEL_CACHE_PATH": folder / "models",
            "TRAINING__CHECKPOINT_PATH": folder / "checkpoints",
            "DEVICES": devices,
            "DEFAULT_DEVICE": name_devices(parse_devices(devices))[0].device_id,
        }
        self.environment = services.environment(own | given) | {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
        node = given.get("NODE")
        self.device_ids = [found.device_id for found in name_devices(parse_devices(devices), node and str(node))]
        self._services: dict[str, ChildService] = {}
        self._processes: dict[str, psutil.Popen] = {}
        self._epochs_before: dict[str, int] = {}
        self.gateway_urls = [self._add_gateway(number) for number in range(1, gateways + 1)]
        self.http_url = self.gateway_urls[0]
        for device_id in self.device_ids:
            self._services[device_id] = services.worker(device_id, self.environment, REPOSITORY)
        self.client = httpx.Client(base_url=self.http_url, timeout=60, trust_env=False, headers=self._key(given))

    def _add_gateway(self, number: int) -> str:
        name = "gateway" if number == 1 else f"gateway-{number}"
        own = services.environment({"HTTP__PORT": free_port()}, base=self.environment)
        self._services[name] = services.gateway(own, REPOSITORY, name)
        return self._services[name].url

    @staticmethod
    def _key(settings: dict[str, object]) -> dict[str, str]:
        keys = parse_api_keys(str(settings.get("API_KEYS") or ""))
        return {"X-API-Key": keys[0].key} if keys else {}

    def start(self, *names: str) -> None:
        """Starts parts by name, or all of them, without waiting."""
        for name in names or self._services:
            assert name not in self._processes, f"{name} runs already"
            if name in self.device_ids:
                self._epochs_before[name] = self._epoch(name)
            self._processes[name] = processes.start(self._services[name].command, self.folder / f"{name}.log")

    def stop(self, *names: str) -> None:
        """Asks parts to stop, or all of them (workers before gateways), and waits until nothing of them is left."""
        for name in names or [*self.device_ids, *self._gateway_names()]:
            process = self._processes.pop(name, None)
            if process is None:
                continue
            command = self._services[name].command
            below = processes.descendants(process)
            processes.ask_to_stop(process, command.stop_signal)
            processes.await_end([process], command.grace_seconds)
            self._end(process, below)

    def kill(self, *names: str) -> None:
        """Ends parts with SIGKILL, as a crash would, and everything they started."""
        for name in names:
            process = self._processes.pop(name)
            self._end(process, [])

    @staticmethod
    def _end(process: psutil.Popen, below: list[psutil.Process]) -> None:
        processes.end_tree(process, also=below)
        processes.end_session(process.pid)

    def restart(self, *names: str) -> None:
        """Stops parts in good order and starts them again, without waiting for them to be ready."""
        self.stop(*names)
        self.start(*names)

    def run_instead(self, device_id: str, module: str, **environment: str) -> None:
        """From its next start on, the device's worker is `python -m module`, with more in its environment."""
        service = self._services[device_id]
        arguments = services.python("-m", module, "--device", device_id)
        given = {**(service.command.environment or {}), **environment}
        self._services[device_id] = replace(
            service, command=replace(service.command, arguments=arguments, environment=given)
        )

    def process(self, name: str) -> psutil.Popen:
        """The running process of a part, for signals and for its memory."""
        return self._processes[name]

    def is_running(self, name: str) -> bool:
        """Whether the part was started and has not ended."""
        return name in self._processes and self._processes[name].poll() is None

    def log(self, name: str) -> str:
        """Everything the part has printed since the stack was made."""
        path = self.folder / f"{name}.log"
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    def wait_ready(self, seconds: float = 60, devices: list[str] | None = None) -> None:
        """Waits until every gateway that runs answers and every device (or those named) is online; says why not.

        A device whose worker was killed shows as online until its lease is over: the new worker's epoch is waited for.
        """
        wanted = set(self.device_ids if devices is None else devices)

        def ready() -> bool:
            for name in self._processes:
                if not self.is_running(name):
                    raise AssertionError(f"{name} ended while starting:\n{self.log(name)[-4000:]}")
            for name in self._gateway_names():
                if name in self._processes and not services.answers(f"{self._services[name].url}/healthz"):
                    return False
            return wanted <= self.online()

        if not processes.wait_until(ready, seconds):
            logs = "\n".join(f"--- {name}\n{self.log(name)[-2000:]}" for name in self._services)
            raise AssertionError(f"not ready within {seconds:g} s; online: {self.online()}\n{logs}")

    def online(self) -> set[str]:
        """The ids of the devices that are online under the worker that was started last, as the gateway tells."""
        try:
            answer = self.client.get("/api/devices")
        except httpx.HTTPError:
            return set()
        devices = answer.json()["devices"] if answer.status_code == 200 else []
        return {
            one["device_id"]
            for one in devices
            if one["state"] == "online" and one["epoch"] > self._epochs_before.get(one["device_id"], 0)
        }

    def _epoch(self, device_id: str) -> int:
        with contextlib.closing(psycopg2.connect(self.database_url)) as connection, connection.cursor() as cursor:
            cursor.execute("SELECT epoch FROM devices WHERE device_id = %s", [device_id])
            row = cursor.fetchone()
        return int(row[0]) if row else 0

    def close(self) -> None:
        """Stops everything."""
        self.client.close()
        self.stop()

    def _gateway_names(self) -> list[str]:
        return [name for name in self._services if name not in self.device_ids]


def is_running(pid: int) -> bool:
    """Whether a process runs, for tests that none is left: one that only waits to be reaped does not."""
    try:
        return processes.is_alive(psutil.Process(pid))
    except psutil.NoSuchProcess:
        return False


def eventually(condition: Callable[[], Any], seconds: float = 20, interval_seconds: float = 0.05) -> Any:
    """Polls until the condition answers something true, and answers that; fails naming the last answer."""
    deadline = time.monotonic() + seconds
    while True:
        answer = condition()
        if answer:
            return answer
        if time.monotonic() > deadline:
            raise AssertionError(f"not so within {seconds:g} s; the last answer was {answer!r}")
        time.sleep(interval_seconds)
