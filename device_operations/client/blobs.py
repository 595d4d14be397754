"""Blobs over HTTP: streamed up from bytes, a file or a path, and down into bytes or a path, with ranges."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeAlias

import httpx

from device_operations.client.transport.calls import Call, Flow, Sleep, at, do, next_bytes, send
from device_operations.client.transport.operations import Mode, Noun, operation
from device_operations.errors import failure

#: Bytes read from a file, and sent, at once.
CHUNK_BYTES = 2**20

#: How often a download that breaks off is taken up again without having got any further.
RESUMES = 5

#: What can be uploaded: bytes, the path of a file, or a file opened for reading bytes (from where it stands).
Source: TypeAlias = bytes | bytearray | memoryview | str | os.PathLike[str] | BinaryIO


@dataclass(frozen=True, slots=True)
class Blob:
    """Bytes in the blob store."""

    blob_id: str
    sha256: str | None
    size_bytes: int


class Blobs(Noun[Mode]):
    """The methods on blobs."""

    @operation
    def upload(self, source: Source) -> Flow[Blob]:
        """Stores a new blob. Raises `checksum_mismatch` where what arrived is not what was sent."""
        return (yield from upload(source))

    @operation
    def read(self, blob_id: str, start: int = 0, end: int | None = None) -> Flow[bytes]:
        """The blob's bytes from `start` up to, but not including, `end`."""
        return (yield from read(at("/api/blobs/{}", blob_id), start, end))

    @operation
    def download(self, blob_id: str, path: str | os.PathLike[str]) -> Flow[Path]:
        """Writes the blob to a file, which is there only once it is whole."""
        return (yield from download(at("/api/blobs/{}", blob_id), Path(path)))

    @operation
    def describe(self, blob_id: str) -> Flow[Blob]:
        """The blob's size and hash."""
        response = yield from send(Call("HEAD", at("/api/blobs/{}", blob_id), missing="blob_not_found"))
        return Blob(blob_id, response.headers.get("x-content-sha256"), int(response.headers["content-length"]))

    @operation
    def delete(self, blob_id: str) -> Flow[None]:
        """Deletes a blob that nothing open refers to; `blob_in_use` otherwise."""
        yield from send(Call("DELETE", at("/api/blobs/{}", blob_id)))


def upload(source: Source) -> Flow[Blob]:
    """Sends a body to the blob store and compares hashes."""
    body = Body(source)
    response = yield from send(Call("POST", "/api/blobs", content=body))
    stored = response.json()
    if stored["sha256"] != body.sha256:
        raise failure(
            "checksum_mismatch",
            f"blob {stored['blob_id']} has sha256 {stored['sha256']}, but {body.sha256} was sent; upload it again",
        )
    return Blob(stored["blob_id"], stored["sha256"], stored["size_bytes"])


class Body:
    """A source as the body of a request: `sha256` is that of what was sent last."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._start = 0
        self.repeatable = True
        self.sha256 = ""
        if not isinstance(source, (bytes, bytearray, memoryview, str, os.PathLike)):
            self.repeatable = source.seekable()
            self._start = source.tell() if self.repeatable else 0

    def headers(self) -> dict[str, str]:
        """Type and length; a file of unknown length is sent in chunks."""
        size = self._size()
        return {"Content-Type": "application/octet-stream"} | ({} if size is None else {"Content-Length": str(size)})

    def chunks(self) -> Iterator[bytes | memoryview]:
        """The pieces, from the beginning, hashed as they are read."""
        digest = hashlib.sha256()
        for chunk in self._pieces():
            digest.update(chunk)
            yield chunk
        self.sha256 = digest.hexdigest()

    def _pieces(self) -> Iterator[bytes | memoryview]:
        source = self._source
        if isinstance(source, (bytes, bytearray, memoryview)):
            view = memoryview(source).cast("B")
            yield from (view[start : start + CHUNK_BYTES] for start in range(0, len(view), CHUNK_BYTES))
        elif isinstance(source, (str, os.PathLike)):
            with open(source, "rb") as file:
                yield from iter(lambda: file.read(CHUNK_BYTES), b"")
        else:
            if self.repeatable:
                source.seek(self._start)
            yield from iter(lambda: source.read(CHUNK_BYTES), b"")

    def _size(self) -> int | None:
        source = self._source
        if isinstance(source, (bytes, bytearray, memoryview)):
            return memoryview(source).nbytes
        if isinstance(source, (str, os.PathLike)):
            return Path(source).stat().st_size
        if not self.repeatable:
            return None
        return source.seek(0, os.SEEK_END) - self._start


def read(path: str, start: int = 0, end: int | None = None) -> Flow[bytes]:
    """The bytes at an address that supports `Range`."""
    if end is not None and end <= start:
        return b""
    headers = {} if (start, end) == (0, None) else {"Range": f"bytes={start}-{'' if end is None else end - 1}"}
    response = yield from send(Call("GET", path, headers=headers))
    partial: bytes = response.content
    return partial if response.status_code == 206 else checked(response)


def checked(response: httpx.Response) -> bytes:
    """The body, which must have the hash that was announced with it, if one was."""
    content: bytes = response.content
    expected = response.headers.get("x-content-sha256")
    if expected:
        _require_hash(response.request.url.path, hashlib.sha256(content).hexdigest(), expected)
    return content


def download(path: str, target: Path) -> Flow[Path]:
    """Streams an address into a temporary file, goes on where a connection broke, then renames it."""
    unfinished = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        file = yield from do(lambda: unfinished.open("wb"))
        try:
            expected = yield from _pour(path, file)
        finally:
            file.close()
        if expected:
            found = yield from do(lambda: _sha256_of(unfinished))
            _require_hash(path, found, expected)
        yield from do(lambda: os.replace(unfinished, target))
    finally:
        unfinished.unlink(missing_ok=True)
    return target


def _pour(path: str, file: BinaryIO) -> Flow[str | None]:
    """Writes the whole body to the file and gives the hash that was announced."""
    done, fruitless = 0, 0
    while True:
        before = done
        try:
            headers = {"Range": f"bytes={done}-"} if done else {}
            response = yield from send(Call("GET", path, headers=headers, stream=bytes))
            if done and response.status_code != 206:
                done = 0
                file.seek(0)
                file.truncate()
            while (chunk := (yield from next_bytes(response))) is not None:
                yield from do(lambda chunk=chunk: file.write(chunk))  # type: ignore[misc]
                done += len(chunk)
        except httpx.TransportError as error:
            fruitless = 0 if done > before else fruitless + 1
            if fruitless > RESUMES:
                raise failure("gateway_unreachable", f"GET {path}: broke off after {done} bytes: {error}") from error
            yield Sleep(min(2.0, 0.1 * 2**fruitless))
        else:
            announced: str | None = response.headers.get("x-content-sha256")
            return announced


def _sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _require_hash(path: str, found: str, expected: str) -> None:
    if found != expected:
        raise failure("checksum_mismatch", f"GET {path}: sha256 is {found}, but {expected} was announced; try again")
