"""The blob store: immutable bytes by id, in a folder or any store that obstore knows. Rows are `tasks.store.blobs`'.

Bytes are written under their final key only when they are whole (obstore's local store writes beside and renames, S3
completes the upload), so a cut-off upload leaves nothing behind.
"""

from __future__ import annotations

import hashlib
import mmap
import urllib.parse
import urllib.request
from collections.abc import AsyncIterable, AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import obstore
import obstore.store

from device_operations.errors import failure
from device_operations.jobs import new_id

#: Bytes moved at a time: what one process holds of a stream.
CHUNK_BYTES = 8 * 2**20


@dataclass(frozen=True, slots=True)
class Stored:
    """A blob that is whole in the store."""

    blob_id: str
    sha256: str
    size_bytes: int


class BlobStore:
    """Blobs behind one URL: `file:///folder`, `s3://bucket/prefix`, `memory://` (one process only)."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.folder: Path | None = None
        if url.startswith("file://"):
            self.folder = Path(urllib.request.url2pathname(urllib.parse.urlsplit(url).path))
            self.folder.mkdir(parents=True, exist_ok=True)
            self._store: Any = obstore.store.LocalStore(self.folder, mkdir=True)
        else:
            self._store = obstore.store.from_url(url)

    @property
    def objects(self) -> Any:
        """The store itself, for what lies beside the blobs."""
        return self._store

    async def put_stream(self, chunks: AsyncIterable[bytes], max_bytes: int, sha256: str | None = None) -> Stored:
        """Stores a stream as a new blob. `payload_too_large` over `max_bytes`, `checksum_mismatch` on other content."""
        blob_id = new_id()
        hasher = hashlib.sha256()
        size = 0

        async def counted() -> AsyncIterator[bytes]:
            nonlocal size
            async for chunk in chunks:
                size += len(chunk)
                if size > max_bytes:
                    raise failure("payload_too_large", f"a blob may have {max_bytes} bytes (BLOBS__MAX_BYTES)")
                hasher.update(chunk)
                yield bytes(chunk)
            if sha256 is not None and hasher.hexdigest() != sha256:
                raise failure("checksum_mismatch", f"the body's sha256 is {hasher.hexdigest()}, not {sha256}")

        await obstore.put_async(self._store, _key(blob_id), counted(), chunk_size=CHUNK_BYTES)
        return Stored(blob_id, hasher.hexdigest(), size)

    def put(self, data: bytes | bytearray | memoryview, blob_id: str | None = None) -> Stored:
        """Stores bytes as a new blob."""
        blob_id = blob_id or new_id()
        obstore.put(self._store, _key(blob_id), data if isinstance(data, bytes) else bytes(data))
        return Stored(blob_id, hashlib.sha256(data).hexdigest(), len(data))

    def put_chunks(self, chunks: Iterator[bytes | memoryview], blob_id: str | None = None) -> Stored:
        """Stores a stream of chunks as a new blob, holding one chunk at a time."""
        blob_id = blob_id or new_id()
        hasher = hashlib.sha256()
        size = 0

        def counted() -> Iterator[bytes]:
            nonlocal size
            for chunk in chunks:
                size += len(chunk)
                hasher.update(chunk)
                yield bytes(chunk)

        obstore.put(self._store, _key(blob_id), counted(), chunk_size=CHUNK_BYTES)
        return Stored(blob_id, hasher.hexdigest(), size)

    def read(self, blob_id: str, offset: int = 0, size_bytes: int | None = None) -> Any:
        """A range of a blob as one buffer: mapped from its file where the store is a folder, else fetched."""
        if self.folder is not None:
            return self._mapped(blob_id, offset, size_bytes)
        try:
            if size_bytes is None:
                size_bytes = obstore.head(self._store, _key(blob_id))["size"] - offset
            if size_bytes == 0:
                return memoryview(b"")
            return memoryview(obstore.get_range(self._store, _key(blob_id), start=offset, length=size_bytes))
        except FileNotFoundError as error:
            raise _missing(blob_id) from error

    def chunks(self, blob_id: str, offset: int, size_bytes: int) -> Iterator[memoryview]:
        """A range of a blob, a chunk at a time."""
        end = offset + size_bytes
        while offset < end:
            step = min(CHUNK_BYTES, end - offset)
            try:
                yield memoryview(obstore.get_range(self._store, _key(blob_id), start=offset, length=step))
            except FileNotFoundError as error:
                raise _missing(blob_id) from error
            offset += step

    async def stream(self, blob_id: str, offset: int, size_bytes: int) -> AsyncIterator[bytes]:
        """A range of a blob for HTTP, a chunk at a time."""
        end = offset + size_bytes
        while offset < end:
            step = min(CHUNK_BYTES, end - offset)
            yield bytes(await obstore.get_range_async(self._store, _key(blob_id), start=offset, length=step))
            offset += step

    def size(self, blob_id: str) -> int | None:
        """The blob's size in bytes, or None where the store has no such blob."""
        try:
            return int(obstore.head(self._store, _key(blob_id))["size"])
        except FileNotFoundError:
            return None

    def delete(self, blob_id: str) -> None:
        """Deletes the bytes; a blob that is not there is gone already."""
        try:
            obstore.delete(self._store, _key(blob_id))
        except FileNotFoundError:
            return

    def file(self, blob_id: str) -> Path | None:
        """The blob's file where the store is a folder of this machine."""
        return self.folder / _key(blob_id) if self.folder is not None else None

    def fetch(self, blob_id: str, target: Path) -> None:
        """Writes the blob to a file, a chunk at a time."""
        size = self.size(blob_id)
        if size is None:
            raise _missing(blob_id)
        with target.open("wb") as out:
            for chunk in self.chunks(blob_id, 0, size):
                out.write(chunk)

    def check(self) -> None:
        """Raises when the store cannot be listed: wrong credentials, no such bucket, no such folder."""
        next(iter(obstore.list(self._store, prefix="blobs", chunk_size=1)), None)

    def _mapped(self, blob_id: str, offset: int, size_bytes: int | None) -> Any:
        assert self.folder is not None
        try:
            with (self.folder / _key(blob_id)).open("rb") as file:
                there = file.seek(0, 2)
                size = there - offset if size_bytes is None else size_bytes
                if offset + size > there or size < 0:
                    raise failure(
                        "input_mismatch",
                        f"blob {blob_id} has {there} bytes; {max(size, 0)} from {offset} were asked for",
                    )
                if size == 0:
                    return memoryview(b"")
                return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))[offset : offset + size]
        except FileNotFoundError as error:
            raise _missing(blob_id) from error


def _key(blob_id: str) -> str:
    # The last characters of a UUIDv7 are its random ones: folders fill evenly.
    return f"blobs/{blob_id[-2:]}/{blob_id}"


def _missing(blob_id: str) -> Exception:
    return failure("blob_not_found", f"blob {blob_id} is not in the store: it was deleted, or has expired")
