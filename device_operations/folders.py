"""Folders and files of the service on disk: private to its account, and renamed durably.

Gateway and workers call `keep_private` at their start, and `up` gives its servers the same umask: what they or
their libraries create is 0600, or 0700 for a folder. `private_folder` is for folders whose names are the service's own:
what an earlier version left open is closed too.
"""

from __future__ import annotations

import os
from pathlib import Path

#: What the service's files and folders keep from other accounts.
PRIVATE_UMASK = 0o077


def keep_private() -> None:
    """Lets this process create files that only its own account may read, from now on."""
    os.umask(PRIVATE_UMASK)


def private_folder(path: Path) -> Path:
    """The folder, made where it is missing: for this account alone (0700), also where it was open to others before.

    Folders above it that are missing are made 0700 too; those that are there stay as they are. Windows keeps its own
    permissions.
    """
    for missing in reversed([above for above in path.parents if not above.exists()]):
        missing.mkdir(mode=0o700, exist_ok=True)
    path.mkdir(mode=0o700, exist_ok=True)
    if os.name == "posix":
        status = path.stat()
        if status.st_uid == os.geteuid() and status.st_mode & PRIVATE_UMASK:
            path.chmod(0o700)
    return path


def private_opener(path: str, flags: int) -> int:
    """For `open(…, opener=private_opener)`: a file that this makes is 0600, under any umask."""
    return os.open(path, flags, 0o600)


def sync_folder(folder: Path) -> None:
    """Makes a rename durable. A folder cannot be opened on Windows, where os.replace is as durable as it gets."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
