"""Bytes that travel with a waiting request: where they lie, and what may be written in their place."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from device_operations.errors import OperationError
from device_operations.jobs import new_id
from tasks.blobs.store import BlobStore
from tasks.blobs.transients import KEPT_OF_A_SIZE, KEPT_SECONDS, Transients

SIZE = 100_000


@pytest.fixture
def transients(tmp_path: Path) -> Transients:
    return Transients(BlobStore(tmp_path.as_uri()))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "transient"


def test_bytes_are_written_over_a_file_that_was_read(transients: Transients, folder: Path) -> None:
    first = transients.put([b"a" * SIZE])
    file = (folder / first).stat().st_ino
    transients.drop([first], read=True)
    second = transients.put([b"b" * 60_000, b"c" * 30_000])
    assert (folder / second).stat().st_ino == file
    assert bytes(transients.read(second, 0, 90_000)) == b"b" * 60_000 + b"c" * 30_000
    # Nothing of the first request is left behind the second one's bytes.
    assert (folder / second).stat().st_size == 90_000
    with pytest.raises(OperationError, match="the bytes that came with the request are gone"):
        transients.read(first, 0, SIZE)


def test_a_file_that_may_still_be_read_is_never_written_over(transients: Transients, folder: Path) -> None:
    first = transients.put([b"a" * SIZE])
    with (folder / first).open("rb") as reader:
        transients.drop([first])
        second = transients.put([b"b" * SIZE])
        assert reader.read() == b"a" * SIZE
    assert bytes(transients.read(second, 0, SIZE)) == b"b" * SIZE


def test_no_more_files_are_kept_than_a_few_of_each_size(transients: Transients, folder: Path) -> None:
    transients.drop([transients.put([os.urandom(SIZE)]) for _ in range(3)], read=True)
    assert len(list(folder.iterdir())) == 3
    ids = [transients.put([os.urandom(SIZE)]) for _ in range(3 * KEPT_OF_A_SIZE)]
    transients.drop([*ids, new_id()], read=True)
    assert len(list(folder.iterdir())) == KEPT_OF_A_SIZE
    transients.drop([transients.put([bytes(8 << 20)])], read=True)
    assert len(list(folder.iterdir())) == KEPT_OF_A_SIZE


def test_kept_files_are_swept_soon_and_those_of_a_request_late(transients: Transients, folder: Path) -> None:
    kept, awaited = (transients.put([os.urandom(SIZE)]) for _ in range(2))
    transients.drop([kept], read=True)
    assert transients.sweep(3600) == 0
    long_ago = time.time() - KEPT_SECONDS - 1
    for file in folder.iterdir():
        os.utime(file, (long_ago, long_ago))
    assert transients.sweep(3600) == 1
    assert [file.name for file in folder.iterdir()] == [awaited]
