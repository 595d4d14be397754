"""Checkpoints: whole and recorded or not there, kept as many as asked, taken beside the steps, refused when damaged."""

from __future__ import annotations

import hashlib
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import save

from tests.support.stack import RunningStack, eventually
from tests.training_service.calls import LAYERS, Training, arrays, batch, described, refused, tensor


def stored(stack: RunningStack, blob_id: str) -> Path:
    return next((stack.folder / "data" / "blobs").rglob(blob_id))


def train(training: Training, session_id: str, first: int, last: int) -> None:
    jobs = training.submit_all(
        "training.step",
        [{"session_id": session_id, "sequence": number, **batch(number)} for number in range(first, last + 1)],
    )
    for job in jobs:
        training.done(job)


def listed(training: Training, session_id: str) -> list[dict[str, Any]]:
    answer = training.client.get("/api/training/checkpoints", params={"session_id": session_id})
    return list(answer.json()["checkpoints"])


def test_a_checkpoint_is_a_blob_with_its_hash_and_goes_with_its_record(training: Training) -> None:
    session_id = training.initialize()
    train(training, session_id, 1, 3)
    made = training.checkpoint(session_id)
    raw = training.blob(made["blob_id"])
    assert hashlib.sha256(raw).hexdigest() == made["sha256"] and len(raw) == made["size_bytes"]
    told = training.client.get(f"/api/training/checkpoints/{made['checkpoint_id']}").json()
    assert (told["step"], told["sequence"], told["blob_id"]) == (3, 3, made["blob_id"])
    refused(training.client.delete(f"/api/blobs/{made['blob_id']}"), 409, "blob_in_use")
    assert training.client.delete(f"/api/training/checkpoints/{made['checkpoint_id']}").status_code == 204
    refused(training.client.get(f"/api/training/checkpoints/{made['checkpoint_id']}"), 404, "checkpoint_not_found")
    eventually(lambda: training.client.get(f"/api/blobs/{made['blob_id']}").status_code == 404, 30, 0.5)
    refused(
        training.client.post("/api/training/initialize", json=described(resume_from=made["checkpoint_id"])),
        404, "checkpoint_not_found",
    )  # fmt: skip
    training.end(session_id)


def test_automatic_checkpoints_come_every_so_many_steps_and_the_last_ones_are_kept(training: Training) -> None:
    session_id = training.initialize(checkpoint_every_steps=5, keep_last=2)
    train(training, session_id, 1, 17)
    kept = training.checkpoint(session_id, name="mine")
    inputs, targets = arrays(1000, 64)
    given = {"blob_id": training.upload(save({"input": inputs, "targets": targets})), "batch_size": 8, "steps": 13}
    training.done(training.step(session_id, 18, dataset=given))
    wanted = [(30, True), (25, True), (17, False)]
    eventually(lambda: [(one["step"], one["automatic"]) for one in listed(training, session_id)] == wanted, 20)
    assert [one["name"] for one in listed(training, session_id)] == [None, None, "mine"]
    # A count with the request is over all of the session's checkpoints.
    last = training.checkpoint(session_id, keep_last=1)
    assert [one["checkpoint_id"] for one in listed(training, session_id)] == [last["checkpoint_id"]]
    assert kept["checkpoint_id"] != last["checkpoint_id"]
    training.end(session_id)


@pytest.mark.parametrize(("every", "left"), [(7, 2), (16, 0)])
def test_a_checkpoint_in_the_middle_of_a_job_goes_on_with_the_batch_that_follows(
    training: Training, every: int, left: int
) -> None:
    session_id = training.initialize(checkpoint_every_steps=every)
    inputs, targets = arrays(1000, 64)
    given = {"blob_id": training.upload(save({"input": inputs, "targets": targets})), "batch_size": 8, "epochs": 2}
    training.done(training.step(session_id, 1, dataset=given))
    eventually(lambda: len(listed(training, session_id)) == 16 // every)
    middle = listed(training, session_id)[0]
    assert (middle["step"], middle["sequence"]) == (16 - left, 0)
    resumed = training.initialize(resume_from=middle["checkpoint_id"])
    assert training.done(training.step(resumed, 1, dataset=given))["result"]["steps"] == left
    assert training.state(resumed) == training.state(session_id)
    training.end(session_id)
    training.end(resumed)


def test_the_checkpoint_that_an_open_session_depends_on_cannot_be_deleted(training: Training) -> None:
    session_id = training.initialize()
    made = []
    for number in (1, 2, 3):
        train(training, session_id, number, number)
        made.append(training.checkpoint(session_id)["checkpoint_id"])
    addresses = [f"/api/training/checkpoints/{checkpoint_id}" for checkpoint_id in made]
    assert training.client.delete(addresses[2]).status_code == 204
    refused(training.client.delete(addresses[1]), 409, "checkpoint_in_use")
    assert training.client.delete(addresses[0]).status_code == 204
    training.end(session_id)
    assert training.client.delete(addresses[1]).status_code == 204


def test_a_checkpoint_of_another_model_is_refused(training: Training) -> None:
    session_id = training.initialize()
    train(training, session_id, 1, 1)
    made = training.checkpoint(session_id)
    other = training.initialize_job(
        resume_from=made["checkpoint_id"], model={"kind": "layers", "layers": [*LAYERS, {"type": "tanh"}]}
    )
    error = training.failed(other, "model_invalid")["error"]
    assert "another model" in error["message"]
    training.end(session_id)


def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_it_serves(mortal: Training) -> None:
    training = mortal
    stack = training.stack
    session_id = training.initialize()
    train(training, session_id, 1, 4)
    good = training.checkpoint(session_id, name="good")
    train(training, session_id, 5, 8)
    bad = training.checkpoint(session_id, name="bad")
    train(training, session_id, 9, 10)
    wanted = training.losses(session_id)
    file = stored(stack, bad["blob_id"])
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)
    resumed = training.initialize_job(resume_from=bad["checkpoint_id"])
    error = training.failed(resumed, "checksum_mismatch")["error"]
    assert bad["blob_id"] in error["message"]
    stack.kill("cpu_0")
    stack.start("cpu_0")
    eventually(lambda: training.status(session_id)["state"] == "restored", 60)
    assert training.status(session_id)["step"] == 10 and training.losses(session_id) == wanted
    damage = {one["name"]: one["damage"] for one in listed(training, session_id)}
    assert damage["good"] is None and damage["bad"]["code"] == "checksum_mismatch"
    assert training.done(training.step(session_id, 11))["result"]["step"] == 11
    twin = training.initialize(resume_from=good["checkpoint_id"])
    train(training, twin, 5, 11)
    assert training.state(twin) == training.state(session_id)


def test_a_session_that_cannot_come_back_says_lost_and_so_do_its_jobs(mortal: Training) -> None:
    training = mortal
    stack = training.stack
    session_id = training.initialize()
    for number in range(3):
        train(training, session_id, 2 * number + 1, 2 * number + 2)
        training.checkpoint(session_id)
    for one in listed(training, session_id):
        stored(stack, one["blob_id"]).write_bytes(b"nothing of it is left")
    stack.kill("cpu_0")
    waiting = training.step(session_id, 7)
    stack.start("cpu_0")
    error = training.failed(waiting, "session_lost")["error"]
    assert "log" in error["message"]
    assert training.status(session_id)["state"] == "lost"
    refused(
        training.client.post("/api/training/step", json={"session_id": session_id, **batch(8)}), 410, "session_lost"
    )
    assert training.client.get("/api/memory/device/cpu_0").json()["training_bytes"] == 0


@pytest.mark.skipif(os.name == "nt", reason="a limit on the size of files is POSIX's")
def test_with_a_full_disk_the_checkpoint_fails_and_training_goes_on(mortal: Training) -> None:
    import resource

    training = mortal
    wide = [{"type": "linear", "in_features": 6, "out_features": 60_000}, {"type": "relu"},
            {"type": "linear", "in_features": 60_000, "out_features": 4}]  # fmt: skip
    session_id = training.initialize(checkpoint_every_steps=4, model={"kind": "layers", "layers": wide})
    train(training, session_id, 1, 2)
    first = training.checkpoint(session_id)
    worker = training.stack.process("cpu_0")
    # More than its log has, less than the checkpoint.
    resource.prlimit(worker.pid, resource.RLIMIT_FSIZE, (2**20, resource.RLIM_INFINITY))
    failing = training.submit("checkpoint", {"session_id": session_id})
    assert "free space" in training.failed(failing, "storage_full")["error"]["message"]
    train(training, session_id, 3, 6)
    status = eventually(lambda: (told := training.status(session_id))["error"] and told)
    assert status["error"]["code"] == "storage_full" and (status["step"], status["state"]) == (6, "ready")
    # The end that keeps the state fails with it, and the session goes on.
    ending = training.client.delete(f"/api/training/session/{session_id}", params={"checkpoint": True})
    training.failed(training.answered(ending), "storage_full")
    resource.prlimit(worker.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    train(training, session_id, 7, 8)
    eventually(lambda: training.status(session_id)["error"] is None)
    assert [one["step"] for one in listed(training, session_id)] == [8, 2]
    assert listed(training, session_id)[1]["checkpoint_id"] == first["checkpoint_id"]
    training.end(session_id)


def test_steps_go_on_while_a_checkpoint_is_written(training: Training) -> None:
    wide = [{"type": "linear", "in_features": 6, "out_features": 700_000}, {"type": "relu"},
            {"type": "linear", "in_features": 700_000, "out_features": 4}]  # fmt: skip
    session_id = training.initialize(model={"kind": "layers", "layers": wide}, optimizer={
        "type": "sgd", "learning_rate": 1e-4})  # fmt: skip
    training.done(training.step(session_id, 1))
    worker = training.stack.process("cpu_0")
    saving = training.submit("checkpoint", {"session_id": session_id})
    steps = [training.step(session_id, number) for number in range(2, 8)]
    kept, last = training.done(saving), training.done(steps[-1])
    assert kept["result"]["step"] == 1
    first = training.done(steps[0])
    assert first["started_at"] < kept["finished_at"], "the first step waited for the checkpoint's file"
    assert last["result"]["step"] == 7
    assert worker.is_running()
    training.end(session_id)


@pytest.mark.slow
def test_a_session_nobody_touches_leaves_the_device_and_wakes_with_its_next_step(mortal: Training) -> None:
    training = mortal
    session_id = training.initialize(lease_seconds=1)
    train(training, session_id, 1, 3)
    assert training.status(session_id)["lease_expires_at"] is not None
    status = eventually(lambda: not (told := training.status(session_id))["resident"] and told, 30)
    assert status["state"] == "ready" and [one["step"] for one in listed(training, session_id)] == [3]
    assert training.client.get("/api/memory/device/cpu_0").json()["training_bytes"] == 0
    assert training.done(training.step(session_id, 4))["result"]["step"] == 4
    assert training.status(session_id)["resident"]
    twin = training.initialize()
    train(training, twin, 1, 4)
    assert training.losses(twin) == training.losses(session_id)
    # Unloaded, and its worker killed: it wakes all the same.
    eventually(lambda: not training.status(session_id)["resident"], 30)
    training.stack.kill("cpu_0")
    training.stack.start("cpu_0")
    training.done(training.step(session_id, 5))
    training.done(training.step(twin, 5))
    assert training.state(twin) == training.state(session_id)
    training.end(session_id)


def test_a_checkpoint_cut_off_by_a_death_is_made_again_or_said_to_have_failed(mortal: Training) -> None:
    training = mortal
    session_id = training.initialize()
    train(training, session_id, 1, 3)
    worker = training.stack.process("cpu_0")
    worker.send_signal(signal.SIGSTOP)
    job = training.submit("checkpoint", {"session_id": session_id})
    training.stack.kill("cpu_0")
    training.stack.start("cpu_0")
    assert training.done(job)["result"]["step"] == 3
    training.end(session_id, checkpoint=True)
    assert len(listed(training, session_id)) == 2


def test_the_exported_model_is_validated_and_runs_as_it_is(training: Training) -> None:
    ort = pytest.importorskip("onnxruntime")
    session_id = training.initialize()
    inputs, targets = arrays(3, 20)
    body = {"session_id": session_id, "inputs": {"input": tensor(inputs)}, "targets": tensor(targets)}
    before = training.done(training.submit("validate", body))["result"]
    assert before["largest_difference"] < 1e-4
    train(training, session_id, 1, 30)
    found = training.done(training.submit("validate", body))["result"]
    assert found["largest_difference"] < 1e-4 and abs(found["loss"] - found["trained_loss"]) < 1e-4
    assert found["samples"] == 20 and found["loss"] < before["loss"] and found["step"] == 30
    made = training.checkpoint(session_id, export=["onnx"])
    session = ort.InferenceSession(training.blob(made["onnx_blob_id"]))
    (output,) = session.run(None, {"input": inputs})
    assert float((output.argmax(1) == targets).mean()) == found["accuracy"]
    train(training, session_id, 31, 32)
    again = training.done(
        training.submit("validate", {**body, "session_id": None, "checkpoint_id": made["checkpoint_id"]})
    )
    assert {**again["result"], "session_id": session_id, "checkpoint_id": None} == found
    training.end(session_id)
    refused(training.client.post("/api/training/validate", json=body), 410, "session_closed")
    assert training.done(
        training.submit("validate", {**body, "session_id": None, "checkpoint_id": made["checkpoint_id"]})
    )
