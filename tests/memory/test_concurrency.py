"""Many callers at once: what is reserved never exceeds the budget, and what fails gives its reservation back."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from device_operations.errors import OperationError
from device_operations.jobs import Kind, State
from device_operations.settings import Settings
from tasks.jobs import lifecycle
from tasks.jobs.store import Ending
from tests.memory.bench import Bench
from tests.memory.calls import Memory
from tests.support.stack import RunningStack

CLIENTS = 32
BUDGET = 100_000


@pytest.fixture
def bench(database_url: str, settings: Callable[..., Settings], tmp_path: Path) -> Iterator[Bench]:
    made = Bench(database_url, settings(DATABASE_URL=database_url), tmp_path, BUDGET)
    yield made
    made.close()


def totals(bench: Bench) -> tuple[int, int]:
    """What is reserved by the device's one total, and by the sum of its allocations."""
    with bench.engine.connect() as connection:
        row = connection.exec_driver_sql(
            "SELECT reserved_bytes, (SELECT coalesce(sum(size_bytes), 0) FROM allocations "
            "WHERE state IN ('pending', 'active')) FROM device_budgets"
        ).one()
    return int(row[0]), int(row[1])


def freeing(bench: Bench, size: int) -> tuple[str, str]:
    """An active allocation of `size` bytes, and the queued job that frees it."""
    allocation = bench.submit([(Kind.MEMORY_ALLOCATE, {"size_bytes": size})])[0]["resource_id"]
    bench.run()
    return allocation, bench.submit([(Kind.MEMORY_DEALLOCATE, {"allocation_id": allocation})])[0]["id"]


def cancel(bench: Bench, job_id: str) -> None:
    """Ends a queued job before it runs."""
    lifecycle.end(bench.engine, [Ending(job_id, State.CANCELLED.value, error=lifecycle.CANCELLED)], [State.QUEUED])


def test_32_clients_never_reserve_more_than_the_budget(bench: Bench) -> None:
    stop = threading.Event()
    seen: list[tuple[int, int]] = []

    def watch() -> None:
        while not stop.is_set():
            seen.append(totals(bench))

    def ask(seed: int) -> int:
        numbers, taken = random.Random(seed), 0
        for _ in range(15):
            size = numbers.randrange(1, BUDGET // 8)
            _, refusal = bench.attempt([(Kind.MEMORY_ALLOCATE, {"size_bytes": size})])
            if refusal is None:
                taken += size
                continue
            assert refusal.code == "insufficient_memory"
            assert refusal.detail is not None
            assert refusal.detail["needed_bytes"] == size
        return taken

    watcher = threading.Thread(target=watch)
    watcher.start()
    with ThreadPoolExecutor(CLIENTS) as clients:
        taken = sum(clients.map(ask, range(CLIENTS)))
    stop.set()
    watcher.join()
    assert max(reserved for reserved, _ in seen) <= BUDGET
    assert totals(bench) == (taken, taken)
    assert taken > BUDGET * 0.9
    rows = bench.run(limit=10_000)
    assert {row["state"] for row in rows} == {"succeeded"}
    assert bench.resident.device.allocated_bytes == taken
    for allocation in list(bench.resident.allocations):
        bench.submit([(Kind.MEMORY_DEALLOCATE, {"allocation_id": allocation})])
    bench.run(limit=10_000)
    assert totals(bench) == (0, 0)


def test_one_caller_id_by_32_clients_is_one_allocation(bench: Bench) -> None:
    def ask(_: int) -> str:
        return str(bench.submit([(Kind.MEMORY_ALLOCATE, {"size_bytes": 10, "allocation_id": "same"})])[0]["id"])

    def free(_: int) -> str:
        return str(bench.submit([(Kind.MEMORY_DEALLOCATE, {"allocation_id": "same"})])[0]["id"])

    with ThreadPoolExecutor(CLIENTS) as clients:
        assert len(set(clients.map(ask, range(CLIENTS)))) == 1
        assert totals(bench) == (10, 10)
        assert len(set(clients.map(free, range(CLIENTS)))) == 1
    bench.run()
    assert totals(bench) == (0, 0)


def test_jobs_that_are_cancelled_or_fail_give_back_what_they_reserved(bench: Bench) -> None:
    def ask(number: int) -> Any:
        row = bench.submit([(Kind.MEMORY_ALLOCATE, {"size_bytes": 1000})])[0]
        if number % 2:
            cancel(bench, row["id"])
        return row

    with ThreadPoolExecutor(CLIENTS) as clients:
        list(clients.map(ask, range(60)))
    assert totals(bench) == (30_000, 30_000)
    bench.run()
    assert bench.resident.device.allocated_bytes == 30_000


def test_room_that_a_queued_deallocation_makes_is_given_out_and_waited_for(bench: Bench) -> None:
    full = bench.submit([(Kind.MEMORY_ALLOCATE, {"size_bytes": BUDGET})])[0]["resource_id"]
    bench.run()
    with pytest.raises(OperationError, match="free allocations"):
        bench.submit([(Kind.MEMORY_ALLOCATE, {"size_bytes": 1})])
    freed_by = bench.submit([(Kind.MEMORY_DEALLOCATE, {"allocation_id": full})])[0]["id"]
    next_one = bench.submit([(Kind.MEMORY_ALLOCATE, {"size_bytes": BUDGET, "job": {"priority": 9}})])[0]
    assert next_one["after"] == [freed_by]
    standing = bench.standing()
    assert (standing["reserved_bytes"], standing["awaiting_bytes"]) == (BUDGET, BUDGET)
    with pytest.raises(OperationError, match="free allocations"):
        bench.submit([(Kind.MEMORY_ALLOCATE, {"size_bytes": 1})])
    bench.run()
    assert bench.job(next_one["id"])["state"] == "succeeded"
    assert totals(bench) == (BUDGET, BUDGET)


def test_room_that_was_counted_on_and_did_not_come_fails_in_the_scheduler(bench: Bench) -> None:
    full, freed_by = freeing(bench, BUDGET)
    hopeful = bench.submit([(Kind.MEMORY_ALLOCATE, {"size_bytes": 10})])[0]
    cancel(bench, freed_by)
    bench.run()
    assert bench.job(hopeful["id"])["error"]["code"] == "insufficient_memory"
    assert totals(bench) == (BUDGET, BUDGET)
    # A deallocation that did not happen can be asked for again.
    bench.submit([(Kind.MEMORY_DEALLOCATE, {"allocation_id": full})])
    bench.run()
    assert totals(bench) == (0, 0)


def test_an_allocation_that_counted_on_nothing_does_not_pay_for_one_that_waits(bench: Bench) -> None:
    _, freed_by = freeing(bench, BUDGET - 100)
    fits = bench.submit([(Kind.MEMORY_ALLOCATE, {"size_bytes": 100})])[0]
    waits = bench.submit([(Kind.MEMORY_ALLOCATE, {"size_bytes": 50})])[0]
    assert (fits["after"], waits["after"]) == ([], [freed_by])
    # The bench runs the newest first that waits for nobody: the one that fits, before anything is freed.
    assert [row["id"] for row in bench.run(1)] == [fits["id"]]
    assert bench.job(fits["id"])["state"] == "succeeded"
    bench.run()
    assert bench.job(waits["id"])["state"] == "succeeded"
    assert totals(bench) == (150, 150)


def test_who_counted_on_room_that_did_not_come_fails_and_who_was_admitted_before_does_not(bench: Bench) -> None:
    _, freed_by = freeing(bench, BUDGET - 100)
    fits = bench.submit([(Kind.MEMORY_ALLOCATE, {"size_bytes": 100})])[0]
    hopeful = bench.submit([(Kind.MEMORY_ALLOCATE, {"size_bytes": 50})])[0]
    cancel(bench, freed_by)
    bench.run()
    assert bench.job(fits["id"])["state"] == "succeeded"
    assert bench.job(hopeful["id"])["error"]["detail"] == {"needed_bytes": 50, "missing_bytes": 50}
    assert totals(bench) == (BUDGET, BUDGET)


def test_32_clients_over_http_pipeline_without_waiting_and_leave_nothing(stack: RunningStack) -> None:
    def work(number: int) -> None:
        with httpx.Client(base_url=stack.http_url, timeout=60, trust_env=False) as client:
            memory = Memory(stack, client)
            data = bytes([number]) * 5000
            for _ in range(3):
                one = memory.allocate(size_bytes=5000)["resource"]["id"]
                two = memory.allocate(size_bytes=5000)["resource"]["id"]
                memory.write(one, data)
                memory.copy(one, two)
                memory.clear(one, value=255)
                jobs = [memory.deallocate(one)]
                assert memory.read(two) == data
                jobs.append(memory.deallocate(two))
                for job in jobs:
                    memory.done(job)

    with ThreadPoolExecutor(CLIENTS) as clients:
        list(clients.map(work, range(CLIENTS)))
    standing = Memory(stack).device()
    assert (standing["reserved_bytes"], standing["used_bytes"], standing["allocation_count"]) == (0, 0, 0)


def test_a_thousand_allocations_at_once_are_recorded_all_or_none(stack: RunningStack) -> None:
    memory = Memory(stack)
    jobs = [{"kind": "memory.allocate", "request": {"size_bytes": 64, "label": str(n)}} for n in range(1000)]
    answer = stack.client.post("/api/jobs", json={"jobs": jobs})
    assert answer.status_code == 202
    made = answer.json()["jobs"]
    assert len({job["resource"]["id"] for job in made}) == 1000
    for job in made[::100] + made[-1:]:
        memory.done(job)
    assert memory.device()["allocation_count"] == 1000
    frees = [{"kind": "memory.deallocate", "request": {"allocation_id": job["resource"]["id"]}} for job in made]
    for job in stack.client.post("/api/jobs", json={"jobs": frees}).json()["jobs"]:
        memory.done(job)
    assert memory.device()["reserved_bytes"] == 0
