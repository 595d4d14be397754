"""An outcome that the database will not have ends its job as failed, alone, instead of leaving it running for ever."""

from __future__ import annotations

import time

from sqlalchemy import Engine

from device_operations.jobs import State
from tasks.celery_bridge.outbox import Outbox
from tasks.database import open_engine
from tasks.jobs import store as jobs
from tasks.redis.publish import Publisher, connect
from tests.spine.test_records import make_device, new_job
from tests.support.stack import eventually
from workers.celery_bridge.pool import Note
from workers.execution.claimed_job import ClaimedJob
from workers.execution.completer import Completer
from workers.execution.scheduler import Entry, Scheduler


def test_one_bad_outcome_fails_alone_and_the_others_are_recorded(database_url: str, redis_url: str) -> None:
    engine: Engine = open_engine(database_url)
    epoch = make_device(engine)
    made = [new_job() for _ in range(3)]
    with engine.connect() as connection:
        jobs.insert(connection, made)
        rows = {row["id"]: row for row in jobs.claim(connection, [job.id for job in made], "cpu_0", epoch)}
    works = [ClaimedJob(Entry(job.id, job.kind, 5, 0), rows[job.id], {}) for job in made]
    outcomes = [work.succeeded({"fine": True}) for work in works]
    outcomes[1].result = {"not": {1, 2}, "key": {("a", "b"): 1}}
    completer = Completer(engine, Publisher(connect(redis_url)), Scheduler(), "cpu_0", epoch, Outbox(engine, redis_url))
    completer.start()
    completer.finished(works, outcomes)

    def ended() -> list[dict]:
        with engine.connect() as connection:
            found = jobs.get_many(connection, [job.id for job in made])
        states = [found[job.id] for job in made]
        return states if all(State(row["state"]).terminal for row in states) else []

    first, bad, last = eventually(ended)
    completer.stop()
    assert (first["state"], last["state"]) == ("succeeded", "succeeded")
    assert (bad["state"], bad["error"]["code"]) == ("failed", "internal_error")


def test_a_step_that_fails_costs_no_outcome_that_was_handed_over_after_it(database_url: str, redis_url: str) -> None:
    engine: Engine = open_engine(database_url)
    epoch = make_device(engine)
    made = new_job()
    with engine.connect() as connection:
        jobs.insert(connection, [made])
        (row,) = jobs.claim(connection, [made.id], "cpu_0", epoch)
    work = ClaimedJob(Entry(made.id, made.kind, 5, 0), row, {})
    completer = Completer(engine, Publisher(connect(redis_url)), Scheduler(), "cpu_0", epoch, Outbox(engine, redis_url))

    def step() -> None:
        raise ZeroDivisionError

    # Taken together, since they wait when it starts.
    completer.call(step)
    completer.finished([work], [work.succeeded({"fine": True})])
    completer.start()
    completer.stop()
    with engine.connect() as connection:
        found = jobs.get(connection, made.id)
    assert found is not None
    assert found["state"] == "succeeded"


def test_a_job_whose_outcome_cannot_be_recorded_is_no_longer_held(database_url: str, redis_url: str) -> None:
    engine: Engine = open_engine(database_url)
    epoch = make_device(engine)
    scheduler = Scheduler()
    assert scheduler.admit(Entry("no-such-row", "inference.run", 5, 0))
    (entry,) = scheduler.take(0)
    assert "no-such-row" in scheduler
    # Without a row there is nothing to say how often it may be tried: as unexpected as anything.
    work = ClaimedJob(entry, {}, {})
    completer = Completer(engine, Publisher(connect(redis_url)), scheduler, "cpu_0", epoch, Outbox(engine, redis_url))
    completer.finished([work], [work.succeeded({})])
    completer.start()
    completer.stop()
    assert "no-such-row" not in scheduler


def test_a_start_is_told_soon_whether_or_not_the_recorder_is_about_to_look(database_url: str, redis_url: str) -> None:
    engine: Engine = open_engine(database_url)
    completer = Completer(engine, Publisher(connect(redis_url)), Scheduler(), "cpu_0", 1, Outbox(engine, redis_url))
    completer.start()
    try:
        # It waits for a second; then for much less, since there was something.
        for about_to_look in (False, True):
            eventually(lambda: completer._looks_at > time.monotonic() + 0.6)
            if about_to_look:
                completer.call(lambda: None)
                eventually(lambda: completer._looks_at < time.monotonic() + 0.1)
            headers = {"id": new_job().id, "task": "device_operations.inference.run", "argsrepr": "", "kwargsrepr": ""}
            note = Note(headers)
            work = ClaimedJob(Entry(note.job_id, note.kind, 5, 0, handle=note), {}, {})
            looks_at, began = completer._looks_at, time.time()
            completer.started([work])
            started_at = eventually(lambda note=note: note.started_at)
            assert began - 0.01 <= started_at <= began + 0.3
            assert about_to_look or time.monotonic() < looks_at
    finally:
        completer.stop()
