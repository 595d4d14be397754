"""The blob store: immutable bytes by id, in a folder or any store that obstore knows. Rows are `tasks.blobs.records`'.

Bytes are written under their final key only when they are whole (a folder's are written elsewhere and renamed, S3
completes the upload), so a cut-off upload leaves nothing behind; what a killed process left is swept by age.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import mmap
import os
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import AsyncIterable, AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import obstore
import obstore.store
from obstore.store import ObjectStore

from device_operations.errors import failure
from device_operations.folders import private_folder, sync_folder
from device_operations.jobs import new_id
from device_operations.wire.json_types import FreeJson
from tasks.blobs.writers import BLOCK_BYTES, CHUNK_BYTES, BlobWriter, FileWriter, Stored, UploadWriter

__all__ = ["BLOCK_BYTES", "CHUNK_BYTES", "BlobStore", "BlobWriter", "Stored"]

#: The folders of a local store: in which blobs are written, and of those that are whole.
_PARTIAL = "partial"
_WHOLE = "blobs"

#: The file of a blob that was retired, there, and how much of it is kept.
_SPARE = "spare"
SPARE_BYTES = 2**30


class BlobStore:
    """Blobs behind one URL: `file:///folder`, `s3://bucket/prefix`, `memory://` (one process only).

    A store's options may stand in the URL's query: `s3://bucket/prefix?endpoint=http://host:9000&region=us-east-1`;
    what is not said there is read from the provider's own environment variables (`AWS_ACCESS_KEY_ID`, …).
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.folder: Path | None = None
        self._threads = ThreadPoolExecutor(max_workers=8, thread_name_prefix="blobs")
        if url.startswith("file://"):
            self.folder = Path(urllib.request.url2pathname(urllib.parse.urlsplit(url).path))
            for name in (_PARTIAL, _WHOLE):
                private_folder(self.folder / name)
            self.objects: ObjectStore = obstore.store.LocalStore(self.folder, mkdir=True)
        else:
            self.objects = _open(url)

    # ---- in

    def writer(self, blob_id: str | None = None, *, sha256: str | None = None, expected_bytes: int = 0) -> BlobWriter:
        """A new blob to be written piece by piece. With `sha256`, the content's known hash, none is computed.

        Where `expected_bytes` are about as many as the last retired blob had, its file is written over.
        """
        blob_id = blob_id or new_id()
        if self.folder is not None:
            folder = self.folder / _PARTIAL
            spare = folder / _SPARE if _size(folder / _SPARE) <= 2 * expected_bytes else None
            return FileWriter(blob_id, sha256, self._threads, folder, self.folder / _key(blob_id), spare)
        return UploadWriter(blob_id, sha256, self._threads, self.objects, _key(blob_id))

    async def put_stream(
        self, chunks: AsyncIterable[bytes], max_bytes: int, sha256: str | None = None, expected_bytes: int = 0
    ) -> Stored:
        """Stores a stream as a new blob. `payload_too_large` over `max_bytes`, `checksum_mismatch` on other content."""
        writer = self.writer(expected_bytes=expected_bytes)
        loop = asyncio.get_running_loop()
        writing: asyncio.Future[None] | None = None
        block: list[bytes] = []
        held = size = 0
        try:
            async for chunk in chunks:
                size += len(chunk)
                if size > max_bytes:
                    raise failure("payload_too_large", f"a blob may have {max_bytes} bytes (BLOBS__MAX_BYTES)")
                block.append(chunk)
                held += len(chunk)
                if held >= BLOCK_BYTES:
                    # One block is written and hashed on threads while the next arrives.
                    if writing is not None:
                        await writing
                    writing = loop.run_in_executor(self._threads, writer.write_all, block)
                    block, held = [], 0
            if writing is not None:
                await writing
            return await loop.run_in_executor(self._threads, writer.finish_with, block, sha256)
        except BaseException:
            # Not awaited: a request that was cut off waits for nothing any more.
            self._threads.submit(writer.abort)
            raise

    def put(self, data: bytes | bytearray | memoryview, blob_id: str | None = None) -> Stored:
        """Stores bytes as a new blob."""
        blob_id = blob_id or new_id()
        obstore.put(self.objects, _key(blob_id), data if isinstance(data, bytes) else bytes(data))
        return Stored(blob_id, hashlib.sha256(data).hexdigest(), len(data))

    def put_chunks(self, chunks: Iterator[bytes | memoryview], blob_id: str | None = None) -> Stored:
        """Stores a stream of chunks as a new blob, holding one chunk at a time."""
        with self.writer(blob_id) as writer:
            for chunk in chunks:
                writer.write(chunk)
            return writer.finish()

    def adopt(self, path: Path, blob_id: str, sha256: str) -> Stored:
        """Makes a whole file a blob. Where the store is a folder on the same file system it is moved, not copied."""
        size = path.stat().st_size
        if self.folder is not None:
            target = self.folder / _key(blob_id)
            target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            try:
                os.replace(path, target)
                sync_folder(target.parent)
                return Stored(blob_id, sha256, size)
            except OSError as error:
                if error.errno != errno.EXDEV:
                    raise
        with path.open("rb") as file, self.writer(blob_id, sha256=sha256) as writer:
            while chunk := file.read(CHUNK_BYTES):
                writer.write(chunk)
            return writer.finish()

    # ---- out

    def read(self, blob_id: str, offset: int = 0, size_bytes: int | None = None) -> memoryview:
        """A range of a blob as one buffer: mapped from its file where the store is a folder, else fetched."""
        if self.folder is not None:
            return self._mapped(blob_id, offset, size_bytes)
        try:
            if size_bytes is None:
                size_bytes = obstore.head(self.objects, _key(blob_id))["size"] - offset
            if size_bytes == 0:
                return memoryview(b"")
            return memoryview(obstore.get_range(self.objects, _key(blob_id), start=offset, length=size_bytes))
        except FileNotFoundError as error:
            raise _missing(blob_id) from error

    def read_into(self, blob_id: str, offset: int, into: memoryview) -> None:
        """Fills writable bytes from a blob's range. `blob_not_found` if it is gone or, in a folder, too short."""
        if self.folder is not None:
            with self._opened(blob_id) as file:
                file.seek(offset)
                filled = 0
                while filled < len(into):
                    count = file.readinto(into[filled:])  # type: ignore[attr-defined]
                    if not count:
                        raise failure("blob_not_found", f"blob {blob_id} ends before byte {offset + len(into)}")
                    filled += count
            return
        done = 0
        for chunk in self.chunks(blob_id, offset, len(into)):
            into[done : done + len(chunk)] = chunk
            done += len(chunk)

    def chunks(self, blob_id: str, offset: int, size_bytes: int) -> Iterator[memoryview]:
        """A range of a blob, a chunk at a time."""
        end = offset + size_bytes
        while offset < end:
            step = min(CHUNK_BYTES, end - offset)
            try:
                yield memoryview(obstore.get_range(self.objects, _key(blob_id), start=offset, length=step))
            except FileNotFoundError as error:
                raise _missing(blob_id) from error
            offset += step

    async def stream(self, blob_id: str, offset: int, size_bytes: int) -> AsyncIterator[bytes | memoryview]:
        """A range of a blob for HTTP, a block at a time; the next is read while one is sent."""
        loop = asyncio.get_running_loop()
        source = _Source(self, blob_id)
        starts = range(offset, offset + size_bytes, BLOCK_BYTES)
        end = offset + size_bytes
        try:
            ahead = loop.run_in_executor(self._threads, source.read, offset, end)
            for start in starts:
                block = await ahead
                if start + BLOCK_BYTES < end:
                    ahead = loop.run_in_executor(self._threads, source.read, start + BLOCK_BYTES, end)
                yield block
        finally:
            # Not awaited: a request that was cut off waits for nothing any more.
            self._threads.submit(source.close)

    def _opened(self, blob_id: str) -> BinaryIO:
        assert self.folder is not None
        try:
            return (self.folder / _key(blob_id)).open("rb", buffering=0)
        except FileNotFoundError as error:
            raise _missing(blob_id) from error

    def size(self, blob_id: str) -> int | None:
        """The blob's size in bytes, or None where the store has no such blob."""
        try:
            return int(obstore.head(self.objects, _key(blob_id))["size"])
        except FileNotFoundError:
            return None

    def delete(self, blob_id: str) -> None:
        """Deletes the bytes; a blob that is not there is gone already."""
        try:
            obstore.delete(self.objects, _key(blob_id))
        except FileNotFoundError:
            return

    def retire(self, blob_id: str) -> None:
        """Deletes a blob whose bytes have only passed through; a folder keeps the file to be written over by the next.

        Writing over pages that are there takes a third of the time that new ones take, and a tenth of what they take
        on a virtual machine whose host has yet to give it the memory.
        """
        path = self.file(blob_id)
        if self.folder is None or path is None or _size(path) < CHUNK_BYTES:
            self.delete(blob_id)
            return
        try:
            if _size(path) > SPARE_BYTES:
                os.truncate(path, SPARE_BYTES)
            os.replace(path, self.folder / _PARTIAL / _SPARE)
        except OSError:
            # Windows does not move a file that is open.
            self.delete(blob_id)

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
        next(iter(obstore.list(self.objects, prefix="blobs", chunk_size=1)), None)

    def sweep(self, older_than_seconds: float = 3600) -> None:
        """Deletes from a folder what was not written to for that long: half-written blobs, and the retired file."""
        if self.folder is None:
            return
        for path in (self.folder / _PARTIAL).iterdir():
            try:
                if time.time() - path.stat().st_mtime > older_than_seconds:
                    path.unlink()
            except FileNotFoundError:
                continue

    def _mapped(self, blob_id: str, offset: int, size_bytes: int | None) -> memoryview:
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


class _Source:
    """One blob being read by threads that take turns: its file stays open, so that deleting it does not cut it off."""

    def __init__(self, blobs: BlobStore, blob_id: str) -> None:
        self._blobs = blobs
        self._blob_id = blob_id
        self._file = blobs._opened(blob_id) if blobs.folder is not None else None
        self._lock = threading.Lock()

    def read(self, start: int, end: int) -> bytes | memoryview:
        """One block from `start`, shorter where `end` is nearer."""
        size = max(0, min(BLOCK_BYTES, end - start))
        with self._lock:
            if self._file is None:
                return b"".join(self._blobs.chunks(self._blob_id, start, size))
            self._file.seek(start)
            return self._file.read(size)

    def close(self) -> None:
        """Lets the file go, after the read under way."""
        with self._lock:
            if self._file is not None:
                self._file.close()


def _open(url: str) -> ObjectStore:
    """obstore's store for a URL; options in its query, and plain HTTP where the endpoint says so."""
    parts = urllib.parse.urlsplit(url)
    options: FreeJson = dict(urllib.parse.parse_qsl(parts.query))
    if options.pop("allow_http", "") == "true" or options.get("endpoint", "").startswith("http://"):
        options["client_options"] = {"allow_http": True}
    return obstore.store.from_url(urllib.parse.urlunsplit(parts._replace(query="")), **options)


def _size(path: Path) -> int:
    """A file's bytes; 0 where there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _key(blob_id: str) -> str:
    # The last characters of a UUIDv7 are its random ones: folders fill evenly.
    return f"{_WHOLE}/{blob_id[-2:]}/{blob_id}"


def _missing(blob_id: str) -> Exception:
    return failure("blob_not_found", f"blob {blob_id} is not in the store: it was deleted, or has expired")
