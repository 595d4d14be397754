"""Copies between the workers of two devices of one machine."""

from __future__ import annotations

import os
import random
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from device_operations.errors import failure
from tasks.blobs.ring import SLOT_BYTES, Ring, segment_name, sweep
from tests.memory.calls import Memory, refused
from tests.support.stack import RunningStack, eventually

SHM = Path("/dev/shm")


def segments() -> set[str]:
    return {path.name for path in SHM.glob("devop-*")}


@pytest.fixture(scope="module")
def pair(databases: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningStack]:
    with databases.migrated() as url:
        running = RunningStack(tmp_path_factory.mktemp("pair"), url, databases.redis_url(), "cpu:2")
        try:
            running.start()
            running.wait_ready()
            yield running
        finally:
            running.close()


@pytest.fixture
def memory(pair: RunningStack) -> Memory:
    return Memory(pair)


def test_an_end_of_a_ring_is_let_go_while_its_memory_is_still_there() -> None:
    ring = Ring.make("devop-test-let-go", slots=1)
    seen = []
    ring.before_close = lambda: seen.append(len(ring.memory))
    ring.close()
    assert seen == [4096 + SLOT_BYTES]


def test_a_range_is_copied_to_another_device_in_the_order_of_submission(memory: Memory) -> None:
    data = random.Random(1).randbytes(30_000_000)
    source = memory.allocate(size_bytes=len(data), device_id="cpu_0")["resource"]["id"]
    destination = memory.allocate(size_bytes=len(data), device_id="cpu_1", fill=9)["resource"]["id"]
    memory.write(source, data)
    copy = memory.copy(source, destination, 20_000_001, at=5, to=1_000_003)
    memory.clear(source, value=1)
    memory.deallocate(source)
    expected = bytes([9]) * 1_000_003 + data[5:20_000_006] + bytes([9]) * (len(data) - 21_000_004)
    assert memory.read(destination) == expected
    result = memory.done(copy)["result"]
    assert (result["source_device_id"], result["size_bytes"], result["via"]) == ("cpu_0", 20_000_001, "ring")
    memory.done(memory.deallocate(destination))
    assert segments() == set()


def test_opposite_copies_at_the_same_time_both_arrive(memory: Memory) -> None:
    size = 64 << 20
    here = [memory.allocate(size_bytes=size, device_id="cpu_0", fill=fill)["resource"]["id"] for fill in (1, 0)]
    there = [memory.allocate(size_bytes=size, device_id="cpu_1", fill=fill)["resource"]["id"] for fill in (2, 0)]
    jobs = []
    for _ in range(3):
        jobs += [memory.copy(here[0], there[1]), memory.copy(there[0], here[1])]
    for job in jobs:
        memory.done(job)
    assert memory.read(there[1]) == b"\x01" * size
    assert memory.read(here[1]) == b"\x02" * size
    for allocation in here + there:
        memory.done(memory.deallocate(allocation))
    assert segments() == set()


def test_a_source_out_of_range_is_refused_wherever_it_lies(memory: Memory) -> None:
    source, destination = memory.made(size_bytes=100, device_id="cpu_0"), memory.made(size_bytes=10, device_id="cpu_1")
    body = {"source": {"allocation_id": source}, "destination": {"allocation_id": destination}, "size_bytes": 11}
    refused(memory.client.post("/api/memory/copy", json=body), 422, "out_of_range")
    memory.done(memory.copy(source, destination, 10))


@pytest.mark.parametrize("victim", ["cpu_0", "cpu_1"])
def test_a_worker_killed_in_the_middle_fails_the_copy_and_leaves_no_segment(
    start_stack: Callable[..., RunningStack], victim: str
) -> None:
    stack = start_stack(devices="cpu:2", LEASE_SECONDS=2)
    memory = Memory(stack)
    size = 512 << 20
    source = memory.made(size_bytes=size, device_id="cpu_0", fill=1)
    destination = memory.made(size_bytes=size, device_id="cpu_1")
    copy = memory.copy(source, destination)
    # Paused in the middle, so that the kill meets a copy under way and not one that was faster.
    eventually(lambda: stack.client.get(f"/api/jobs/{copy['job_id']}").json()["progress"], interval_seconds=0.002)
    os.kill(stack.process("cpu_0").pid, signal.SIGSTOP)
    assert stack.client.get(f"/api/jobs/{copy['job_id']}").json()["state"] == "running"
    stack.kill(victim)
    os.kill(stack.process("cpu_0").pid, signal.SIGCONT) if victim != "cpu_0" else None
    memory.failed(copy, "worker_lost")
    assert eventually(lambda: segments() == set(), seconds=2)
    lost = source if victim == "cpu_0" else destination
    eventually(lambda: memory.allocation(lost)["state"] == "lost", seconds=10)


@pytest.mark.parametrize("apart", ["cpu_0", "cpu_1"])
def test_a_copy_goes_through_a_blob_where_shared_memory_is_small_or_not_shared(
    start_stack: Callable[..., RunningStack], apart: str
) -> None:
    stack = start_stack(devices="cpu:2", wait=False)
    stack.stop(apart)
    in_a_small_world(stack, apart)
    stack.start(apart)
    stack.wait_ready()
    memory = Memory(stack)
    data = random.Random(2).randbytes(20_000_000)
    source = memory.made(size_bytes=len(data), device_id="cpu_0")
    destination = memory.made(size_bytes=len(data), device_id="cpu_1")
    memory.write(source, data)
    copy = memory.copy(source, destination, at=7)
    assert memory.done(copy)["result"]["via"] == "blob"
    assert memory.read(destination) == data[7:] + bytes(7)
    assert segments() == set()


def in_a_small_world(stack: RunningStack, name: str) -> None:
    """Gives a part a /dev/shm of its own with 64 KiB, as a container has."""
    service = stack._services[name]
    mount = "mount -t tmpfs -o size=64k tmpfs /dev/shm"
    apart = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--mount", "--map-root-user"]
    if subprocess.run([*apart, "sh", "-c", mount], capture_output=True, check=False).returncode:
        pytest.skip("this account may not make a mount namespace")
    command = service.command
    arguments = [*apart, "sh", "-c", f'{mount} && exec "$@"', "sh", *command.arguments]
    stack._services[name] = replace(service, command=replace(command, arguments=arguments))


def test_a_ring_passes_pieces_in_order_and_is_full_and_empty_in_time() -> None:
    name = segment_name("a test's own device", 1, 1)
    taker = Ring.make(name)
    putter = Ring.attach(name)
    taken = []
    for number in range(20):
        slot = putter.room()
        if slot is None:
            taken.append(take(taker))
            slot = putter.room()
        assert slot is not None
        slot[:4] = number.to_bytes(4, "little")
        slot.release()
        putter.put(4)
    while len(taken) < 20:
        taken.append(take(taker))
    assert taken == list(range(20))
    assert taker.piece() is None
    assert taker.attached
    taker.forget_name()
    assert name not in segments()
    error = failure("worker_lost", "x").as_job_error()
    putter.fail(error)
    assert taker.error() == error
    taker.close()
    assert putter.closed
    putter.close()


def take(ring: Ring) -> int:
    piece = ring.piece()
    assert piece is not None
    assert len(piece) == 4 < SLOT_BYTES
    number = int.from_bytes(piece, "little")
    piece.release()
    ring.taken()
    return number


@pytest.mark.skipif(not SHM.is_dir(), reason="only Linux lists shared memory")
def test_a_new_epoch_sweeps_what_earlier_ones_left_and_nothing_of_others() -> None:
    left = [Ring.make(segment_name("mine", epoch, 1)) for epoch in (1, 2, 3)]
    other = Ring.make(segment_name("another's", 1, 1))
    assert sweep("mine", 3) == 2
    assert segments() == {left[2].name, other.name}
    for ring in [*left, other]:
        ring.close()
    assert segments() == set()
