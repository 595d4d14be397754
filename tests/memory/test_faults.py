"""What becomes of memory when workers die, when clients leave, and when messages are lost."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import redis

from tests.memory.calls import Memory, refused
from tests.support.stack import RunningStack, eventually

LEASE_SECONDS = 2


def test_a_killed_workers_allocations_are_lost_and_so_are_the_jobs_on_them(
    start_stack: Callable[..., RunningStack],
) -> None:
    stack = start_stack(LEASE_SECONDS=LEASE_SECONDS)
    memory = Memory(stack)
    held = memory.made(size_bytes=1 << 20, fill=5)
    stack.client.post("/api/devices/cpu_0/drain")
    eventually(lambda: "draining" in stack.log("cpu_0"), seconds=10)
    stack.kill("cpu_0")
    killed_at = time.monotonic()
    stack.client.post("/api/devices/cpu_0/resume")
    queued = []
    for answer in (
        stack.client.post(f"/api/memory/clear/{held}"),
        stack.client.put(f"/api/memory/data/{held}", content=b"x"),
        stack.client.delete(f"/api/memory/deallocate/{held}"),
    ):
        if answer.status_code == 202:
            queued.append(answer.json())
        else:
            # The device counts as gone already: nothing is queued on it any more.
            assert answer.json()["code"] in ("device_unavailable", "allocation_lost"), answer.text
    eventually(lambda: memory.allocation(held)["state"] == "lost", seconds=LEASE_SECONDS + 5)
    assert time.monotonic() - killed_at < LEASE_SECONDS + 5
    for job in queued:
        memory.failed(job, "allocation_lost")
    refused(stack.client.post(f"/api/memory/clear/{held}"), 410, "allocation_lost")
    entry = memory.device()
    assert (entry["state"], entry["reserved_bytes"], entry["free_bytes"]) == ("offline", 0, None)
    stack.start("cpu_0")
    stack.wait_ready()
    entry = memory.device()
    assert (entry["reserved_bytes"], entry["used_bytes"], entry["allocation_count"]) == (0, 0, 0)
    refused(stack.client.get(f"/api/memory/data/{held}"), 410, "allocation_lost")
    assert memory.read(memory.made(size_bytes=1 << 20)) == bytes(1 << 20)


def test_jobs_queued_behind_a_dead_worker_fail_and_one_that_allocates_waits_for_the_next(
    start_stack: Callable[..., RunningStack],
) -> None:
    stack = start_stack(LEASE_SECONDS=LEASE_SECONDS)
    memory = Memory(stack)
    held = memory.made(size_bytes=4096)
    late = memory.allocate(size_bytes=4096, job={"delay_seconds": 1})
    jobs = [memory.clear(held, job={"delay_seconds": 60}), memory.deallocate(held)]
    stack.kill("cpu_0")
    for job in jobs:
        memory.failed(job, "allocation_lost")
    stack.start("cpu_0")
    memory.done(late)
    assert memory.device()["reserved_bytes"] == 4096


def test_work_survives_the_loss_of_everything_in_redis(start_stack: Callable[..., RunningStack]) -> None:
    stack = start_stack()
    memory = Memory(stack)
    first = memory.allocate(size_bytes=4096, fill=1)
    jobs = [first, memory.clear(first["resource"]["id"], value=2)]
    with redis.Redis.from_url(stack.redis_url) as client:
        client.flushdb()
    for job in jobs:
        memory.done(job)
    assert memory.read(first["resource"]["id"]) == b"\x02" * 4096


def test_a_cut_off_upload_leaves_nothing_behind(stack: RunningStack) -> None:
    memory = Memory(stack)
    size = 64 << 20
    allocation = memory.made(size_bytes=size, fill=3)
    before = files(stack)
    url = urlsplit(stack.http_url)
    with socket.create_connection((url.hostname, url.port)) as connection:
        head = f"PUT /api/memory/data/{allocation} HTTP/1.1\r\nHost: {url.netloc}\r\nContent-Length: {size}\r\n\r\n"
        connection.sendall(head.encode() + bytes(20 << 20))
        eventually(lambda: len(files(stack)) > len(before), seconds=10)
    eventually(lambda: files(stack) == before, seconds=10)
    assert memory.read(allocation, size_bytes=100) == b"\x03" * 100
    memory.done(memory.deallocate(allocation))


def test_a_reader_that_leaves_in_the_middle_leaves_no_blob_behind(stack: RunningStack) -> None:
    memory = Memory(stack)
    size = 64 << 20
    allocation = memory.made(size_bytes=size)
    before = files(stack)
    with stack.client.stream("GET", f"/api/memory/data/{allocation}") as answer:
        assert answer.status_code == 200
        next(answer.iter_raw(1 << 16))
    eventually(lambda: files(stack) == before, seconds=10)
    memory.done(memory.deallocate(allocation))


def test_status_answers_at_once_while_the_device_does_not(stack: RunningStack) -> None:
    memory = Memory(stack)
    held = memory.made(size_bytes=4096)
    worker = psutil.Process(stack.process("cpu_0").pid)
    worker.suspend()
    try:
        clear = memory.clear(held)
        began = time.monotonic()
        entry = stack.client.get("/api/memory/status").json()["devices"][0]
        there = stack.client.get("/api/memory/device/cpu_0", params={"map": True}).json()["map"]
        assert time.monotonic() - began < 2
        assert entry["reserved_bytes"] >= 4096
        assert held in {thing["id"] for thing in there}
        assert stack.client.get(f"/api/jobs/{clear['job_id']}").json()["state"] not in ("succeeded", "running")
    finally:
        worker.resume()
    memory.done(clear)
    memory.done(memory.deallocate(held))


def test_memory_comes_back_to_the_system_when_it_is_freed(stack: RunningStack) -> None:
    memory = Memory(stack)
    worker = psutil.Process(stack.process("cpu_0").pid)
    memory.done(memory.deallocate(memory.made(size_bytes=64 << 20)))
    before = worker.memory_info().rss
    large = memory.made(size_bytes=512 << 20)
    assert worker.memory_info().rss - before > 500 << 20
    memory.done(memory.deallocate(large))
    eventually(lambda: worker.memory_info().rss - before < 32 << 20, seconds=5)


def test_a_cancelled_clear_stops_between_two_steps_and_the_next_job_goes_on(stack: RunningStack) -> None:
    memory = Memory(stack)
    allocation = memory.made(size_bytes=2 << 30)
    jobs = [memory.clear(allocation, value=value) for value in (1, 2, 3)]
    for job in jobs[:2]:
        stack.client.delete(f"/api/jobs/{job['job_id']}")
    states = [stack.client.get(f"/api/jobs/{job['job_id']}", params={"wait": 30}).json()["state"] for job in jobs]
    assert set(states[:2]) <= {"cancelled", "succeeded"}
    assert "cancelled" in states
    assert states[2] == "succeeded"
    assert memory.read(allocation, offset=(2 << 30) - 10) == b"\x03" * 10
    memory.done(memory.deallocate(allocation))


def files(stack: RunningStack) -> set[Path]:
    folder = stack.folder / "data" / "blobs"
    return {path for path in folder.rglob("*") if path.is_file() and path.name != "spare"}
