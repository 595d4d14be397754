"""Blobs over HTTP: streamed both ways, with ranges, owners and expiry; what is used does not expire."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Callable

import psutil
import pytest
import sqlalchemy

from tasks.database import dialect_url
from tests.blobs.test_store import s3_endpoint, s3_url
from tests.memory.calls import Memory, refused
from tests.support.stack import RunningStack, eventually

__all__ = ["s3_endpoint"]


def test_a_blob_goes_in_and_comes_out_whole_and_in_ranges(stack: RunningStack) -> None:
    data = os.urandom(5_000_001)
    told = stack.client.post("/api/blobs", content=data)
    assert told.status_code == 201
    blob = told.json()
    assert (blob["size_bytes"], blob["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    address = f"/api/blobs/{blob['blob_id']}"
    whole = stack.client.get(address)
    assert (whole.status_code, whole.content) == (200, data)
    for wanted, part in [("bytes=10-19", data[10:20]), ("bytes=5000000-", data[-1:]), ("bytes=-7", data[-7:])]:
        answer = stack.client.get(address, headers={"Range": wanted})
        assert (answer.status_code, answer.content) == (206, part)
    refused(stack.client.get(address, headers={"Range": "bytes=5000001-"}), 416, "range_not_satisfiable")
    head = stack.client.head(address)
    assert (head.headers["content-length"], head.headers["x-content-sha256"]) == (str(len(data)), blob["sha256"])
    assert stack.client.delete(address).status_code == 204
    refused(stack.client.get(address), 404, "blob_not_found")
    refused(stack.client.delete(address), 404, "blob_not_found")


def test_an_empty_blob_is_a_blob(stack: RunningStack) -> None:
    blob = stack.client.post("/api/blobs", content=b"").json()
    assert blob["size_bytes"] == 0
    assert stack.client.get(f"/api/blobs/{blob['blob_id']}").content == b""


@pytest.mark.parametrize("header", ["Digest", "Content-Digest", "X-Content-SHA256"])
def test_a_digest_that_does_not_match_is_refused(stack: RunningStack, header: str) -> None:
    def said(data: bytes) -> str:
        digest = hashlib.sha256(data)
        encoded = base64.b64encode(digest.digest()).decode()
        forms = {"Digest": f"sha-256={encoded}", "Content-Digest": f"sha-256=:{encoded}:"}
        return forms.get(header, digest.hexdigest())

    right = stack.client.post("/api/blobs", content=b"hello", headers={header: said(b"hello")})
    assert right.status_code == 201
    wrong = stack.client.post("/api/blobs", content=b"hello", headers={header: said(b"other")})
    refused(wrong, 422, "checksum_mismatch")
    refused(stack.client.post("/api/blobs", content=b"x", headers={header: "sha-256=???"}), 400, "malformed_request")


def test_a_body_over_the_limit_is_refused_whether_or_not_it_is_announced(
    start_stack: Callable[..., RunningStack],
) -> None:
    stack = start_stack(BLOBS__MAX_BYTES=1_000_000)
    refused(stack.client.post("/api/blobs", content=bytes(1_000_001)), 413, "payload_too_large")
    chunked = stack.client.post("/api/blobs", content=iter([bytes(500_000)] * 3))
    refused(chunked, 413, "payload_too_large")
    assert stack.client.post("/api/blobs", content=bytes(1_000_000)).status_code == 201


def test_an_unused_blob_expires_and_one_that_a_job_still_needs_does_not(
    start_stack: Callable[..., RunningStack],
) -> None:
    stack = start_stack(BLOBS__TTL_HOURS=0.0005)
    memory = Memory(stack)
    unused = stack.client.post("/api/blobs", content=b"unused").json()["blob_id"]
    used = stack.client.post("/api/blobs", content=b"used").json()["blob_id"]
    allocation = memory.made(size_bytes=4)
    write = {"allocation_id": allocation, "blob_id": used, "job": {"delay_seconds": 20}}
    job = stack.client.post("/api/jobs", json={"jobs": [{"kind": "memory.write", "request": write}]}).json()["jobs"][0]
    refused(stack.client.delete(f"/api/blobs/{used}"), 409, "blob_in_use")
    eventually(lambda: stack.client.head(f"/api/blobs/{unused}").status_code == 404, seconds=25)
    assert stack.client.head(f"/api/blobs/{used}").status_code == 200
    memory.done(job)
    assert memory.read(allocation) == b"used"
    eventually(lambda: stack.client.head(f"/api/blobs/{used}").status_code == 404, seconds=25)


def test_memory_is_written_and_read_through_s3(start_stack: Callable[..., RunningStack], s3_endpoint: str) -> None:
    stack = start_stack(BLOBS__URL=s3_url(s3_endpoint), devices="cpu:2")
    memory = Memory(stack)
    data = os.urandom(20_000_003)
    allocation = memory.made(size_bytes=len(data), device_id="cpu_0")
    digest = hashlib.sha256(data).hexdigest()
    memory.done(memory.write(allocation, data, headers={"X-Content-SHA256": digest}))
    assert memory.read(allocation) == data
    assert memory.read(allocation, offset=10_000_000, size_bytes=99) == data[10_000_000:10_000_099]
    read = {"kind": "memory.read", "request": {"allocation_id": allocation}}
    job = memory.done(stack.client.post("/api/jobs", json={"jobs": [read]}).json()["jobs"][0])
    assert stack.client.get(f"/api/blobs/{job['result']['blob_id']}").content == data
    stack.client.delete(f"/api/blobs/{job['result']['blob_id']}")
    engine = sqlalchemy.create_engine(dialect_url(stack.database_url))
    with engine.connect() as connection:
        left = connection.exec_driver_sql("SELECT count(*) FROM blobs WHERE expires_at > now() + interval '2 min'")
        assert left.scalar_one() == 0
    engine.dispose()


@pytest.mark.serial
@pytest.mark.slow
def test_a_gibibyte_in_and_out_takes_less_than_128_mebibytes_more_in_any_process(stack: RunningStack) -> None:
    memory = Memory(stack)
    size = int(os.environ.get("BLOBS_GIB", "1")) << 30
    allocation = memory.made(size_bytes=size)
    memory.read(allocation, size_bytes=1 << 20)
    memory.done(memory.write(allocation, bytes(1 << 20)))
    watched = {name: psutil.Process(stack.process(name).pid) for name in ("gateway", "cpu_0")}
    before = {name: process.memory_info().rss for name, process in watched.items()}
    peak = dict(before)

    def watch() -> None:
        for name, process in watched.items():
            peak[name] = max(peak[name], process.memory_info().rss)

    block = os.urandom(1 << 20)
    sent = hashlib.sha256()

    def body() -> object:
        for number in range(size >> 20):
            if number % 16 == 0:
                watch()
            sent.update(block)
            yield block

    job = stack.client.put(f"/api/memory/data/{allocation}", content=body()).json()
    while stack.client.get(f"/api/jobs/{job['job_id']}", params={"wait": 0.1}).json()["state"] != "succeeded":
        watch()
    got = hashlib.sha256()
    with stack.client.stream("GET", f"/api/memory/data/{allocation}") as answer:
        assert answer.status_code == 200
        for number, piece in enumerate(answer.iter_raw(1 << 20)):
            got.update(piece)
            if number % 16 == 0:
                watch()
    assert got.hexdigest() == sent.hexdigest() == answer.headers["x-content-sha256"]
    for name in watched:
        assert peak[name] - before[name] < 128 << 20, (name, peak[name] - before[name])
    memory.done(memory.deallocate(allocation))
