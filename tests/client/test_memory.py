"""The client's methods on device memory and inference sessions, against a whole stack."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from device_operations import Client, State
from device_operations.errors import Invalid, NotFound
from tests.support.stack import eventually


def allocated(client: Client, size_bytes: int, **more: object) -> str:
    job = client.memory.allocate(size_bytes, **more)  # type: ignore[arg-type]
    assert job.resource is not None and job.resource.type == "allocation"
    return job.resource.id


def test_bytes_are_allocated_written_copied_cleared_read_and_freed_without_waiting_between(client: Client) -> None:
    source, target = allocated(client, 4096), allocated(client, 4096, fill=7)
    content = np.random.default_rng(0).bytes(1000)
    client.memory.write(source, content, offset=96)
    client.memory.copy({"allocation_id": source, "offset": 96}, target, 1000)
    client.memory.clear(target, 255, offset=0, size_bytes=10)
    assert client.memory.read(target) == b"\xff" * 10 + content[10:] + b"\x07" * 3096
    assert client.memory.read(source, offset=96, size_bytes=4) == content[:4]
    for allocation_id in (source, target):
        assert client.memory.deallocate(allocation_id, wait=20).state is State.SUCCEEDED
        assert client.memory.allocation(allocation_id)["state"] == "freed"


def test_arrays_are_written_and_read(client: Client, tmp_path: Path) -> None:
    array = np.arange(60_000, dtype=np.float32).reshape(100, 600)
    job = client.memory.allocate(shape=array.shape, dtype="float32", label="weights", ttl_seconds=600)
    assert job.resource is not None
    client.memory.write(job.resource.id, array)
    np.testing.assert_array_equal(client.memory.read_array(job.resource.id, "float32", array.shape), array)
    row = client.memory.read_array(job.resource.id, "float32", (600,), offset=600 * 4)
    np.testing.assert_array_equal(row, array[1])
    assert client.memory.download(job.resource.id, tmp_path / "raw").read_bytes() == array.tobytes()
    assert client.memory.renew(job.resource.id, 60)["ttl_seconds"] == 60
    client.memory.deallocate(job.resource.id)


def test_a_write_takes_options_files_and_a_key(client: Client, tmp_path: Path) -> None:
    allocation = allocated(client, 1000)
    (tmp_path / "content").write_bytes(b"x" * 1000)
    job = client.memory.write(allocation, tmp_path / "content", job={"labels": {"part": "1"}}, wait=20)
    assert (job.state, job.labels) == (State.SUCCEEDED, {"part": "1"})
    first = client.memory.write(allocation, b"y" * 1000, idempotency_key="the same write", wait=20)
    again = client.memory.write(allocation, b"y" * 1000, idempotency_key="the same write")
    assert (first.state, again.job_id) == (State.SUCCEEDED, first.job_id)
    client.memory.deallocate(allocation)


def test_what_lies_on_a_device_is_told(client: Client) -> None:
    allocation = allocated(client, 2**20, label="scratch", allocation_id="of-my-own")
    assert allocation == "of-my-own"
    client.wait(client.memory.clear(allocation), timeout=20)
    assert "of-my-own" in [found["allocation_id"] for found in client.memory.allocations(state="active")]
    (device,) = client.memory.status()
    assert device["device_id"] == "cpu_0" and device["allocation_count"] >= 1
    lying = client.memory.device("cpu_0", map=True)["map"]
    assert ("allocation", "of-my-own", "scratch") in [(thing["type"], thing["id"], thing["label"]) for thing in lying]
    client.memory.deallocate(allocation, wait=20)
    with pytest.raises(NotFound):
        client.memory.allocation("unknown")
    with pytest.raises(Invalid) as caught:
        client.memory.allocate(-1)
    assert caught.value.code == "validation_failed"


def test_an_output_stays_on_the_device_and_feeds_the_next_run(client: Client) -> None:
    allocation = allocated(client, 16)
    result = client.inference.run(
        {"x": np.ones((1, 4), np.float32)}, model_name="tiny", into={"y": {"allocation_id": allocation}}
    )
    assert result.outputs["y"]["allocation_id"] == allocation
    np.testing.assert_array_equal(client.memory.read_array(allocation, "float32", (1, 4)), [[3, 3, 3, 3]])
    again = client.inference.run({"x": result.outputs["y"]}, model_name="tiny")
    np.testing.assert_array_equal(again.outputs["y"], [[7, 7, 7, 7]])
    client.memory.deallocate(allocation)


def test_a_session_keeps_state_between_runs_and_is_closed(client: Client) -> None:
    start = np.ones((1, 4), np.float32)
    opened = client.inference.open_session(model_name="tiny", state={"y": "x"}, initial={"x": start})
    session = opened["session_id"]
    np.testing.assert_array_equal(client.inference.run({}, session_id=session, outputs=["y"]).outputs["y"], start * 3)
    np.testing.assert_array_equal(client.inference.run({}, session_id=session, outputs=["y"]).outputs["y"], start * 7)
    assert session in [found["session_id"] for found in client.inference.sessions(state="active")]
    eventually(lambda: client.inference.session(session)["runs"]["succeeded"] == 2)
    assert client.inference.close_session(session, wait=20).state is State.SUCCEEDED
    assert client.inference.session(session)["state"] == "closed"
    assert session not in [found["session_id"] for found in client.inference.sessions(state="active")]
