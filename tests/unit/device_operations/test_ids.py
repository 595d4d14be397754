"""Ids of jobs: UUIDs that sort by the time of their making, and are given once."""

from __future__ import annotations

import multiprocessing
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest

from device_operations.jobs import new_id


def test_ids_are_uuids_of_version_7_that_sort_by_time() -> None:
    first = new_id()
    began = time.time_ns()
    while time.time_ns() < began + 2_000_000:  # ids count milliseconds
        pass
    second = new_id()
    assert first < second
    for given in (first, second):
        assert str(uuid.UUID(given)) == given
        assert (uuid.UUID(given).version, uuid.UUID(given).variant) == (7, uuid.RFC_4122)


def test_threads_are_given_different_ids() -> None:
    with ThreadPoolExecutor(8) as threads:
        ids = list(threads.map(lambda _: new_id(), range(20_000)))
    assert len(set(ids)) == len(ids)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fork")
def test_a_forked_child_gives_ids_of_its_own() -> None:
    new_id()
    with multiprocessing.get_context("fork").Pool(2) as children:
        of_children = children.map(_tails, [300, 300], chunksize=1)
    ids = [*_tails(300), *of_children[0], *of_children[1]]
    assert len(set(ids)) == len(ids)


def _tails(count: int) -> list[str]:
    """The random part of so many new ids: what is left where two were made in one millisecond."""
    return [new_id()[19:] for _ in range(count)]
