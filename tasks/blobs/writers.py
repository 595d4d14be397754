"""How one blob gets into the store: piece by piece, hashed on the way, whole under its key or not there at all."""

from __future__ import annotations

import hashlib
import os
import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import obstore
from obstore.store import ObjectStore

from device_operations.errors import failure

#: Bytes moved at a time: what one process holds of a stream, a few times over.
CHUNK_BYTES = 8 * 2**20

#: Bytes handed to or taken from HTTP at a time.
BLOCK_BYTES = 2 * 2**20


@dataclass(frozen=True, slots=True)
class Stored:
    """A blob that is whole in the store."""

    blob_id: str
    sha256: str
    size_bytes: int


class BlobWriter(ABC):
    """One blob on its way into the store. Use it as a context: what is not finished by then leaves nothing behind."""

    def __init__(self, blob_id: str, sha256: str | None, threads: ThreadPoolExecutor) -> None:
        self.blob_id = blob_id
        self.size_bytes = 0
        self._sha256 = sha256
        self._hasher = None if sha256 else hashlib.sha256()
        self._threads = threads
        self._ended = False
        self._lock = threading.Lock()

    def __enter__(self) -> BlobWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.abort()

    def write(self, data: bytes | memoryview) -> None:
        """Adds bytes; they may be reused once this returns. Hashing and storing go on side by side."""
        with self._lock:
            if self._ended:
                raise failure("internal_error", f"blob {self.blob_id} is no longer open for writing")
            hashing: Future[None] | None = None
            if self._hasher is not None and len(data) > BLOCK_BYTES // 4:
                hashing = self._threads.submit(self._hasher.update, data)
            elif self._hasher is not None:
                self._hasher.update(data)
            try:
                self._store(data)
            finally:
                if hashing is not None:
                    hashing.result()
            self.size_bytes += len(data)

    def write_all(self, pieces: list[bytes]) -> None:
        """Adds several pieces as one."""
        self.write(pieces[0] if len(pieces) == 1 else b"".join(pieces))

    def finish(self, sha256: str | None = None) -> Stored:
        """Makes the blob whole in the store; `checksum_mismatch` where the content's hash is not `sha256`."""
        with self._lock:
            content_sha256 = self._sha256 or (self._hasher.hexdigest() if self._hasher else "")
            if sha256 is not None and content_sha256 != sha256:
                raise failure("checksum_mismatch", f"the content's sha256 is {content_sha256}, not {sha256}")
            self._ended = True
            self._complete()
            return Stored(self.blob_id, content_sha256, self.size_bytes)

    def finish_with(self, pieces: list[bytes], sha256: str | None) -> Stored:
        """Adds the last pieces and finishes."""
        if pieces:
            self.write_all(pieces)
        return self.finish(sha256)

    def abort(self) -> None:
        """Leaves nothing behind, unless the blob is finished."""
        with self._lock:
            if not self._ended:
                self._ended = True
                self._discard()

    @abstractmethod
    def _store(self, data: bytes | memoryview) -> None: ...

    @abstractmethod
    def _complete(self) -> None: ...

    @abstractmethod
    def _discard(self) -> None: ...


class FileWriter(BlobWriter):
    """Writes under another name, over the file `spare` where there is one, and renames."""

    def __init__(
        self,
        blob_id: str,
        sha256: str | None,
        threads: ThreadPoolExecutor,
        folder: Path,
        target: Path,
        spare: Path | None = None,
    ) -> None:
        super().__init__(blob_id, sha256, threads)
        self._path = folder / f"{blob_id}.{os.getpid()}"
        self._target = target
        self._file = _taken(spare, self._path) or self._path.open("xb", buffering=0)

    def _store(self, data: bytes | memoryview) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[self._file.write(rest) or 0 :]

    def _complete(self) -> None:
        # What a file that is written over held beyond must not be read.
        self._file.truncate(self.size_bytes)
        self._file.close()
        self._target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.replace(self._path, self._target)

    def _discard(self) -> None:
        self._file.close()
        self._path.unlink(missing_ok=True)


def _taken(spare: Path | None, path: Path) -> FileIO | None:
    """A file that is needed no more, under a new name; of several processes that want it, one gets it."""
    if spare is None:
        return None
    try:
        os.replace(spare, path)
        return FileIO(path, "r+")
    except OSError:
        return None


class UploadWriter(BlobWriter):
    """Feeds obstore's own upload, which runs on a thread; an error in the feed makes it give the parts up."""

    def __init__(
        self, blob_id: str, sha256: str | None, threads: ThreadPoolExecutor, store: ObjectStore, key: str
    ) -> None:
        super().__init__(blob_id, sha256, threads)
        self._key = key
        self._feed: queue.Queue[bytes | Exception | None] = queue.Queue(maxsize=2)
        self._error: BaseException | None = None
        self._uploading = threading.Thread(
            target=self._upload, args=(store,), name=f"upload-{blob_id[-6:]}", daemon=True
        )
        self._uploading.start()

    def _upload(self, store: ObjectStore) -> None:
        try:
            obstore.put(store, self._key, self._pieces(), chunk_size=CHUNK_BYTES)
        except BaseException as error:  # noqa: BLE001 - raised where the caller writes next, or finishes
            self._error = error

    def _pieces(self) -> Iterator[bytes]:
        while True:
            piece = self._feed.get()
            if piece is None:
                return
            if isinstance(piece, Exception):
                raise piece
            yield piece

    def _hand_over(self, piece: bytes | Exception | None) -> None:
        while True:
            try:
                self._feed.put(piece, timeout=0.5)
            except queue.Full:
                if self._uploading.is_alive():
                    continue
            return

    def _store(self, data: bytes | memoryview) -> None:
        for start in range(0, len(data), CHUNK_BYTES):
            self._hand_over(bytes(data[start : start + CHUNK_BYTES]))
        if not self._uploading.is_alive():
            raise self._failed()

    def _complete(self) -> None:
        self._hand_over(None)
        self._uploading.join()
        if self._error is not None:
            raise self._failed()

    def _discard(self) -> None:
        self._hand_over(ConnectionAbortedError("the upload was given up"))
        self._uploading.join()

    def _failed(self) -> Exception:
        return failure("storage_unavailable", f"the blob store did not take blob {self.blob_id}: {self._error}")
