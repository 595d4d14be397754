"""Cancelling, time limits, expiry and priority of runs."""

from __future__ import annotations

import time
from datetime import datetime
from typing import Any

import numpy as np
import pytest

from tests.inference import graphs
from tests.inference.conftest import Api, as_tensor
from tests.support.records import claim_of
from tests.support.stack import eventually


def started(api: Api, job_id: str) -> None:
    eventually(lambda: api.job(job_id, wait=0)["state"] == "running", interval_seconds=0.01)


def seconds(job: dict[str, Any], first: str, last: str) -> float:
    return (datetime.fromisoformat(job[last]) - datetime.fromisoformat(job[first])).total_seconds()


@pytest.fixture
def slow_id(api: Api) -> str:
    return api.load(graphs.slow(1500), "slow")["model_id"]


X = np.zeros((512, 512), np.float32)


@pytest.mark.serial
def test_a_running_graph_stops_at_once(api: Api, slow_id: str) -> None:
    took = []
    for _ in range(3):
        job = api.run(slow_id, {"x": X}, wait=0)
        started(api, job["job_id"])
        time.sleep(0.15)  # somewhere in the middle of the graph
        asked = time.monotonic()
        assert api.http.delete(f"/api/jobs/{job['job_id']}").status_code == 202
        ended = api.job(job["job_id"])
        took.append(time.monotonic() - asked)
        assert ended["state"] == "cancelled"
        assert ended["celery_state"] == "REVOKED"
    assert sorted(took)[1] < 1, took  # the graph takes many seconds
    model_id = api.load(graphs.affine())["model_id"]
    assert np.array_equal(api.outputs(model_id, {"x": np.ones((1, 4), np.float32)})["y"], np.full((1, 4), 3.0))


def test_the_model_is_usable_after_a_cancelled_run(api: Api) -> None:
    model_id = api.load(graphs.busy(600, 256))["model_id"]
    x = np.eye(256, dtype=np.float32)[None]
    whole = api.outputs(model_id, {"x": x})["y"]
    job = api.run(model_id, {"x": x}, wait=0)
    started(api, job["job_id"])
    api.http.delete(f"/api/jobs/{job['job_id']}")
    assert api.job(job["job_id"])["state"] == "cancelled"
    assert np.array_equal(api.outputs(model_id, {"x": x})["y"], whole)


def test_a_session_is_usable_after_a_cancelled_run(api: Api) -> None:
    model_id = api.load(graphs.slow(1500, 512), "slow")["model_id"]
    answer = api.http.post("/api/inference/sessions", json={"model_id": model_id, "state": {"y": "x"}})
    session_id = answer.json()["session_id"]
    job = api.run(None, {"x": X}, wait=0, session_id=session_id)
    started(api, job["job_id"])
    api.http.delete(f"/api/jobs/{job['job_id']}")
    assert api.job(job["job_id"])["state"] == "cancelled"
    told = api.http.get(f"/api/inference/status/{session_id}").json()
    assert (told["state"], told["runs"]["failed"]) == ("idle", 1)
    closing = api.http.delete(f"/api/inference/sessions/{session_id}", headers={"Prefer": "wait=10"})
    assert closing.json()["state"] == "succeeded"


@pytest.mark.serial
def test_a_run_past_its_time_limit_fails_with_timeout(api: Api, slow_id: str) -> None:
    job = api.run(slow_id, {"x": X}, job={"timeout_seconds": 0.3})
    assert (job["state"], job["error"]["code"]) == ("failed", "timeout")
    assert 0.3 <= seconds(job, "started_at", "finished_at") < 2


def test_a_run_that_waits_past_its_expiry_never_starts(api: Api, slow_id: str) -> None:
    model_id = api.load(graphs.affine())["model_id"]
    blocking = api.run(slow_id, {"x": X}, wait=0)
    job = api.run(model_id, {"x": np.ones((1, 4), np.float32)}, job={"expires_in_seconds": 0.4})
    assert (job["state"], job["error"]["code"], job["started_at"]) == ("expired", "expired", None)
    api.http.delete(f"/api/jobs/{blocking['job_id']}")
    api.job(blocking["job_id"])


def test_an_urgent_run_starts_next_in_a_flood(api: Api) -> None:
    model_id = api.load(graphs.busy(60, 192), options={"max_batch_size": 1})["model_id"]
    zeros = api.http.post("/api/blobs", content=bytes(192 * 192 * 4)).json()["blob_id"]
    x = {"dtype": "float32", "shape": [1, 192, 192], "blob_id": zeros}
    body = {"model_id": model_id, "inputs": {"x": x}, "job": {"priority": 1}}
    flood = api.http.post("/api/jobs", json={"jobs": [{"kind": "inference.run", "request": body}] * 500}).json()["jobs"]
    eventually(lambda: api.job(flood[0]["job_id"], wait=0)["started_at"])
    urgent = api.run(model_id, {"x": x}, job={"priority": 9})
    assert urgent["state"] == "succeeded"
    listed = api.http.get("/api/jobs", params={"kind": "inference.run", "limit": 1000}).json()["jobs"]
    ids = {job["job_id"] for job in flood}
    starts = [job["started_at"] for job in listed if job["job_id"] in ids and job["started_at"]]
    # What ran when it came is finished; nothing that waited goes before it but what was taken while it arrived.
    between = [start for start in starts if urgent["submitted_at"] < start < urgent["started_at"]]
    assert len(between) <= 3, len(between)
    assert len(starts) < 300  # it did not wait for the flood
    assert api.unload(model_id, force=True)["state"] == "succeeded"  # the rest need not run


def test_an_urgent_run_goes_before_one_that_is_claimed_already(api: Api) -> None:
    model_id = api.load(graphs.busy(400, 320), options={"max_batch_size": 1})["model_id"]
    x = np.zeros((1, 320, 320), np.float32)
    # How long a run takes is known once one has run; from then on the next is claimed meanwhile.
    assert api.run(model_id, {"x": x})["state"] == "succeeded"
    usual = [api.run(model_id, {"x": x}, wait=0)["job_id"] for _ in range(4)]
    eventually(lambda: claim_of(api.stack.database_url, usual[1]) == ("reserved", 1), interval_seconds=0.01)
    urgent = api.run(model_id, {"x": x}, wait=0, job={"priority": 9})["job_id"]
    first, claimed, *rest = [api.job(job_id) for job_id in usual]
    ended = api.job(urgent)["finished_at"]
    assert first["finished_at"] < ended < claimed["finished_at"] < rest[0]["finished_at"]


def test_unloading_waits_for_the_runs_before_it(api: Api) -> None:
    model_id = api.load(graphs.busy(200, 256), options={"max_batch_size": 1})["model_id"]
    x = as_tensor(np.zeros((1, 256, 256), np.float32))
    runs = [api.run(model_id, {"x": x}, wait=0) for _ in range(5)]
    unloaded = api.unload(model_id)
    assert unloaded["state"] == "succeeded"
    ended = [api.job(job["job_id"]) for job in runs]
    assert [job["state"] for job in ended] == ["succeeded"] * 5
    assert all(job["finished_at"] <= unloaded["started_at"] for job in ended)


@pytest.mark.serial
def test_unloading_by_force_cancels_the_runs_before_it(api: Api) -> None:
    model_id = api.load(graphs.slow(1501))["model_id"]
    runs = [api.run(model_id, {"x": X}, wait=0) for _ in range(4)]
    started(api, runs[0]["job_id"])
    began = time.monotonic()
    assert api.unload(model_id, force=True)["state"] == "succeeded"
    assert time.monotonic() - began < 1
    assert [api.job(job["job_id"])["state"] for job in runs] == ["cancelled"] * 4


def test_force_reaches_the_runs_of_a_bulk_submission_too(api: Api) -> None:
    # Each run takes some seconds, and the worker looks into the records every second.
    model_id = api.load(graphs.slow(4502))["model_id"]
    runs = [api.run(model_id, {"x": X}, wait=0) for _ in range(3)]
    started(api, runs[0]["job_id"])
    unload = {"kind": "inference.unload_model", "request": {"model_id": model_id, "force": True}}
    began = time.monotonic()
    (job,) = api.http.post("/api/jobs", json={"jobs": [unload]}).json()["jobs"]
    assert api.job(job["job_id"], wait=30)["state"] == "succeeded"
    assert time.monotonic() - began < 5  # the worker saw in the records that they are to be cancelled
    assert [api.job(job["job_id"])["state"] for job in runs] == ["cancelled"] * 3
