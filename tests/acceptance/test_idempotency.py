"""An Idempotency-Key: the first answer again on every submission, also when what it named is gone by now."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Any

import httpx
import numpy as np
import pytest

from tests.inference.graphs import counter
from tests.memory.calls import Memory, refused
from tests.support import graphs
from tests.support.stack import RunningStack
from tests.training_service.calls import Training, batch

_numbers = count(1)
WAIT = {"Prefer": "wait=30"}


@pytest.fixture(scope="module")
def http(stack: RunningStack) -> httpx.Client:
    graphs.tiny(stack.folder / "models" / "tiny.onnx")
    (stack.folder / "models" / "counter.onnx").write_bytes(counter())
    return stack.client


def loaded(http: httpx.Client, path: str) -> str:
    body = {"name": f"model-{next(_numbers)}", "source": {"path": path}}
    job = http.post("/api/inference/load-model", json=body, headers=WAIT).json()
    assert job["state"] == "succeeded", job
    return str(job["resource"]["id"])


def unloaded(http: httpx.Client, model_id: str) -> None:
    answer = http.delete(f"/api/inference/unload-model/{model_id}", params={"force": "true"}, headers=WAIT)
    assert answer.json()["state"] == "succeeded", answer.text


def freed(http: httpx.Client, allocation_id: str) -> None:
    answer = http.delete(f"/api/memory/deallocate/{allocation_id}", headers=WAIT)
    assert answer.json()["state"] == "succeeded", answer.text


Ask = tuple[str, str, dict[str, Any]]
Takes = Callable[[], None]


def _on_memory(method: str, path: str, body: dict[str, Any]) -> Callable[[RunningStack], tuple[Ask, Takes]]:
    def make(stack: RunningStack) -> tuple[Ask, Takes]:
        made = Memory(stack).made(size_bytes=64)
        other = Memory(stack).made(size_bytes=64)
        told = {"source": {"allocation_id": made}, "destination": {"allocation_id": other}} if "copy" in path else body
        return (method, path.format(made), {"json": told}), lambda: freed(stack.client, made)

    return make


def _freeing(stack: RunningStack) -> tuple[Ask, Takes]:
    made = Memory(stack).made(size_bytes=64)
    return ("DELETE", f"/api/memory/deallocate/{made}", {}), lambda: None


def _writing(stack: RunningStack) -> tuple[Ask, Takes]:
    made = Memory(stack).made(size_bytes=64)
    return ("PUT", f"/api/memory/data/{made}", {"content": b"a" * 64}), lambda: freed(stack.client, made)


def _reading(stack: RunningStack) -> tuple[Ask, Takes]:
    made = Memory(stack).made(size_bytes=64)
    entry = {"kind": "memory.read", "request": {"allocation_id": made}}
    return ("POST", "/api/jobs", {"json": {"jobs": [entry, entry]}}), lambda: freed(stack.client, made)


def _running(stack: RunningStack) -> tuple[Ask, Takes]:
    model_id = loaded(stack.client, "tiny.onnx")
    body = {"model_id": model_id, "inputs": {"x": graphs.tensor(np.ones((1, 4), np.float32))}}
    return ("POST", "/api/inference/run", {"json": body}), lambda: unloaded(stack.client, model_id)


def _unloading(stack: RunningStack) -> tuple[Ask, Takes]:
    model_id = loaded(stack.client, "tiny.onnx")
    return ("DELETE", f"/api/inference/unload-model/{model_id}", {}), lambda: None


def _session(stack: RunningStack, model_id: str) -> str:
    body = {"model_id": model_id, "state": {"total": "before"}}
    answer = stack.client.post("/api/inference/sessions", json=body)
    assert answer.status_code == 201, answer.text
    return str(answer.json()["session_id"])


def _running_in_a_session(stack: RunningStack) -> tuple[Ask, Takes]:
    model_id = loaded(stack.client, "counter.onnx")
    session_id = _session(stack, model_id)
    body = {"session_id": session_id, "inputs": {"x": graphs.tensor(np.ones(1, np.float32))}}
    close = f"/api/inference/sessions/{session_id}"
    return ("POST", "/api/inference/run", {"json": body}), lambda: stack.client.delete(close, headers=WAIT)


def _closing(stack: RunningStack) -> tuple[Ask, Takes]:
    session_id = _session(stack, loaded(stack.client, "counter.onnx"))
    return ("DELETE", f"/api/inference/sessions/{session_id}", {}), lambda: None


def _stepping(stack: RunningStack) -> tuple[Ask, Takes]:
    training = Training(stack)
    session_id = training.initialize()
    body = {"session_id": session_id, **batch(1)}
    return ("POST", "/api/training/step", {"json": body}), lambda: training.end(session_id)


def _checkpointing(stack: RunningStack) -> tuple[Ask, Takes]:
    training = Training(stack)
    session_id = training.initialize()
    body = {"session_id": session_id}
    return ("POST", "/api/training/checkpoint", {"json": body}), lambda: training.end(session_id)


def _ending(stack: RunningStack) -> tuple[Ask, Takes]:
    session_id = Training(stack).initialize()
    return ("DELETE", f"/api/training/session/{session_id}", {}), lambda: None


CASES = {
    "clear": _on_memory("POST", "/api/memory/clear/{}", {"value": 3}),
    "copy": _on_memory("POST", "/api/memory/copy", {}),
    "deallocate": _freeing,
    "write": _writing,
    "two reads in one body": _reading,
    "run": _running,
    "unload": _unloading,
    "run in a session": _running_in_a_session,
    "close a session": _closing,
    "step": _stepping,
    "checkpoint": _checkpointing,
    "end a training session": _ending,
}


def ids(answer: httpx.Response) -> list[str]:
    assert answer.status_code in (200, 202), answer.text
    told = answer.json()
    return [job["job_id"] for job in told.get("jobs", [told])]


@pytest.mark.parametrize("case", CASES)
def test_the_first_jobs_answer_although_what_they_named_is_gone(
    stack: RunningStack, http: httpx.Client, case: str
) -> None:
    (method, path, more), take_away = CASES[case](stack)
    headers = {"Idempotency-Key": f"key-{next(_numbers)}"}
    first = ids(http.request(method, path, headers=headers, **more))
    for job_id in first:
        assert http.get(f"/api/jobs/{job_id}", params={"wait": 30}).json()["state"] == "succeeded"
    take_away()
    assert http.request(method, path, **more).status_code in (404, 410), "without the key, what it names is gone"
    assert ids(http.request(method, path, headers=headers, **more)) == first
    awaited = http.request(method, path, headers=headers | WAIT, **more)
    assert (awaited.status_code, ids(awaited)) == (200, first)
    changed = (
        {"content": b"b" * 64} if "content" in more else {"json": {**more.get("json", {}), "job": {"priority": 1}}}
    )
    if path == "/api/jobs":
        changed = {"json": {"jobs": more["json"]["jobs"][:1]}}
    if "/inference/" not in path or method != "DELETE":  # those take no body
        refused(http.request(method, path, headers=headers, **changed), 409, "idempotency_conflict")


def test_a_write_of_other_bytes_into_freed_memory_is_refused_by_the_key(stack: RunningStack) -> None:
    made = Memory(stack).made(size_bytes=8)
    address = f"/api/memory/data/{made}"
    first = stack.client.put(address, content=b"12345678", headers={"Idempotency-Key": "w"} | WAIT).json()
    assert first["state"] == "succeeded"
    freed(stack.client, made)
    refused(stack.client.put(address, content=b"x", headers={"Idempotency-Key": "unused"}), 404, "allocation_not_found")
    refused(stack.client.put(address, content=b"x", headers={"Idempotency-Key": "w"}), 409, "idempotency_conflict")


def test_the_same_key_opens_one_session(stack: RunningStack, http: httpx.Client) -> None:
    model_id = loaded(http, "counter.onnx")
    body = {"model_id": model_id, "state": {"total": "before"}}
    headers = {"Idempotency-Key": "talk"}
    first = http.post("/api/inference/sessions", json=body, headers=headers)
    assert first.status_code == 201, first.text
    again = http.post("/api/inference/sessions", json=body, headers=headers)
    assert (again.status_code, again.json()["session_id"]) == (201, first.json()["session_id"])
    assert again.headers["location"] == first.headers["location"]
    refused(
        http.post("/api/inference/sessions", json={"model_id": model_id}, headers=headers), 409, "idempotency_conflict"
    )
    unloaded(http, model_id)
    last = http.post("/api/inference/sessions", json=body, headers=headers)
    assert (last.status_code, last.json()["session_id"]) == (201, first.json()["session_id"])
    assert last.json()["state"] == "closed"
    refused(
        http.post("/api/inference/sessions", json={"model_id": model_id}, headers=headers), 409, "idempotency_conflict"
    )


def test_a_session_that_was_refused_leaves_its_key_free(stack: RunningStack, http: httpx.Client) -> None:
    headers = {"Idempotency-Key": "refused"}
    body: dict[str, Any] = {"model_id": "no-such-model"}
    refused(http.post("/api/inference/sessions", json=body, headers=headers), 404, "model_not_found")
    body = {"model_id": loaded(http, "counter.onnx"), "state": {"total": "before"}}
    assert http.post("/api/inference/sessions", json=body, headers=headers).status_code == 201


@pytest.mark.parametrize("route", ["/api/memory/allocate", "/api/inference/sessions", "/api/jobs"])
def test_of_submissions_at_once_under_one_key_one_counts(stack: RunningStack, http: httpx.Client, route: str) -> None:
    body: dict[str, Any] = {"size_bytes": 32}
    if route.endswith("sessions"):
        body = {"model_id": loaded(http, "counter.onnx"), "state": {"total": "before"}}
    elif route.endswith("jobs"):
        body = {"jobs": [{"kind": "memory.allocate", "request": body}] * 2}
    headers = {"Idempotency-Key": f"together-{route}"}
    with ThreadPoolExecutor(8) as together:
        answers = list(together.map(lambda _: http.post(route, json=body, headers=headers), range(8)))
    assert {answer.status_code for answer in answers} <= {200, 201, 202}
    told = {answer.json()["session_id"] if route.endswith("sessions") else tuple(ids(answer)) for answer in answers}
    assert len(told) == 1


def test_one_that_frees_and_is_sent_again_at_once_is_one_job(stack: RunningStack, http: httpx.Client) -> None:
    for _ in range(10):
        made = Memory(stack).made(size_bytes=16)
        address = f"/api/memory/deallocate/{made}"
        headers = {"Idempotency-Key": f"free-{made}"} | WAIT
        with ThreadPoolExecutor(4) as together:
            answers = list(together.map(lambda _: http.delete(address, headers=headers), range(4)))  # noqa: B023
        assert len({answer.json()["job_id"] for answer in answers}) == 1


# ---- Prefer: wait on a body of many


def test_a_bulk_submission_waits_for_all_its_jobs(stack: RunningStack, http: httpx.Client) -> None:
    entries = [{"kind": "memory.allocate", "request": {"size_bytes": 16}} for _ in range(20)]
    answer = http.post("/api/jobs", json={"jobs": entries}, headers=WAIT)
    assert answer.status_code == 200, answer.text
    jobs = answer.json()["jobs"]
    assert [job["state"] for job in jobs] == ["succeeded"] * 20
    assert all(job["finished_at"] and job["result"] for job in jobs)
    assert len({job["resource"]["id"] for job in jobs}) == 20


def test_it_answers_as_they_stand_when_the_time_is_up(stack: RunningStack, http: httpx.Client) -> None:
    entries = [
        {"kind": "memory.allocate", "request": {"size_bytes": 16}},
        {"kind": "memory.allocate", "request": {"size_bytes": 16, "job": {"delay_seconds": 60}}},
    ]
    answer = http.post("/api/jobs", json={"jobs": entries}, headers={"Prefer": "wait=1"})
    assert answer.status_code == 202
    assert [job["state"] for job in answer.json()["jobs"]] == ["succeeded", "scheduled"]
    http.delete(f"/api/jobs/{answer.json()['jobs'][1]['job_id']}")


def test_it_waits_for_failures_too(stack: RunningStack, http: httpx.Client) -> None:
    (stack.folder / "models" / "bad.onnx").write_bytes(b"no model")
    entries = [
        {"kind": "inference.load_model", "request": {"name": "bad", "source": {"path": "bad.onnx"}}},
        {"kind": "memory.allocate", "request": {"size_bytes": 16}},
    ]
    answer = http.post("/api/jobs", json={"jobs": entries}, headers=WAIT)
    assert (answer.status_code, [job["state"] for job in answer.json()["jobs"]]) == (200, ["failed", "succeeded"])


def test_a_key_whose_job_an_earlier_one_answers_gives_that_one_again(stack: RunningStack, http: httpx.Client) -> None:
    body = {"size_bytes": 16, "allocation_id": f"own-{next(_numbers)}"}
    first = ids(http.post("/api/memory/allocate", json=body))
    for _ in range(2):
        assert (
            ids(http.post("/api/memory/allocate", json=body, headers={"Idempotency-Key": body["allocation_id"]}))
            == first
        )
