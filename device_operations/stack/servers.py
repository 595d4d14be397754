"""PostgreSQL and Valkey together, both running for as long as a block lasts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from device_operations.stack import postgres, valkey
from device_operations.stack.state import Remembered, locked, make_private_folder
from device_operations.stack.supervisor import Supervisor


@dataclass(frozen=True, slots=True)
class Servers:
    """The addresses of two running servers, with their passwords in them."""

    database_url: str
    redis_url: str


@contextlib.contextmanager
def running(data_dir: Path, *, durable: bool = False) -> Iterator[Servers]:
    """Both servers, started before the block and stopped after it, with their data below `data_dir`.

    Not `durable` (for tests): a crash of the machine may lose data, a crash of a process may not. Call it from the
    main thread. Raises `StackError`.
    """
    folder = make_private_folder(data_dir.absolute())
    with locked(folder), Supervisor(folder) as supervisor:
        remembered = Remembered(folder)
        both = [prepare(folder, remembered, durable=durable) for prepare in (postgres.prepare, valkey.prepare)]
        supervisor.start(both)
        yield Servers(database_url=both[0].url, redis_url=both[1].url)
