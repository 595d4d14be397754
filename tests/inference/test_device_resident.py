"""Tensors that stay on the device: allocations as inputs and outputs of runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.inference import graphs
from tests.inference.conftest import Api, as_tensor

WIDTH = 50_000


def allocated(api: Api, size_bytes: int, **more: Any) -> str:
    answer = api.post("/api/memory/allocate", {"size_bytes": size_bytes, **more})
    assert answer.json()["state"] == "succeeded", answer.text
    return answer.json()["resource"]["id"]


def written(api: Api, array: np.ndarray, **more: Any) -> str:
    allocation_id = allocated(api, array.nbytes, **more)
    answer = api.http.put(f"/api/memory/data/{allocation_id}", content=array.tobytes(), headers={"Prefer": "wait=20"})
    assert answer.status_code == 200, answer.text
    return allocation_id


def read(api: Api, allocation_id: str) -> np.ndarray:
    return np.frombuffer(api.http.get(f"/api/memory/data/{allocation_id}").content, np.float32)


def resident(allocation_id: str, shape: list[int], **more: Any) -> dict[str, Any]:
    return {"dtype": "float32", "shape": shape, "allocation_id": allocation_id, **more}


def test_a_run_reads_and_writes_allocations_where_they_lie(api: Api) -> None:
    model_id = api.load(graphs.wide(WIDTH))["model_id"]
    x = np.random.default_rng(0).standard_normal(2 * WIDTH).astype(np.float32)
    source, target = written(api, x), allocated(api, 2 * x.nbytes)
    job = api.run(
        model_id,
        {"x": resident(source, [2, WIDTH])},
        into={"y": {"allocation_id": target, "offset": x.nbytes}},
    )
    assert job["state"] == "succeeded", job["error"]
    assert job["result"]["outputs"]["y"] == {
        "dtype": "float32", "shape": [2, WIDTH], "allocation_id": target, "offset": x.nbytes,
    }  # fmt: skip
    assert "staged_bytes" not in job["result"]
    assert np.array_equal(read(api, target)[2 * WIDTH :], x + 1)
    # The output of one run is the input of the next, without a wait in between: they take effect in order.
    for _ in range(3):
        api.run(
            model_id,
            {"x": resident(target, [2, WIDTH], offset=x.nbytes)},
            wait=0,
            into={"y": {"allocation_id": target, "offset": x.nbytes}},
        )
    assert np.array_equal(read(api, target)[2 * WIDTH :], ((x + 1) + 1 + 1) + 1)


def test_ranges_and_owners_are_checked_before_anything_runs(api: Api) -> None:
    model_id = api.load(graphs.wide(WIDTH))["model_id"]
    small = allocated(api, WIDTH * 4)
    body: dict[str, Any] = {"model_id": model_id, "inputs": {"x": resident(small, [1, WIDTH], offset=4)}}
    answer = api.post("/api/inference/run", body)
    assert (answer.status_code, answer.json()["code"]) == (422, "out_of_range")
    x = as_tensor(np.zeros((2, WIDTH), np.float32))
    job = api.run(model_id, {"x": x}, into={"y": {"allocation_id": small}})
    assert (job["state"], job["error"]["code"]) == ("failed", "out_of_range")
    api.http.delete(f"/api/memory/deallocate/{small}", headers={"Prefer": "wait=10"})
    answer = api.post("/api/inference/run", {"model_id": model_id, "inputs": {"x": resident(small, [1, WIDTH])}})
    assert (answer.status_code, answer.json()["code"]) == (404, "allocation_not_found")


def test_an_input_on_another_device_is_brought_and_the_job_says_so(start_api: Callable[..., Api]) -> None:
    api = start_api(devices="cpu:2")
    model_id = api.load(graphs.wide(WIDTH), device_id="cpu_0")["model_id"]
    x = np.arange(WIDTH, dtype=np.float32)
    elsewhere = written(api, x, device_id="cpu_1")
    job = api.run(model_id, {"x": resident(elsewhere, [1, WIDTH])})
    assert job["state"] == "succeeded", job["error"]
    assert np.array_equal(api.arrays(job)["y"][0], x + 1)
    assert job["result"]["staged_bytes"] == x.nbytes
    answer = api.post("/api/inference/run", {
        "model_id": model_id, "inputs": {"x": resident(elsewhere, [1, WIDTH])},
        "into": {"y": {"allocation_id": elsewhere}},
    })  # fmt: skip
    assert (answer.status_code, answer.json()["code"]) == (422, "validation_failed")
    assert "copy" in answer.json()["detail"]
