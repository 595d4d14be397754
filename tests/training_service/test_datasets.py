"""Many steps in one job: told as they go, stopped at a step, overtaken by what is more urgent, kept up to a failure."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from safetensors.numpy import save

from tests.support.stack import eventually
from tests.training_service.calls import Training, arrays, batch, tensor


def dataset(training: Training, count: int = 64, **fields: Any) -> dict[str, Any]:
    inputs, targets = arrays(1000, count)
    return {"blob_id": training.upload(save({"input": inputs, "targets": targets})), "batch_size": 8, **fields}


def running(training: Training, session_id: str, at_least: int = 1) -> dict[str, Any]:
    """The status of a session once its job has told of that many steps."""
    return dict(eventually(
        lambda: (status := training.status(session_id))["step"] >= at_least and status, 30, 0.02))  # fmt: skip


def test_a_job_of_epochs_records_every_step(training: Training) -> None:
    session_id = training.initialize()
    job = training.step(session_id, 1, dataset=dataset(training, epochs=3))
    ended = training.done(job)
    result = ended["result"]
    assert (ended["progress"]["done"], ended["progress"]["total"]) == (24, 24)
    assert (result["steps"], result["step"], result["samples"], result["steps_applied"]) == (24, 24, 192, 24)
    losses = training.losses(session_id)
    assert [one[0] for one in losses] == list(range(1, 25))
    assert result["last_loss"] == losses[-1][1] == training.status(session_id)["loss"]
    judged = training.step(session_id, dataset=dataset(training, epochs=1), mode="evaluate")
    assert training.done(judged)["result"]["accuracy"] > 0.5
    assert training.status(session_id)["step"] == 24
    training.end(session_id)


def test_a_long_job_tells_how_far_it_is_and_stops_at_a_step(training: Training) -> None:
    session_id = training.initialize()
    job = training.step(session_id, 1, dataset=dataset(training, steps=1_000_000))
    status = running(training, session_id)
    assert status["state"] == "stepping"
    told = eventually(lambda: training.client.get(f"/api/jobs/{job['job_id']}").json()["progress"])
    assert told["total"] == 1_000_000 and told["done"] >= 1 and told["loss"] > 0
    assert training.client.delete(f"/api/jobs/{job['job_id']}").status_code == 202
    training.done(job, "cancelled")
    status = training.status(session_id, history=100_000)
    # What was done is kept: the number is used, and the history ends with the session's step.
    assert status["applied_sequence"] == 1 and status["state"] == "ready"
    assert [one["step"] for one in status["history"]][-1] == status["step"] > 1
    assert training.done(training.step(session_id, 2))["result"]["step"] == status["step"] + 1
    training.end(session_id)


def test_what_is_more_urgent_runs_between_two_steps_and_what_is_not_waits(training: Training) -> None:
    long, other = training.initialize(), training.initialize()
    job = training.step(long, 1, dataset=dataset(training, steps=1_000_000))
    running(training, long)
    later = training.step(other, 1, job={"priority": 5})
    urgent = training.initialize_job(job={"priority": 9})
    training.done(urgent)
    quick = training.step(urgent["resource"]["id"], 1, job={"priority": 8})
    assert training.done(quick)["result"]["step"] == 1
    assert training.client.get(f"/api/jobs/{later['job_id']}").json()["state"] in ("queued", "reserved")
    training.client.delete(f"/api/jobs/{job['job_id']}")
    training.done(job, "cancelled")
    training.done(later)
    for session_id in (long, other, urgent["resource"]["id"]):
        training.end(session_id)


def test_a_job_that_runs_past_its_time_keeps_what_it_has_done(training: Training) -> None:
    session_id = training.initialize()
    job = training.step(session_id, 1, dataset=dataset(training, steps=1_000_000), job={"timeout_seconds": 0.7})
    training.failed(job, "timeout")
    status = training.status(session_id)
    assert status["applied_sequence"] == 1 and status["step"] >= 1
    training.end(session_id)


def test_a_loss_that_is_not_finite_stops_at_the_last_good_step(training: Training) -> None:
    session_id = training.initialize(
        model={"kind": "layers", "layers": [{"type": "linear", "in_features": 6, "out_features": 1}]},
        loss="mse", optimizer={"type": "sgd", "learning_rate": 0.01},
    )  # fmt: skip
    inputs = np.ones((24, 6), np.float32)
    inputs[20] = np.nan
    given = {"inputs": {"input": tensor(inputs)}, "targets": tensor(np.ones((24, 1), np.float32))}
    job = training.step(session_id, 1, dataset={**given, "batch_size": 8, "epochs": 1, "shuffle": False})
    error = training.failed(job, "nonfinite_loss")["error"]
    assert "step 3" in error["message"] and error["detail"]["last_good_step"] == 2
    status = training.status(session_id)
    assert (status["step"], status["applied_sequence"]) == (2, 1)
    good = {"inputs": {"input": tensor(np.ones((8, 6), np.float32))}, "targets": tensor(np.ones((8, 1), np.float32))}
    body = {"session_id": session_id, "sequence": 2, **good}
    assert training.done(training.submit("step", body))["result"]["step"] == 3
    # One batch that fails has done nothing: its number is free.
    bad = {**good, "inputs": {"input": tensor(np.full((8, 6), np.inf, np.float32))}}
    training.failed(training.submit("step", {"session_id": session_id, "sequence": 3, **bad}), "nonfinite_loss")
    assert training.done(training.submit("step", {**body, "sequence": 3}))["result"]["step"] == 4
    training.end(session_id)


def test_gradients_are_given_back_accumulated_and_applied(training: Training) -> None:
    session_id = training.initialize()
    asked = training.step(session_id, 1, mode="gradients", form="blob")
    result = training.done(asked)["result"]
    assert result["step"] == 0 and result["accumulated_batches"] == 1
    from safetensors.numpy import load

    gradients = load(training.blob(result["gradients"]["blob_id"]))
    assert set(gradients) == set(result["gradient_norms"]) == {
        "fc1.weight", "fc1.bias", "norm.weight", "norm.bias", "fc2.weight", "fc2.bias"}  # fmt: skip
    norms = {name: float(np.linalg.norm(gradient.astype(np.float64))) for name, gradient in gradients.items()}
    assert all(abs(norms[name] - norm) < 1e-4 for name, norm in result["gradient_norms"].items())
    training.done(training.step(session_id, 2, mode="gradients"))
    applied = training.done(training.step(session_id, 3, mode="apply", gradient_clip_norm=0.1))["result"]
    assert applied["step"] == 1 and applied["learning_rate"] == 0.01 and applied["gradient_norm"] > 0
    # Nothing is accumulated any more.
    training.failed(training.step(session_id, 4, mode="apply"), "validation_failed")
    training.end(session_id)


def test_a_batch_that_lies_on_the_device_is_used_there(training: Training) -> None:
    session_id, twin = training.initialize(), training.initialize()
    inputs, targets = arrays(1)
    job = training.answered(training.client.post("/api/memory/allocate", json={"size_bytes": inputs.nbytes}))
    allocation_id = job["resource"]["id"]
    training.client.put(f"/api/memory/data/{allocation_id}", content=inputs.tobytes()).raise_for_status()
    there = {"dtype": "float32", "shape": list(inputs.shape), "allocation_id": allocation_id}
    body = {"session_id": session_id, "inputs": {"input": there}, "targets": tensor(targets)}
    result = training.done(training.submit("step", body))["result"]
    assert "staged_bytes" not in result
    assert training.done(training.submit("step", {"session_id": twin, **batch(1)}))["result"]["loss"] == result["loss"]
    training.client.delete(f"/api/memory/deallocate/{allocation_id}").raise_for_status()
    for one in (session_id, twin):
        training.end(one)


def test_the_history_of_a_long_job_is_written_in_bulk(training: Training) -> None:
    session_id = training.initialize()
    before = time.monotonic()
    result = training.done(training.step(session_id, 1, dataset=dataset(training, steps=1500)))["result"]
    assert result["steps"] == 1500 and time.monotonic() - before < 60
    assert [one[0] for one in training.losses(session_id)] == list(range(1, 1501))
    training.end(session_id)
