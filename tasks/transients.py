"""Bytes that travel with one waiting request: to its run, or back from it. They are gone with the answer.

They lie beside the blobs and are none: no row, no hash, no owner but the request that waits. Nobody else can name them,
since no request may carry a `transient_id`. What a dead gateway left is swept with the age at which blobs expire.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import obstore

from device_operations.errors import OperationError, failure
from device_operations.jobs import new_id
from tasks.blobs import BlobStore

#: Above this many bytes a tensor of a waiting request leaves the job's row: a file costs less than its way through
#: JSON, a message and two statements.
TRANSIENT_BYTES = 8_192


#: Above this many bytes a range is mapped: below, reading takes half the time of touching fresh pages.
MAPPED_BYTES = 32 << 20


class Transients:
    """Transient bytes in the store that holds the blobs."""

    def __init__(self, blobs: BlobStore) -> None:
        self._objects = blobs.objects
        self._folder: Path | None = None
        if blobs.folder is not None:
            self._folder = blobs.folder / "transient"
            self._folder.mkdir(exist_ok=True)

    @property
    def is_local(self) -> bool:
        """Whether a few kilobytes are here sooner than another thread is."""
        return self._folder is not None

    def put(self, parts: Sequence[bytes | bytearray | memoryview]) -> str:
        """Stores the parts one after the other, and gives the id of the whole."""
        transient_id = new_id()
        if self._folder is None:
            obstore.put(self._objects, _key(transient_id), b"".join(parts))
        else:
            # Nobody knows the id before this returns: no need to write beside and rename.
            with (self._folder / transient_id).open("xb", buffering=0) as file:
                for part in parts:
                    _write_whole(file, part)
        return transient_id

    def read(self, transient_id: str, offset: int = 0, size_bytes: int | None = None) -> memoryview:
        """A range of the bytes; mapped from the file where that is large and the store is a folder."""
        try:
            if self._folder is not None and size_bytes is not None and size_bytes <= MAPPED_BYTES:
                return self._read(transient_id, offset, size_bytes)
            whole = self._whole(transient_id)
        except FileNotFoundError as error:
            raise failure(
                "blob_not_found", "the bytes that came with the request are gone: who waited for the answer has left"
            ) from error
        end = len(whole) if size_bytes is None else offset + size_bytes
        if end > len(whole):
            raise _too_few(end, len(whole))
        return whole[offset:end]

    def drop(self, transient_ids: Iterable[str]) -> None:
        """Deletes what is there. Where a reader still has the file open (Windows), the sweep deletes it later."""
        for transient_id in transient_ids:
            if self._folder is not None:
                with suppress(FileNotFoundError, PermissionError):
                    (self._folder / transient_id).unlink()
            else:
                with suppress(FileNotFoundError):
                    obstore.delete(self._objects, _key(transient_id))

    def sweep(self, older_than_seconds: float) -> int:
        """Deletes what is older, and gives how much that was."""
        if self._folder is not None:
            before = time.time() - older_than_seconds
            old = []
            for file in self._folder.iterdir():
                with suppress(FileNotFoundError):
                    if file.stat().st_mtime < before:
                        old.append(file.name)
        else:
            oldest = datetime.now(UTC) - timedelta(seconds=older_than_seconds)
            old = [
                str(found["path"]).rsplit("/", 1)[-1]
                for page in obstore.list(self._objects, prefix="transient")
                for found in page
                if found["last_modified"] < oldest
            ]
        self.drop(old)
        return len(old)

    def _read(self, transient_id: str, offset: int, size_bytes: int) -> memoryview:
        assert self._folder is not None
        with (self._folder / transient_id).open("rb", buffering=0) as file:
            file.seek(offset)
            data = file.read(size_bytes)
            if len(data) < size_bytes:
                raise _too_few(offset + size_bytes, offset + len(data))
        return memoryview(data)

    def _whole(self, transient_id: str) -> memoryview:
        if self._folder is None:
            return memoryview(obstore.get(self._objects, _key(transient_id)).bytes())
        with (self._folder / transient_id).open("rb") as file:
            if file.seek(0, 2) == 0:
                return memoryview(b"")
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _too_few(needed: int, there: int) -> OperationError:
    return failure("input_mismatch", f"{needed} bytes are needed, {there} came with the request")


def _write_whole(file: Any, part: bytes | bytearray | memoryview) -> None:
    """Writes all of `part`: an unbuffered file may take less at a time."""
    left = memoryview(part)
    while left:
        left = left[file.write(left) :]


def _key(transient_id: str) -> str:
    return f"transient/{transient_id}"
