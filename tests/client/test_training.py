"""The client's methods on training sessions, against a whole stack."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from device_operations import Client, State
from device_operations.errors import Conflict, NotFound

LINEAR = {"kind": "layers", "layers": [{"type": "linear", "name": "fc", "in_features": 3, "out_features": 1}]}
WEIGHTS = np.array([[1.0], [-2.0], [0.5]], np.float32)


def batch(seed: int, rows: int = 16) -> tuple[dict[str, np.ndarray], np.ndarray]:
    inputs = np.random.default_rng(seed).normal(size=(rows, 3)).astype(np.float32)
    return {"input": inputs}, inputs @ WEIGHTS


def session(client: Client, **more: object) -> str:
    job = client.training.initialize(LINEAR, loss="mse", optimizer={"type": "sgd", "learning_rate": 0.1}, **more)  # type: ignore[arg-type]
    assert job.resource is not None and job.resource.type == "training_session"
    return job.resource.id


def test_steps_on_arrays_lower_the_loss_and_are_told(client: Client) -> None:
    there = session(client, seed=7)
    jobs = [client.training.step(there, *batch(number), sequence=number) for number in range(1, 21)]
    losses = [client.result(job, timeout=60)["loss"] for job in jobs]
    assert losses[-1] < losses[0] / 10
    status = client.training.status(there, history=20)
    assert (status["step"], status["applied_sequence"]) == (20, 20)
    np.testing.assert_allclose([step["loss"] for step in status["history"]], losses)
    again = client.training.step(there, *batch(20), sequence=20)
    assert again.job_id == jobs[-1].job_id
    for sequence, code in ((20, "sequence_conflict"), (30, "sequence_gap")):
        with pytest.raises(Conflict) as caught:
            client.training.step(there, *batch(99), sequence=sequence)
        assert caught.value.code == code
    assert client.training.end_session(there, wait=60).state is State.SUCCEEDED


def test_a_dataset_of_arrays_beyond_64_kib_is_uploaded_and_trained_on(client: Client) -> None:
    there = session(client)
    inputs, targets = batch(0, rows=8000)
    dataset = {"inputs": inputs, "targets": targets, "batch_size": 32, "steps": 50}
    client.result(client.training.step(there, dataset=dataset, gradient_clip_norm=5.0), timeout=60)
    assert client.training.status(there)["step"] == 50
    loss = client.result(client.training.step(there, *batch(1), mode="evaluate"), timeout=60)["loss"]
    assert loss < 0.01
    client.training.end_session(there)


def test_a_checkpoint_is_made_listed_resumed_validated_and_deleted(client: Client, tmp_path: Path) -> None:
    there = session(client)
    client.training.step(there, *batch(1))
    job = client.training.checkpoint(there, name="one step", export=["onnx"])
    assert job.resource is not None and job.resource.type == "checkpoint"
    client.result(job, timeout=60)
    kept = client.training.get_checkpoint(job.resource.id)
    assert (kept["step"], kept["session_id"]) == (1, there)
    assert job.resource.id in [found["checkpoint_id"] for found in client.training.checkpoints(there)]
    assert client.blobs.download(kept["onnx_blob_id"], tmp_path / "model.onnx").stat().st_size > 0
    resumed = session(client, resume_from=job.resource.id)
    loss = [client.result(client.training.step(one, *batch(2)), timeout=60)["loss"] for one in (there, resumed)]
    assert loss[0] == loss[1]
    inputs, targets = batch(3)
    checked = client.result(client.training.validate(inputs, targets, session_id=resumed), timeout=120)
    assert checked["loss"] >= 0
    for one in (there, resumed):
        client.training.end_session(one, wait=60)
    client.training.delete_checkpoint(job.resource.id)
    with pytest.raises(NotFound) as caught:
        client.training.get_checkpoint(job.resource.id)
    assert caught.value.code == "checkpoint_not_found"
