"""Allocations over HTTP on a GPU: bytes written, copied and read back, and what the driver sees of them."""

from __future__ import annotations

import time

import numpy as np

from benchmarks.gpu import WAIT
from benchmarks.measure import Figure, absolute
from tests.support.stack import RunningStack

GIB = 2**30


def memory_over_http(stack: RunningStack) -> list[Figure]:
    """Allocations through jobs, pipelined; and what the device holds before and after."""
    client = stack.client
    # The first allocation brings CUDA's own context along, which stays as long as the process.
    client.post(
        "/api/memory/allocate", json={"size_bytes": 4096, "allocation_id": "first"}, headers=WAIT
    ).raise_for_status()
    client.delete("/api/memory/deallocate/first", headers=WAIT).raise_for_status()
    before = used()
    size = 4 * GIB
    wanted = [
        {"kind": "memory.allocate", "request": {"size_bytes": size, "allocation_id": f"big-{n}"}} for n in range(2)
    ]
    client.post("/api/jobs", json={"jobs": wanted}).raise_for_status()
    content = np.random.default_rng(0).integers(0, 256, 1 << 20, np.uint8).tobytes()
    client.put("/api/memory/data/big-0?offset=4096", content=content)
    body = {"source": {"allocation_id": "big-0"}, "destination": {"allocation_id": "big-1"}}
    copied = client.post("/api/memory/copy", json=body, headers=WAIT).json()
    assert copied["state"] == "succeeded", copied
    held = used()
    got = client.get("/api/memory/data/big-1", params={"offset": 4096, "size_bytes": len(content)}).content
    for name in ("big-0", "big-1"):
        client.delete(f"/api/memory/deallocate/{name}", headers=WAIT).raise_for_status()
    after = used()
    return [
        absolute("bytes read back equal those written, through two allocations", "", float(got == content), at_least=1),
        absolute("8 GiB of allocations seen by the driver", "GiB", (held - before) / GIB, at_least=7.9),
        absolute("left on the device after deallocation", "MiB", (after - before) / 2**20, at_most=64),
    ]


def used(ordinal: int = 0) -> float:
    """What the driver says is in use on a GPU, in bytes, once it has settled."""
    from workers.devices.adapters import nvml

    time.sleep(0.5)
    usage = nvml.usage(nvml.gpus()[ordinal].index)
    assert usage is not None
    return float(usage.used_bytes)
