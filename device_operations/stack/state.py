"""The data folder's private files: what is remembered from start to start, what runs now, and the lock on both."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from device_operations.folders import private_folder, private_opener
from device_operations.stack.errors import StackError
from device_operations.wire.json_types import FreeJson

#: Ports are taken from here: below what Linux (32768) and Windows (49152) hand out for outgoing connections, which
#: could otherwise hold a remembered port at the next start.
PORTS = range(20_000, 32_000)


def make_private_folder(path: Path) -> Path:
    """Makes the folder for this account alone (0700); one that is there keeps its permissions.

    Where we are root, others may pass through it, and no more (0711): PostgreSQL's account has its own folder inside.
    """
    is_new = not path.exists()
    if is_new:
        private_folder(path)
    if os.name == "posix" and path.stat().st_uid == os.geteuid() and os.geteuid() == 0:
        path.chmod(0o711 if is_new else path.stat().st_mode & 0o777 | 0o711)
    return path


def write_private(path: Path, content: FreeJson) -> None:
    """Writes JSON that only this user may read (0600), whole or not at all."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=2)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise


def read_private(path: Path) -> FreeJson:
    """What `write_private` wrote, or `{}`. Raises `StackError` where the file holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise StackError(f"{path} cannot be read ({error}); if it is damaged, delete it") from None
    if not isinstance(content, dict):
        raise StackError(f"{path} holds no JSON object; delete it")
    return content


class Remembered:
    """Passwords and ports that stay the same from one start to the next, in `remembered.json`."""

    def __init__(self, data_dir: Path) -> None:
        self._path = data_dir / "remembered.json"
        self._content = read_private(self._path)

    def get(self, name: str) -> object:
        """The value kept under this name, or None."""
        return self._content.get(name)

    def put(self, name: str, value: object) -> None:
        """Keeps a value; it is on disk when this returns."""
        self._content[name] = value
        write_private(self._path, self._content)

    def secret(self, name: str) -> str:
        """The password kept under this name; a random one, kept from now on, at the first call."""
        if not self._content.get(name):
            import secrets

            self.put(name, secrets.token_urlsafe(24))
        return str(self._content[name])

    def port(self, name: str) -> int:
        """The port kept under this name if it is still free, else another free one, kept from now on."""
        kept = self._content.get(name)
        others = [value for other, value in self._content.items() if other != name]
        if not isinstance(kept, int) or kept in others or not is_free(kept):
            self.put(name, free_port())
        _given.add(self._content[name])
        return int(self._content[name])


#: Ports that this process has given out: their receivers may not listen on them yet.
_given: set[int] = set()


def free_port() -> int:
    """A port on loopback that is free now, outside the range of outgoing connections; another each time."""
    import random

    for port in random.sample(PORTS, 200):
        if port not in _given and is_free(port):
            _given.add(port)
            return port
    raise StackError(f"none of 200 ports tried between {PORTS.start} and {PORTS.stop} is free")


def is_free(port: int, host: str = "127.0.0.1") -> bool:
    """Whether this address could be listened on now."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        if os.name == "posix":  # On Windows this option would let two listeners share the port.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


@contextlib.contextmanager
def locked(data_dir: Path) -> Iterator[None]:
    """Holds the data folder for this process; the lock goes with the process however it ends.

    Raises `StackError` naming the holder's process id where another process holds it.
    """
    path = data_dir / "up.lock"
    with open(path, "a+", encoding="utf-8", opener=private_opener) as file:
        if not _try_lock(file):
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise StackError(
                f"another `device-operations up` (process {holder}) runs with the data folder {data_dir}; "
                "stop it, or set DEVICE_OPERATIONS_DATA_DIR to another folder"
            )
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


if sys.platform == "win32":
    import msvcrt

    def _try_lock(file: IO[str]) -> bool:
        file.seek(2**20)  # Windows locks keep others from reading: not the bytes that hold the process id.
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        file.seek(0)
        return True
else:
    import fcntl

    def _try_lock(file: IO[str]) -> bool:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True
