"""Every kind of task keeps Celery's promises: its result goes on, what is linked to it is called, and it is revoked."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from celery import chain

from device_operations.jobs import Kind
from tests.direct.conftest import Caller
from tests.support import graphs
from tests.support.stack import eventually
from tests.training_service.calls import batch, described

P = "$previous"


@pytest.fixture(scope="module")
def things(caller: Caller) -> dict[str, Any]:
    """What requests name, made over HTTP: an allocation, a blob, a model, its session, a training session."""
    client = caller.stack.client
    (caller.stack.folder / "models").mkdir(exist_ok=True)
    graphs.tiny(caller.stack.folder / "models" / "tiny.onnx")

    def made(path: str, body: dict[str, Any]) -> dict[str, Any]:
        answer = client.post(path, json=body, headers={"Prefer": "wait=60"})
        assert answer.status_code in (200, 201), answer.text
        found: dict[str, Any] = answer.json()
        return found

    model = made("/api/inference/load-model", {"name": "tiny", "source": {"path": "tiny.onnx"}})["resource"]["id"]
    other = made("/api/inference/load-model", {"name": "other", "source": {"path": "tiny.onnx"}})["resource"]["id"]
    return {
        "allocation": made("/api/memory/allocate", {"size_bytes": 64, "device_id": "cpu_0"})["resource"]["id"],
        "blob": client.post("/api/blobs", content=b"0123456789").json()["blob_id"],
        "model": model,
        "other": other,
        "open": made("/api/inference/sessions", {"model_id": model, "state": {}})["session_id"],
        "training": made("/api/training/initialize", described())["resource"]["id"],
        "ending": made("/api/training/initialize", described())["resource"]["id"],
    }


def request_of(kind: Kind, things: dict[str, Any]) -> dict[str, Any]:
    """A request of the kind that succeeds."""
    place = {"allocation_id": things["allocation"]}
    return {
        Kind.MEMORY_ALLOCATE: {"size_bytes": 16},
        Kind.MEMORY_DEALLOCATE: {"allocation_id": {P: "allocation_id"}},
        Kind.MEMORY_COPY: {"source": place, "destination": {**place, "offset": 8}, "size_bytes": 8},
        Kind.MEMORY_CLEAR: {**place, "value": 1},
        Kind.MEMORY_WRITE: {**place, "blob_id": things["blob"]},
        Kind.MEMORY_READ: place,
        Kind.INFERENCE_LOAD_MODEL: {"name": "more", "source": {"path": "tiny.onnx"}},
        Kind.INFERENCE_RUN: {"model_id": things["model"], "inputs": {"x": graphs.tensor(np.ones((1, 4), np.float32))}},
        Kind.INFERENCE_UNLOAD_MODEL: {"model_id": things["other"]},
        Kind.INFERENCE_CLOSE_SESSION: {"session_id": things["open"]},
        Kind.TRAINING_INITIALIZE: described(),
        Kind.TRAINING_STEP: {"session_id": things["training"], **batch(1)},
        Kind.TRAINING_CHECKPOINT: {"session_id": things["training"]},
        Kind.TRAINING_VALIDATE: {"session_id": things["training"], **batch(2)},
        Kind.TRAINING_END_SESSION: {"session_id": things["ending"]},
    }[kind]


@pytest.mark.parametrize("kind", list(Kind))
def test_one_that_is_scheduled_is_revoked(caller: Caller, things: dict[str, Any], kind: Kind) -> None:
    request = request_of(kind, things)
    if P in str(request):
        request = {"allocation_id": things["allocation"]}
    sent = caller.task(kind.value, request, immutable=True).apply_async(countdown=30)
    job = eventually(lambda: caller.job(sent.id))
    assert job["state"] == "scheduled", job["error"]
    sent.revoke()
    assert caller.ended(sent.id, 5)["state"] == "cancelled"
    eventually(lambda: sent.state == "REVOKED")


@pytest.mark.parametrize("kind", list(Kind))
def test_what_is_linked_is_called_once_and_the_result_is_the_jobs(
    plain: Caller, things: dict[str, Any], kind: Kind
) -> None:
    plain.forget_notes()
    request = request_of(kind, things)
    task = plain.task(kind.value, request, immutable=P not in str(request), link=plain.plain("note"))
    sent = chain(plain.allocate(), task).apply_async()
    result = sent.get(timeout=60)
    job = plain.ended(sent.id)
    assert (job["kind"], job["state"], job["result"]) == (kind.value, "succeeded", result)
    assert [note["args"] for note in plain.noted()] == [[result]]
    assert len(plain.notes()) == 1


@pytest.mark.parametrize("kind", list(Kind))
def test_one_that_fails_says_so_and_what_is_linked_to_its_error_is_called(plain: Caller, kind: Kind) -> None:
    plain.forget_notes()
    bad = plain.task(kind.value, {"surprise": 1}, immutable=True, link_error=plain.plain("note"))
    sent = chain(plain.allocate(), bad).apply_async()
    with pytest.raises(Exception, match="does not fit the contract"):
        sent.get(timeout=30)
    assert plain.ended(sent.id)["error"]["code"] == "validation_failed"
    assert [note["args"] for note in plain.noted()] == [[sent.id]]
