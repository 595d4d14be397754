"""What does not fit is refused with its code, by name, and changes nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest

from tests.training_service.calls import Training, arrays, batch, described, refused, tensor

Start = Callable[..., Training]


@pytest.fixture(scope="module")
def session_id(training: Training) -> str:
    return training.initialize()


def initialize(training: Training, **fields: Any) -> httpx.Response:
    return training.client.post("/api/training/initialize", json=described(**fields))


INPUTS, TARGETS = arrays(1)
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "another name": ({"inputs": {"x": tensor(INPUTS)}}, "takes the inputs"),
    "too wide": ({"inputs": {"input": tensor(np.ones((8, 7), np.float32))}}, "8, 7"),
    "another dtype": ({"inputs": {"input": tensor(np.ones((8, 6), np.float64))}}, "float64"),
    "fewer targets": ({"targets": tensor(TARGETS[:5])}, "first axes differ"),
    "targets out of range": ({"targets": tensor(np.full(8, 4))}, "4"),
    "negative targets": ({"targets": tensor(np.full(8, -1))}, "-1"),
    "targets of another kind": ({"targets": tensor(np.ones((8, 4, 2), np.float32))}, ""),
    "no samples": ({"inputs": {"input": tensor(np.ones((0, 6), np.float32))}, "targets": tensor(TARGETS[:0])}, ""),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_batch_that_does_not_fit_fails_by_name_and_changes_nothing(
    training: Training, session_id: str, case: str
) -> None:
    fields, words = WRONG[case]
    before = training.status(session_id)
    job = training.submit("step", {"session_id": session_id, **batch(1), **fields})
    assert words in training.failed(job, "input_mismatch")["error"]["message"]
    after = training.status(session_id)
    assert (after["step"], after["submitted_sequence"]) == (before["step"], before["submitted_sequence"])


def test_elements_that_do_not_fit_their_shape_are_refused_at_once(training: Training, session_id: str) -> None:
    given = {"dtype": "float32", "shape": [8, 6], "data": [1.0, 2.0]}
    body = {"session_id": session_id, "inputs": {"input": given}, "targets": tensor(TARGETS)}
    refused(training.client.post("/api/training/step", json=body), 422, "input_mismatch")


def test_a_batch_over_the_limit_is_refused_alone_and_of_a_dataset(training: Training, session_id: str) -> None:
    body = {"session_id": session_id, **batch(1, 33)}
    told = refused(training.client.post("/api/training/step", json=body), 422, "batch_too_large")
    assert told["context"] == {"batch_size": 33, "max_batch_size": 32}
    given = {"session_id": session_id, "dataset": {**batch(1, 64), "batch_size": 64, "epochs": 1}}
    refused(training.client.post("/api/training/step", json=given), 422, "batch_too_large")


def test_layers_that_are_unknown_or_do_not_follow_from_each_other_are_refused(training: Training) -> None:
    unknown = initialize(training, model={"kind": "layers", "layers": [{"type": "linaer", "in_features": 1}]})
    assert "did you mean 'linear'" in refused(unknown, 422, "validation_failed")["detail"]
    # Two layers that do not fit show with the first batch.
    layers = [
        {"type": "linear", "in_features": 6, "out_features": 5},
        {"type": "linear", "in_features": 6, "out_features": 4},
    ]
    session_id = training.initialize(model={"kind": "layers", "layers": layers})
    training.failed(training.step(session_id, 1), "input_mismatch")
    training.end(session_id)


@pytest.mark.parametrize("kind", ["linear", "embedding", "lstm", "conv2d"])
def test_a_layer_of_a_trillion_parameters_is_refused_before_anything_is_allocated(
    training: Training, kind: str
) -> None:
    side = 10**6
    layer = {
        "linear": {"in_features": side, "out_features": side},
        "embedding": {"num_embeddings": side, "embedding_dim": side},
        "lstm": {"input_size": side, "hidden_size": side},
        "conv2d": {"in_channels": side, "out_channels": side, "kernel_size": 3},
    }[kind]
    model = {"kind": "layers", "layers": [{"type": kind, **layer}]}
    told = refused(initialize(training, model=model), 507, "insufficient_memory")
    assert told["context"]["needed_bytes"] >= 12 * 10**12
    assert training.client.get("/api/memory/device/cpu_0").json()["awaiting_bytes"] == 0


def test_more_than_the_device_has_left_is_refused(training: Training) -> None:
    before = training.client.get("/api/memory/device/cpu_0").json()
    free = before["budget_bytes"]
    rows = free // (4 * 4 * 2) + 1  # with its gradient and both of Adam's moments, half of the budget
    model = {"kind": "layers", "layers": [{"type": "embedding", "num_embeddings": rows, "embedding_dim": 2}]}
    taken = training.client.post("/api/memory/allocate", json={"size_bytes": 2**20}).json()
    told = refused(initialize(training, model=model), 507, "insufficient_memory")
    assert told["context"]["free_bytes"] < told["context"]["needed_bytes"]
    training.client.delete(f"/api/memory/deallocate/{taken['resource']['id']}", headers={"Prefer": "wait=10"})
    assert training.client.get("/api/memory/device/cpu_0").json()["reserved_bytes"] == before["reserved_bytes"]


@pytest.mark.skipif(sys.platform != "linux", reason="a limit on a running process's memory is Linux's")
def test_a_step_that_runs_out_of_memory_fails_and_the_session_stays_at_its_last_good_step(training: Training) -> None:
    import resource

    wide = [{"type": "linear", "in_features": 6, "out_features": 500_000}, {"type": "relu"},
            {"type": "linear", "in_features": 500_000, "out_features": 4}]  # fmt: skip
    fields = {"model": {"kind": "layers", "layers": wide}, "optimizer": {"type": "sgd", "learning_rate": 1e-4}}
    session_id, twin = training.initialize(**fields), training.initialize(**fields)
    for one in (session_id, twin):
        training.done(training.step(one, 1, **batch(1, 2)))
    worker = training.stack.process("cpu_0")
    # Enough for the activations of two samples, not for those of 32, 64 MB for each layer.
    limit = worker.memory_info().vms + 80 * 2**20
    resource.prlimit(worker.pid, resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    try:
        error = training.failed(training.step(session_id, 2, **batch(2, 32)), "out_of_memory")["error"]
        assert "the step" in error["message"]
        status = training.status(session_id)
        assert (status["state"], status["step"], status["applied_sequence"]) == ("ready", 1, 1)
        assert training.done(training.step(session_id, 2, **batch(3, 2)))["result"]["step"] == 2
    finally:
        resource.prlimit(worker.pid, resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    training.done(training.step(twin, 2, **batch(3, 2)))
    assert training.state(session_id) == training.state(twin)
    for one in (session_id, twin):
        training.end(one)


def test_programs_and_paths_that_are_not_trusted_are_refused(training: Training) -> None:
    blob_id = training.upload(b"a program")
    refused(initialize(training, model={"kind": "torchscript", "blob_id": blob_id}), 422, "untrusted_program")
    refused(initialize(training, model={"kind": "onnx", "path": "../secret.onnx"}), 422, "path_not_allowed")
    refused(initialize(training, model={"kind": "onnx", "blob_id": "none-of-mine"}), 404, "blob_not_found")
    job = training.initialize_job(model={"kind": "onnx", "blob_id": blob_id})
    training.failed(job, "model_invalid")
    session_id = job["resource"]["id"]
    assert training.status(session_id)["state"] == "failed"
    assert training.status(session_id)["error"]["code"] == "model_invalid"
    body = {"session_id": session_id, **batch(1)}
    refused(training.client.post("/api/training/step", json=body), 410, "session_closed")


def test_jobs_of_a_session_that_could_not_be_made_fail_with_its_reason(training: Training) -> None:
    blob_id = training.upload(b"no model at all")
    entries = [{"kind": "training.initialize", "request": described(model={"kind": "onnx", "blob_id": blob_id})}]
    entries[0]["request"]["job"] = {"delay_seconds": 0.5}
    job = training.client.post("/api/jobs", json={"jobs": entries}).json()["jobs"][0]
    waiting = training.step(job["resource"]["id"], 1)
    training.failed(job, "model_invalid")
    training.failed(waiting, "model_invalid")
    assert training.client.get("/api/memory/device/cpu_0").json()["reserved_bytes"] >= 0


def test_ids_that_name_nothing_are_told_so(training: Training) -> None:
    client = training.client
    refused(client.post("/api/training/step", json={"session_id": "none", **batch(1)}), 404, "session_not_found")
    refused(client.get("/api/training/status/none"), 404, "session_not_found")
    refused(client.post("/api/training/checkpoint", json={"session_id": "none"}), 404, "session_not_found")
    refused(client.delete("/api/training/session/none"), 404, "session_not_found")
    refused(client.delete("/api/training/checkpoints/none"), 404, "checkpoint_not_found")
    body = {"checkpoint_id": "none", **batch(1)}
    refused(client.post("/api/training/validate", json=body), 404, "checkpoint_not_found")


def test_another_owner_s_session_and_checkpoint_are_not_to_be_seen(start_training: Start) -> None:
    training = start_training(API_KEYS="anna:anna-key-1,ben:ben-key-12,root:root-key-1:admin")
    session_id = training.initialize()
    made = training.checkpoint(session_id)
    with httpx.Client(base_url=training.stack.http_url, headers={"X-API-Key": "ben-key-12"}, trust_env=False) as ben:
        refused(ben.get(f"/api/training/status/{session_id}"), 404, "session_not_found")
        refused(ben.post("/api/training/step", json={"session_id": session_id, **batch(1)}), 404, "session_not_found")
        refused(ben.delete(f"/api/training/session/{session_id}"), 404, "session_not_found")
        refused(ben.get(f"/api/training/checkpoints/{made['checkpoint_id']}"), 404, "checkpoint_not_found")
        refused(ben.delete(f"/api/training/checkpoints/{made['checkpoint_id']}"), 404, "checkpoint_not_found")
        asked = described(resume_from=made["checkpoint_id"])
        refused(ben.post("/api/training/initialize", json=asked), 404, "checkpoint_not_found")
        refused(ben.get(f"/api/blobs/{made['blob_id']}"), 404, "blob_not_found")
        assert ben.get("/api/training/checkpoints").json()["checkpoints"] == []
    with httpx.Client(base_url=training.stack.http_url, headers={"X-API-Key": "root-key-1"}, trust_env=False) as root:
        assert root.get(f"/api/training/status/{session_id}").json()["owner"] == "anna"
