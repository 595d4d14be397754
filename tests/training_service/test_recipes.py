"""What a session may be made of besides layers and batches, over HTTP: its loss, schedule, precision and parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from tests.support.stack import eventually
from tests.training.networks import export
from tests.training_service.calls import Training, arrays, described, refused

#: Everything that has state of its own besides the tensors.
RECIPE: dict[str, Any] = {
    "loss": {"type": "cross_entropy", "ignore_index": -1, "weight": [1.0, 2.0, 0.5, 1.0], "label_smoothing": 0.1},
    "schedule": {"type": "plateau", "metric": "evaluate", "patience": 0, "factor": 0.5, "threshold": 0.5},
    "precision": "float16",
}


def dataset(training: Training, **fields: Any) -> dict[str, Any]:
    inputs, targets = arrays(7, 36)
    targets[::5] = -1
    file = save({"input": inputs, "targets": targets.astype(np.int32)})
    return {"blob_id": training.upload(file), "batch_size": 8, "epochs": 2, **fields}


def test_the_status_lists_each_tensor_with_whether_it_is_trained_and_why(training: Training, tmp_path: Path) -> None:
    listed = {one["name"]: one for one in training.status(training.initialize(trainable=["fc*"]))["parameters"]}
    assert listed["fc1.weight"] == {
        "name": "fc1.weight", "shape": [16, 6], "dtype": "float32", "trained": True,
        "reason": "named by trainable; parameter of a layer",
    }  # fmt: skip
    assert (listed["norm.weight"]["trained"], listed["norm.running_mean"]["trained"]) == (False, False)

    file = training.upload(export("norm", "preserve", tmp_path / "norm.onnx"))
    session_id = training.initialize(model={"kind": "onnx", "blob_id": file})
    listed = {one["name"]: one for one in training.status(session_id)["parameters"]}
    assert {name for name, one in listed.items() if one["trained"]} == {"a.weight", "a.bias"}
    assert "only read by Div" in listed["std"]["reason"]
    job = training.initialize_job(model={"kind": "onnx", "blob_id": file}, trainable=["a.*", "mean"])
    assert training.status(job["resource"]["id"])["state"] in ("initializing", "ready")
    # The job's own figures are numbers as before.
    assert training.done(job)["result"]["trained_parameters"] == 28 + 6


def test_gradients_of_several_batches_make_one_update_with_the_mean_of_their_losses(training: Training) -> None:
    session_id, plain = training.initialize(), training.initialize()
    inputs, targets = arrays(3, 32)
    file = training.upload(save({"input": inputs, "targets": targets}))
    job = training.step(session_id, 1, dataset={"blob_id": file, "batch_size": 8, "epochs": 1, "grad_accumulation": 2})
    result = training.done(job)["result"]
    assert (result["steps"], result["step"], result["samples"]) == (4, 2, 32)
    history = training.losses(session_id)
    assert [one[0] for one in history] == [1, 2]
    assert result["loss"] == sum(one[1] for one in history) / 2
    refused(
        training.client.post("/api/training/step", json={
            "session_id": plain, "mode": "evaluate",
            "dataset": {"blob_id": file, "batch_size": 8, "epochs": 1, "grad_accumulation": 2},
        }), 422, "validation_failed",
    )  # fmt: skip


def test_a_whole_recipe_comes_back_bit_for_bit_after_its_workers_death(mortal: Training) -> None:
    ids = [mortal.initialize(**RECIPE) for _ in range(2)]

    def advance(session_id: str, first: int) -> None:
        mortal.done(mortal.step(session_id, first, dataset=dataset(mortal, grad_accumulation=2)))
        for number in (first + 1, first + 2):
            mortal.done(mortal.step(session_id, number, mode="evaluate", dataset=dataset(mortal, epochs=1)))

    for session_id in ids:
        advance(session_id, 1)
    mortal.checkpoint(ids[1])
    for session_id in ids:
        advance(session_id, 4)
    mortal.stack.kill("cpu_0")
    mortal.stack.start("cpu_0")
    eventually(lambda: mortal.status(ids[1])["state"] == "restored", 60)
    for session_id in ids:
        advance(session_id, 7)
    # One was made again from its beginning, the other from a checkpoint.
    assert mortal.state(ids[0]) == mortal.state(ids[1])
    assert mortal.losses(ids[0]) == mortal.losses(ids[1])
    rates = [one[3] for one in mortal.losses(ids[0])]
    assert rates[0] == 0.01 > rates[-1] > 0


def test_a_loss_with_an_argument_of_another_is_refused_at_once(training: Training) -> None:
    wrong = described(loss={"type": "mse", "ignore_index": 1})
    problem = refused(training.client.post("/api/training/initialize", json=wrong), 422, "validation_failed")
    assert "ignore_index" in str(problem)
    unknown = described(schedule={"type": "cyclic"})
    problem = refused(training.client.post("/api/training/initialize", json=unknown), 422, "validation_failed")
    assert "one_cycle" in str(problem)
