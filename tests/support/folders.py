"""Temporary folders that the account `nobody` reaches too, which pytest's own (mode 0700) are not."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def reachable_folder() -> Iterator[Path]:
    """A folder for as long as the block lasts."""
    with tempfile.TemporaryDirectory(prefix="device-operations-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder
