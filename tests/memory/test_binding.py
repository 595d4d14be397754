"""Inference on tensors that lie in allocations: used where they lie, written where they are wanted."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests.devices.graphs import identity
from tests.memory.calls import Memory, refused
from tests.support.stack import RunningStack

VALUES = np.arange(12, dtype=np.float32).reshape(4, 3)


@pytest.fixture(scope="module")
def pair(databases: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningStack]:
    with databases.migrated() as url:
        running = RunningStack(tmp_path_factory.mktemp("binding"), url, databases.redis_url(), "cpu:2")
        try:
            running.start()
            running.wait_ready()
            folder = running.folder / "models"
            folder.mkdir(exist_ok=True)
            (folder / "identity.onnx").write_bytes(identity(["float32"]))
            body = {"name": "identity", "source": {"path": "identity.onnx"}, "device_id": "cpu_0"}
            job = running.client.post("/api/inference/load-model", json=body, headers={"Prefer": "wait=30"}).json()
            assert job["state"] == "succeeded", job
            yield running
        finally:
            running.close()


@pytest.fixture
def memory(pair: RunningStack) -> Memory:
    return Memory(pair)


def run(memory: Memory, source: str, **more: Any) -> Any:
    model = memory.client.get("/api/inference/models").json()["models"][0]
    tensor = {"dtype": "float32", "shape": [4, 3], "allocation_id": source, "offset": 4}
    body = {"model_name": "identity", "inputs": {model["inputs"][0]["name"]: tensor}, **more}
    return memory.client.post("/api/inference/run", json=body)


def output(memory: Memory) -> str:
    return str(memory.client.get("/api/inference/models").json()["models"][0]["outputs"][0]["name"])


@pytest.mark.parametrize("device_id", ["cpu_0", "cpu_1"])
def test_a_run_reads_its_input_where_it_lies_and_writes_its_output_where_it_is_wanted(
    memory: Memory, device_id: str
) -> None:
    source = memory.allocate(size_bytes=100, device_id=device_id)["resource"]["id"]
    target = memory.allocate(size_bytes=100, device_id="cpu_0", fill=9)["resource"]["id"]
    memory.write(source, VALUES.tobytes(), offset=4)
    name = output(memory)
    job = run(memory, source, into={name: {"allocation_id": target, "offset": 8}}).json()
    memory.clear(source, value=7)
    assert memory.read(target) == bytes([9] * 8) + VALUES.tobytes() + bytes([9] * 44)
    result = memory.done(job)["result"]
    assert result["outputs"][name]["allocation_id"] == target
    assert result.get("staged_bytes", 0) == (0 if device_id == "cpu_0" else VALUES.nbytes)
    plain = memory.done(run(memory, source).json())["result"]
    assert np.frombuffer(bytes([7] * 48), np.float32).tolist() == plain["outputs"][name]["data"]
    for allocation in (source, target):
        memory.done(memory.deallocate(allocation))


def test_a_hash_is_forgotten_once_a_run_wrote_into_the_allocation(memory: Memory) -> None:
    source, target = memory.made(size_bytes=100, device_id="cpu_0"), memory.made(size_bytes=48, device_id="cpu_0")
    memory.done(memory.write(target, bytes(48)))
    memory.done(memory.write(source, VALUES.tobytes(), offset=4))
    assert memory.allocation(target)["sha256"]
    memory.done(run(memory, source, into={output(memory): {"allocation_id": target}}).json())
    assert memory.allocation(target)["sha256"] is None
    # The digest in the answer is that of the bytes in the answer.
    answer = memory.client.get(f"/api/memory/data/{target}")
    assert answer.content == VALUES.tobytes()
    assert answer.headers["x-content-sha256"] == hashlib.sha256(answer.content).hexdigest()


def test_what_does_not_fit_is_refused_before_it_is_queued(memory: Memory) -> None:
    small, elsewhere = memory.made(size_bytes=51, device_id="cpu_0"), memory.made(size_bytes=64, device_id="cpu_1")
    refused(run(memory, small), 422, "out_of_range")
    refused(run(memory, "nobody-has-this"), 404, "allocation_not_found")
    into = {output(memory): {"allocation_id": elsewhere}}
    source = memory.made(size_bytes=64, device_id="cpu_0")
    assert "cpu_1" in refused(run(memory, source, into=into), 422, "validation_failed")["detail"]
