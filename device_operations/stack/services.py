"""How each part of the product is run: the same commands for `up`, the command line, Compose and the tests.

Parts are started by `python -m`, never imported: this package stays free of what they load.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import httpx

from device_operations.settings import PREFIX, local_url
from device_operations.stack.processes import Command
from device_operations.stack.supervisor import ChildService

#: A worker finishes the step that runs when it is stopped; what waits goes to the next worker.
WORKER_GRACE_SECONDS = 30

#: A worker refuses a device whose lease a killed one has left; with their pauses, so many starts outlast it.
WORKER_FAILED_STARTS = 6

#: What a worker is started with unless its environment says otherwise: glibc asks for huge pages (Linux's, where
#: `transparent_hugepage` is `madvise`), in which ONNX Runtime's runs on the CPU took 1 to 2 % less time. It does so for
#: the main thread's arena only, and models are loaded on another thread: all threads share that one.
WORKER_ENVIRONMENT = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1"}

GATEWAY = ("-m", "api_gateway")
MIGRATE = ("-m", "migrations", "upgrade")
FLOWER = ("-m", "device_operations.stack.flower")


def worker_arguments(device_id: str) -> tuple[str, ...]:
    """What runs the worker of one device."""
    return ("-m", "workers", "--device", device_id)


def python(*arguments: str) -> list[str]:
    """This very Python, with arguments."""
    return [sys.executable, *arguments]


def environment(settings: Mapping[str, object], base: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a child: ours, with these settings (by their names without the prefix) over it."""
    inherited = dict(os.environ if base is None else base)
    return inherited | {PREFIX + name: str(value) for name, value in settings.items()}


def migrate(environment: Mapping[str, str], folder: Path | None = None) -> Command:
    """Brings the database to the newest revision; ends."""
    return Command("migrate", python(*MIGRATE), environment, folder)


def gateway(environment: Mapping[str, str], folder: Path | None = None, name: str = "gateway") -> ChildService:
    """The HTTP gateway; ready as soon as it answers at all, since `/readyz` also needs a device."""
    url = gateway_url(environment)
    return ChildService(
        Command(name, python(*GATEWAY), environment, folder),
        is_ready=lambda: answers(f"{url}/healthz"),
        url=url,
        remedy=f"is another program on port {url.rpartition(':')[2]}?",
    )


def worker(device_id: str, environment: Mapping[str, str], folder: Path | None = None) -> ChildService:
    """The worker of one device. `/readyz` says when it is online."""
    command, own = python(*worker_arguments(device_id)), {**WORKER_ENVIRONMENT, **environment}
    return ChildService(
        Command(f"worker-{device_id}", command, own, folder, grace_seconds=WORKER_GRACE_SECONDS),
        remedy="run `device-operations doctor` to see what this machine's devices lack",
        failed_starts=WORKER_FAILED_STARTS,
    )


def flower(environment: Mapping[str, str], url: str, folder: Path | None = None) -> ChildService:
    """Flower at its URL; ready when it answers, also if only with 401."""
    return ChildService(
        Command("flower", python(*FLOWER), environment, folder), is_ready=lambda: answers(url, any_status=True), url=url
    )


def gateway_url(environment: Mapping[str, str]) -> str:
    """Where this machine reaches the gateway that the environment describes."""
    host = environment.get(f"{PREFIX}HTTP__HOST") or "127.0.0.1"
    return local_url(host, int(environment.get(f"{PREFIX}HTTP__PORT") or 8000))


def answers(url: str, *, any_status: bool = False) -> bool:
    """Whether an HTTP server answers there: with 200, or with `any_status`."""
    try:
        status = local_http().get(url).status_code
    except httpx.HTTPError:
        return False
    return any_status or status == 200


@functools.cache
def local_http() -> httpx.Client:
    """One client for all polling of this machine's own servers: making one costs more than the request."""
    return httpx.Client(timeout=5, trust_env=False)
