"""Runs that wait together run together, and each gets what it would have got alone."""

from __future__ import annotations

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
from tests.rows.graphs import Case, reported, siblings
from tests.support.stack import eventually
from workers.devices import open_device
from workers.devices.onnx.runtime import LoadedGraph
from workers.devices.values import SessionOptions
from workers.resident.batching import TOLERANCE, decide, find_out
from workers.resident.residents import Graph, ResidentModel
from workers.rows.proof import Proof, Verdict


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


@pytest.mark.serial
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


@pytest.mark.serial
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
    ("graph", "proof", "reason"),
    [
        (graphs.affine(), "proven", "no operator lets rows touch"),
        (graphs.renamed(), "proven", "no operator lets rows touch"),
        (graphs.mixing(), "disproven", "ReduceMean 'm': it works along the rows"),
        (graphs.fixed(), "disproven", "no open first axis"),
        (graphs.counter(), "disproven", "no open first axis"),
        (graphs.scaled(), "proven", "no operator lets rows touch"),
        (graphs.open_state(), "disproven", "Concat 'all'"),
        (graphs.everything(), "proven", "no operator lets rows touch"),
        (graphs.picky(), "proven", "no operator lets rows touch"),
    ],
    ids=["rows apart", "two names", "rows mix", "two rows", "one row", "scalar", "concatenated", "text", "table"],
)
def test_a_models_runs_are_joined_by_default_where_that_is_proven(
    tmp_path: Path, graph: bytes, proof: str, reason: str
) -> None:
    found = find_out(opened(tmp_path, graph), None)
    assert (found.enabled, found.proof) == (proof == "proven", proof), found
    assert reason in found.reason, found
    assert found.trial == ("joined rows are what they are alone" if proof == "proven" else None)


def opened(tmp_path: Path, graph: bytes) -> LoadedGraph:
    """A model on the CPU device."""
    path = tmp_path / "model.onnx"
    path.write_bytes(graph)
    return LoadedGraph(open_device("cpu", 0), path, SessionOptions())


@pytest.mark.parametrize(
    ("proof", "asked", "rows"),
    [
        ("proven", None, 8), ("proven", 1, 1), ("proven", 32, 32), ("unknown", None, 1), ("unknown", 32, 32),
        ("disproven", None, 1), ("disproven", 32, 1),
    ],
)  # fmt: skip
def test_the_proof_and_the_callers_limit_decide_together(proof: str, asked: int | None, rows: int) -> None:
    assert decide(Verdict(Proof(proof), ""), asked) == rows


#: Nothing here can run Mystery, and what is drawn at random is drawn anew each time.
CASES = [case for case in [*reported(), *siblings()] if case.operator not in ("Mystery", "RandomNormalLike")]


@pytest.mark.parametrize("asked", [None, 6], ids=["by default", "with a limit"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_callers_at_once_each_get_their_own_answer(api: Api, case: Case, asked: int | None) -> None:
    case.model.producer_name = str(asked)  # other bytes are another model
    content = case.model.SerializeToString()
    loaded = api.load(content, options={} if asked is None else {"max_batch_size": asked})
    assert loaded["batching"]["proof"] == case.proof
    if case.operator:
        assert loaded["batching"]["decided_by"]["operator"] == case.operator
    random = np.random.default_rng(14)
    callers = [case.rows(random) for _ in range(6)]
    _, block = blocked(api)
    block()
    jobs = submit_all(api, [request(loaded["model_id"], **rows) for rows in callers])
    session = ort.InferenceSession(content)
    joins = case.proof == "proven" or (case.proof == "unknown" and asked is not None)
    for job, rows in zip(jobs, callers, strict=True):
        assert (job["result"]["batch_size"] > 1) is joins
        for output, value in zip(session.get_outputs(), session.run(None, rows), strict=True):
            given = api.arrays(job)[output.name]
            assert given.shape == value.shape
            largest = max(float(np.abs(value).max(initial=0)), 1e-9)
            assert np.abs(given - value).max(initial=0) <= (TOLERANCE if case.proof == "unknown" else 1e-5) * largest


def test_an_input_that_only_some_runs_give_is_not_joined(tmp_path: Path) -> None:
    model = opened(tmp_path, graphs.affine())
    resident = ResidentModel("m", "m", Graph("m", model, 0), max_batch_size=8, batching=find_out(model, 8))
    row = {"dtype": "float32", "shape": [1, 4]}
    assert resident.batch_of({"x": row}, None) is not None
    assert resident.batch_of({"x": row, "s": row}, None) is None


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
