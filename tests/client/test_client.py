"""The client against a whole stack: every method that the gateway serves, with real jobs."""

from __future__ import annotations

import asyncio
import hashlib
import io
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from device_operations import AsyncClient, Client, Job, OperationError, State
from device_operations.client.blobs import CHUNK_BYTES
from device_operations.errors import Conflict, ExecutionFailed, Invalid, NotFound, Refused
from device_operations.requests.inference import Run
from device_operations.settings import Settings
from device_operations.tensors import INLINE_BYTES
from tests.support import graphs
from tests.support.stack import RunningStack, eventually

ONES = np.ones((1, 4), np.float32)


def slow(client: Client, rounds: int = 100_000_000, **given: object) -> Job:
    inputs = {"x": np.zeros((256, 256), np.float32), "rounds": np.array(rounds)}
    return client.inference.submit_run(inputs, model_name="slow", **given)  # type: ignore[arg-type]


def run_request(**more: object) -> dict:
    return {"model_name": "tiny", "inputs": {"x": graphs.tensor(ONES)}, **more}


# ---- running models


def test_arrays_go_in_and_come_out(client: Client) -> None:
    result = client.inference.run({"x": ONES * 3}, model_name="tiny")
    np.testing.assert_array_equal(result.outputs["y"], np.full((1, 4), 7, np.float32))
    assert result.outputs["y"].dtype == np.float32
    assert result.session_id == result.job_id and result.batch_size >= 1 and result.device_ms > 0


def test_arrays_beyond_64_kib_travel_as_blobs_both_ways(client: Client) -> None:
    rows = INLINE_BYTES // 16 + 1
    big = np.arange(rows * 4, dtype=np.float32).reshape(rows, 4)
    job = client.inference.submit_run({"x": big}, model_name="tiny", wait=30)
    assert job.result is not None and "blob_id" in job.result["outputs"]["y"]
    np.testing.assert_array_equal(client.inference.run_result(job).outputs["y"], big * 2 + 1)


def test_an_array_that_is_neither_little_endian_nor_contiguous_keeps_its_elements(client: Client) -> None:
    rows = INLINE_BYTES // 16 + 1
    for count in (5, rows):
        odd = np.arange(count * 4, dtype=">f4").reshape(4, count).T
        result = client.inference.run({"x": odd}, model_name="tiny")
        np.testing.assert_array_equal(result.outputs["y"], odd * 2 + 1)


def test_values_that_json_cannot_say_come_through(client: Client) -> None:
    values = np.array([[np.nan, np.inf, -np.inf, -0.0]], np.float32)
    result = client.inference.run({"x": values}, model_name="tiny")
    np.testing.assert_array_equal(result.outputs["y"], values * 2 + 1)


def test_a_dtype_without_a_wire_form_is_refused_by_name(client: Client) -> None:
    with pytest.raises(Invalid, match="complex64"):
        client.inference.run({"x": np.ones(4, np.complex64)}, model_name="tiny")


def test_a_failed_run_raises_what_the_worker_recorded(client: Client) -> None:
    with pytest.raises(OperationError) as caught:
        client.inference.run({"wrong": ONES}, model_name="tiny")
    assert caught.value.code == "input_mismatch" and caught.value.status == 422


def test_models_are_listed_read_and_unloaded(client: Client, loaded: RunningStack) -> None:
    path = graphs.tiny(loaded.folder / "models" / "short-lived.onnx")
    graph = onnx.load(path)
    graph.doc_string = "the same content would be the same model"
    onnx.save(graph, path)
    job = client.inference.load_model("short-lived", "short-lived.onnx", version="2", options={"max_batch_size": 4})
    assert job.resource is not None and job.resource.type == "model"
    client.result(job)
    model = client.inference.model(job.resource.id)
    assert (model["name"], model["version"], model["state"]) == ("short-lived", "2", "loaded")
    assert job.resource.id in [found["model_id"] for found in client.inference.models(state="loaded")]
    assert client.result(client.inference.unload_model(job.resource.id))["freed_bytes"] >= 0
    assert client.inference.model(job.resource.id)["state"] == "unloaded"


# ---- jobs


def test_a_submission_is_a_job_at_once_and_a_result_later(client: Client) -> None:
    job = client.submit("inference.run", run_request(), job={"labels": {"who": "test"}, "priority": 7})
    assert job.priority == 7 and job.labels == {"who": "test"}
    assert client.wait(job, timeout=20).state is State.SUCCEEDED
    assert client.job(job.job_id).state is State.SUCCEEDED
    assert client.result(job.job_id)["outputs"]["y"]["data"] == [3.0] * 4


def test_a_typed_request_is_taken_as_well_as_plain_fields(client: Client) -> None:
    job = client.submit("inference.run", Run.model_validate(run_request(job={"priority": 2})), wait=20)
    assert (job.state, job.priority) == (State.SUCCEEDED, 2)


def test_what_does_not_fit_the_contract_is_refused_before_it_is_sent() -> None:
    with Client("http://127.0.0.1:9", retries=0) as nowhere, pytest.raises(Invalid) as caught:
        nowhere.submit("inference.run", {"model_name": "tiny", "input": {}})
    assert caught.value.code == "validation_failed" and caught.value.errors


def test_many_jobs_are_submitted_at_once_or_not_at_all(client: Client) -> None:
    label = str(uuid.uuid4())
    entries = [("inference.run", run_request(job={"labels": {"set": label}})) for _ in range(20)]
    jobs = client.submit_many(entries)
    assert len({job.job_id for job in jobs}) == 20
    assert all(client.wait(job, timeout=20).state is State.SUCCEEDED for job in jobs)
    with pytest.raises(NotFound):
        client.submit_many([*entries, ("inference.run", run_request() | {"model_name": "unknown"})])
    assert len(list(client.jobs(label=f"set:{label}"))) == 20


def test_jobs_are_listed_newest_first_over_pages_up_to_a_limit(client: Client) -> None:
    label = str(uuid.uuid4())
    options = {"labels": {"set": label}}
    made = [job.job_id for job in client.submit_many([("inference.run", run_request(job=options))] * 120)]
    found = [job.job_id for job in client.jobs(label=f"set:{label}")]
    assert found == made[::-1]
    assert [job.job_id for job in client.jobs(label=f"set:{label}", limit=7)] == found[:7]


def test_a_wait_ends_with_its_timeout_and_says_how_the_job_stands(client: Client) -> None:
    job = slow(client)
    try:
        began = time.monotonic()
        with pytest.raises(TimeoutError, match=job.job_id):
            client.wait(job, timeout=0.5)
        assert 0.4 < time.monotonic() - began < 5
        assert client.submit("inference.run", run_request(), job={"after": [job.job_id]}, wait=0.2).terminal is False
    finally:
        client.cancel(job)
    assert client.wait(job, timeout=20).state is State.CANCELLED


def test_the_result_of_a_cancelled_job_raises_and_names_the_job(client: Client) -> None:
    job = slow(client)
    eventually(lambda: client.job(job).state is State.RUNNING)
    client.cancel(job)
    with pytest.raises(ExecutionFailed) as caught:
        client.result(job, timeout=20)
    assert caught.value.code == "cancelled"
    assert any(job.job_id in note for note in caught.value.__notes__)
    with pytest.raises(Conflict) as late:
        client.cancel(job)
    assert late.value.code == "job_finished"


def test_events_tell_a_job_from_its_start_to_its_end(client: Client) -> None:
    job = slow(client)
    names, states = [], []
    for event in client.events(job):
        names.append(event.name)
        states += [event.data["state"]] if event.name in ("state", "done") else []
        if "running" in states and "cancel asked for" not in states:
            client.cancel(job)
            states.append("cancel asked for")
    assert names[0] == "state" and names[-1] == "done" and states[-1] == "cancelled"


def test_the_same_idempotency_key_is_the_same_job(client: Client) -> None:
    key = str(uuid.uuid4())
    first = client.submit("inference.run", run_request(), idempotency_key=key)
    assert client.submit("inference.run", run_request(), idempotency_key=key).job_id == first.job_id
    with pytest.raises(Conflict):
        client.submit("inference.run", run_request(form="base64"), idempotency_key=key)


def test_an_unknown_job_is_not_found(client: Client) -> None:
    for ask in (client.job, client.wait, client.cancel, client.result, lambda name: list(client.events(name))):
        with pytest.raises(NotFound) as caught:
            ask("no such job?")
        assert caught.value.code == "job_not_found"


# ---- blobs


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES, 3 * CHUNK_BYTES + 5])
def test_bytes_of_any_size_come_back_as_they_were(client: Client, size: int, tmp_path: Path) -> None:
    content = np.random.default_rng(size).bytes(size)
    (tmp_path / "content").write_bytes(content)
    with (tmp_path / "content").open("rb") as file:
        blobs = [client.blobs.upload(source) for source in (content, memoryview(content), tmp_path / "content", file)]
    blobs.append(client.blobs.upload(Unseekable(content)))
    for blob in blobs:
        assert (blob.size_bytes, blob.sha256) == (size, hashlib.sha256(content).hexdigest())
        assert client.blobs.read(blob.blob_id) == content
    assert client.blobs.describe(blobs[0].blob_id) == blobs[0]
    target = client.blobs.download(blobs[0].blob_id, tmp_path / "copy")
    assert target.read_bytes() == content and sorted(p.name for p in tmp_path.iterdir()) == ["content", "copy"]


class Unseekable(io.RawIOBase):
    """A pipe, as far as readers can tell."""

    def __init__(self, content: bytes) -> None:
        self._inner = io.BytesIO(content)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        return self._inner.readinto(buffer)  # type: ignore[arg-type]


def test_a_range_of_a_blob_is_read(client: Client) -> None:
    blob = client.blobs.upload(bytes(range(100)))
    assert client.blobs.read(blob.blob_id, 10, 20) == bytes(range(10, 20))
    assert client.blobs.read(blob.blob_id, 90) == bytes(range(90, 100))
    assert client.blobs.read(blob.blob_id, 5, 5) == b""
    with pytest.raises(Invalid) as caught:
        client.blobs.read(blob.blob_id, 100, 101)
    assert caught.value.code == "range_not_satisfiable"


def test_a_deleted_blob_is_not_found_and_leaves_no_file(client: Client, tmp_path: Path) -> None:
    blob = client.blobs.upload(b"short-lived")
    client.blobs.delete(blob.blob_id)
    for ask in (client.blobs.read, client.blobs.describe, lambda name: client.blobs.download(name, tmp_path / "none")):
        with pytest.raises(NotFound) as caught:
            ask(blob.blob_id)
        assert caught.value.code == "blob_not_found"
    assert list(tmp_path.iterdir()) == []


# ---- devices, readiness, settings


def test_devices_are_read_drained_and_resumed(client: Client) -> None:
    (device,) = client.devices.list()
    assert client.devices.get("cpu_0")["backend"] == device["backend"] == "cpu"
    try:
        assert client.devices.drain("cpu_0")["state"] == "draining"
    finally:
        client.devices.resume("cpu_0")
    assert client.devices.get("cpu_0")["state"] == "online"
    assert isinstance(client.devices.samples("cpu_0"), list)
    with pytest.raises(NotFound) as caught:
        client.devices.get("gpu_7")
    assert caught.value.code == "device_not_found"


def test_readiness_is_told(client: Client) -> None:
    assert client.ready()["status"] == "ready"


def test_without_a_url_the_settings_say_where_the_gateway_is(
    loaded: RunningStack, settings: Callable[..., Settings]
) -> None:
    with Client() as client:
        settings(HTTP__PORT=loaded.http_url.rpartition(":")[2])
        assert client.base_url.rstrip("/") == loaded.http_url
        assert client.ready()["status"] == "ready"


# ---- asyncio


def test_the_async_client_has_the_same_methods_to_be_awaited(loaded: RunningStack, tmp_path: Path) -> None:
    async def use() -> None:
        async with AsyncClient(loaded.http_url) as client:
            runs = [client.inference.run({"x": ONES * n}, model_name="tiny") for n in range(8)]
            for number, result in enumerate(await asyncio.gather(*runs)):
                np.testing.assert_array_equal(result.outputs["y"], ONES * (2 * number + 1))
            job = await client.submit("inference.run", run_request())
            assert [event.name async for event in client.events(job)][-1] == "done"
            assert (await client.wait(job)).state is State.SUCCEEDED
            assert [found.job_id async for found in client.jobs(limit=1)] == [job.job_id]
            (tmp_path / "content").write_bytes(b"x" * (CHUNK_BYTES + 1))
            blob = await client.blobs.upload(tmp_path / "content")
            assert (await client.blobs.download(blob.blob_id, tmp_path / "copy")).stat().st_size == CHUNK_BYTES + 1
            with pytest.raises(Refused):
                await client.blobs.read("unknown")

    asyncio.run(use())


def test_an_abandoned_iteration_closes_its_connection(client: Client) -> None:
    job = slow(client)
    try:
        events = client.events(job)
        next(events)
        events.close()  # type: ignore[attr-defined]
        assert client.job(job).terminal is False
    finally:
        client.cancel(job)
    client.wait(job, timeout=20)
