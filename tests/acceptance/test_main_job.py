"""The main job over HTTP: a real model is loaded, run, polled; and everything that a submission may ask for."""

from __future__ import annotations

import json
import time
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.support import graphs
from tests.support.stack import RunningStack, eventually

WAIT = {"Prefer": "wait=30"}


@pytest.fixture(scope="module")
def http(stack: RunningStack) -> httpx.Client:
    graphs.tiny(stack.folder / "models" / "tiny" / "model.onnx")
    graphs.slow(stack.folder / "models" / "slow.onnx")
    for name, path in (("tiny", "tiny/model.onnx"), ("slow", "slow.onnx")):
        answer = stack.client.post(
            "/api/inference/load-model", json={"name": name, "source": {"path": path}}, headers=WAIT
        )
        assert answer.json()["state"] == "succeeded", answer.text
    return stack.client


def tiny_run(**job: object) -> dict:
    body: dict = {"model_name": "tiny", "inputs": {"x": graphs.tensor(np.ones((1, 4), np.float32))}}
    return {**body, "job": job} if job else body


def slow_run(rounds: int = 100_000, **job: object) -> dict:
    inputs = {"x": graphs.tensor(np.zeros((256, 256), np.float32)), "rounds": graphs.tensor(np.array(rounds))}
    return {"model_name": "slow", "inputs": inputs, "job": job}


def test_a_run_is_accepted_polled_and_right(http: httpx.Client) -> None:
    answer = http.post("/api/inference/run", json=tiny_run())
    assert answer.status_code == 202
    job = answer.json()
    assert answer.headers["location"] == f"/api/jobs/{job['job_id']}"
    assert job["state"] == "queued" and job["celery_state"] == "PENDING" and job["result"] is None
    done = http.get(answer.headers["location"], params={"wait": 10}).json()
    assert done["state"] == "succeeded" and done["celery_state"] == "SUCCESS" and done["attempt"] == 1
    assert done["result"]["outputs"]["y"] == {"dtype": "float32", "shape": [1, 4], "data": [3.0] * 4}
    assert done["result"]["session_id"] == done["job_id"]
    assert all(done["timings"][name] > 0 for name in ("queued_ms", "device_ms", "total_ms"))
    assert done["submitted_at"].endswith("Z") and done["submitted_at"] <= done["started_at"] <= done["finished_at"]


def test_prefer_wait_answers_with_the_finished_job(http: httpx.Client) -> None:
    answer = http.post("/api/inference/run", json=tiny_run(), headers=WAIT)
    assert (answer.status_code, answer.json()["state"]) == (200, "succeeded")


def test_an_unknown_job_is_not_found_never_pending(http: httpx.Client) -> None:
    answer = http.get("/api/jobs/nope")
    assert answer.status_code == 404
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["code"] == "job_not_found" and answer.json()["status"] == 404


def test_an_idempotency_key_gives_the_first_job_again_and_refuses_another_body(http: httpx.Client) -> None:
    headers = {"Idempotency-Key": "once"}
    first = http.post("/api/inference/run", json=tiny_run(), headers=headers).json()
    again = http.post("/api/inference/run", json=tiny_run(), headers=headers).json()
    assert again["job_id"] == first["job_id"]
    other = http.post("/api/inference/run", json=tiny_run(priority=1), headers=headers)
    assert (other.status_code, other.json()["code"]) == (409, "idempotency_conflict")


def test_a_list_is_newest_first_and_pages_without_gaps(http: httpx.Client) -> None:
    label = f"page-{time.monotonic_ns()}"
    made = [http.post("/api/inference/run", json=tiny_run(labels={"set": label})).json()["job_id"] for _ in range(5)]
    found, cursor = [], None
    while True:
        page = http.get(
            "/api/jobs", params={"label": f"set:{label}", "limit": 2, **({"cursor": cursor} if cursor else {})}
        )
        found += [job["job_id"] for job in page.json()["jobs"]]
        cursor = page.json()["next_cursor"]
        if cursor is None:
            break
    assert found == made[::-1]


def test_many_jobs_are_taken_at_once_or_none(http: httpx.Client) -> None:
    entry = {"kind": "inference.run", "request": tiny_run()}
    answer = http.post("/api/jobs", json={"jobs": [entry] * 10})
    assert answer.status_code == 202 and len(answer.json()["jobs"]) == 10
    before = http.get("/api/jobs", params={"limit": 1}).json()["jobs"][0]["job_id"]
    refused = http.post("/api/jobs", json={"jobs": [entry, {"kind": "inference.run", "request": {"model_name": "no"}}]})
    assert refused.status_code == 422 and "jobs.1" in refused.json()["detail"]
    assert http.get("/api/jobs", params={"limit": 1}).json()["jobs"][0]["job_id"] == before
    assert http.post("/api/jobs", json={"jobs": []}).status_code == 422


def test_a_queued_job_is_cancelled_and_never_starts(http: httpx.Client) -> None:
    later = http.post("/api/inference/run", json=tiny_run(delay_seconds=60)).json()
    assert later["state"] == "scheduled"
    cancelled = http.delete(f"/api/jobs/{later['job_id']}")
    assert (cancelled.status_code, cancelled.json()["state"]) == (202, "cancelled")
    again = http.delete(f"/api/jobs/{later['job_id']}")
    assert (again.status_code, again.json()["code"]) == (409, "job_finished")
    assert http.get(f"/api/jobs/{later['job_id']}").json()["started_at"] is None


def test_a_running_job_stops_soon_after_it_was_cancelled_and_the_worker_goes_on(http: httpx.Client) -> None:
    job_id = http.post("/api/inference/run", json=slow_run()).json()["job_id"]
    eventually(lambda: http.get(f"/api/jobs/{job_id}").json()["state"] == "running")
    asked = time.monotonic()
    http.delete(f"/api/jobs/{job_id}")
    ended = http.get(f"/api/jobs/{job_id}", params={"wait": 10}).json()
    assert ended["state"] == "cancelled" and time.monotonic() - asked < 2
    assert http.post("/api/inference/run", json=tiny_run(), headers=WAIT).json()["state"] == "succeeded"


def test_a_job_past_its_time_limit_fails_with_timeout(http: httpx.Client) -> None:
    ended = http.post("/api/inference/run", json=slow_run(timeout_seconds=0.3), headers=WAIT).json()
    assert (ended["state"], ended["error"]["code"]) == ("failed", "timeout")
    assert "job.timeout_seconds = 0.3 s" in ended["error"]["message"]


def test_a_job_that_waits_past_its_expiry_expires(http: httpx.Client) -> None:
    busy = http.post("/api/inference/run", json=slow_run()).json()["job_id"]
    waiting = http.post("/api/inference/run", json=tiny_run(expires_in_seconds=0.3)).json()["job_id"]
    ended = http.get(f"/api/jobs/{waiting}", params={"wait": 10}).json()
    http.delete(f"/api/jobs/{busy}")
    assert (ended["state"], ended["celery_state"], ended["started_at"]) == ("expired", "REVOKED", None)
    assert "expires_in_seconds was 0.3" in ended["error"]["message"]


def test_a_scheduled_job_runs_when_it_is_due(http: httpx.Client) -> None:
    job = http.post("/api/inference/run", json=tiny_run(delay_seconds=0.5)).json()
    ended = http.get(f"/api/jobs/{job['job_id']}", params={"wait": 10}).json()
    assert ended["state"] == "succeeded" and ended["timings"]["queued_ms"] >= 500


def test_a_job_waits_for_the_predecessors_that_its_caller_names(http: httpx.Client) -> None:
    first = http.post("/api/inference/run", json=tiny_run(delay_seconds=0.7, priority=0)).json()["job_id"]
    second = http.post("/api/inference/run", json=tiny_run(after=[first], priority=9)).json()["job_id"]
    ended = http.get(f"/api/jobs/{second}", params={"wait": 10}).json()
    before = http.get(f"/api/jobs/{first}").json()
    assert before["finished_at"] <= ended["started_at"]
    missing = http.post("/api/inference/run", json=tiny_run(after=["nope"]))
    assert (missing.status_code, missing.json()["code"]) == (404, "job_not_found")


def test_events_tell_states_and_end_with_the_job(http: httpx.Client) -> None:
    job_id = http.post("/api/inference/run", json=slow_run(2000)).json()["job_id"]
    names, states = [], []
    with http.stream("GET", f"/api/jobs/{job_id}/events") as events:
        assert events.headers["content-type"].startswith("text/event-stream")
        for line in events.iter_lines():
            if line.startswith("event: "):
                names.append(line[7:])
            elif line.startswith("data: "):
                states.append(json.loads(line[6:])["state"])
    assert names[0] == "state" and names[-1] == "done"
    assert states[-2:] == ["running", "succeeded"]


def test_the_queue_position_counts_what_goes_before(http: httpx.Client) -> None:
    busy = http.post("/api/inference/run", json=slow_run()).json()["job_id"]
    eventually(lambda: http.get(f"/api/jobs/{busy}").json()["state"] == "running")
    low = http.post("/api/inference/run", json=tiny_run(priority=1)).json()["job_id"]
    http.post("/api/inference/run", json=tiny_run(priority=8))
    assert http.get(f"/api/jobs/{low}").json()["queue_position"] == 1
    http.delete(f"/api/jobs/{busy}")


def test_devices_health_and_metrics_tell_what_is(http: httpx.Client) -> None:
    (device,) = http.get("/api/devices").json()["devices"]
    assert device["device_id"] == "cpu_0" and device["state"] == "online" and device["epoch"] == 1
    assert device["total_bytes"] > device["free_bytes"] > 0
    assert http.get("/healthz").json() == {"status": "ok"}
    assert http.get("/readyz").json()["devices"]["online"] == ["cpu_0"]
    assert "device_operations_device_online" in http.get("/metrics").text
    document = http.get("/openapi.json").json()
    assert "/api/inference/run" in document["paths"] and "Run" in document["components"]["schemas"]


def test_a_draining_device_takes_no_new_jobs_until_it_is_resumed(http: httpx.Client) -> None:
    assert http.post("/api/devices/cpu_0/drain").json()["state"] == "draining"
    eventually(lambda: http.post("/api/inference/run", json=tiny_run()).json().get("code") == "device_draining")
    assert http.post("/api/devices/cpu_0/resume").json()["state"] == "online"
    eventually(lambda: http.post("/api/inference/run", json=tiny_run(), headers=WAIT).status_code == 200)


BAD_RUNS = {
    "unknown field": ({**tiny_run(), "extra": 1}, 422, "validation_failed"),
    "unknown model": ({**tiny_run(), "model_name": "none"}, 404, "model_not_found"),
    "wrong name": ({"model_name": "tiny", "inputs": {"z": graphs.tensor(np.ones((1, 4), np.float32))}}, 422, "input_mismatch"),
    "wrong dtype": ({"model_name": "tiny", "inputs": {"x": graphs.tensor(np.ones((1, 4)))}}, 422, "input_mismatch"),
    "wrong shape": ({"model_name": "tiny", "inputs": {"x": graphs.tensor(np.ones((1, 5), np.float32))}}, 422, "input_mismatch"),
    "ragged": ({"model_name": "tiny", "inputs": {"x": {"dtype": "float32", "shape": [2, 4], "data": [[1, 2, 3, 4], [1]]}}}, 422, "input_mismatch"),
    "text for numbers": ({"model_name": "tiny", "inputs": {"x": {"dtype": "float32", "shape": [1, 4], "data": ["1", "2", "3", "4"]}}}, 422, "input_mismatch"),
    "bad base64": ({"model_name": "tiny", "inputs": {"x": {"dtype": "float32", "shape": [1, 4], "base64": "@@"}}}, 422, "input_mismatch"),
    "wrong type": ({"model_name": 5, "inputs": {}}, 422, "validation_failed"),
    "priority 10": (tiny_run(priority=10), 422, "validation_failed"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_RUNS)
def test_a_request_that_does_not_fit_is_a_clear_problem_and_records_nothing(http: httpx.Client, name: str) -> None:
    body, status, code = BAD_RUNS[name]
    before = http.get("/api/jobs", params={"limit": 1}).json()["jobs"][0]["job_id"]
    answer = http.post("/api/inference/run", json=body)
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
    assert http.get("/api/jobs", params={"limit": 1}).json()["jobs"][0]["job_id"] == before


def test_a_body_that_is_not_json_is_malformed(http: httpx.Client) -> None:
    for body in (b'{"model_name": NaN}', b"{", b"[]", b""):
        answer = http.post("/api/inference/run", content=body)
        assert (answer.status_code, answer.json()["code"]) == (400, "malformed_request"), body


def test_a_hundred_megabytes_of_json_are_refused(http: httpx.Client) -> None:
    answer = http.post("/api/inference/run", content=b" " * 100_000_000)
    assert (answer.status_code, answer.json()["code"]) == (413, "payload_too_large")


def test_a_model_path_may_not_leave_the_model_folder(http: httpx.Client, stack: RunningStack) -> None:
    (stack.folder / "outside.onnx").write_bytes(b"x")
    link = stack.folder / "models" / "link.onnx"
    link.symlink_to(stack.folder / "outside.onnx")
    for path in ("../outside.onnx", "/etc/passwd", "tiny/../../outside.onnx", "link.onnx"):
        answer = http.post("/api/inference/load-model", json={"name": "bad", "source": {"path": path}})
        assert (answer.status_code, answer.json()["code"]) == (422, "path_not_allowed"), path


def test_a_missing_or_corrupt_model_fails_clearly_and_the_worker_goes_on(
    http: httpx.Client, stack: RunningStack
) -> None:
    missing = http.post("/api/inference/load-model", json={"name": "bad", "source": {"path": "none.onnx"}})
    assert (missing.status_code, missing.json()["code"]) == (422, "model_invalid")
    (stack.folder / "models" / "corrupt.onnx").write_bytes(b"\x08\x09 no model")
    (stack.folder / "models" / "empty.onnx").write_bytes(b"")
    for path in ("corrupt.onnx", "empty.onnx"):
        job = http.post(
            "/api/inference/load-model", json={"name": "bad", "source": {"path": path}}, headers=WAIT
        ).json()
        assert (job["state"], job["error"]["code"]) == ("failed", "model_invalid")
        model = http.get(f"/api/inference/models/{job['resource']['id']}").json()
        assert model["state"] == "failed" and model["error"]["code"] == "model_invalid"
    assert http.post("/api/inference/run", json=tiny_run(), headers=WAIT).json()["state"] == "succeeded"


def test_external_data_may_not_lie_outside_the_models_folder(
    http: httpx.Client, stack: RunningStack, tmp_path: Path
) -> None:
    from onnx import load
    from onnx.external_data_helper import set_external_data

    model = load(str(graphs.tiny(tmp_path / "m.onnx")))
    for initializer in model.graph.initializer:
        initializer.ClearField("data_location")
        set_external_data(initializer, location="../../secret.bin")
    folder = stack.folder / "models" / "external"
    folder.mkdir()
    (stack.folder / "secret.bin").write_bytes(bytes(64))
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    job = http.post(
        "/api/inference/load-model", json={"name": "external", "source": {"path": "external/model.onnx"}}, headers=WAIT
    ).json()
    assert (job["state"], job["error"]["code"]) in {("failed", "model_invalid"), ("failed", "path_not_allowed")}


def test_loading_the_same_content_twice_gives_the_same_model(http: httpx.Client, stack: RunningStack) -> None:
    graphs.tiny(stack.folder / "models" / "copy.onnx")
    first = http.post(
        "/api/inference/load-model", json={"name": "tiny", "source": {"path": "tiny/model.onnx"}}, headers=WAIT
    )
    again = http.post("/api/inference/load-model", json={"name": "tiny", "source": {"path": "copy.onnx"}}, headers=WAIT)
    assert first.json()["resource"]["id"] == again.json()["resource"]["id"]


def test_a_model_is_unloaded_and_its_runs_are_then_refused(http: httpx.Client, stack: RunningStack) -> None:
    graphs.slow(stack.folder / "models" / "gone.onnx")
    body = {"name": "gone", "source": {"path": "gone.onnx"}, "options": {"graph_optimization": "disable"}}
    model_id = http.post("/api/inference/load-model", json=body, headers=WAIT).json()["resource"]["id"]
    done = http.delete(f"/api/inference/unload-model/{model_id}", headers=WAIT).json()
    assert done["state"] == "succeeded" and "freed_bytes" in done["result"]
    eventually(lambda: http.post("/api/inference/run", json={**tiny_run(), "model_name": "gone"}).status_code == 404)
