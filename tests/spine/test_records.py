"""The records: migrations, what statements of the store give back, and what guards them besides states."""

from __future__ import annotations

import pytest
from sqlalchemy import Engine, inspect

from device_operations.jobs import new_id
from migrations.__main__ import configuration
from tasks.database import open_engine
from tasks.devices import store as devices
from tasks.jobs import store as jobs
from tasks.jobs.store import Ending, NewJob
from tasks.records import metadata
from tasks.statements import execute, rows, transaction
from tests.support.records import make_device


@pytest.fixture(scope="module")
def engine(database_url: str) -> Engine:
    return open_engine(database_url)


def new_job(**more: object) -> NewJob:
    values = {"id": new_id(), "kind": "inference.run", "device_id": "cpu_0", "queue": "device.cpu_0", "request": {}}
    return NewJob(**{**values, "owner": "default", **more})  # type: ignore[arg-type]


def test_migrations_and_tables_say_the_same(databases: object) -> None:
    from alembic.command import check, downgrade, upgrade

    with databases.empty() as url:  # type: ignore[attr-defined]
        config = configuration(url)
        upgrade(config, "head")
        check(config)
        downgrade(config, "base")
        left = set(inspect(open_engine(url)).get_table_names())
        assert left <= {"alembic_version"}
        upgrade(config, "head")
        assert set(metadata.tables) <= set(inspect(open_engine(url)).get_table_names())


def test_the_hot_path_never_reads_the_whole_table_and_a_claim_writes_to_no_index(databases: object) -> None:
    with databases.migrated() as url:  # type: ignore[attr-defined]
        engine = open_engine(url)
        epoch = make_device(engine)
        with engine.connect() as connection:
            # Plans are made while the table is empty, and kept when it is not.
            for _ in range(40):
                made = [new_job() for _ in range(20)]
                jobs.insert(connection, made)
                claimed = {row["id"]: row for row in jobs.claim(connection, [job.id for job in made], "cpu_0", epoch)}
                endings = [Ending(job.id, "succeeded", result={}) for job in made]
                assert len(jobs.end_running(connection, endings, epoch, claimed)) == 20
            execute(connection, "SELECT pg_stat_force_next_flush()")
            told = "SELECT seq_scan, n_tup_hot_upd AS hot FROM pg_stat_user_tables WHERE relname = 'jobs'"
            (found,) = rows(connection, told)
            read = rows(connection, "SELECT sum(idx_tup_read) AS read FROM pg_stat_user_indexes WHERE relname = 'jobs'")
        assert found["seq_scan"] <= 3, "its indexes were made, each by a look at the empty table"
        assert found["hot"] > 600, found
        assert read[0]["read"] < 800 * 8, "each job is looked up, not looked for"
        engine.dispose()


def test_what_an_end_gives_back_is_what_the_record_says(engine: Engine) -> None:
    epoch = make_device(engine)
    told = {"text": "a\u0000b", "number": 0.1 + 0.2, "none": None, "list": [1, {"a": "\ufffd"}]}
    made = [new_job(), new_job()]
    results = [{"plain": "é", "number": 1e300}, told]
    with engine.connect() as connection:
        for job, result in zip(made, results, strict=True):
            jobs.insert(connection, [job])
            claimed = {row["id"]: row for row in jobs.claim(connection, [job.id], "cpu_0", epoch)}
            ending = Ending(job.id, "succeeded", result=result, device_ms=1.5)
            (ended,) = jobs.end_running(connection, [ending], epoch, claimed)
            found = jobs.get(connection, job.id)
            assert found is not None
            assert jobs.view(ended) == jobs.view(found)


def test_what_recording_gives_back_is_what_the_record_says(engine: Engine) -> None:
    job = new_job(priority=7, labels={"a": "b"}, needs=["m"], timeout_seconds=3.0, expires_in_seconds=60.0)
    with engine.connect() as connection:
        (made,) = jobs.insert(connection, [job])
        assert made == jobs.get(connection, job.id)


def test_a_job_is_claimed_once_and_only_under_the_epoch_that_stands(engine: Engine) -> None:
    epoch = make_device(engine)
    job = new_job()
    with engine.connect() as connection:
        jobs.insert(connection, [job])
        assert jobs.claim(connection, [job.id], "cpu_0", epoch - 1) == []
        (claimed,) = jobs.claim(connection, [job.id], "cpu_0", epoch)
        assert (claimed["state"], claimed["attempt"], claimed["epoch"]) == ("running", 1, epoch)
        assert jobs.claim(connection, [job.id], "cpu_0", epoch) == []
        assert jobs.end_running(connection, [Ending(job.id, "succeeded")], epoch - 1) == []
        assert len(jobs.end_running(connection, [Ending(job.id, "succeeded", result={"a": 1})], epoch)) == 1
        assert jobs.end_running(connection, [Ending(job.id, "failed")], epoch) == []


def test_a_cancelled_or_expired_job_is_not_claimed(engine: Engine) -> None:
    epoch = make_device(engine)
    cancelled, expired = new_job(), new_job(expires_in_seconds=-1)
    with engine.connect() as connection:
        jobs.insert(connection, [cancelled, expired])
        jobs.request_cancel(connection, [cancelled.id])
        assert jobs.claim(connection, [cancelled.id, expired.id], "cpu_0", epoch) == []


def test_ids_that_exist_are_not_recorded_twice(engine: Engine) -> None:
    job = new_job(request={"first": True})
    with engine.connect() as connection:
        assert len(jobs.insert(connection, [job])) == 1
        assert jobs.insert(connection, [job]) == []


def test_a_nul_in_a_request_does_not_break_the_record(engine: Engine) -> None:
    job = new_job(request={"text": "a\x00b"})
    with engine.connect() as connection:
        jobs.insert(connection, [job])
        assert jobs.request_of(connection, job.id) == {"text": "a\ufffdb"}


def test_budget_reservations_never_exceed_the_total(engine: Engine) -> None:
    with engine.connect() as connection:
        devices.set_budget(connection, "cpu_9", 100)
        assert devices.reserve(connection, "cpu_9", 60)
        assert not devices.reserve(connection, "cpu_9", 41)
        assert devices.reserve(connection, "cpu_9", 40)
        devices.adjust_reservation(connection, "cpu_9", -100)
        assert devices.reserve(connection, "cpu_9", 100)


def test_a_transaction_that_raises_leaves_nothing(engine: Engine) -> None:
    job = new_job()
    with pytest.raises(ZeroDivisionError), transaction(engine) as connection:
        jobs.insert(connection, [job])
        raise ZeroDivisionError
    with engine.connect() as connection:
        assert jobs.get(connection, job.id) is None


def test_the_device_monitor_can_be_read(engine: Engine) -> None:
    with engine.connect() as connection:
        assert rows(connection, "SELECT * FROM device_monitor") == []
