"""`QUEUE__MAX_LENGTH`: never exceeded, and nothing is refused while there is a place, whoever submits at once."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from threading import Event, Thread

import httpx
import psycopg2
import pytest
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError

from api_gateway.submission.submitter import Submitter
from device_operations.errors import OperationError
from device_operations.jobs import new_id
from tasks.database import open_engine
from tasks.jobs import queue_limit, store
from tasks.jobs.store import NewJob
from tasks.redis.publish import Publisher, connect
from tasks.statements import Relaxed, execute, rows, transaction
from tests.support.stack import RunningStack, eventually

DEVICE = "cpu_0"


def job(limit: int | None) -> NewJob:
    return NewJob(new_id(), "inference.run", DEVICE, f"device.{DEVICE}", {}, "default", queue_limit=limit)


@contextmanager
def watched(database_url: str) -> Iterator[list[int]]:
    """The largest number of waiting jobs that was ever seen, as a list of one."""
    seen, stop = [0], Event()

    def look() -> None:
        connection = psycopg2.connect(database_url)
        connection.autocommit = True
        with connection.cursor() as cursor:
            while not stop.is_set():
                cursor.execute("SELECT count(*) FROM jobs WHERE finished_at IS NULL AND state <> 'running'")
                seen[0] = max(seen[0], cursor.fetchone()[0])
        connection.close()

    thread = Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join()


@pytest.fixture
def engine(databases) -> Iterator[Engine]:
    with databases.migrated() as url:
        opened = open_engine(url, pool_size=20, max_overflow=20)
        yield opened
        opened.dispose()


@pytest.mark.parametrize("limit", [60, queue_limit.RESERVE + 700, 2 * queue_limit.RESERVE + 300])
def test_the_limit_is_exact_for_many_writers_at_once(engine: Engine, redis_url: str, limit: int) -> None:
    """Transactions as a submission makes them, and the submitter's batches, all for one device."""
    submitters = [Submitter(engine, Publisher(connect(redis_url))) for _ in range(4)]

    def write(seed: int) -> int:
        numbers = random.Random(seed)
        recorded = 0
        while True:
            sizes = [numbers.choice([1, 1, 2, 7, 40]) for _ in range(numbers.randrange(1, 4))]
            groups = [[job(limit) for _ in range(size)] for size in sizes]
            if seed % 2:
                answers = submitters[seed % 4]._insert(groups, relaxed=seed % 4 == 1)
            else:
                groups = groups[:1]
                try:
                    with transaction(engine) as connection:
                        answers = [queue_limit.insert(connection, groups[0])]
                except OperationError as error:
                    answers = [error]
            for group, answer in zip(groups, answers, strict=True):
                if isinstance(answer, OperationError):
                    assert answer.code == "queue_full"
                    if len(group) == 1:
                        return recorded
                else:
                    assert [row["id"] for row in answer] == [one.id for one in group]
                    recorded += len(group)

    url = engine.url.render_as_string(hide_password=False).replace("+psycopg2", "")
    with watched(url) as seen, ThreadPoolExecutor(16) as threads:
        total = sum(threads.map(write, range(16)))
    # Each writer stopped when there was no place for a single job.
    assert total == limit
    assert seen[0] <= limit


def test_who_counts_exactly_waits_for_what_others_have_not_committed(engine: Engine) -> None:
    limit = queue_limit.RESERVE + 200

    def fill() -> int:
        with transaction(engine) as connection:
            answers = queue_limit.insert_near(connection, [[job(limit)] for _ in range(limit + 50)])
        return sum(isinstance(answer, list) for answer in answers)

    def waits() -> bool:
        with engine.connect() as connection:
            query = "SELECT count(*) AS n FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
            return bool(rows(connection, query)[0]["n"])

    with ThreadPoolExecutor(1) as threads:
        with transaction(engine) as connection:
            assert queue_limit.insert_far(connection, [[job(limit) for _ in range(100)]]) is not None
            filling = threads.submit(fill)
            eventually(lambda: waits() or filling.done())
        assert filling.result() == limit - 100


def waiting(engine: Engine) -> int:
    with engine.connect() as connection:
        query = "SELECT count(*) AS n FROM jobs WHERE finished_at IS NULL AND state <> 'running'"
        return int(rows(connection, query)[0]["n"])


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The devices whose queues were counted before an INSERT that does not count; one that counts fails."""
    seen: list[list[str]] = []

    def count(connection: Connection, limits: Mapping[str, int], *, before: str = "") -> dict[str, int]:
        seen.append(list(limits))
        return open_counts(connection, limits, before=before)

    open_counts = store.open_counts
    monkeypatch.setattr(store, "open_counts", count)
    monkeypatch.setattr(store, "insert_where", None)
    return seen


def test_far_from_the_limit_a_queue_is_counted_once(engine: Engine, counted: list[list[str]]) -> None:
    relaxed = Relaxed(engine)
    many = [[job(10_000)], [job(10_000), replace(job(10_000), device_id="cpu_1")]]
    for _ in range(30):
        fresh = [[replace(one, id=new_id()) for one in group] for group in many]
        found = relaxed.run(partial(queue_limit.insert_far, groups=fresh))
        assert [[row["id"] for row in group] for group in found or []] == [[one.id for one in group] for group in fresh]
    assert counted == [[DEVICE, "cpu_1"]]


def test_what_another_gateway_records_counts_where_nothing_is_counted(engine: Engine) -> None:
    limit = 2 * queue_limit.RESERVE + 50
    one = Relaxed(engine)
    assert one.run(lambda connection: queue_limit.insert_far(connection, [[job(limit)]])) is not None
    with transaction(engine) as connection:
        answers = queue_limit.insert_near(connection, [[job(limit)] for _ in range(limit)])
    assert sum(isinstance(answer, list) for answer in answers) == limit - 1
    assert one.run(lambda connection: queue_limit.insert_far(connection, [[job(limit)]])) is None
    assert waiting(engine) == limit


def test_running_jobs_that_come_back_count_where_nothing_is_counted(engine: Engine) -> None:
    running = 2 * queue_limit.RESERVE + 100
    limit = 2 * running
    with transaction(engine) as connection:
        store.insert(connection, [job(None) for _ in range(running)])
        execute(connection, "UPDATE jobs SET state = 'running', epoch = 1, started_at = clock_timestamp()")
    relaxed = Relaxed(engine)
    assert relaxed.run(lambda connection: queue_limit.insert_far(connection, [[job(limit)]])) is not None
    with transaction(engine) as connection:
        execute(connection, "UPDATE jobs SET state = 'queued', epoch = NULL, started_at = NULL WHERE state = 'running'")
    while relaxed.run(lambda connection: queue_limit.insert_far(connection, [[job(limit) for _ in range(100)]])):
        assert waiting(engine) <= limit
    with transaction(engine) as connection:
        answers = queue_limit.insert_near(connection, [[job(limit)] for _ in range(limit)])
    assert any(isinstance(answer, OperationError) for answer in answers)
    assert waiting(engine) == limit


def test_a_queue_is_counted_again_on_a_new_connection(engine: Engine, counted: list[list[str]]) -> None:
    """A crash of PostgreSQL may give numbers a second time: none that was seen before it may be compared with them."""
    relaxed = Relaxed(engine)

    def record() -> None:
        assert relaxed.run(lambda connection: queue_limit.insert_far(connection, [[job(10_000)]])) is not None

    record()
    record()
    assert counted == [[DEVICE]]
    with pytest.raises(DBAPIError):
        relaxed.run(lambda connection: rows(connection, "SELECT pg_terminate_backend(pg_backend_pid())"))
    record()
    assert counted == [[DEVICE], [DEVICE]]


def test_direct_messages_are_recorded_beyond_the_limit(engine: Engine) -> None:
    with transaction(engine) as connection:
        assert len(queue_limit.insert(connection, [job(2), job(2)])) == 2
    with transaction(engine) as connection:
        assert len(queue_limit.insert(connection, [job(None)])) == 1
    with (
        pytest.raises(OperationError, match="0 more jobs may wait for cpu_0, and 1 were sent") as raised,
        transaction(engine) as again,
    ):
        queue_limit.insert(again, [job(2)])
    assert raised.value.retry_after_seconds


def test_two_gateways_share_one_limit_and_bulk_is_all_or_none(start_stack: Callable[..., RunningStack]) -> None:
    stack = start_stack(gateways=2, QUEUE__MAX_LENGTH=150)
    later = {"size_bytes": 16, "job": {"delay_seconds": 3600}}

    def submit(number: int) -> int:
        with httpx.Client(base_url=stack.gateway_urls[number % 2], timeout=60, trust_env=False) as client:
            recorded = 0
            for round_ in range(40):
                many = 1 if (round_ + number) % 3 else 9
                if many == 1:
                    answer = client.post("/api/memory/allocate", json=later)
                else:
                    entry = {"kind": "memory.allocate", "request": later}
                    answer = client.post("/api/jobs", json={"jobs": [entry] * many})
                assert answer.status_code in (202, 429), answer.text
                if answer.status_code == 202:
                    recorded += many
                else:
                    assert answer.json()["code"] == "queue_full"
                    assert int(answer.headers["Retry-After"]) > 0
            return recorded

    with watched(stack.database_url) as seen, ThreadPoolExecutor(8) as threads:
        total = sum(threads.map(submit, range(8)))
    assert total == 150
    assert seen[0] == 150
    # A place that becomes free can be taken at once, whatever was known half a second ago.
    job_id = stack.client.get("/api/jobs?state=scheduled&limit=1").json()["jobs"][0]["job_id"]
    assert stack.client.post("/api/memory/allocate", json=later).status_code == 429
    assert stack.client.delete(f"/api/jobs/{job_id}").status_code == 202
    assert stack.client.post("/api/memory/allocate", json=later).status_code == 202
    assert stack.client.post("/api/memory/allocate", json=later).status_code == 429
