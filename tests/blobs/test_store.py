"""The blob store itself, on a folder and on a real S3 server."""

from __future__ import annotations

import asyncio
import hashlib
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from device_operations.errors import OperationError
from tasks.blobs.store import CHUNK_BYTES, BlobStore
from tests.support.stack import eventually


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """An S3 server on loopback, with one bucket."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    endpoint = f"http://127.0.0.1:{port}"
    try:
        eventually(lambda: _answers(endpoint), seconds=60)
        urllib.request.urlopen(urllib.request.Request(f"{endpoint}/bucket", method="PUT")).close()
        yield endpoint
    finally:
        server.terminate()
        server.wait(10)


def _answers(endpoint: str) -> bool:
    try:
        urllib.request.urlopen(endpoint, timeout=1).close()
    except OSError:
        return False
    return True


def s3_url(endpoint: str) -> str:
    keys = "access_key_id=test&secret_access_key=testing-key"
    return f"s3://bucket/some/prefix?endpoint={endpoint}&region=us-east-1&{keys}"


@pytest.fixture(params=["folder", "s3"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> BlobStore:
    if request.param == "folder":
        return BlobStore((tmp_path / "with a space").as_uri())
    return BlobStore(s3_url(request.getfixturevalue("s3_endpoint")))


def there(blobs: BlobStore) -> set[str]:
    """The keys of everything in the store, finished or not."""
    if blobs.folder is not None:
        return {str(path.relative_to(blobs.folder)) for path in blobs.folder.rglob("*") if path.is_file()}
    import obstore

    return {str(found["path"]) for page in obstore.list(blobs.objects) for found in page}


async def pieces(data: bytes, size: int) -> AsyncIterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


@pytest.mark.parametrize("size", [0, 1, 100_000, 3 * CHUNK_BYTES + 17])
def test_a_stream_is_stored_whole_with_its_hash(blobs: BlobStore, size: int) -> None:
    data = os.urandom(size)
    stored = asyncio.run(blobs.put_stream(pieces(data, 65_537), 10**9))
    assert (stored.size_bytes, stored.sha256) == (size, hashlib.sha256(data).hexdigest())
    assert bytes(blobs.read(stored.blob_id)) == data
    assert blobs.size(stored.blob_id) == size
    blobs.delete(stored.blob_id)
    blobs.delete(stored.blob_id)
    assert blobs.size(stored.blob_id) is None


def test_ranges_come_out_in_every_way(blobs: BlobStore, tmp_path: Path) -> None:
    data = os.urandom(2 * CHUNK_BYTES + 5)
    blob_id = blobs.put(data).blob_id
    start, size = CHUNK_BYTES - 3, CHUNK_BYTES + 6
    wanted = data[start : start + size]
    assert bytes(blobs.read(blob_id, start, size)) == wanted
    assert b"".join(blobs.chunks(blob_id, start, size)) == wanted
    into = bytearray(size)
    blobs.read_into(blob_id, start, memoryview(into))
    assert into == wanted

    async def streamed() -> bytes:
        return b"".join([bytes(block) async for block in blobs.stream(blob_id, start, size)])

    assert asyncio.run(streamed()) == wanted
    blobs.fetch(blob_id, tmp_path / "whole")
    assert (tmp_path / "whole").read_bytes() == data


@pytest.mark.parametrize("size", [10, 3 * CHUNK_BYTES])
def test_what_is_not_finished_leaves_nothing_behind(blobs: BlobStore, size: int) -> None:
    before = there(blobs)

    async def cut_off() -> AsyncIterator[bytes]:
        async for piece in pieces(bytes(size), 65_536):
            yield piece
        raise ConnectionResetError("the client left")

    with pytest.raises(ConnectionResetError):
        asyncio.run(blobs.put_stream(cut_off(), 10**9))
    with pytest.raises(OperationError) as wrong:
        asyncio.run(blobs.put_stream(pieces(bytes(size), 65_536), 10**9, "00" * 32))
    assert wrong.value.code == "checksum_mismatch"
    with pytest.raises(OperationError) as large:
        asyncio.run(blobs.put_stream(pieces(bytes(size), 65_536), size - 1))
    assert large.value.code == "payload_too_large"
    with blobs.writer() as writer:
        writer.write(bytes(size))
    eventually(lambda: there(blobs) == before, seconds=10)


def test_a_retired_blobs_file_is_written_over_and_nothing_of_it_can_be_read(tmp_path: Path) -> None:
    blobs = BlobStore(tmp_path.as_uri())
    old = blobs.put(b"\xaa" * (2 * CHUNK_BYTES))
    file = blobs.file(old.blob_id)
    assert file is not None
    number = file.stat().st_ino
    blobs.retire(old.blob_id)
    assert blobs.size(old.blob_id) is None

    with blobs.writer(expected_bytes=1000) as small:
        small.write(b"small")
        first = small.finish()
    # The expected number of bytes is the caller's word: what comes may be less.
    with blobs.writer(expected_bytes=2 * CHUNK_BYTES) as one, blobs.writer(expected_bytes=2 * CHUNK_BYTES) as two:
        one.write(b"\x01" * 5)
        two.write(b"\x02" * CHUNK_BYTES)
        stored = [one.finish(), two.finish()]
    assert bytes(blobs.read(first.blob_id)) == b"small"
    assert [bytes(blobs.read(blob.blob_id)) for blob in stored] == [b"\x01" * 5, b"\x02" * CHUNK_BYTES]
    inodes = [path.stat().st_ino for path in (blobs.file(blob.blob_id) for blob in [first, *stored]) if path]
    assert [inode == number for inode in inodes] == [False, True, False]


def test_a_retired_blob_is_gone_where_the_store_is_no_folder(s3_endpoint: str) -> None:
    blobs = BlobStore(s3_url(s3_endpoint))
    stored = blobs.put(b"passing")
    blobs.retire(stored.blob_id)
    assert blobs.size(stored.blob_id) is None
    assert list(blobs.objects.list(prefix=f"blobs/{stored.blob_id[-2:]}")) == []


def test_a_blob_that_is_gone_is_not_found_however_it_is_read(blobs: BlobStore, tmp_path: Path) -> None:
    blob_id = blobs.put(b"soon gone").blob_id
    blobs.delete(blob_id)
    ways: list[Callable[[], object]] = [
        lambda: blobs.read(blob_id),
        lambda: list(blobs.chunks(blob_id, 0, 9)),
        lambda: blobs.read_into(blob_id, 0, memoryview(bytearray(9))),
        lambda: blobs.fetch(blob_id, tmp_path / "x"),
    ]
    for way in ways:
        with pytest.raises(OperationError) as error:
            way()
        assert error.value.code == "blob_not_found"


def test_what_a_killed_process_left_half_written_is_swept_once_it_is_old(tmp_path: Path) -> None:
    blobs = BlobStore(tmp_path.as_uri())
    writer = blobs.writer()
    writer.write(b"half")
    blobs.sweep(older_than_seconds=60)
    assert len(there(blobs)) == 1
    old = time.time() - 120
    for path in (tmp_path / "partial").iterdir():
        os.utime(path, (old, old))
    blobs.sweep(older_than_seconds=60)
    assert there(blobs) == set()
    writer.abort()


def test_a_store_that_cannot_be_reached_says_so(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    blobs = BlobStore(s3_url(f"http://127.0.0.1:{port}") + "&skip_signature=true")
    with blobs.writer() as writer, pytest.raises(OperationError) as error:
        writer.write(b"x")
        writer.finish()
    assert error.value.code == "storage_unavailable"
