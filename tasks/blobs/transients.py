"""Bytes that travel with one waiting request: to its run, or back from it. They are gone with the answer.

They lie in the blobs' folder and are none: no row, no hash, no owner but the request that waits. Nothing else can name
them, since no request may carry a `transient_id`. What a dead gateway left is swept with the age at which blobs expire.

A file that was read is kept under another name, for the next bytes to be written over: to find room for a new file, and
to give it back, takes a file system several times longer than to take the bytes.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from io import FileIO
from pathlib import Path

import obstore

from device_operations.errors import OperationError, failure
from device_operations.folders import private_folder
from device_operations.jobs import new_id
from tasks.blobs.store import BlobStore

#: Above this many bytes a tensor of a waiting request leaves the job's row: a file costs less than its way through
#: JSON, a message and two statements.
TRANSIENT_BYTES = 8_192


#: Files up to this many bytes are kept to be written over, and so many of each size, counted in powers of two.
KEPT_BYTES = 4 << 20
KEPT_OF_A_SIZE = 8

#: Seconds after which a sweep deletes a kept file that nothing was written over.
KEPT_SECONDS = 60.0

#: Above this many bytes a range is mapped: below, reading takes half the time of touching fresh pages.
MAPPED_BYTES = 32 << 20


class Transients:
    """Transient bytes in the store that holds the blobs."""

    def __init__(self, blobs: BlobStore) -> None:
        self._objects = blobs.objects
        self._folder: Path | None = None
        if blobs.folder is not None:
            self._folder = private_folder(blobs.folder / "transient")

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
            # The id is unknown before this returns: no need to write to another name first.
            with self._empty(transient_id, sum(map(len, parts))) as file:
                for part in parts:
                    _write_whole(file, part)
                file.truncate()
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

    def drop(self, transient_ids: Iterable[str], *, read: bool = False) -> None:
        """Deletes what is there. Where a reader still has the file open (Windows), the sweep deletes it later.

        `read` says that they were read by whom they were for: only then may others be written in their place.
        """
        for transient_id in transient_ids:
            if self._folder is not None:
                if read:
                    self._keep(transient_id)
                with suppress(FileNotFoundError, PermissionError):
                    os.unlink(f"{self._folder}/{transient_id}")
            else:
                with suppress(FileNotFoundError):
                    obstore.delete(self._objects, _key(transient_id))

    def sweep(self, older_than_seconds: float) -> int:
        """Deletes what is older, and gives how much that was. Kept files go sooner."""
        if self._folder is not None:
            now = time.time()
            old = []
            for file in self._folder.iterdir():
                allowed = min(KEPT_SECONDS, older_than_seconds) if file.name.startswith("kept-") else older_than_seconds
                with suppress(FileNotFoundError):
                    if now - file.stat().st_mtime > allowed:
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

    def _empty(self, transient_id: str, size_bytes: int) -> FileIO:
        """A file of that name to write to: one that was kept, or a new one."""
        path = f"{self._folder}/{transient_id}"
        if size_bytes <= KEPT_BYTES:
            for kept in self._places(size_bytes):
                with suppress(OSError):
                    os.rename(kept, path)
                    return FileIO(path, "r+")
        return FileIO(path, "x")

    def _keep(self, transient_id: str) -> None:
        """Gives the file another name under which it waits to be written over, where one is free."""
        path = f"{self._folder}/{transient_id}"
        with suppress(OSError):
            size_bytes = os.stat(path).st_size
            for place in self._places(size_bytes) if size_bytes <= KEPT_BYTES else ():
                # A link, since a rename would take the place of what is there.
                with suppress(FileExistsError):
                    os.link(path, place)
                    return

    def _places(self, size_bytes: int) -> Iterable[str]:
        size = size_bytes.bit_length()
        return (f"{self._folder}/kept-{size}-{number}" for number in range(KEPT_OF_A_SIZE))

    def _read(self, transient_id: str, offset: int, size_bytes: int) -> memoryview:
        with FileIO(f"{self._folder}/{transient_id}") as file:
            if offset:
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


def _write_whole(file: FileIO, part: bytes | bytearray | memoryview) -> None:
    """Writes all of `part`: an unbuffered file may take less at a time."""
    left = memoryview(part)
    while left:
        left = left[file.write(left) :]


def _key(transient_id: str) -> str:
    return f"transient/{transient_id}"
