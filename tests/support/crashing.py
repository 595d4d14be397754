"""A PostgreSQL of a test's own that can be killed, and that loses what it had not written when it is."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import psycopg2

from device_operations.stack import postgres, processes
from device_operations.stack.state import Remembered, make_private_folder
from device_operations.stack.supervisor import ChildService

#: The longest that PostgreSQL takes: only commits that wait for the disk write the log before the next of these.
_WRITES_LATE = ("-c", "wal_writer_delay=10s")


class CrashingPostgres:
    """Durable as under `device-operations up`, but for the log's writer, which comes by once in ten seconds."""

    def __init__(self, folder: Path) -> None:
        prepared = postgres.prepare(folder, Remembered(folder), durable=True)
        command = replace(prepared.command, arguments=[*prepared.command.arguments, *_WRITES_LATE])
        self._service: ChildService = replace(prepared, command=command)
        self._log = folder / "postgres.log"
        self.url = self._service.url
        self._process = processes.start(command, self._log)
        self.wait_ready()

    def kill(self) -> None:
        """Ends the server and all its processes with SIGKILL, and starts it again."""
        processes.end_tree(self._process)
        processes.end_session(self._process.pid)
        self._process = processes.start(self._service.command, self._log)
        self.wait_ready()

    def crash(self) -> None:
        """Kills one of its processes: the server ends all others, and begins anew with an empty memory."""
        doomed = next(child for child in self._process.children() if "checkpointer" in " ".join(child.cmdline()))
        doomed.kill()
        psutil.wait_procs([doomed], timeout=10)
        self.wait_ready()

    def wait_ready(self) -> None:
        """Returns once the server takes connections."""
        assert self._service.is_ready is not None

        def ready() -> bool:
            with contextlib.suppress(psycopg2.OperationalError):
                return self._service.is_ready()
            return False

        assert processes.wait_until(ready, 60), self._log.read_text(errors="replace")[-2000:]

    def close(self) -> None:
        """Ends it."""
        processes.end_tree(self._process)
        processes.end_session(self._process.pid)


@contextlib.contextmanager
def crashing_postgres(folder: Path) -> Iterator[CrashingPostgres]:
    """One with its data below `folder`, for as long as the block lasts. Call it from the main thread."""
    server = CrashingPostgres(make_private_folder(folder))
    try:
        yield server
    finally:
        server.close()
