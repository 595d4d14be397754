"""Sessions: state stays on the device, runs are in order, nobody sees another's state, and every end is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from tests.inference import graphs
from tests.inference.conftest import Api, as_tensor
from tests.support.stack import eventually

STATE = {"next": "h"}


def opened(api: Api, model_id: str, state: dict[str, str], **more: Any) -> str:
    answer = api.http.post("/api/inference/sessions", json={"model_id": model_id, "state": state, **more})
    assert answer.status_code == 201, answer.text
    return answer.json()["session_id"]


def status(api: Api, session_id: str) -> dict[str, Any]:
    return api.http.get(f"/api/inference/status/{session_id}").json()


def closed(api: Api, *session_ids: str) -> None:
    for session_id in session_ids:
        answer = api.http.delete(f"/api/inference/sessions/{session_id}", headers={"Prefer": "wait=10"})
        assert answer.json()["state"] == "succeeded"


def by_hand(sequence: list[np.ndarray], h: np.ndarray) -> list[np.ndarray]:
    """The same recurrent model over the same sequence in this process."""
    session = ort.InferenceSession(graphs.recurrent())
    given = []
    for x in sequence:
        y, h = session.run(["y", "next"], {"x": x, "h": h})
        given.append(y)
    return given


def test_a_recurrent_model_over_a_session_equals_the_sequence_run_by_hand(api: Api) -> None:
    model_id = api.load(graphs.recurrent())["model_id"]
    drawn = np.random.default_rng(3)
    beginnings = [drawn.standard_normal((1, 5)).astype(np.float32), np.zeros((1, 5), np.float32)]
    sequences = [[drawn.standard_normal((1, 3)).astype(np.float32) for _ in range(8)] for _ in beginnings]
    sessions = [
        opened(api, model_id, STATE, initial={"h": as_tensor(beginnings[0])}),
        opened(api, model_id, STATE),  # without a beginning, state begins with zeros
    ]
    given: list[list[np.ndarray]] = [[], []]
    for step in range(8):  # by turns: neither sees the other's state
        for which in (0, 1):
            outputs = api.outputs(None, {"x": sequences[which][step]}, session_id=sessions[which])
            given[which].append(outputs["y"])
    for which in (0, 1):
        assert np.array_equal(given[which], by_hand(sequences[which], beginnings[which]))
    closed(api, *sessions)


def test_runs_of_one_session_are_in_order_whatever_their_priority(api: Api) -> None:
    model_id = api.load(graphs.counter())["model_id"]
    session_id = opened(api, model_id, {"total": "before"})
    jobs = [
        api.run(None, {"x": np.array([2.0**n], np.float32)}, wait=0, session_id=session_id, job={"priority": n % 10})
        for n in range(20)
    ]
    totals = [api.arrays(api.job(job["job_id"]))["total"][0] for job in jobs]
    assert totals == [2.0 ** (n + 1) - 1 for n in range(20)]
    told = status(api, session_id)
    assert told["runs"] == {"succeeded": 20, "failed": 0, "running": 0}
    assert told["last_job_id"] == jobs[-1]["job_id"]
    assert told["state"] == "idle"
    assert told["model_id"] == model_id
    closed(api, session_id)


def test_a_failed_run_leaves_the_state_as_it_was(api: Api) -> None:
    model_id = api.load(graphs.counter())["model_id"]
    session_id = opened(api, model_id, {"total": "before"})
    api.outputs(None, {"x": np.array([1], np.float32)}, session_id=session_id)
    blob = api.http.post("/api/blobs", content=b"abcd").json()["blob_id"]
    job = api.run(
        None,
        {"x": {"dtype": "float32", "shape": [1], "blob_id": blob}},
        wait=0,
        session_id=session_id,
        job={"delay_seconds": 0.5},
    )
    (api.stack.folder / "data" / "blobs").mkdir(exist_ok=True)
    (stored,) = (path for path in (api.stack.folder / "data").rglob(blob) if path.is_file())
    stored.unlink()
    failed = api.job(job["job_id"])
    assert (failed["state"], failed["error"]["code"]) == ("failed", "blob_not_found")
    assert api.outputs(None, {"x": np.array([10], np.float32)}, session_id=session_id)["total"][0] == 11
    assert status(api, session_id)["runs"] == {"succeeded": 2, "failed": 1, "running": 0}
    closed(api, session_id)


def test_a_caller_may_give_a_state_input_itself(api: Api) -> None:
    model_id = api.load(graphs.counter())["model_id"]
    session_id = opened(api, model_id, {"total": "before"})
    x = np.array([1], np.float32)
    assert api.outputs(None, {"x": x}, session_id=session_id)["total"][0] == 1
    assert api.outputs(None, {"x": x, "before": np.array([40], np.float32)}, session_id=session_id)["total"][0] == 41
    assert api.outputs(None, {"x": x}, session_id=session_id)["total"][0] == 42
    closed(api, session_id)


def test_state_of_an_open_shape_needs_a_beginning(api: Api) -> None:
    model_id = api.load(graphs.open_state())["model_id"]
    x = np.array([1], np.float32)
    without = opened(api, model_id, {"all": "before"})
    job = api.run(None, {"x": x}, session_id=without)
    assert job["error"]["code"] == "input_mismatch"
    assert "initial" in job["error"]["message"]
    grown = opened(api, model_id, {"all": "before"}, initial={"before": as_tensor(np.array([9], np.float32))})
    for expected in ([1, 9], [1, 1, 9], [1, 1, 1, 9]):
        assert api.outputs(None, {"x": x}, session_id=grown)["all"].tolist() == expected
    closed(api, without, grown)


@pytest.mark.parametrize(
    ("body", "code", "text"),
    [
        ({"state": {"nope": "h"}}, "input_mismatch", "unknown output 'nope'"),
        ({"state": {"next": "nope"}}, "input_mismatch", "unknown input 'nope'"),
        ({"state": {"next": "x"}}, "input_mismatch", "cannot feed"),
        ({"state": {"next": "h", "y": "h"}}, "validation_failed", "one input from two outputs"),
        ({"state": STATE, "initial": {"x": {}}}, "validation_failed", "initial"),
        (
            {"state": STATE, "initial": {"h": {"dtype": "float32", "shape": [1, 4], "data": [0, 0, 0, 0]}}},
            "input_mismatch",
            "initial 'h' has shape",
        ),
    ],
)
def test_state_that_cannot_go_round_is_refused(api: Api, body: dict[str, Any], code: str, text: str) -> None:
    model_id = api.load(graphs.recurrent())["model_id"]
    answer = api.http.post("/api/inference/sessions", json={"model_id": model_id, **body})
    assert answer.status_code == 422
    assert answer.json()["code"] == code
    assert text in answer.json()["detail"]


def test_a_closed_session_is_gone_and_what_was_queued_for_it_fails(api: Api) -> None:
    model_id = api.load(graphs.counter())["model_id"]
    session_id = opened(api, model_id, {"total": "before"})
    x = as_tensor(np.array([1], np.float32))
    first = api.run(None, {"x": x}, wait=0, session_id=session_id, job={"delay_seconds": 1})
    closing = api.http.delete(f"/api/inference/sessions/{session_id}").json()
    late = api.run(None, {"x": x}, wait=0, session_id=session_id)
    assert api.job(first["job_id"])["state"] == "succeeded"  # it was submitted before the close
    assert api.job(closing["job_id"])["state"] == "succeeded"
    assert api.job(late["job_id"])["error"]["code"] == "session_closed"
    again = api.post("/api/inference/run", {"session_id": session_id, "inputs": {"x": x}})
    assert (again.status_code, again.json()["code"]) == (410, "session_closed")
    assert status(api, session_id)["state"] == "closed"
    assert api.http.delete(f"/api/inference/sessions/{session_id}").status_code == 410
    missing = api.http.get("/api/inference/status/nobody")
    assert (missing.status_code, missing.json()["code"]) == (404, "session_not_found")


def test_a_run_alone_has_a_session_of_its_own(api: Api) -> None:
    model_id = api.load(graphs.affine())["model_id"]
    job = api.run(model_id, {"x": np.zeros((1, 4), np.float32)})
    assert job["resource"] == {"type": "inference_session", "id": job["job_id"]}
    assert job["result"]["session_id"] == job["job_id"]
    told = status(api, job["job_id"])
    assert (told["state"], told["model_id"]) == ("closed", model_id)
    assert told["runs"] == {"succeeded": 1, "failed": 0, "running": 0}


def test_a_model_with_open_sessions_is_unloaded_by_force_only(api: Api) -> None:
    model_id = api.load(graphs.counter())["model_id"]
    session_id = opened(api, model_id, {"total": "before"})
    refused = api.http.delete(f"/api/inference/unload-model/{model_id}")
    assert (refused.status_code, refused.json()["code"]) == (409, "model_in_use")
    assert session_id in refused.json()["detail"]
    assert api.unload(model_id, force=True)["state"] == "succeeded"
    assert status(api, session_id)["state"] == "closed"


def test_sessions_are_limited_and_expire_when_idle(start_api: Callable[..., Api]) -> None:
    api = start_api(INFERENCE__MAX_CONCURRENT_SESSIONS=2, INFERENCE__SESSION_TIMEOUT_MINUTES=0.05)
    model_id = api.load(graphs.counter())["model_id"]
    first, second = (opened(api, model_id, {"total": "before"}) for _ in range(2))
    api.outputs(None, {"x": np.array([1], np.float32)}, session_id=first)
    refused = api.http.post("/api/inference/sessions", json={"model_id": model_id})
    assert (refused.status_code, refused.json()["code"]) == (429, "too_many_sessions")
    assert int(refused.headers["Retry-After"]) >= 1

    def keep_alive() -> bool:
        api.outputs(None, {"x": np.array([1], np.float32)}, session_id=first)
        return status(api, second)["state"] == "expired"

    eventually(keep_alive, interval_seconds=0.3)
    assert status(api, first)["state"] == "idle"  # it was used meanwhile
    again = api.post("/api/inference/run", {"session_id": second, "inputs": {"x": as_tensor(np.float32([1]))}})
    assert (again.status_code, again.json()["code"]) == (410, "session_expired")
    eventually(lambda: status(api, first)["state"] == "expired")
    # Nothing holds the model any more: idle for as long, it is unloaded.
    eventually(lambda: api.model(model_id)["state"] == "unloaded")
    eventually(lambda: api.model(model_id)["freed_bytes"] is not None)
    run = {"model_id": model_id, "inputs": {}}
    # A gateway looks at the models once in half a second; until then it says what else is wrong with the run.
    eventually(lambda: api.post("/api/inference/run", run).json()["code"] == "model_not_found", seconds=5)


def test_a_session_is_lost_with_its_worker_and_the_model_comes_back(start_api: Callable[..., Api]) -> None:
    api = start_api(LEASE_SECONDS=2)
    model_id = api.load(graphs.counter())["model_id"]
    used, unused = (opened(api, model_id, {"total": "before"}) for _ in range(2))
    x = np.array([1], np.float32)
    api.outputs(None, {"x": x}, session_id=used)
    epoch = api.http.get("/api/devices/cpu_0").json()["epoch"]
    queued = api.run(None, {"x": x}, wait=0, session_id=used, job={"delay_seconds": 2})
    api.stack.kill("cpu_0")
    api.stack.start("cpu_0")
    eventually(lambda: api.http.get("/api/devices/cpu_0").json()["epoch"] > epoch)
    assert api.job(queued["job_id"])["error"]["code"] == "session_lost"
    assert status(api, used)["state"] == "lost"
    eventually(lambda: api.model(model_id)["state"] == "loaded")
    again = api.post("/api/inference/run", {"session_id": used, "inputs": {"x": as_tensor(x)}})
    assert (again.status_code, again.json()["code"]) == (410, "session_lost")
    # Nothing of the other lay on the device yet: it goes on.
    assert api.outputs(None, {"x": x}, session_id=unused)["total"][0] == 1
    assert api.outputs(model_id, {"x": x, "before": x})["total"][0] == 2


def test_the_protocols_sequence_id_names_a_session(api: Api) -> None:
    api.load(graphs.counter(), "counting")
    session_id = api.http.post(
        "/api/inference/sessions", json={"model_name": "counting", "state": {"total": "before"}}
    ).json()["session_id"]
    body = {
        "parameters": {"sequence_id": session_id},
        "inputs": [{"name": "x", "shape": [1], "datatype": "FP32", "data": [5]}],
    }
    totals = [api.http.post("/v2/models/counting/infer", json=body).json()["outputs"][0]["data"] for _ in range(3)]
    assert totals == [[5], [10], [15]]
    closed(api, session_id)
