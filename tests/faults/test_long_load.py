"""A load that keeps every other thread of its worker from running must not cost the worker its device."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import closing

import psycopg2
import pytest

from tests.support import graphs
from tests.support.stack import RunningStack, eventually

Start = Callable[..., RunningStack]
LEASE, HOLD = 2, 7

pytestmark = pytest.mark.skipif(os.name == "nt", reason="what holds the interpreter is the C library's sleep")


def lease_left(stack: RunningStack) -> float:
    """Seconds that the device's lease has left, by the database's clock."""
    with closing(psycopg2.connect(stack.database_url)) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT extract(epoch FROM lease_until - clock_timestamp()) FROM devices")
        (left,) = cursor.fetchone()
    return float(left)


def test_a_load_that_holds_the_interpreter_for_longer_than_the_lease_keeps_the_device(start_stack: Start) -> None:
    stack = start_stack(LEASE_SECONDS=LEASE)
    stack.stop("cpu_0")
    stack.run_instead("cpu_0", "tests.faults.holding_worker", HOLD_SECONDS=str(HOLD))
    stack.start("cpu_0")
    stack.wait_ready()
    (before,) = stack.client.get("/api/devices").json()["devices"]
    allocated = stack.client.post("/api/memory/allocate", json={"size_bytes": 64}, headers={"Prefer": "wait=20"})
    model = graphs.tiny(stack.folder / "models" / "tiny.onnx")
    began = time.monotonic()
    job = stack.client.post("/api/inference/load-model", json={"name": "tiny", "source": {"path": model.name}}).json()
    eventually(lambda: stack.client.get(f"/api/jobs/{job['job_id']}").json()["state"] == "running")
    seen: list[tuple[str, int]] = []
    while (state := stack.client.get(f"/api/jobs/{job['job_id']}?wait=1").json()["state"]) == "running":
        (device,) = stack.client.get("/api/devices").json()["devices"]
        seen.append((device["state"], device["epoch"]))
    took = time.monotonic() - began
    assert state == "succeeded"
    assert took > HOLD > 3 * LEASE
    assert len(seen) >= HOLD - 2
    assert set(seen) == {("online", before["epoch"])}
    held_id = allocated.json()["resource"]["id"]
    assert stack.client.get(f"/api/memory/allocations/{held_id}").json()["state"] == "active"
    # The longer lease is given back with the load: a worker that dies now is missed as soon as any.
    assert eventually(lambda: lease_left(stack) <= LEASE, 5)
    stack.kill("cpu_0")
    eventually(lambda: stack.client.get("/api/devices").json()["devices"][0]["state"] == "offline", 2 * LEASE + 5)
