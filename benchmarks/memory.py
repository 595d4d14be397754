"""Device memory: copies beside memcpy, HTTP beside a bare uvicorn, a bulk submission beside bare Celery echo tasks.

A cross-device copy is taken warm: its first round makes the ring. Both HTTP figures end when the bytes are where they
belong: on the device after an upload, at the caller after a read. `MEMORY_MIB` makes the buffers smaller.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import orjson
from celery import Celery

from benchmarks import running
from benchmarks.measure import Figure, compare
from device_operations.stack.state import free_port
from tasks.blobs.store import BlobStore
from tests.memory.calls import Memory
from tests.support.stack import RunningStack, eventually
from workers.devices import open_device
from workers.execution.claimed_job import ClaimedJob
from workers.execution.scheduler import Entry
from workers.operations import memory as operations
from workers.resident.residents import Resident

SIZE = int(os.environ.get("MEMORY_MIB", "1024")) << 20

#: Allocations in one bulk submission, and echo tasks in the round beside it.
COUNT = 1000

BLOCK = np.random.default_rng(1).bytes(1 << 20)

#: As the gateway is served, and nothing behind it.
BARE = """
import hashlib, sys, uvicorn
size, block = int(sys.argv[2]), bytes(1 << 20)
whole = memoryview(b"1" * size)
async def app(scope, receive, send):
    if scope["type"] != "http":
        return
    if scope["method"] == "PUT":
        while (await receive()).get("more_body"):
            pass
    length = size if scope["method"] == "GET" else 0
    if scope["path"] == "/hashed":
        hasher = hashlib.sha256()
        for _ in range(length >> 20):
            hasher.update(block)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", str(length).encode())]})
    for start in range(0, length, len(block)):
        sent = whole[start : start + len(block)] if scope["path"] == "/whole" else block
        await send({"type": "http.response.body", "body": sent, "more_body": True})
    await send({"type": "http.response.body", "body": b""})
uvicorn.run(app, port=int(sys.argv[1]), log_level="error", access_log=False)
"""

ECHO = """
from celery import Celery
app = Celery("echo", broker={url!r}, backend={url!r})
app.conf.update(worker_prefetch_multiplier=64, task_default_queue="echo", worker_hijack_root_logger=False)
@app.task(name="echo")
def echo(value):
    return value
app.worker_main(["--quiet", "worker", "--pool=threads", "--concurrency=64", "--without-gossip", "--without-mingle",
                 "--loglevel=ERROR"])
"""


def run() -> list[Figure]:
    """All figures of device memory."""
    figures = on_the_device()
    with running.servers() as servers:
        with running.stack(servers, "cpu:2") as stack:
            figures.append(across_devices(stack))
        with running.stack(servers) as stack:
            figures += over_http(stack)
            figures.append(in_bulk(stack))
    return figures


def on_the_device() -> list[Figure]:
    """The operations themselves on the very buffers that NumPy is given."""
    device = open_device("cpu", 0)
    # Nothing but allocations of its own: no records are touched.
    resident = Resident("cpu_0", 1, device, None, None, BlobStore("memory://"))  # type: ignore[arg-type]
    one, two = device.allocate(SIZE), device.allocate(SIZE)
    resident.allocations = {"one": one, "two": two}
    copy = {
        "source": {"allocation_id": "one"}, "destination": {"allocation_id": "two"}, "size_bytes": SIZE,
        "source_device_id": "cpu_0",
    }  # fmt: skip
    clear = {"allocation_id": "two", "size_bytes": SIZE, "value": 7}
    return [
        compare(
            "copy on the device", "GB/s",
            lambda: rate(lambda: perform(operations.copy, resident, copy)),
            lambda: rate(lambda: np.copyto(two.storage, one.storage)), "numpy.copyto", at_least=0.95,
        ),
        compare(
            "clear on the device", "GB/s",
            lambda: rate(lambda: perform(operations.clear, resident, clear)),
            lambda: rate(lambda: two.storage.fill(7)), "ndarray.fill", at_least=0.95,
        ),
    ]  # fmt: skip


def perform(operation: Any, resident: Resident, request: dict[str, Any]) -> None:
    """One operation to its end, step by step as the executor takes it."""
    made = operation(resident, ClaimedJob(Entry("one", "memory.copy", 5, 1), {}, request))
    if hasattr(made, "__next__"):
        for _ in made:
            pass


def across_devices(stack: RunningStack) -> Figure:
    """A copy between the workers of two devices, by the job's own time on the device."""
    memory = Memory(stack)
    source = memory.made(size_bytes=SIZE, device_id="cpu_0", fill=1)
    destination = memory.made(size_bytes=SIZE, device_id="cpu_1")
    here, there = np.ones(SIZE, np.uint8), np.ones(SIZE, np.uint8)

    def copied() -> float:
        job = memory.done(memory.copy(source, destination))
        return SIZE / job["timings"]["device_ms"] / 1e6

    copied()
    return compare(
        "copy to another device, warm", "GB/s", copied, lambda: rate(lambda: np.copyto(there, here)), "memcpy",
        at_least=0.5,
    )  # fmt: skip


def over_http(stack: RunningStack) -> list[Figure]:
    """Uploads and reads through one socket, with as little client as there can be."""
    allocation = Memory(stack).made(size_bytes=SIZE)
    path = f"/api/memory/data/{allocation}"
    with bare() as url:
        upload = compare(
            "upload to the device over HTTP", "GB/s",
            lambda: rate(lambda: put(stack.http_url, path)), lambda: rate(lambda: put(url, "/")),
            "bare uvicorn that takes the same bytes and drops them", at_least=0.8,
        )  # fmt: skip
        known = compare(
            "read over HTTP, hash known", "GB/s",
            lambda: rate(lambda: get(stack.http_url, path)), lambda: rate(lambda: get(url, "/")),
            "bare uvicorn that sends one block, which stays in the cache, again and again",
        )  # fmt: skip

        whole = compare(
            "read over HTTP, hash known", "GB/s",
            lambda: rate(lambda: get(stack.http_url, path)), lambda: rate(lambda: get(url, "/whole")),
            "bare uvicorn that sends as many bytes of its memory, each once", at_least=0.8,
        )  # fmt: skip

        def changed() -> float:
            memory = Memory(stack)
            memory.done(memory.clear(allocation, offset=0, size_bytes=1, value=1))
            return rate(lambda: get(stack.http_url, path))

        unknown = compare(
            "read over HTTP, hashed first", "GB/s", changed, lambda: rate(lambda: get(url, "/")),
            "bare uvicorn that sends one block again and again",
        )  # fmt: skip
        hashed = compare(
            "read over HTTP, hashed first", "GB/s", changed, lambda: rate(lambda: get(url, "/hashed")),
            "bare uvicorn that hashes as many bytes, then sends them",
        )  # fmt: skip
    return [upload, known, whole, unknown, hashed]


def in_bulk(stack: RunningStack) -> Figure:
    """A thousand small allocations in one submission, to the last one's end."""
    memory = Memory(stack)
    body = {"jobs": [{"kind": "memory.allocate", "request": {"size_bytes": 4096}}] * COUNT}
    worker = subprocess.Popen([sys.executable, "-c", ECHO.format(url=stack.redis_url)])
    try:
        app = Celery(broker=stack.redis_url, backend=stack.redis_url)
        app.send_task("echo", args=[1], queue="echo").get(timeout=30)

        def allocated() -> float:
            there = memory.device()["allocation_count"]
            began = time.perf_counter()
            jobs = orjson.loads(stack.client.post("/api/jobs", json=body).content)["jobs"]
            memory.done(jobs[-1])
            eventually(lambda: memory.device()["allocation_count"] == there + COUNT, interval_seconds=0.005)
            eventually(lambda: memory.device()["used_bytes"] >= COUNT * 4096, interval_seconds=0.005)
            took = time.perf_counter() - began
            frees = [{"kind": "memory.deallocate", "request": {"allocation_id": job["resource"]["id"]}} for job in jobs]
            for job in stack.client.post("/api/jobs", json={"jobs": frees}).json()["jobs"]:
                memory.done(job)
            return COUNT / took

        def echoed() -> float:
            began = time.perf_counter()
            for result in [app.send_task("echo", args=[1], queue="echo") for _ in range(COUNT)]:
                result.get(timeout=60)
            return COUNT / (time.perf_counter() - began)

        return compare(
            "1,000 allocations in one submission", "per s", allocated, echoed, "bare Celery echo, 64 threads",
            at_least=1.0,
        )  # fmt: skip
    finally:
        worker.terminate()
        worker.wait(timeout=20)


def rate(step: Any) -> float:
    """GB/s over the buffers' size."""
    began = time.perf_counter()
    step()
    return SIZE / (time.perf_counter() - began) / 1e9


@contextmanager
def bare() -> Iterator[str]:
    """The bare endpoint in a process of its own."""
    port = free_port()
    server = subprocess.Popen([sys.executable, "-c", BARE, str(port), str(SIZE)])

    def answers() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    try:
        eventually(answers)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(timeout=10)


def put(url: str, path: str) -> None:
    """Sends the bytes and reads the answer, which comes once they are where they belong."""
    with connected(url) as connection:
        head = f"PUT {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nPrefer: wait=60\r\nConnection: close\r\nContent-Length: {SIZE}\r\n\r\n"
        connection.sendall(head.encode())
        for _ in range(SIZE >> 20):
            connection.sendall(BLOCK)
        answer = b""
        while piece := connection.recv(65_536):
            answer += piece
    assert answer.startswith(b"HTTP/1.1 200"), answer[:2000]


def get(url: str, path: str) -> None:
    """Takes all the bytes in."""
    with connected(url) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode())
        into = memoryview(bytearray(1 << 20))
        taken = 0
        while count := connection.recv_into(into):
            taken += count
    assert taken > SIZE, taken


@contextmanager
def connected(url: str) -> Iterator[socket.socket]:
    """A connection to where `url` points."""
    parts = urlsplit(url)
    with socket.create_connection((str(parts.hostname), parts.port or 80)) as connection:
        yield connection
