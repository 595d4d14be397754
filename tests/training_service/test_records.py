"""The records of training: who may move a session on, what is kept for a replay, and what goes."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import Engine

from device_operations.jobs import State, new_id
from tasks.blobs import records as blobs
from tasks.database import open_engine
from tasks.devices import store as devices
from tasks.jobs import lifecycle
from tasks.jobs import rescue as rescues
from tasks.jobs import store as jobs
from tasks.jobs.lifecycle import Outcome
from tasks.jobs.store import NewJob
from tasks.statements import execute, row, transaction
from tasks.training import checkpoints, steps
from tasks.training import sessions as store
from tasks.training.effects import kept, number_of
from tests.support.records import make_device

STANDING = {
    "step": 1, "loss": 0.5, "gradient_norm": 1.0, "learning_rate": 0.1, "samples_seen": 8, "steps_per_second": 1.0,
    "history": [{"step": 1, "loss": 0.5, "gradient_norm": 1.0, "learning_rate": 0.1, "at": 0.0}],
    "cpu_fallback_operators": ["aten::lerp"], "steps_applied": None, "spooled": {}, "spooled_ids": [],
}  # fmt: skip


@pytest.fixture(scope="module")
def engine(database_url: str) -> Engine:
    return open_engine(database_url)


@pytest.fixture
def epoch(engine: Engine) -> int:
    with engine.connect() as connection:
        devices.set_budget(connection, "cpu_0", 2**30)
    return make_device(engine)


def make_session(engine: Engine, epoch: int) -> str:
    session_id = new_id()
    with transaction(engine) as connection:
        store.insert(connection, {
            "session_id": session_id, "device_id": "cpu_0", "owner": "default", "spec": {}, "resumed": None,
            "blob_ids": [], "init_job_id": "none", "sequence": 0, "step": 0, "reserved_bytes": 0,
            "lease_seconds": None,
        })  # fmt: skip
        facts = {"state": "ready", "step": 0, "sequence": 0, "samples_seen": 0, "learning_rate": 0.1, "memory_bytes": 1}
        assert store.settle(connection, session_id, epoch, facts)
    return session_id


def make_step(engine: Engine, session_id: str, sequence: int, epoch: int, blob_ids: tuple[str, ...] = ()) -> str:
    """A numbered step whose job runs under `epoch`."""
    job = NewJob(
        id=new_id(), kind="training.step", device_id="cpu_0", queue="device.cpu_0", request={"n": sequence},
        owner="default", resource_type="training_session", resource_id=session_id,
        needs=[session_id, number_of(session_id, sequence - 1)],
    )  # fmt: skip
    with transaction(engine) as connection:
        assert steps.take_number(connection, session_id, sequence, job.id, "sha", blob_ids) == sequence
        jobs.insert(connection, [job])
        jobs.claim(connection, [job.id], "cpu_0", epoch)
    return job.id


def finish(engine: Engine, session_id: str, job_id: str, sequence: int, epoch: int) -> list[dict[str, Any]]:
    return finish_together(engine, [(session_id, job_id, sequence)], epoch)


def finish_together(engine: Engine, steps: list[tuple[str, str, int]], epoch: int) -> list[dict[str, Any]]:
    outcomes = []
    for session_id, job_id, sequence in steps:
        facts = {"applied": {**STANDING, "session_id": session_id, "sequence": sequence, "step": sequence}}
        outcomes.append(Outcome(job_id, State.SUCCEEDED, result={"step": sequence}, facts=facts))
    with engine.connect() as connection:
        claimed = jobs.get_many(connection, [job_id for _, job_id, _ in steps])
    return lifecycle.finish(engine, outcomes, claimed, epoch)


def read(engine: Engine, session_id: str) -> dict[str, Any]:
    with engine.connect() as connection:
        found = store.get(connection, session_id)
    assert found is not None
    return found


def test_a_step_moves_number_loss_history_and_job_on_together(engine: Engine, epoch: int) -> None:
    session_id = make_session(engine, epoch)
    job_id = make_step(engine, session_id, 1, epoch)
    (ended,) = finish(engine, session_id, job_id, 1, epoch)
    assert (ended["id"], ended["state"], ended["result"]) == (job_id, "succeeded", {"step": 1})
    session = read(engine, session_id)
    assert (session["applied_sequence"], session["step"], session["loss"]) == (1, 1, 0.5)
    assert session["cpu_fallback_operators"] == ["aten::lerp"]
    with engine.connect() as connection:
        assert [one["step"] for one in store.history(connection, session_id, 10)] == [1]
    # Again, as after an answer that was lost: the job has ended, and nothing moves.
    assert finish(engine, session_id, job_id, 1, epoch) == []
    assert read(engine, session_id)["applied_sequence"] == 1


def test_an_epoch_that_no_longer_holds_the_session_cannot_move_it(engine: Engine, epoch: int) -> None:
    session_id = make_session(engine, epoch)
    job_id = make_step(engine, session_id, 1, epoch)
    with engine.connect() as connection:
        execute(
            connection, "UPDATE training_sessions SET epoch = epoch + 1 WHERE session_id = %(id)s", {"id": session_id}
        )
    (ended,) = finish(engine, session_id, job_id, 1, epoch)
    assert (ended["state"], ended["error"]["code"]) == ("failed", "internal_error")
    session = read(engine, session_id)
    assert (session["applied_sequence"], session["submitted_sequence"], session["step"]) == (0, 0, 0)
    with engine.connect() as connection:
        assert store.history(connection, session_id, 10) == []


def test_a_job_that_was_taken_over_cannot_move_the_session(engine: Engine, epoch: int) -> None:
    session_id = make_session(engine, epoch)
    job_id = make_step(engine, session_id, 1, epoch)
    with engine.connect() as connection:
        jobs.requeue(connection, [job_id], died=True)
    assert finish(engine, session_id, job_id, 1, epoch) == []
    assert read(engine, session_id)["applied_sequence"] == 0


def test_a_number_that_is_not_the_next_cannot_be_applied(engine: Engine, epoch: int) -> None:
    session_id = make_session(engine, epoch)
    first, second = (make_step(engine, session_id, number, epoch) for number in (1, 2))
    (ended,) = finish(engine, session_id, second, 2, epoch)
    assert ended["state"] == "failed"
    assert read(engine, session_id)["applied_sequence"] == 0
    assert [one["state"] for one in finish(engine, session_id, first, 1, epoch)] == ["succeeded"]


def test_steps_that_ended_together_are_recorded_up_to_the_one_that_is_refused(engine: Engine, epoch: int) -> None:
    one, other = make_session(engine, epoch), make_session(engine, epoch)
    steps = [(one, make_step(engine, one, number, epoch), number) for number in (1, 2, 3, 4)]
    elsewhere = [(other, make_step(engine, other, number, epoch), number) for number in (1, 2)]
    ended = finish_together(engine, [steps[0], steps[1], steps[3], *elsewhere], epoch)
    states = {row["id"]: (row["state"], (row["error"] or {}).get("code")) for row in ended}
    done = ("succeeded", None)
    assert states == {
        steps[0][1]: done, steps[1][1]: done, steps[3][1]: ("failed", "sequence_gap"),
        elsewhere[0][1]: done, elsewhere[1][1]: done,
    }  # fmt: skip
    assert [read(engine, session_id)["applied_sequence"] for session_id in (one, other)] == [2, 2]
    assert [row["state"] for row in finish_together(engine, steps[2:3], epoch)] == ["succeeded"]


def test_what_a_replay_may_need_is_kept_until_two_checkpoints_lie_behind_it(engine: Engine, epoch: int) -> None:
    session_id = make_session(engine, epoch)
    blob = {"blob_id": new_id(), "sha256": "sha", "size_bytes": 1, "owner": "default"}
    with engine.connect() as connection:
        blobs.insert(connection, blob, 0.0)

    def used() -> bool:
        with engine.connect() as connection:
            return blobs.in_use(connection, blob["blob_id"])

    def keep(sequence: int) -> str:
        stored = {"blob_id": new_id(), "sha256": "sha", "size_bytes": 1}
        made = {
            "checkpoint_id": new_id(), "session_id": session_id, "owner": "default", "name": None, "job_id": None,
            "run_job_id": None, "keep_last": None, "step": sequence, "sequence": sequence, "onnx_blob_id": None,
            **stored, "blobs": [stored],
        }  # fmt: skip
        with transaction(engine) as connection:
            assert kept(connection, made, epoch)
        return str(made["checkpoint_id"])

    job_id = make_step(engine, session_id, 1, epoch, (blob["blob_id"],))
    finish(engine, session_id, job_id, 1, epoch)
    keep(1)
    assert used()
    with engine.connect() as connection:
        execute(connection, "UPDATE jobs SET finished_at = now() - interval '1 year' WHERE id = %(id)s", {"id": job_id})
        jobs.forget(connection, 1, 100)
        assert jobs.get(connection, job_id), "the job of a step that may be replayed was forgotten"
    finish(engine, session_id, make_step(engine, session_id, 2, epoch), 2, epoch)
    last = keep(2)
    assert not used()
    with engine.connect() as connection:
        jobs.forget(connection, 1, 100)
        assert jobs.get(connection, job_id) is None
        # Its number still answers for what it was.
        there = steps.numbered(connection, session_id, 1)
        assert there and there["job_id"] == job_id
        assert checkpoints.delete(connection, last)
        gone = row(connection, "SELECT count(*) AS n FROM blobs WHERE expires_at <= clock_timestamp()", {})
        assert gone and gone["n"] >= 1


def test_the_furthest_checkpoints_are_kept_in_whichever_order_they_were_recorded(engine: Engine, epoch: int) -> None:
    session_id = make_session(engine, epoch)

    def keep(step: int, sequence: int, run_job_id: str | None = None) -> None:
        stored = {"blob_id": new_id(), "sha256": "sha", "size_bytes": 1}
        made = {
            "checkpoint_id": new_id(), "session_id": session_id, "owner": "default", "name": None, "job_id": None,
            "run_job_id": run_job_id, "keep_last": 2, "step": step, "sequence": sequence, "onnx_blob_id": None,
            **stored, "blobs": [stored],
        }  # fmt: skip
        with transaction(engine) as connection:
            assert kept(connection, made, epoch)

    def steps() -> list[int]:
        with engine.connect() as connection:
            return [one["step"] for one in checkpoints.page(connection, session_id, None, 10)]

    run = make_step(engine, session_id, 1, epoch)
    for step in (25, 20, 30):
        keep(step, 0, run)
    assert steps() == [30, 25]
    keep(99, 0, "a run that was cancelled, and its number given to another")
    keep(35, 0, run)
    assert steps() == [35, 30]
    finish(engine, session_id, run, 1, epoch)
    keep(36, 1)
    assert steps() == [36, 35]


def test_a_checkpoint_of_an_epoch_that_is_over_is_not_recorded(engine: Engine, epoch: int) -> None:
    session_id = make_session(engine, epoch)
    stored = {"blob_id": new_id(), "sha256": "sha", "size_bytes": 1}
    made = {
        "checkpoint_id": new_id(), "session_id": session_id, "owner": "default", "name": None, "job_id": None,
        "run_job_id": None, "keep_last": None, "step": 1, "sequence": 1, "onnx_blob_id": None, **stored,
        "blobs": [stored],
    }  # fmt: skip
    with transaction(engine) as connection:
        assert not kept(connection, made, epoch + 1)
        assert checkpoints.get(connection, made["checkpoint_id"]) is None
        assert blobs.get(connection, stored["blob_id"]) is None


def test_a_worker_s_death_leaves_sessions_to_be_brought_back_and_their_steps_queued(engine: Engine, epoch: int) -> None:
    session_id = make_session(engine, epoch)
    running = make_step(engine, session_id, 1, epoch)
    with transaction(engine) as connection:
        rescue = rescues.rescue(connection, "cpu_0", epoch)
    assert running in [job["id"] for job in rescue.requeued]
    session = read(engine, session_id)
    assert (session["state"], session["epoch"], session["submitted_sequence"]) == ("initializing", None, 1)
    with engine.connect() as connection:
        assert session_id in [one["session_id"] for one in store.to_bring_back(connection, "cpu_0")]
