"""`device-operations up`: the whole product on this machine, from the servers to Flower, until it is stopped.

lock the data folder ─▶ end leftovers ─▶ servers ─▶ migrate ─▶ gateway, workers, Flower ─▶ ready ─▶ watch ─▶ stop
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType

import httpx
import psutil

from device_operations.devices import DeviceSpec, device_ids, spell_devices
from device_operations.settings import Settings, local_url, stack_file
from device_operations.stack import postgres, services, state, valkey
from device_operations.stack.errors import StackError
from device_operations.stack.state import Remembered
from device_operations.stack.supervisor import ChildService, Stopped, Supervisor
from device_operations.wire.json_types import FreeJson

#: From the start of the gateway until a device is online: a GPU's first contact takes many seconds.
READY_WITHIN_SECONDS = 180

#: A busy port that is not set explicitly gives way to one of the next so many.
PORTS_TRIED = 20


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where everything listens, with passwords; what `stack.json` holds while the stack runs."""

    database_url: str
    redis_url: str
    http_url: str
    flower_url: str
    flower_user: str
    flower_password: str


def up(settings: Settings, say: Callable[[str], None], ready: Callable[[Addresses], None] = lambda _: None) -> None:
    """Runs the stack until SIGINT or SIGTERM. `ready` is called once, when `/readyz` is 200. Raises `StackError`.

    `settings` must be `settings.read()`'s: those of `load()` may hold the addresses of a stack that is gone.
    """
    data_dir = state.make_private_folder(settings.data_dir)
    with state.locked(data_dir), Supervisor(data_dir, say) as supervisor, _stopping_on_signals(supervisor, say):
        try:
            addresses = _start(settings, supervisor, say)
            _await_ready(addresses.http_url, supervisor)
            ready(addresses)
            supervisor.watch()
        except Stopped:
            say("stopping")
        finally:
            supervisor.stop()
            stack_file(data_dir).unlink(missing_ok=True)


def _start(settings: Settings, supervisor: Supervisor, say: Callable[[str], None]) -> Addresses:
    remembered = Remembered(settings.data_dir)
    addresses = _addresses(settings, remembered, supervisor, say)
    environment = _environment(settings, addresses)
    supervisor.run(services.migrate(environment))
    state.write_private(stack_file(settings.data_dir), _noted(addresses))
    devices = device_ids(settings)
    # Found once, here: a worker need not look again, and all see the same names.
    found = spell_devices(DeviceSpec(one.backend, one.ordinal) for one in devices)
    environment |= services.environment({"DEVICES": found}, base={})
    flower = environment | services.environment({"FLOWER__PASSWORD": addresses.flower_password}, base={})
    supervisor.start(
        [services.gateway(environment)],
        [services.worker(one.device_id, environment) for one in devices],
        [services.flower(flower, addresses.flower_url)],
    )
    return addresses


def _addresses(
    settings: Settings, remembered: Remembered, supervisor: Supervisor, say: Callable[[str], None]
) -> Addresses:
    """Starts the servers that no URL is set for, and finds a port for everything else."""
    http_port = _port(
        "HTTP__PORT", settings.http.host, settings.http.port, "port" in settings.http.model_fields_set, say
    )
    flower_port = _port(
        "FLOWER__PORT", settings.flower.host, settings.flower.port, "port" in settings.flower.model_fields_set, say
    )
    ours: dict[str, ChildService] = {}
    if settings.database_url is None:
        ours["database"] = postgres.prepare(settings.data_dir, remembered)
    if settings.redis_url is None:
        ours["redis"] = valkey.prepare(settings.data_dir, remembered)
    supervisor.start(list(ours.values()))
    return Addresses(
        database_url=settings.database_url or ours["database"].url,
        redis_url=settings.redis_url or ours["redis"].url,
        http_url=local_url(settings.http.host, http_port),
        flower_url=local_url(settings.flower.host, flower_port),
        flower_user="admin",
        flower_password=settings.flower.password or remembered.secret("flower_password"),
    )


def _port(name: str, host: str, wanted: int, asked_for: bool, say: Callable[[str], None]) -> int:
    """The port wanted, if it is free. If not: an error if it was set explicitly, else a free one after it."""
    if wanted == 0:
        return state.free_port()
    if state.is_free(wanted, host):
        return wanted
    holder = _holder(wanted)
    if asked_for:
        raise StackError(
            f"DEVICE_OPERATIONS_{name} is {wanted}, and that port is taken{holder}: "
            "end that program, or set another port (0 for any)"
        )
    for port in range(wanted + 1, wanted + 1 + PORTS_TRIED):
        if state.is_free(port, host):
            say(f"port {wanted} is taken{holder}: using {port} (set DEVICE_OPERATIONS_{name} to choose)")
            return port
    raise StackError(f"the ports {wanted} to {wanted + PORTS_TRIED} are all taken: set DEVICE_OPERATIONS_{name}")


def _holder(port: int) -> str:
    """The process that listens on the port, if the system shows it."""
    try:
        for one in psutil.net_connections("tcp"):
            if one.status == psutil.CONN_LISTEN and one.pid and tuple(one.laddr)[1:] == (port,):
                return f" by {psutil.Process(one.pid).name()} (process {one.pid})"
    except (psutil.AccessDenied, psutil.NoSuchProcess):
        return ""
    return ""


def _environment(settings: Settings, addresses: Addresses) -> dict[str, str]:
    """What every child is given: our own environment, and what was found out since."""
    return services.environment(
        {
            "DATABASE_URL": addresses.database_url,
            "REDIS_URL": addresses.redis_url,
            "DATA_DIR": settings.data_dir,
            "HTTP__PORT": _port_of(addresses.http_url),
            "FLOWER__PORT": _port_of(addresses.flower_url),
        }
    )


def _port_of(url: str) -> str:
    return url.rpartition(":")[2]


def _noted(addresses: Addresses) -> FreeJson:
    return {name: getattr(addresses, name) for name in Addresses.__slots__} | {"pid": os.getpid()}


def _await_ready(http_url: str, supervisor: Supervisor) -> None:
    """Waits for `/readyz`. Raises `StackError` with what it last said."""
    deadline = time.monotonic() + READY_WITHIN_SECONDS
    while True:
        try:
            answer = services.local_http().get(f"{http_url}/readyz")
            if answer.status_code == 200:
                return
            said = answer.text[:1000]
        except httpx.HTTPError as error:
            said = str(error)
        if time.monotonic() > deadline:
            raise StackError(f"{http_url}/readyz is not 200 after {READY_WITHIN_SECONDS} s; it last said: {said}")
        supervisor.tick()
        supervisor.check()


@contextlib.contextmanager
def _stopping_on_signals(supervisor: Supervisor, say: Callable[[str], None]) -> Iterator[None]:
    """SIGINT, SIGTERM and a closed terminal stop the stack in good order; a second one stops it at once."""

    def stop(signal_number: int, frame: FrameType | None) -> None:
        if supervisor.ask_to_stop() > 1:
            say("stopping at once")

    names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")
    before = {number: signal.signal(number, stop) for name in names if (number := getattr(signal, name, None))}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
