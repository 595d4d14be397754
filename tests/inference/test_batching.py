"""Runs that wait together run together, and each gets what it would have got alone."""

from __future__ import annotations

import re
import threading
import time
from pathlib import Path
from typing import Any

import celery
import numpy as np
import onnxruntime as ort
import pytest

from tests.inference import graphs
from tests.inference.conftest import Api, as_tensor
from tests.support.stack import eventually
from workers.batching import find_out
from workers.devices import open_device
from workers.devices.onnx import OnnxModel
from workers.devices.values import ModelOptions


def blocked(api: Api) -> tuple[str, Any]:
    """Holds the device for a moment with a run of another model, so that what follows waits together."""
    model_id = api.load(graphs.slow(300, 256), "blocker")["model_id"]
    return model_id, lambda: api.run(model_id, {"x": np.zeros((256, 256), np.float32)}, wait=0)


def submit_all(api: Api, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All requests in one bulk submission, and their jobs once they have ended."""
    body = {"jobs": [{"kind": "inference.run", "request": request} for request in requests]}
    jobs = api.http.post("/api/jobs", json=body).json()["jobs"]
    return [api.job(job["job_id"]) for job in jobs]


def request(model_id: str, **inputs: Any) -> dict[str, Any]:
    return {"model_id": model_id, "inputs": {name: as_tensor(value) for name, value in inputs.items()}}


def test_runs_that_wait_together_are_joined_up_to_the_limit(api: Api) -> None:
    _, block = blocked(api)
    model_id = api.load(graphs.affine(), options={"max_batch_size": 4})["model_id"]
    rows = [np.full((1, 4), n, np.float32) for n in range(10)]
    block()
    jobs = submit_all(api, [request(model_id, x=x) for x in rows])
    for job, x in zip(jobs, rows, strict=True):
        assert np.array_equal(api.arrays(job)["y"], x * 2 + 1)
        assert job["timings"]["device_ms"] is not None
        assert job["result"]["session_id"] == job["job_id"]
    sizes = sorted((job["result"]["batch_size"] for job in jobs), reverse=True)
    assert sizes == [4, 4, 4, 4, 4, 4, 4, 4, 2, 2]


def test_each_input_of_joined_runs_keeps_its_own_values(api: Api) -> None:
    _, block = blocked(api)
    model_id = api.load(graphs.difference())["model_id"]
    rows = [(np.full((1, 4), 10 * n, np.float32), np.full((1, 4), n, np.float32)) for n in range(4)]
    block()
    jobs = submit_all(api, [request(model_id, a=a, b=b) for a, b in rows])
    assert {job["result"]["batch_size"] for job in jobs} == {4}
    for job, (a, b) in zip(jobs, rows, strict=True):
        assert np.array_equal(api.arrays(job)["y"], a - b)


def test_runs_of_several_rows_share_the_limit_in_rows(api: Api) -> None:
    _, block = blocked(api)
    model_id = api.load(graphs.affine(3), options={"max_batch_size": 6})["model_id"]
    block()
    jobs = submit_all(api, [request(model_id, x=np.full((2, 4), n, np.float32)) for n in range(5)])
    assert sorted(job["result"]["batch_size"] for job in jobs) == [2, 2, 3, 3, 3]
    for n, job in enumerate(jobs):
        assert np.array_equal(api.arrays(job)["y"], np.full((2, 4), n * 3 + 1, np.float32))


def test_other_shapes_scalars_and_outputs_make_other_batches(api: Api) -> None:
    _, block = blocked(api)
    model_id = api.load(graphs.scaled())["model_id"]
    block()
    x = np.ones((1, 2), np.float32)
    jobs = submit_all(
        api,
        [request(model_id, x=x, k=np.float32(2))] * 2
        + [request(model_id, x=x, k=np.float32(3))] * 3
        + [request(model_id, x=np.ones((2, 2), np.float32), k=np.float32(2))],
    )
    assert [job["result"]["batch_size"] for job in jobs] == [2, 2, 3, 3, 3, 1]
    assert [api.arrays(job)["y"][0, 0] for job in jobs] == [2, 2, 3, 3, 3, 2]


def test_a_batch_with_a_bad_member_fails_it_alone(api: Api) -> None:
    _, block = blocked(api)
    model_id = api.load(graphs.picky())["model_id"]
    block()
    jobs = submit_all(api, [request(model_id, i=np.array([n], np.int64)) for n in (0, 1, 99, 2)])
    assert [job["state"] for job in jobs] == ["succeeded", "succeeded", "failed", "succeeded"]
    assert jobs[2]["error"]["code"] in ("run_failed", "input_mismatch")
    alone = api.outputs(model_id, {"i": np.array([2], np.int64)})["y"]
    assert np.array_equal(api.arrays(jobs[3])["y"], alone)


def test_cancelling_a_member_of_a_running_batch_leaves_the_others(api: Api) -> None:
    model_id = api.load(graphs.busy(400, 256), options={"max_batch_size": 4})["model_id"]
    _, block = blocked(api)
    block()
    x = np.random.default_rng(0).standard_normal((1, 256, 256)).astype(np.float32)
    body = {"jobs": [{"kind": "inference.run", "request": request(model_id, x=x)} for _ in range(3)]}
    ids = [job["job_id"] for job in api.http.post("/api/jobs", json=body).json()["jobs"]]
    eventually(lambda: api.job(ids[0], wait=0)["state"] == "running", interval_seconds=0.01)
    assert api.http.delete(f"/api/jobs/{ids[1]}").status_code == 202
    jobs = [api.job(job_id) for job_id in ids]
    assert [job["state"] for job in jobs] == ["succeeded", "cancelled", "succeeded"]
    assert np.array_equal(api.arrays(jobs[0])["y"], api.arrays(jobs[2])["y"])


def test_a_model_may_wait_for_company(api: Api) -> None:
    model_id = api.load(graphs.affine(13), options={"max_batch_size": 2, "max_delay_ms": 2000})["model_id"]
    x = np.ones((1, 4), np.float32)
    began = time.monotonic()
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(api.run(model_id, {"x": x}))) for _ in range(2)]
    threads[0].start()
    eventually(lambda: api.http.get("/api/jobs", params={"state": "queued"}).json() is not None)
    threads[1].start()
    for thread in threads:
        thread.join()
    assert [job["result"]["batch_size"] for job in found] == [2, 2]
    assert time.monotonic() - began < 1.5  # the batch was full: nobody waited any longer
    began = time.monotonic()
    alone = api.run(model_id, {"x": x})
    assert alone["result"]["batch_size"] == 1
    assert 1.9 < time.monotonic() - began < 4


def test_something_urgent_ends_the_wait_for_company(api: Api) -> None:
    model_id = api.load(graphs.affine(14), options={"max_batch_size": 2, "max_delay_ms": 3000})["model_id"]
    other = api.load(graphs.affine(15))["model_id"]
    x = np.ones((1, 4), np.float32)
    waiting = api.run(model_id, {"x": x}, wait=0)
    began = time.monotonic()
    urgent = api.run(other, {"x": x}, job={"priority": 9})
    assert urgent["state"] == "succeeded"
    assert time.monotonic() - began < 2
    assert api.job(waiting["job_id"])["state"] == "succeeded"


@pytest.mark.parametrize(
    ("graph", "enabled", "reason"),
    [
        (graphs.affine(), True, "as they are alone|what they are alone"),
        (graphs.renamed(), True, "what they are alone"),
        (graphs.mixing(), False, "change each other"),
        (graphs.fixed(), False, "no open first axis"),
        (graphs.counter(), False, "no open first axis"),
        (graphs.scaled(), True, "what they are alone"),
        (graphs.open_state(), False, "row for each row"),
        (graphs.everything(), True, "what they are alone"),
        (graphs.picky(), True, "what they are alone"),
    ],
    ids=["rows apart", "two names", "rows mix", "two rows", "one row", "scalar", "concatenated", "text", "table"],
)
def test_a_model_is_asked_whether_its_runs_may_be_joined(
    tmp_path: Path, graph: bytes, enabled: bool, reason: str
) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(graph)
    told = find_out(OnnxModel(open_device("cpu", 0), path, ModelOptions()), 8)
    assert told.enabled is enabled, told
    assert re.search(reason, told.reason), told


def test_a_model_with_rows_that_mix_runs_alone(api: Api) -> None:
    _, block = blocked(api)
    model_id = api.load(graphs.mixing())["model_id"]
    block()
    jobs = submit_all(api, [request(model_id, x=np.full((1, 3), n, np.float32)) for n in range(3)])
    assert [job["result"]["batch_size"] for job in jobs] == [1, 1, 1]
    assert all(np.array_equal(api.arrays(job)["y"], np.zeros((1, 3), np.float32)) for job in jobs)


@pytest.mark.parametrize("name", ["ch_PP-OCRv4_det_infer", "ch_PP-OCRv4_rec_infer", "ch_ppocr_mobile_v2.0_cls_infer"])
def test_real_models_with_two_names_for_their_batch_axis_are_joined_rightly(
    api: Api, models_dir: Path, name: str
) -> None:
    content = (models_dir / "rapidocr" / f"{name}.onnx").read_bytes()
    loaded = api.load(content)
    assert loaded["batching"]["enabled"], loaded["batching"]
    _, block = blocked(api)
    shape = (1, 3, 48, 96) if "det" not in name else (1, 3, 64, 64)
    drawn = [np.random.default_rng(n).standard_normal(shape).astype(np.float32) for n in range(3)]
    block()
    jobs = submit_all(api, [request(loaded["model_id"], x=x) for x in drawn])
    assert [job["result"]["batch_size"] for job in jobs] == [3, 3, 3]
    session = ort.InferenceSession(content)
    for job, x in zip(jobs, drawn, strict=True):
        (alone,) = session.run(None, {"x": x})
        (given,) = api.arrays(job).values()
        assert given.shape == alone.shape
        assert np.allclose(given, alone, atol=1e-4)


def test_each_member_of_a_batch_has_its_own_outcome_in_celery(api: Api) -> None:
    _, block = blocked(api)
    model_id = api.load(graphs.picky())["model_id"]
    block()
    client = celery.Celery(broker=api.stack.redis_url, backend=api.stack.redis_url)
    sent = [
        client.send_task(
            "device_operations.inference.run",
            kwargs={"request": request(model_id, i=np.array([n], np.int64))},
            queue="device.cpu_0",
            ignore_result=False,
        )
        for n in (0, 99, 1)
    ]
    given = [task.get(timeout=20, propagate=False) for task in sent]
    assert [task.state for task in sent] == ["SUCCESS", "FAILURE", "SUCCESS"]
    assert given[0]["outputs"]["y"]["shape"] == [1, 2]
    assert "run_failed" in repr(given[1]) or "indices" in str(given[1])
    assert [api.job(task.id)["celery_state"] for task in sent] == ["SUCCESS", "FAILURE", "SUCCESS"]
    assert api.job(sent[0].id)["result"] == given[0]
