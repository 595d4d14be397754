"""Rows that run under a living epoch and that its worker does not hold: found, and treated as after a death."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from sqlalchemy import Engine

from tasks.database import open_engine
from tasks.jobs import lost_ends as ends
from tasks.jobs import store as jobs
from tasks.jobs.rescue import Rescue
from tasks.jobs.store import Ending
from tasks.statements import Row, execute
from tests.faults.test_spine_faults import load
from tests.spine.test_records import new_job
from tests.support import graphs
from tests.support.records import make_device
from tests.support.stack import RunningStack, eventually
from workers.execution.reconcile import Reconciler


class Bench:
    """A device's epoch with jobs that run under it, and a reconciler that is said which of them are held."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.epoch = make_device(engine)
        self.held: set[str] = set()
        self.announced: list[Rescue] = []
        self.reconciler = Reconciler(
            engine, "cpu_0", self.epoch, lambda job_id: job_id in self.held, self.announced.append
        )

    def running(self, *, seconds: float = 10, **more: object) -> str:
        made = new_job(needs=["model"], **more)
        with self.engine.connect() as connection:
            jobs.insert(connection, [made])
            assert jobs.claim(connection, [made.id], "cpu_0", self.epoch)
            age = "UPDATE jobs SET started_at = started_at - make_interval(secs => %(age)s) WHERE id = %(id)s"
            execute(connection, age, {"id": made.id, "age": seconds})
        return made.id

    def look(self) -> None:
        self.reconciler.look(self.asked())

    def asked(self) -> Sequence[Row]:
        with self.engine.connect() as connection:
            return ends.claimed(connection, "cpu_0", self.epoch)

    def state(self, job_id: str) -> str:
        with self.engine.connect() as connection:
            found = jobs.get(connection, job_id)
        assert found is not None
        return str(found["state"])


@pytest.fixture
def bench(database_url: str) -> Bench:
    return Bench(open_engine(database_url))


def test_a_run_that_nothing_holds_goes_back_to_the_queue_at_the_second_look(bench: Bench) -> None:
    job_id = bench.running()
    bench.look()
    assert bench.state(job_id) == "running"
    bench.look()
    assert bench.state(job_id) == "queued"
    (told,) = bench.announced
    assert [(row["id"], row["deaths"]) for row in told.requeued] == [(job_id, 1)]


def test_what_cannot_be_repeated_fails_as_after_a_death(bench: Bench) -> None:
    job_id = bench.running(kind="memory.copy")
    bench.look()
    bench.look()
    assert bench.state(job_id) == "failed"
    assert [row["error"]["code"] for row in bench.announced[0].ended] == ["worker_lost"]


def test_what_was_to_be_cancelled_is(bench: Bench) -> None:
    job_id = bench.running()
    with bench.engine.connect() as connection:
        jobs.request_cancel(connection, [job_id])
    bench.look()
    bench.look()
    assert bench.state(job_id) == "cancelled"


def test_what_is_held_or_was_claimed_just_now_stays(bench: Bench) -> None:
    held, young = bench.running(), bench.running(seconds=0)
    bench.held.add(held)
    for _ in range(3):
        bench.look()
    assert {bench.state(held), bench.state(young)} == {"running"}
    assert not bench.announced


def test_what_has_ended_since_the_statement_is_no_loss(bench: Bench) -> None:
    job_id = bench.running()
    asked = bench.asked()
    bench.reconciler.look(asked)
    with bench.engine.connect() as connection:
        jobs.end_running(connection, [Ending(job_id, "succeeded", {})], bench.epoch)
    bench.reconciler.look(asked)
    assert bench.state(job_id) == "succeeded"
    assert not bench.announced


def test_an_epoch_that_is_over_puts_nothing_back(bench: Bench) -> None:
    job_id = bench.running()
    asked = bench.asked()
    make_device(bench.engine)
    bench.reconciler.look(asked)
    bench.reconciler.look(asked)
    assert bench.state(job_id) == "running"


def test_a_living_worker_runs_again_what_its_epoch_was_said_to_run(start_stack: Callable[..., RunningStack]) -> None:
    stack = start_stack()
    load(stack, "tiny")
    body = {"model_name": "tiny", "inputs": {"x": graphs.tensor(np.ones((1, 4), np.float32))}}
    done = stack.client.post("/api/inference/run", json=body, headers={"Prefer": "wait=30"}).json()
    epoch = stack.client.get("/api/devices/cpu_0").json()["epoch"]
    engine = open_engine(stack.database_url)
    made = new_job()
    with engine.connect() as connection:
        # As a claim leaves it whose answer never came.
        execute(
            connection,
            "INSERT INTO jobs (id, kind, state, device_id, queue, priority, attempt, epoch, request, resource_type, "
            "resource_id, needs, owner, submitted_at, started_at) SELECT %(id)s, kind, 'running', device_id, queue, "
            "priority, 1, %(epoch)s, request, resource_type, %(id)s, needs, owner, clock_timestamp(), "
            "clock_timestamp() FROM jobs WHERE id = %(like)s",
            {"id": made.id, "epoch": epoch, "like": done["job_id"]},
        )
    engine.dispose()
    # Not at once: it could be a claim that was made this very moment.
    assert stack.client.get(f"/api/jobs/{made.id}", params={"wait": 2}).json()["state"] == "running"
    job = eventually(lambda: (one := stack.client.get(f"/api/jobs/{made.id}").json())["finished_at"] and one, 30)
    assert (job["state"], job["attempt"], job["deaths"]) == ("succeeded", 1, 1)
    assert job["result"]["outputs"] == done["result"]["outputs"]
