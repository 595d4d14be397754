"""What was asked is told again, and an ended job is submitted again as a new one, with other fields where wanted."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any

import httpx
import numpy as np
import pytest

from device_operations.client import Client
from tests.inference.graphs import counter
from tests.memory.calls import Memory, refused
from tests.support import graphs
from tests.support.stack import RunningStack
from tests.training_service.calls import Training, batch, described

_numbers = count(1)
WAIT = {"Prefer": "wait=30"}
X = graphs.tensor(np.ones((1, 4), np.float32))


@pytest.fixture(scope="module")
def http(stack: RunningStack) -> httpx.Client:
    graphs.tiny(stack.folder / "models" / "tiny.onnx")
    (stack.folder / "models" / "counter.onnx").write_bytes(counter())
    body = {"name": "tiny", "source": {"path": "tiny.onnx"}}
    assert stack.client.post("/api/inference/load-model", json=body, headers=WAIT).json()["state"] == "succeeded"
    return stack.client


def ended(http: httpx.Client, job: dict[str, Any], state: str = "succeeded") -> dict[str, Any]:
    told = http.get(f"/api/jobs/{job['job_id']}", params={"wait": 30}).json()
    assert told["state"] == state, told
    return dict(told)


def request_of(http: httpx.Client, job: dict[str, Any]) -> dict[str, Any]:
    answer = http.get(f"/api/jobs/{job['job_id']}", params={"include": "request"})
    assert answer.status_code == 200, answer.text
    told = answer.json()
    assert told["job_id"] == job["job_id"]
    return dict(told["request"])


def retried(http: httpx.Client, job: dict[str, Any], changes: dict[str, Any] | None = None) -> dict[str, Any]:
    answer = http.post(f"/api/jobs/{job['job_id']}/retry", json=changes or {})
    assert answer.status_code in (200, 202), answer.text
    made = answer.json()
    assert made["job_id"] != job["job_id"]
    assert (made["retried_from"], made["kind"]) == (job["job_id"], job["kind"])
    assert answer.headers["location"] == f"/api/jobs/{made['job_id']}"
    return dict(made)


def submit(http: httpx.Client, kind: str, request: dict[str, Any]) -> dict[str, Any]:
    answer = http.post("/api/jobs", json={"jobs": [{"kind": kind, "request": request}]})
    assert answer.status_code == 202, answer.text
    (job,) = answer.json()["jobs"]
    return dict(job)


def test_what_was_asked_is_told_as_it_was_asked(http: httpx.Client, stack: RunningStack) -> None:
    job = {"priority": 7, "labels": {"a": "b"}, "timeout_seconds": 5.0}
    asked: list[tuple[str, dict[str, Any]]] = [
        ("inference.run", {"model_name": "tiny", "inputs": {"x": X}, "job": job}),
        ("inference.run", {"model_name": "tiny", "inputs": {"x": X}, "outputs": ["y"], "form": "base64"}),
        ("memory.allocate", {"shape": [4, 4], "dtype": "float32", "label": "mine"}),
        ("memory.allocate", {"size_bytes": 8, "allocation_id": f"own-{next(_numbers)}", "fill": 3, "job": job}),
        ("inference.load_model", {"name": "tiny", "source": {"path": "tiny.onnx"}}),
        ("inference.load_model", {"name": "tiny", "source": {"path": "tiny.onnx"}, "options": {"max_batch_size": 4}}),
        ("training.initialize", described()),
    ]
    for kind, request in asked:
        made = submit(http, kind, request)
        assert request_of(http, made) == request, kind
        ended(http, made)
        assert request_of(http, made) == request, kind
    there = Memory(stack).made(size_bytes=64)
    clear = http.post(f"/api/memory/clear/{there}", json={"value": 4}).json()
    assert request_of(http, clear) == {"allocation_id": there, "value": 4}
    copy = {"source": {"allocation_id": there}, "destination": {"allocation_id": there, "offset": 32}}
    assert (
        request_of(http, Memory(stack).copy(there, there, to=32)) | copy
        == request_of(http, submit(http, "memory.copy", copy)) | copy
    )
    assert request_of(http, submit(http, "memory.copy", copy)) == copy
    written = Memory(stack).write(there, b"1234", offset=4)
    assert request_of(http, written).keys() == {"allocation_id", "offset", "blob_id"}
    plain = http.get(f"/api/jobs/{clear['job_id']}").json()
    assert "request" not in plain
    refused(http.get(f"/api/jobs/{clear['job_id']}", params={"include": "secrets"}), 422, "validation_failed")
    awaited = http.get(f"/api/jobs/{clear['job_id']}", params={"include": "request", "wait": 10}).json()
    assert (awaited["state"], awaited["request"]["value"]) == ("succeeded", 4)


def test_big_tensors_are_told_and_tried_again_as_blobs(http: httpx.Client) -> None:
    many = np.random.default_rng(1).standard_normal((8192, 4)).astype(np.float32)
    first = ended(http, submit(http, "inference.run", {"model_name": "tiny", "inputs": {"x": graphs.tensor(many)}}))
    (tensor,) = request_of(http, first)["inputs"].values()
    assert tensor.keys() == {"dtype", "shape", "blob_id"}
    again = ended(http, retried(http, first))
    blobs = [http.get(f"/api/blobs/{job['result']['outputs']['y']['blob_id']}").content for job in (first, again)]
    assert blobs[0] == blobs[1] and len(blobs[0]) == many.nbytes
    assert http.delete(f"/api/blobs/{tensor['blob_id']}").status_code == 204
    refused(http.post(f"/api/jobs/{first['job_id']}/retry"), 404, "blob_not_found")
    small = ended(http, retried(http, first, {"inputs": {"x": X}}))
    assert small["result"]["outputs"]["y"]["data"] == [3.0] * 4


def test_a_run_is_tried_again_with_other_fields(http: httpx.Client) -> None:
    job = {"priority": 2, "labels": {"a": "b"}}
    first = ended(http, submit(http, "inference.run", {"model_name": "tiny", "inputs": {"x": X}, "job": job}))
    assert first["retried_from"] is None
    again = ended(http, retried(http, first))
    assert again["result"]["outputs"] == first["result"]["outputs"]
    assert (again["priority"], again["labels"]) == (2, {"a": "b"})
    other = ended(http, retried(http, first, {"form": "base64", "job": {"priority": 9}}))
    assert "base64" in other["result"]["outputs"]["y"]
    assert (other["priority"], other["labels"]) == (9, {"a": "b"})
    assert request_of(http, other) == {
        "model_name": "tiny", "inputs": {"x": X}, "form": "base64", "job": {"priority": 9, "labels": {"a": "b"}},
    }  # fmt: skip
    third = ended(http, retried(http, other, {"form": None, "job": {"labels": None}}))
    assert request_of(http, third) == {"model_name": "tiny", "inputs": {"x": X}, "job": {"priority": 9}}
    assert third["retried_from"] == other["job_id"]
    path = f"/api/jobs/{first['job_id']}/retry"
    refused(http.post(path, json={"nonsense": 1}), 422, "validation_failed")
    refused(http.post(path, json={"job": 3}), 422, "validation_failed")
    refused(http.post(path, json={"model_name": "none"}), 404, "model_not_found")


def test_the_new_job_runs_although_it_failed_before(http: httpx.Client, stack: RunningStack) -> None:
    path = stack.folder / "models" / "later.onnx"
    path.write_bytes(b"no model")
    first = submit(http, "inference.load_model", {"name": "later", "source": {"path": "later.onnx"}})
    ended(http, first, "failed")
    graphs.tiny(path)
    again = ended(http, retried(http, first))
    assert again["resource"]["id"] != first["resource"]["id"]


def test_only_an_ended_job_is_tried_again(http: httpx.Client) -> None:
    waiting = submit(http, "inference.run", {"model_name": "tiny", "inputs": {"x": X}, "job": {"delay_seconds": 60}})
    refused(http.post(f"/api/jobs/{waiting['job_id']}/retry"), 409, "job_not_finished")
    http.delete(f"/api/jobs/{waiting['job_id']}")
    again = ended(http, retried(http, waiting, {"job": {"delay_seconds": None}}))
    assert again["submitted_at"] >= waiting["submitted_at"]
    refused(http.post("/api/jobs/none/retry"), 404, "job_not_found")


@pytest.mark.parametrize("own", [{}, {"allocation_id": "own-to-be-tried-again"}])
def test_what_it_makes_has_an_id_of_its_own(http: httpx.Client, own: dict[str, str]) -> None:
    first = ended(http, submit(http, "memory.allocate", {"size_bytes": 16, "fill": 7, **own}))
    again = ended(http, retried(http, first))
    assert again["resource"]["id"] != first["resource"]["id"]
    data = http.get(f"/api/memory/data/{again['resource']['id']}").content
    assert data == bytes([7]) * 16


def test_an_id_of_the_callers_own_is_used_again_where_nothing_was_made(http: httpx.Client) -> None:
    own = f"failed-{next(_numbers)}"
    first = submit(http, "memory.allocate", {"size_bytes": 16, "allocation_id": own, "job": {"delay_seconds": 60}})
    assert http.delete(f"/api/jobs/{first['job_id']}").json()["state"] == "cancelled"
    again = ended(http, retried(http, first, {"job": {"delay_seconds": None}}))
    assert again["resource"]["id"] == own


def test_every_kind_on_memory(http: httpx.Client, stack: RunningStack) -> None:
    there = Memory(stack).made(size_bytes=16)
    blob = http.post("/api/blobs", content=b"abcd").json()["blob_id"]
    place = {"allocation_id": there}
    for kind, request in (
        ("memory.write", {**place, "blob_id": blob}),
        ("memory.read", place),
        ("memory.clear", {**place, "value": 1}),
        ("memory.copy", {"source": place, "destination": {**place, "offset": 8}, "size_bytes": 4}),
    ):
        first = ended(http, submit(http, kind, request))
        again = ended(http, retried(http, first))
        assert again["result"].keys() == first["result"].keys()
    freed = ended(http, submit(http, "memory.deallocate", place))
    refused(http.post(f"/api/jobs/{freed['job_id']}/retry"), 404, "allocation_not_found")


def test_training_is_tried_again_by_number(http: httpx.Client, stack: RunningStack) -> None:
    training = Training(stack)
    first = ended(http, training.initialize_job())
    again = ended(http, retried(http, first))
    assert again["resource"]["id"] != first["resource"]["id"]
    session_id = first["resource"]["id"]
    unnumbered = ended(http, submit(http, "training.step", {"session_id": session_id, **batch(1)}))
    assert ended(http, retried(http, unnumbered))["result"]["step"] == 2
    numbered = ended(http, submit(http, "training.step", {"session_id": session_id, "sequence": 3, **batch(1)}))
    path = f"/api/jobs/{numbered['job_id']}/retry"
    refused(http.post(path), 409, "sequence_conflict")
    assert ended(http, retried(http, numbered, {"sequence": None}))["result"]["step"] == 4
    bad = {"session_id": session_id, "sequence": 5, **batch(1), "job": {"delay_seconds": 60}}
    waiting = submit(http, "training.step", bad)
    http.delete(f"/api/jobs/{waiting['job_id']}")
    assert ended(http, retried(http, waiting, {"job": {"delay_seconds": None}}))["result"]["step"] == 5
    kept = ended(http, submit(http, "training.checkpoint", {"session_id": session_id}))
    assert ended(http, retried(http, kept))["resource"]["id"] != kept["resource"]["id"]
    checked = ended(http, submit(http, "training.validate", {"session_id": session_id, **batch(2)}))
    assert ended(http, retried(http, checked))["result"].keys() == checked["result"].keys()
    over = ended(http, submit(http, "training.end_session", {"session_id": session_id}))
    refused(http.post(f"/api/jobs/{over['job_id']}/retry"), 410, "session_closed")


def test_a_key_and_a_wait_go_with_it(http: httpx.Client) -> None:
    first = ended(http, submit(http, "memory.allocate", {"size_bytes": 16}))
    path, headers = f"/api/jobs/{first['job_id']}/retry", {"Idempotency-Key": "again"} | WAIT
    answers = [http.post(path, json={"fill": 3}, headers=headers) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert answers[0].json() == answers[1].json()
    assert answers[0].json()["state"] == "succeeded"
    refused(http.post(path, json={"fill": 4}, headers=headers), 409, "idempotency_conflict")
    assert http.post(path, headers=WAIT).json()["job_id"] != answers[0].json()["job_id"]


def test_a_run_over_the_inference_protocol_is_told_without_its_tensors(http: httpx.Client) -> None:
    x = {"name": "x", "shape": [4096, 4], "datatype": "FP32", "data": [1.0] * 16384}
    answer = http.post("/v2/models/tiny/infer", json={"inputs": [x]}).json()
    job = {"job_id": answer["parameters"]["job_id"]}
    told = request_of(http, job)
    assert told == {"model_name": "tiny", "inputs": {"x": {"dtype": "float32", "shape": [4096, 4]}}}
    refused(http.post(f"/api/jobs/{job['job_id']}/retry"), 404, "blob_not_found")
    again = http.post(f"/api/jobs/{job['job_id']}/retry", json={"inputs": {"x": X}}, headers=WAIT).json()
    assert (again["state"], again["retried_from"]) == ("succeeded", job["job_id"])


def test_owners_try_their_own_again_and_an_admin_everybodys(start_stack: Callable[..., RunningStack]) -> None:
    stack = start_stack(API_KEYS="alice:secret-of-alice,bob:secret-of-bob,root:secret-of-root:admin")
    alice, bob, root = ({"X-API-Key": f"secret-of-{name}"} for name in ("alice", "bob", "root"))
    made = stack.client.post("/api/memory/allocate", json={"size_bytes": 8}, headers=alice | WAIT).json()
    path = f"/api/jobs/{made['job_id']}"
    strange = stack.client.get("/api/jobs/none", params={"include": "request"}, headers=bob).json()
    told = stack.client.get(path, params={"include": "request"}, headers=bob)
    assert (told.status_code, told.json()["code"]) == (404, strange["code"])
    refused(stack.client.post(f"{path}/retry", headers=bob), 404, "job_not_found")
    own = stack.client.post(f"{path}/retry", headers=alice | WAIT).json()
    others = stack.client.post(f"{path}/retry", headers=root | WAIT).json()
    assert [job["owner"] for job in (own, others)] == ["alice", "alice"]
    assert [job["state"] for job in (own, others)] == ["succeeded", "succeeded"]


def test_the_client_and_the_command_line_try_again(stack: RunningStack, http: httpx.Client) -> None:
    import json
    import subprocess
    import sys

    with Client(stack.http_url) as client:
        first = client.submit("memory.allocate", {"size_bytes": 8, "fill": 1}, wait=30)
        again = client.retry(first, {"fill": 2}, wait=30)
        assert (again.state, again.retried_from) == ("succeeded", first.job_id)
        assert client.request_of(again) == {"size_bytes": 8, "fill": 2}
        many = client.submit_many([("memory.allocate", {"size_bytes": 8})] * 3, wait=30)
        assert [job.state for job in many] == ["succeeded"] * 3
    command = [
        sys.executable,
        "-m",
        "device_operations",
        "retry",
        again.job_id,
        "--request",
        '{"fill": 3}',
        "--wait",
        "--json",
    ]
    environment = {**stack.environment, "DEVICE_OPERATIONS_HTTP__PORT": stack.http_url.rpartition(":")[2]}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["state"], told["retried_from"]) == ("succeeded", again.job_id)
