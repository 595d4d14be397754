"""Numbers of steps: each happens once, in order, and one that did not happen leaves its number free."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

import numpy as np
import psycopg2

from tests.support.stack import eventually
from tests.training_service.calls import Training, arrays, batch, refused, tensor


def post(training: Training, body: dict, **headers: str):
    return training.client.post("/api/training/step", json=body, headers=headers)


def test_the_same_number_and_body_again_gives_the_first_job(training: Training) -> None:
    session_id = training.initialize()
    first = training.step(session_id, 1)
    again = training.step(session_id, 1)
    assert again["job_id"] == first["job_id"]
    training.done(first)
    assert training.step(session_id, 1)["job_id"] == first["job_id"]
    assert training.status(session_id)["step"] == 1
    training.end(session_id)


def test_the_same_bytes_in_another_blob_are_the_same_body(training: Training) -> None:
    session_id = training.initialize()
    inputs, targets = arrays(1)

    def body() -> dict:
        blob_id = training.upload(inputs.tobytes())
        given = {"dtype": "float32", "shape": list(inputs.shape), "blob_id": blob_id}
        return {"session_id": session_id, "sequence": 1, "inputs": {"input": given}, "targets": tensor(targets)}

    first = training.submit("step", body())
    assert training.submit("step", body())["job_id"] == first["job_id"]
    training.end(session_id)


def test_another_body_is_a_conflict_and_a_number_too_high_is_a_gap(training: Training) -> None:
    session_id = training.initialize()
    training.done(training.step(session_id, 1))
    refused(post(training, {"session_id": session_id, "sequence": 1, **batch(9)}), 409, "sequence_conflict")
    told = refused(post(training, {"session_id": session_id, "sequence": 3, **batch(3)}), 409, "sequence_gap")
    assert told["context"] == {"submitted_sequence": 1, "applied_sequence": 1}
    assert training.status(session_id)["applied_sequence"] == 1
    training.end(session_id)


def test_steps_without_a_number_are_given_the_next_one_and_evaluations_none(training: Training) -> None:
    session_id = training.initialize()
    numbers = [training.done(training.step(session_id))["result"]["sequence"] for _ in range(3)]
    assert numbers == [1, 2, 3]
    judged = training.done(training.step(session_id, mode="evaluate"))["result"]
    assert judged["sequence"] is None and judged["step"] == 3 and 0 <= judged["accuracy"] <= 1
    assert training.done(training.step(session_id, 4))["result"]["step"] == 4
    training.end(session_id)


def test_a_failed_step_frees_its_number_and_the_steps_queued_behind_it_fail(training: Training) -> None:
    session_id = training.initialize()
    bad = {"session_id": session_id, "sequence": 2, **batch(2), "targets": tensor(np.full(8, 99))}
    good = [{"session_id": session_id, "sequence": number, **batch(number)} for number in (1, 3, 4)]
    jobs = training.submit_all("training.step", [good[0], bad, *good[1:]])
    training.done(jobs[0])
    training.failed(jobs[1], "input_mismatch")
    for job in jobs[2:]:
        training.failed(job, "sequence_gap")
    status = training.status(session_id)
    assert (status["applied_sequence"], status["submitted_sequence"], status["step"]) == (1, 1, 1)
    for number in (2, 3):
        training.done(training.step(session_id, number))
    assert training.status(session_id)["step"] == 3
    training.end(session_id)


def test_a_step_cancelled_before_it_ran_frees_its_number(training: Training) -> None:
    session_id = training.initialize()
    delayed = training.step(session_id, 1, job={"delay_seconds": 60})
    behind = training.step(session_id, 2)
    assert training.client.delete(f"/api/jobs/{delayed['job_id']}").status_code == 202
    training.done(delayed, "cancelled")
    training.failed(behind, "sequence_gap")
    training.done(training.step(session_id, 1))
    training.end(session_id)


def test_steps_submitted_after_the_end_of_their_session_fail_with_it(training: Training) -> None:
    session_id = training.initialize()
    first = training.step(session_id, 1, job={"delay_seconds": 0.5})
    ending = training.answered(training.client.delete(f"/api/training/session/{session_id}"))
    behind, evaluated = training.step(session_id, 2), training.step(session_id, mode="evaluate")
    for job in (first, ending):
        training.done(job)
    for job in (behind, evaluated):
        training.failed(job, "session_closed")


def test_a_resumed_session_goes_on_with_the_next_number_only(training: Training) -> None:
    session_id = training.initialize()
    training.done(training.step(session_id, 1))
    made = training.checkpoint(session_id)
    resumed = training.initialize(resume_from=made["checkpoint_id"])
    refused(post(training, {"session_id": resumed, "sequence": 1, **batch(1)}), 409, "sequence_conflict")
    refused(post(training, {"session_id": resumed, "sequence": 3, **batch(3)}), 409, "sequence_gap")
    assert training.done(training.step(resumed, 2))["result"]["step"] == 2
    training.end(session_id)
    training.end(resumed)


def test_jobs_on_a_session_can_be_submitted_before_it_and_its_checkpoint_are_made(training: Training) -> None:
    job = training.submit("initialize", {"model": {"kind": "layers", "layers": [
        {"type": "linear", "in_features": 6, "out_features": 4}]}, "loss": "cross_entropy",
        "optimizer": {"type": "sgd", "learning_rate": 0.1}})  # fmt: skip
    session_id = job["resource"]["id"]
    jobs = [training.step(session_id, number) for number in range(1, 6)]
    kept = training.submit("checkpoint", {"session_id": session_id})
    resumed = training.submit("initialize", {"model": {"kind": "layers", "layers": [
        {"type": "linear", "in_features": 6, "out_features": 4}]}, "loss": "cross_entropy",
        "optimizer": {"type": "sgd", "learning_rate": 0.1}, "resume_from": kept["resource"]["id"]})  # fmt: skip
    last = training.step(resumed["resource"]["id"], 6)
    for one in [job, *jobs, kept, resumed, last]:
        training.done(one)
    assert last["resource"]["id"] == resumed["resource"]["id"]
    assert training.status(resumed["resource"]["id"])["step"] == 6
    training.end(session_id)
    training.end(resumed["resource"]["id"])


def test_the_next_step_runs_while_the_one_before_is_recorded(training: Training) -> None:
    session_id = training.initialize()
    with unrecordable(training) as recording:
        jobs = [training.step(session_id, number) for number in (1, 2)]
        behind = training.step(session_id, mode="evaluate")
        recording(jobs[0], jobs[1])
        assert training.status(session_id)["applied_sequence"] == 0
        assert training.client.get(f"/api/jobs/{behind['job_id']}").json()["state"] in ("queued", "reserved")
    for number, job in enumerate(jobs, start=1):
        assert training.done(job)["result"]["step"] == number
    assert training.done(behind)["result"]["step"] == 2
    training.end(session_id)


def test_a_step_that_cannot_be_recorded_takes_the_one_that_ran_ahead_of_it_with_it(training: Training) -> None:
    expected, session_id = training.initialize(), training.initialize()
    for number in (1, 2, 3):
        training.done(training.step(expected, number))
    training.done(training.step(session_id, 1))
    with unrecordable(training) as recording:
        jobs = [training.step(session_id, number) for number in (2, 3)]
        (backend,) = recording(*jobs)
        assert query(training, "SELECT pg_cancel_backend(%s)", backend) == [(True,)]
        training.failed(jobs[0], "internal_error")
    training.failed(jobs[1], "sequence_gap")
    status = training.status(session_id)
    assert (status["applied_sequence"], status["submitted_sequence"], status["step"]) == (1, 1, 1)
    for number in (2, 3):
        training.done(training.step(session_id, number))
    assert training.state(session_id) == training.state(expected)
    assert training.losses(session_id) == training.losses(expected)
    for one in (session_id, expected):
        training.end(one)


@contextmanager
def unrecordable(training: Training) -> Iterator[Callable[..., list[int]]]:
    """While inside no end of a step can be recorded. What it gives waits until all of some jobs are at work and the
    first one's end waits to be recorded, and gives the server's processes that wait for that.
    """
    with closing(psycopg2.connect(training.stack.database_url)) as connection, connection.cursor() as cursor:
        cursor.execute("LOCK TABLE training_history IN SHARE MODE")

        def recording(*jobs: dict) -> list[int]:
            states = [f"/api/jobs/{job['job_id']}" for job in jobs]
            eventually(lambda: all(training.client.get(at).json()["state"] == "running" for at in states))
            return eventually(lambda: [pid for (pid,) in query(training, _WAITING)])

        yield recording
        connection.rollback()


_WAITING = """
    SELECT pid FROM pg_stat_activity
    WHERE datname = current_database() AND wait_event_type = 'Lock' AND query LIKE 'EXECUTE end_applied%%'
"""


def query(training: Training, sql: str, *parameters: object) -> list[tuple]:
    with closing(psycopg2.connect(training.stack.database_url)) as connection, connection.cursor() as cursor:
        cursor.execute(sql, parameters)
        return cursor.fetchall()
