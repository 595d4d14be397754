"""Workers killed at random moments: a session ends bit for bit where it would have ended, and no step is missing."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest
from safetensors.numpy import save

from tests.support.repetitions import FACTOR, repetitions
from tests.support.stack import eventually
from tests.training_service.calls import Training, arrays, batch


def jobs_of(session_id: str, updates: int, dataset_id: str, long_steps: int) -> list[dict[str, Any]]:
    """The requests that make `updates` updates: batches, accumulated gradients, and jobs over a dataset."""
    bodies: list[dict[str, Any]] = []

    def add(**fields: Any) -> None:
        bodies.append({"session_id": session_id, "sequence": len(bodies) + 1, **fields})

    made = 0
    while made < updates:
        number = len(bodies) + 1
        if number % 37 == 0 and updates - made >= long_steps:
            add(dataset={"blob_id": dataset_id, "batch_size": 8, "steps": long_steps})
            made += long_steps
            continue
        if number % 11 == 0:
            add(mode="gradients", **batch(number))
            add(mode="apply", gradient_clip_norm=0.5)
        else:
            add(**batch(number), **({"learning_rate": 0.003} if number % 7 == 0 else {}))
        made += 1
    return bodies


def dataset(count: int = 64) -> bytes:
    inputs, targets = arrays(1000, count)
    return save({"input": inputs, "targets": targets})


def standing(training: Training, session_id: str) -> tuple[int, int]:
    status = training.status(session_id)
    return status["applied_sequence"], status["step"]


def step_under_kills(
    training: Training, session_id: str, bodies: list[dict[str, Any]], kills: int, seed: int
) -> list[dict[str, Any]]:
    """Submits the steps, and kills the worker `kills` times at random moments of them, spread over the session's way.

    Some steps are submitted only after each kill: however quick they are, none finds the session through.
    """
    chosen = random.Random(seed)
    stack, size, before = training.stack, len(bodies) // (kills + 2), 0
    submitted: list[dict[str, Any]] = []

    def submit_to(count: int) -> None:
        if count > len(submitted):
            submitted.extend(training.submit_all("training.step", bodies[len(submitted) : count]))

    for number in range(1, kills + 1):
        # Each worker makes a step at least.
        mark = max(before + 1, int(size * (number - chosen.random())))
        submit_to(max(size * (number + 1), mark + size))
        eventually(lambda mark=mark: standing(training, session_id)[0] >= mark, 90, 0.002)
        time.sleep(chosen.uniform(0, 0.01))
        stack.kill("cpu_0")
        before = standing(training, session_id)[0]
        stack.start("cpu_0")
        if number == 2:
            # Once more, while the new worker starts or brings the session back.
            time.sleep(chosen.uniform(0.5, 2.5))
            stack.kill("cpu_0")
            stack.start("cpu_0")
    submit_to(len(bodies))
    return submitted


def prove(training: Training, updates: int, kills: int, long_steps: int) -> None:
    fields = {"checkpoint_every_steps": 40, "schedule": {"type": "cosine", "warmup_steps": 9, "total_steps": updates}}
    dataset_id = training.upload(dataset())
    plain = training.initialize(**fields)
    jobs = training.submit_all("training.step", jobs_of(plain, updates, dataset_id, long_steps))
    training.done(jobs[-1])
    wanted, history = training.state(plain), training.losses(plain)
    assert [one[0] for one in history] == list(range(1, updates + 1))
    training.end(plain)

    epoch = training.client.get("/api/devices/cpu_0").json()["epoch"]
    session_id = training.initialize(**fields)
    bodies = jobs_of(session_id, updates, dataset_id, long_steps)
    for job in step_under_kills(training, session_id, bodies, kills, seed=updates):
        training.done(job)
    assert standing(training, session_id) == (len(bodies), updates)
    assert training.losses(session_id) == history
    ended = training.state(session_id)
    assert set(ended) == set(wanted)
    assert [name for name in wanted if ended[name] != wanted[name]] == []
    assert training.client.get("/api/devices/cpu_0").json()["epoch"] >= epoch + kills


def checkpoints_of(training: Training, session_id: str) -> list[dict[str, Any]]:
    return list(training.status(session_id)["checkpoints"])


def test_a_long_job_goes_on_from_the_checkpoint_taken_in_the_middle_of_it(mortal: Training) -> None:
    training = mortal
    given = {"blob_id": training.upload(dataset()), "batch_size": 8, "steps": 1500}
    twin = training.initialize()
    training.done(training.step(twin, 1, dataset=given))
    session_id = training.initialize(checkpoint_every_steps=300)
    job = training.step(session_id, 1, dataset=given)
    eventually(lambda: checkpoints_of(training, session_id), 30, 0.005)
    training.stack.kill("cpu_0")
    training.stack.start("cpu_0")
    ended = training.done(job)
    assert ended["deaths"] == 1 and ended["result"]["steps_applied"] == 1500
    assert ended["result"]["steps"] <= 1200, "the job began anew"
    assert training.losses(session_id) == training.losses(twin)
    assert training.state(session_id) == training.state(twin)


def test_steps_of_a_job_that_was_cancelled_after_its_worker_s_death_never_happened(mortal: Training) -> None:
    training = mortal
    given = {"blob_id": training.upload(dataset()), "batch_size": 8, "steps": 1_000_000}
    twin, session_id = training.initialize(), training.initialize(checkpoint_every_steps=50)
    training.done(training.step(twin, 1))
    job = training.step(session_id, 1, dataset=given)
    eventually(lambda: checkpoints_of(training, session_id), 30, 0.005)
    # Drained, so that the new worker brings the session back and leaves the job in its queue.
    training.client.post("/api/devices/cpu_0/drain").raise_for_status()
    training.stack.kill("cpu_0")
    training.stack.start("cpu_0")
    eventually(lambda: training.status(session_id)["state"] == "restored", 60)
    assert training.status(session_id)["step"] > 0
    training.client.delete(f"/api/jobs/{job['job_id']}").raise_for_status()
    training.done(job, "cancelled")
    assert training.status(session_id)["submitted_sequence"] == 0
    training.client.post("/api/devices/cpu_0/resume").raise_for_status()
    assert training.done(training.step(session_id, 1))["result"]["step"] == 1
    assert training.losses(session_id) == training.losses(twin)
    assert training.state(session_id) == training.state(twin)
    # Its checkpoints are still there for whoever wants to go on from one, in a session of its own.
    left = [one for one in checkpoints_of(training, session_id) if one["run_job_id"] == job["job_id"]]
    resumed = training.initialize(resume_from=left[0]["checkpoint_id"])
    assert training.status(resumed)["step"] == left[0]["step"] >= 50
    # A worker that stops in good order hands its sessions over just the same.
    training.stack.restart("cpu_0")
    training.stack.wait_ready()
    assert training.done(training.step(session_id, 2))["result"]["step"] == 2
    training.done(training.step(twin, 2))
    assert training.state(session_id) == training.state(twin)


@pytest.mark.timeout(600 * FACTOR)
@pytest.mark.slow
def test_steps_under_kills_end_bit_for_bit_where_they_end_without(mortal: Training) -> None:
    prove(mortal, updates=repetitions(200), kills=repetitions(7), long_steps=40)
