"""Claims ahead of the device in the record: one claim each, its start recorded with its end or before, its death."""

from __future__ import annotations

from datetime import datetime, timedelta

import pytest
from sqlalchemy import Engine

from device_operations.jobs import new_id
from tasks.database import open_engine
from tasks.jobs import claims, lifecycle
from tasks.jobs import lost_ends as ends
from tasks.jobs import rescue as rescues
from tasks.jobs import store as jobs
from tasks.jobs.lifecycle import Outcome, State
from tasks.jobs.store import Ending, NewJob
from tasks.statements import Row, execute, transaction
from tests.support.records import make_device


@pytest.fixture
def engine(database_url: str) -> Engine:
    return open_engine(database_url)


@pytest.fixture
def epoch(engine: Engine) -> int:
    return make_device(engine)


def recorded(engine: Engine, **more: object) -> str:
    values = {"id": new_id(), "kind": "inference.run", "device_id": "cpu_0", "queue": "device.cpu_0", "request": {}}
    job = NewJob(**{**values, "owner": "default", "needs": ["model"], **more})  # type: ignore[arg-type]
    with engine.connect() as connection:
        jobs.insert(connection, [job])
    return job.id


def ahead(engine: Engine, epoch: int, *job_ids: str) -> list[Row]:
    with engine.connect() as connection:
        return claims.claim_ahead(connection, job_ids, "cpu_0", epoch)


def read(engine: Engine, job_id: str) -> Row:
    with engine.connect() as connection:
        found = jobs.get(connection, job_id)
    assert found is not None
    return found


def begin(row: Row, after_ms: float = 20) -> datetime:
    """What the worker notes in its row when the device begins."""
    started: datetime = row["claimed_at"] + timedelta(milliseconds=after_ms)
    row.update(state="running", started_at=started, attempt=row["attempt"] + 1)
    return started


def test_what_is_claimed_ahead_is_reserved_and_claimed_once(engine: Engine, epoch: int) -> None:
    job_id = recorded(engine)
    (claimed,) = ahead(engine, epoch, job_id)
    assert (claimed["state"], claimed["attempt"], claimed["started_at"], claimed["epoch"]) == (
        "reserved",
        0,
        None,
        epoch,
    )
    assert ahead(engine, epoch, job_id) == []
    with engine.connect() as connection:
        assert jobs.claim(connection, [job_id], "cpu_0", epoch) == []
        jobs.mark_reserved(connection, [job_id])
        assert jobs.claim(connection, [job_id], "cpu_0", epoch) == []
        assert [row["id"] for row in jobs.waiting(connection, "cpu_0", -1, 100)].count(job_id) == 0


def test_its_end_records_when_it_began(engine: Engine, epoch: int) -> None:
    job_id = recorded(engine)
    (claimed,) = ahead(engine, epoch, job_id)
    started = begin(claimed)
    outcome = Outcome(job_id, State.SUCCEEDED, result={}, device_ms=1.0)
    (ended,) = lifecycle.finish(engine, [outcome], {job_id: claimed}, epoch)
    found = read(engine, job_id)
    assert (found["state"], found["attempt"], found["started_at"]) == ("succeeded", 1, started)
    assert jobs.view(ended) == jobs.view(found)


def test_one_that_was_marked_as_running_keeps_its_start_and_counts_once(engine: Engine, epoch: int) -> None:
    job_id = recorded(engine)
    (claimed,) = ahead(engine, epoch, job_id)
    started = begin(claimed)
    with engine.connect() as connection:
        claims.mark_begun(connection, {job_id: started}, epoch - 1)
        assert read(engine, job_id)["state"] == "reserved"
        claims.mark_begun(connection, {job_id: started}, epoch)
    found = read(engine, job_id)
    assert (found["state"], found["attempt"], found["started_at"]) == ("running", 1, started)
    lifecycle.finish(engine, [Outcome(job_id, State.FAILED, error={"code": "x"})], {job_id: claimed}, epoch)
    assert (read(engine, job_id)["attempt"], read(engine, job_id)["started_at"]) == (1, started)


def test_one_that_is_withdrawn_has_never_started(engine: Engine, epoch: int) -> None:
    job_id = recorded(engine)
    (claimed,) = ahead(engine, epoch, job_id)
    outcome = Outcome(job_id, State.CANCELLED, error=lifecycle.CANCELLED)
    (ended,) = lifecycle.finish(engine, [outcome], {job_id: claimed}, epoch)
    assert (ended["state"], ended["started_at"], ended["attempt"]) == ("cancelled", None, 0)
    assert jobs.view(ended) == jobs.view(read(engine, job_id))


def test_one_that_failed_before_it_was_marked_is_retried_with_its_attempt(engine: Engine, epoch: int) -> None:
    job_id = recorded(engine, max_attempts=2)
    (claimed,) = ahead(engine, epoch, job_id)
    begin(claimed)
    with engine.connect() as connection:
        row = jobs.retry(connection, claimed, epoch, {"code": "x"}, 0)
        assert row is not None
        assert (row["state"], row["attempt"], row["started_at"], row["epoch"]) == ("retrying", 1, None, None)
        (again,) = claims.claim_ahead(connection, [job_id], "cpu_0", epoch)
    assert again["attempt"] == 1


def test_only_its_worker_ends_it(engine: Engine, epoch: int) -> None:
    needed = new_id()
    job_id = recorded(engine, expires_in_seconds=0.02, needs=[needed])
    assert ahead(engine, epoch, job_id)
    with engine.connect() as connection:
        execute(connection, "SELECT pg_sleep(0.03)")
        assert job_id not in [row["id"] for row in jobs.expired(connection, 1000)]
        assert jobs.open_needing(connection, [needed]) == []
        jobs.request_cancel(connection, [job_id])
        asked = [one["id"] for one in ends.claimed(connection, "cpu_0", epoch) if one["cancel_requested"]]
        assert asked == [job_id]
        assert jobs.end_running(connection, [Ending(job_id, "cancelled")], epoch - 1) == []


def buried(engine: Engine, epoch: int, begun: list[str] | None = None) -> None:
    with transaction(engine) as connection:
        rescues.rescue(connection, "cpu_0", epoch, begun)


def test_behind_what_ran_a_death_is_not_counted(engine: Engine, epoch: int) -> None:
    running, waiting = recorded(engine), recorded(engine)
    with engine.connect() as connection:
        assert jobs.claim(connection, [running], "cpu_0", epoch)
    assert ahead(engine, epoch, waiting)
    buried(engine, epoch)
    assert [(row["state"], row["deaths"], row["attempt"]) for row in (read(engine, one) for one in (running, waiting))] == [
        ("queued", 1, 0), ("queued", 0, 0),
    ]  # fmt: skip
    assert ahead(engine, epoch, waiting), "it may be claimed anew"
    buried(engine, epoch)


def test_where_nothing_stands_as_running_what_was_claimed_ahead_may_have_killed_the_worker(
    engine: Engine, epoch: int
) -> None:
    job_id = recorded(engine)
    for deaths in (1, 2):
        assert ahead(engine, epoch, job_id)
        buried(engine, epoch)
        assert (read(engine, job_id)["state"], read(engine, job_id)["deaths"]) == ("queued", deaths)
    assert ahead(engine, epoch, job_id)
    buried(engine, epoch)
    assert (read(engine, job_id)["error"] or {}).get("code") == "poison"


def test_a_worker_that_leaves_in_order_says_what_it_had_begun(engine: Engine, epoch: int) -> None:
    job_id = recorded(engine)
    assert ahead(engine, epoch, job_id)
    buried(engine, epoch, [])
    assert (read(engine, job_id)["state"], read(engine, job_id)["deaths"]) == ("queued", 0)


def test_what_requires_a_job_is_claimed_only_once_that_has_succeeded(engine: Engine, epoch: int) -> None:
    first, second = recorded(engine), recorded(engine)
    after_first, after_second = (recorded(engine, after=[one], requires=[one]) for one in (first, second))
    successors = [after_first, after_second]
    with engine.connect() as connection:
        assert jobs.claim(connection, successors, "cpu_0", epoch) == []
        assert len(jobs.claim(connection, [first, second], "cpu_0", epoch)) == 2
        assert jobs.claim(connection, successors, "cpu_0", epoch) == []
        # As where the worker dies between the end of a job and what follows from it.
        jobs.end_running(connection, [Ending(first, "succeeded"), Ending(second, "failed", error={"code": "x"})], epoch)
        assert claims.claim_ahead(connection, [after_second], "cpu_0", epoch) == []
        assert [row["id"] for row in jobs.claim(connection, successors, "cpu_0", epoch)] == [after_first]
        assert {name: row["id"] for name, row in jobs.failed_before(connection, successors).items()} == {
            after_second: second
        }
