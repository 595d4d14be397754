"""Celery's result backend, Flower, HTTP and the log say the same of every task, whatever is done to the parts."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest
from celery import Signature

from tests.direct.conftest import Caller, busy_run
from tests.support.stack import RunningStack, eventually

OPERATIONS = 500
#: So many operations at the end leave Redis as it is, and so many the worker: what is sent then is there to be compared,
#: however fast it goes. A message that a worker has just taken from Redis when it is killed is lost, as with Celery's own.
UNFLUSHED = 100
UNKILLED = 60
SEED = 20_261_128

#: Where callbacks go: nobody consumes it, so every message that was published is seen.
SINK = "sink"

#: What Celery and Flower say of a job in each state that ends it.
CELERY = {"succeeded": "SUCCESS", "failed": "FAILURE", "cancelled": "REVOKED", "expired": "REVOKED"}


@pytest.fixture(scope="module")
def stack(tmp_path_factory: Any, database_url: str, redis_url: str) -> Iterator[Any]:
    """One with a short lease, since workers are killed."""
    settings = {"LEASE_SECONDS": 2}
    made = RunningStack(tmp_path_factory.mktemp("stack"), database_url, redis_url, settings=settings)
    try:
        made.start()
        made.wait_ready()
        yield made
    finally:
        made.close()


@dataclass
class Run:
    """The random operations, and what they did."""

    caller: Caller
    long_run: Signature
    sent: dict[str, str] = field(default_factory=dict)
    callbacks: Counter[str] = field(default_factory=Counter)
    flushed_at: datetime | None = None
    #: The tasks that were sent before Redis was last emptied, or the worker killed: their messages may be lost.
    uncertain: set[str] = field(default_factory=set)
    done: Counter[str] = field(default_factory=Counter)
    random: random.Random = field(default_factory=lambda: random.Random(SEED))

    def operate(self, left: int) -> None:
        """Does one thing; `left` more are to follow."""
        kinds = {
            self.send: 60, self.send_long: 4, self.send_later: 8, self.send_expiring: 10, self.send_nowhere: 3,
            self.send_refused: 6, self.revoke: 18, self.cancel: 6, self.send_revoked: 4, self.pause: 20,
            self.kill: 2 if left >= UNKILLED else 0, self.flush: 2 if left >= UNFLUSHED else 0,
        }  # fmt: skip
        (step,) = self.random.choices(list(kinds), list(kinds.values()))
        self.done[step.__name__] += 1
        step()

    def _send(self, task: Signature, **options: Any) -> str:
        options.setdefault("priority", self.random.choice([None, 1, 5, 9]))
        sent = task.apply_async(link=self.caller.plain("note", queue=SINK), **options)
        self.sent[sent.id] = task.task
        return str(sent.id)

    def send(self) -> None:
        self._send(self.caller.allocate(self.random.randint(1, 64)))

    def send_long(self) -> None:
        self._send(self.long_run)

    def send_later(self) -> None:
        self._send(self.caller.allocate(), countdown=self.random.uniform(0.1, 4))

    def send_expiring(self) -> None:
        self._send(self.caller.allocate(), expires=self.random.choice([-1, 0.02, 0.5, 60]))

    def send_nowhere(self) -> None:
        self._send(self.caller.allocate(queue="device.gpu_404"))

    def send_refused(self) -> None:
        self._send(self.caller.refused())

    def send_revoked(self) -> None:
        task_id = f"revoked-{len(self.sent)}-{self.random.getrandbits(64)}"
        self.caller.app.control.revoke(task_id)
        self._send(self.caller.allocate(), task_id=task_id)

    def revoke(self) -> None:
        if self.sent:
            recent = list(self.sent)[-20:]
            self.caller.app.control.revoke(self.random.choice(recent), terminate=self.random.random() < 0.5)

    def cancel(self) -> None:
        if self.sent:
            self.caller.stack.client.delete(f"/api/jobs/{self.random.choice(list(self.sent)[-20:])}")

    def pause(self) -> None:
        time.sleep(self.random.uniform(0, 0.15))

    def kill(self) -> None:
        self.caller.stack.kill("cpu_0")
        self.caller.stack.start("cpu_0")
        self.uncertain = set(self.sent)

    def flush(self) -> None:
        self.collect()
        self.caller.redis.flushdb()
        self.flushed_at = datetime.now(UTC)
        self.uncertain = set(self.sent)

    def certain(self) -> set[str]:
        """The tasks whose messages and results nothing took."""
        return self.sent.keys() - self.uncertain

    def end_in_each_state(self) -> None:
        """Sends four more tasks, whose states no timing changes: one for each state that ends a job."""
        self.send()
        self.send_refused()
        self._send(self.caller.allocate(), expires=-1)
        cancelled = self._send(self.caller.allocate(), countdown=3600)
        eventually(lambda: self.caller.job(cancelled), 60)
        self.caller.stack.client.delete(f"/api/jobs/{cancelled}").raise_for_status()

    def collect(self) -> None:
        """Takes the callbacks that were published, by the task that they were linked to."""
        while (raw := self.caller.redis.rpop(SINK)) is not None:
            self.callbacks[json.loads(raw)["headers"]["parent_id"]] += 1


@pytest.fixture(scope="module")
def run(caller: Caller, flower: httpx.Client) -> Run:
    made = Run(caller, busy_run(caller, 2000))
    for number in range(OPERATIONS):
        made.operate(OPERATIONS - 1 - number)
    made.end_in_each_state()
    # The seed says how often each is done, and how many tasks nothing takes; no timing does.
    assert min(made.done["kill"], made.done["flush"], made.done["revoke"]) >= 3, made.done
    assert len(made.certain()) > 30
    return made


def jobs_of(run: Run) -> dict[str, dict[str, Any]]:
    """The tasks' jobs, all of which end. A message that was lost before it was recorded leaves none."""

    jobs: dict[str, dict[str, Any]] = {}

    def not_ended() -> dict[str, str]:
        found = {task_id: run.caller.job(task_id) for task_id in run.sent}
        jobs.update((task_id, job) for task_id, job in found.items() if job is not None)
        waiting = {task_id: job["state"] for task_id, job in jobs.items() if not job["finished_at"]}
        return waiting | dict.fromkeys(run.certain() - jobs.keys(), "no job")

    settled(not_ended, {}, 90)
    return jobs


def settled(look: Callable[[], Any], expected: Any, seconds: float = 20) -> None:
    """Waits until what is seen is what is expected; else shows the difference."""
    try:
        eventually(lambda: look() == expected, seconds, 0.5)
    except AssertionError:
        assert look() == expected


@pytest.mark.slow
def test_all_four_say_the_same_of_every_task(run: Run, flower: httpx.Client) -> None:
    jobs = jobs_of(run)
    states = {task_id: job["state"] for task_id, job in jobs.items()}
    assert set(states.values()) == set(CELERY), Counter(states.values())

    # Celery's results that were there when Redis was emptied are gone; what ended since is not.
    def ended_since(job: dict[str, Any]) -> bool:
        return run.flushed_at is None or datetime.fromisoformat(job["finished_at"]) > run.flushed_at

    since = {task_id: CELERY[states[task_id]] for task_id, job in jobs.items() if ended_since(job)}
    assert run.certain() <= since.keys()
    settled(lambda: {task_id: run.caller.app.AsyncResult(task_id).state for task_id in since}, since)
    for task_id in states.keys() - since.keys():
        assert run.caller.app.AsyncResult(task_id).state in ("PENDING", CELERY[states[task_id]])
    # What no job was made of has no result that says that it ran.
    for task_id in run.sent.keys() - states.keys():
        assert run.caller.app.AsyncResult(task_id).state in ("PENDING", "REVOKED")

    def in_flower() -> dict[str, str]:
        tasks = flower.get("/api/tasks", params={"limit": 100_000}).json()
        return {task_id: tasks[task_id]["state"] for task_id in states if task_id in tasks}

    settled(in_flower, {task_id: CELERY[state] for task_id, state in states.items()}, 60)

    def logged() -> dict[str, set[str]]:
        found: dict[str, set[str]] = {}
        for name in ("gateway", "cpu_0"):
            for line in run.caller.stack.log(name).splitlines():
                if '"event": "job"' in line:
                    told = json.loads(line)
                    found.setdefault(told["job_id"], set()).add(told["state"])
        return {task_id: found.get(task_id, set()) for task_id in states}

    settled(logged, {task_id: {state} for task_id, state in states.items()})


def test_callbacks_were_published_once_for_what_succeeded_and_for_nothing_else(run: Run) -> None:
    jobs = jobs_of(run)
    run.collect()
    wanted = {task_id for task_id, job in jobs.items() if job["state"] == "succeeded"}
    since = {
        task_id
        for task_id in wanted
        if run.flushed_at is None or datetime.fromisoformat(jobs[task_id]["finished_at"]) > run.flushed_at
    }
    eventually(lambda: (run.collect(), since <= run.callbacks.keys())[1], 20)
    assert set(run.callbacks) <= wanted
    assert max(run.callbacks.values()) == 1
