"""A session from its first step to its end over HTTP, and once more from a checkpoint, bit for bit."""

from __future__ import annotations

import math

from tests.training_service.calls import Training, refused


def test_a_session_is_trained_checkpointed_resumed_bit_for_bit_and_ended(training: Training) -> None:
    session_id = training.initialize(schedule={"type": "cosine", "warmup_steps": 4, "total_steps": 40})
    jobs = [training.step(session_id, number) for number in range(1, 21)]
    ended = [training.done(job) for job in jobs]
    assert [job["result"]["step"] for job in ended] == list(range(1, 21))
    status = training.status(session_id, history=5)
    assert (status["state"], status["step"], status["applied_sequence"]) == ("ready", 20, 20)
    assert [one["step"] for one in status["history"]] == [16, 17, 18, 19, 20]
    assert status["loss"] == status["history"][-1]["loss"] == ended[-1]["result"]["loss"] < ended[0]["result"]["loss"]
    assert (status["cpu_fallback_ops"], status["cpu_fallback_operators"]) == (0, [])
    assert status["samples_seen"] == 160 and status["memory_bytes"] > 0 and math.isfinite(status["gradient_norm"])

    made = training.checkpoint(session_id, name="half-way")
    assert (made["step"], made["sequence"], made["name"]) == (20, 20, "half-way")
    assert training.status(session_id)["checkpoints"][0]["checkpoint_id"] == made["checkpoint_id"]

    resumed = training.initialize(seed=77, resume_from=made["checkpoint_id"],
                                  schedule={"type": "cosine", "warmup_steps": 4, "total_steps": 40})  # fmt: skip
    for number in range(21, 31):
        training.done(training.step(session_id, number))
        training.done(training.step(resumed, number))
    assert training.state(resumed) == training.state(session_id)
    assert training.losses(resumed) == training.losses(session_id)[20:]

    before = training.client.get("/api/memory/device/cpu_0").json()
    training.end(session_id)
    training.end(resumed, checkpoint=True)
    after = training.client.get("/api/memory/device/cpu_0").json()
    assert before["training_bytes"] > 0 == after["training_bytes"] == after["reserved_bytes"]
    assert training.status(resumed)["state"] == "ended"
    refused(
        training.client.post("/api/training/step", json={"session_id": resumed, "mode": "apply"}), 410, "session_closed"
    )
