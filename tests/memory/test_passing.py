"""Reads that pass from a worker to a caller without a blob between, and what becomes of them when somebody leaves."""

from __future__ import annotations

import hashlib
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from api_gateway.streams.rings import FORGOTTEN_SECONDS, RINGS, Rings
from device_operations.jobs import Kind
from device_operations.requests.kinds import parse
from device_operations.settings import Settings
from tasks.blobs.ring import Ring, segment_name
from tasks.jobs import submit
from tasks.planning.planner import plan
from tests.memory.bench import Bench
from tests.memory.calls import Memory
from tests.memory.test_faults import files
from tests.support.stack import RunningStack, eventually

MIB = 1 << 20

#: Bytes in no order, of which no two slots of a ring are the same.
NOISE = os.urandom(64 * MIB + 12_345)


@pytest.fixture
def memory(stack: RunningStack) -> Memory:
    return Memory(stack)


def segments(database_url: str) -> set[str]:
    """What gateways on this database have offered and nobody has taken."""
    prefix = segment_name(f"{database_url} gateway", 0, 0).removesuffix("0-0")
    return {path.name for path in Path("/dev/shm").glob(f"{prefix}*")}


def written(memory: Memory, data: bytes = NOISE) -> str:
    allocation = memory.made(size_bytes=len(data))
    memory.done(memory.write(allocation, data))
    return allocation


def reading(memory: Memory, allocation: str, **more: Any) -> Any:
    return memory.client.stream("GET", f"/api/memory/data/{allocation}", **more)


def job_of(memory: Memory, answer: httpx.Response) -> dict[str, Any]:
    return memory.client.get(f"/api/jobs/{answer.headers['x-job-id']}", params={"wait": 30}).json()


def test_a_large_read_passes_through_memory_and_leaves_neither_blob_nor_segment(
    stack: RunningStack, memory: Memory
) -> None:
    allocation = written(memory)
    before = files(stack)
    for start, size in ((0, len(NOISE)), (3, 40 * MIB + 1), (len(NOISE) - 9 * MIB, 9 * MIB)):
        answer = memory.client.get(f"/api/memory/data/{allocation}", params={"offset": start, "size_bytes": size})
        assert answer.content == NOISE[start : start + size]
        assert answer.headers["x-content-sha256"] == hashlib.sha256(answer.content).hexdigest()
        result = job_of(memory, answer)["result"]
        assert (result["sha256"], result["size_bytes"]) == (answer.headers["x-content-sha256"], size)
        assert result["blob_id"] is None or result["passed_bytes"] < size
    eventually(lambda: files(stack) == before and not segments(stack.database_url), seconds=5)
    memory.done(memory.deallocate(allocation))


def test_what_was_uploaded_leaves_no_blob_once_it_is_on_the_device_and_the_next_is_written_over_it(
    stack: RunningStack, memory: Memory
) -> None:
    spare = stack.folder / "data" / "blobs" / "partial" / "spare"
    before = files(stack)
    for data in (NOISE, NOISE[1:], NOISE[: 40 * MIB]):
        allocation = written(memory, data)
        eventually(lambda: files(stack) == before, seconds=5)
        assert spare.stat().st_size == len(data)
        assert memory.read(allocation) == data
        memory.done(memory.deallocate(allocation))


def test_the_hash_of_what_was_never_hashed_is_told_before_the_bytes(memory: Memory) -> None:
    allocation = memory.made(size_bytes=20 * MIB, fill=7)
    assert memory.allocation(allocation)["sha256"] is None
    answer = memory.client.get(f"/api/memory/data/{allocation}")
    assert answer.content == b"\x07" * (20 * MIB)
    assert answer.headers["x-content-sha256"] == hashlib.sha256(answer.content).hexdigest()
    assert memory.allocation(allocation)["sha256"] == answer.headers["x-content-sha256"]
    memory.done(memory.deallocate(allocation))


def test_more_readers_at_once_than_there_are_rings_each_get_their_own_bytes(
    stack: RunningStack, memory: Memory
) -> None:
    size = 12 * MIB
    allocations = [written(memory, NOISE[number : number + size]) for number in range(3)]
    wrong: list[int] = []

    def read(number: int) -> None:
        if memory.read(allocations[number % 3]) != NOISE[number % 3 : number % 3 + size]:
            wrong.append(number)

    readers = [threading.Thread(target=read, args=(number,)) for number in range(RINGS + 4)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(timeout=60)
    assert not wrong and not any(reader.is_alive() for reader in readers)
    for allocation in allocations:
        memory.done(memory.deallocate(allocation))
    eventually(lambda: not segments(stack.database_url), seconds=5)


def test_a_slow_reader_holds_neither_the_device_nor_the_allocation_and_gets_what_it_asked_for(
    stack: RunningStack, memory: Memory
) -> None:
    allocation, other = written(memory), memory.made(size_bytes=4096)
    before = files(stack)
    with reading(memory, allocation) as answer:
        pieces = answer.iter_raw(MIB)
        got = [next(pieces)]
        with httpx.Client(base_url=stack.http_url, timeout=60) as client:
            later = Memory(stack, client)
            for job in (later.clear(other, value=1), later.clear(allocation, value=1), later.deallocate(allocation)):
                later.done(job)
            assert 0 < job_of(later, answer)["result"]["passed_bytes"] < len(NOISE)
        got += pieces
    assert b"".join(got) == NOISE
    assert answer.headers["x-content-sha256"] == hashlib.sha256(NOISE).hexdigest()
    eventually(lambda: files(stack) == before and not segments(stack.database_url), seconds=10)
    memory.done(memory.deallocate(other))


def test_a_reader_that_leaves_ends_its_job_and_the_next_one_goes_on(stack: RunningStack, memory: Memory) -> None:
    before = files(stack)
    allocation = memory.made(size_bytes=1024 * MIB)
    with reading(memory, allocation, params={"size_bytes": 1000 * MIB}) as answer:
        next(answer.iter_raw(MIB))
    memory.done(memory.clear(allocation, offset=5, size_bytes=1, value=1))
    assert job_of(memory, answer)["state"] == "cancelled"
    assert memory.read(allocation, offset=4, size_bytes=3) == b"\x00\x01\x00"
    eventually(lambda: files(stack) == before and not segments(stack.database_url), seconds=10)
    memory.done(memory.deallocate(allocation))


def test_a_worker_killed_in_the_middle_cuts_the_bytes_short(start_stack: Callable[..., RunningStack]) -> None:
    stack = start_stack(LEASE_SECONDS=2)
    memory = Memory(stack)
    allocation = memory.made(size_bytes=1024 * MIB)
    memory.done(memory.write(allocation, NOISE))
    got: list[bytes] = []
    with reading(memory, allocation) as answer:
        # While it still has most of the bytes to give.
        stack.kill("cpu_0")
        with pytest.raises(httpx.RemoteProtocolError):
            got.extend(answer.iter_raw())
    whole = b"".join(got)
    assert 0 < len(whole) < len(NOISE) and NOISE.startswith(whole)
    job = job_of(memory, answer)
    assert (job["state"], job["error"]["code"]) in (("failed", "worker_lost"), ("failed", "allocation_lost"))
    eventually(lambda: not segments(stack.database_url), seconds=5)


def test_a_read_cancelled_in_the_middle_cuts_the_bytes_short(stack: RunningStack, memory: Memory) -> None:
    size = 1024 * MIB
    allocation = memory.made(size_bytes=size)
    with reading(memory, allocation) as answer:
        assert httpx.delete(f"{stack.http_url}/api/jobs/{answer.headers['x-job-id']}").status_code == 202
        with pytest.raises(httpx.RemoteProtocolError):
            for _ in answer.iter_raw(MIB):
                pass
    assert job_of(memory, answer)["state"] == "cancelled"
    memory.done(memory.deallocate(allocation))


def test_a_read_that_nobody_waits_for_any_more_names_a_blob_that_holds_the_bytes(
    stack: RunningStack, memory: Memory
) -> None:
    allocation = written(memory)
    memory.clear(allocation, offset=0, size_bytes=1, value=1, job={"delay_seconds": 2})
    answer = memory.client.get(f"/api/memory/data/{allocation}", headers={"Prefer": "wait=0.3"})
    assert answer.status_code == 202, answer.text
    result = memory.done(answer.json())["result"]
    assert result["passed_bytes"] == 0
    blob = memory.client.get(f"/api/blobs/{result['blob_id']}").content
    assert blob == b"\x01" + NOISE[1:]
    assert hashlib.sha256(blob).hexdigest() == result["sha256"]
    memory.client.delete(f"/api/blobs/{result['blob_id']}")
    memory.done(memory.deallocate(allocation))
    eventually(lambda: not segments(stack.database_url), seconds=5)


def test_a_worker_that_cannot_reach_the_ring_writes_a_blob(
    database_url: str, settings: Callable[..., Settings], tmp_path: Path
) -> None:
    bench = Bench(database_url, settings(DATABASE_URL=database_url), tmp_path, 100 * MIB)
    allocation = bench.submit([(Kind.MEMORY_ALLOCATE, {"size_bytes": 10 * MIB, "fill": 3})])[0]["resource_id"]
    planned = plan(bench.context(), Kind.MEMORY_READ, parse(Kind.MEMORY_READ, {"allocation_id": allocation}))
    planned.job.request["ring"] = "devop-on-another-machine"
    with submit.transaction(bench.engine) as connection:
        submit.record(connection, [planned])
    result = bench.run()[-1]["result"]
    assert result["passed_bytes"] == 0
    assert bytes(bench.blobs.read(result["blob_id"])) == b"\x03" * (10 * MIB)
    bench.close()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no names that outlive their processes")
def test_a_gateway_offers_few_rings_and_sweeps_what_a_killed_one_left() -> None:
    url = f"postgresql://nowhere/{os.getpid()}"
    rings = Rings(url)
    long_ago = int(time.time() - FORGOTTEN_SECONDS) // 60 - 1
    left = Ring.make(segment_name(f"{url} gateway", long_ago, 1))
    held = []
    try:
        while ring := rings.offer():
            held.append(ring)
            assert len(held) <= RINGS
        assert len(held) == RINGS
        assert {ring.name for ring in held} == segments(url)
        rings.take_back(held.pop())
        held.append(rings.offer())
        assert held[-1] is not None
    finally:
        for one in filter(None, held):
            rings.take_back(one)
        left.close()


def test_a_ring_that_was_withdrawn_is_never_attached_and_one_that_is_attached_never_withdrawn() -> None:
    ring = Ring.make(segment_name("test", 1, os.getpid() % 10_000))
    assert ring.withdraw()
    with pytest.raises(OSError, match="withdrawn"):
        Ring.attach(ring.name)
    ring.close()
    other = Ring.make(segment_name("test", 2, os.getpid() % 10_000))
    putter = Ring.attach(other.name)
    assert not other.withdraw()
    putter.close()
    other.close()


@pytest.mark.skipif(sys.platform == "win32", reason="counts descriptors")
def test_a_ring_closed_while_somebody_holds_a_piece_leaves_no_descriptor_and_the_piece_readable() -> None:
    process = psutil.Process()
    before = process.num_fds()
    ring = Ring.make(segment_name("test", 3, os.getpid() % 10_000))
    putter = Ring.attach(ring.name)
    room = putter.room()
    assert room is not None
    room[:5] = b"bytes"
    room.release()
    putter.put(5)
    piece = ring.piece()
    ring.close()
    putter.close()
    del ring, putter
    assert piece == b"bytes"
    del piece
    assert process.num_fds() == before
