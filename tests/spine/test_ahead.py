"""Claiming ahead: as many whole batches as the device is busy with for a while, in one claim, and in their order."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from device_operations.settings import Settings
from tests.memory.bench import Bench
from tests.support.stack import eventually
from workers.execution.claim_ahead import AHEAD_MS, LONG_MS, ClaimAhead
from workers.execution.claimed_job import ClaimedJob
from workers.execution.scheduler import Entry, Scheduler
from workers.operations import inference

MODEL = ("model",)


class Claims:
    """What was claimed together, and what of it had been ended by someone else."""

    def __init__(self) -> None:
        self.made: list[list[str]] = []
        self.prepared: list[str] = []
        self.gone: set[str] = set()
        self.allowed = True

    def claim(self, entries: list[Entry]) -> list[ClaimedJob]:
        self.made.append([entry.job_id for entry in entries])
        # In whatever order the database gives its rows.
        return [ClaimedJob(entry, {}, {}) for entry in reversed(entries) if entry.job_id not in self.gone]

    def prepare(self, works: list[ClaimedJob]) -> None:
        self.prepared += [work.job_id for work in works]


@pytest.fixture
def scheduler() -> Scheduler:
    return Scheduler()


@pytest.fixture
def claims() -> Claims:
    return Claims()


@pytest.fixture
def ahead(scheduler: Scheduler, claims: Claims) -> Iterator[ClaimAhead]:
    made = ClaimAhead(scheduler, claims.claim, claims.prepare, lambda: claims.allowed)
    made.start()
    yield made
    made.end()
    made.close()


def wait(scheduler: Scheduler, count: int, **facts: Any) -> None:
    for seq in range(count):
        scheduler.admit(Entry(f"run-{seq}", "inference.run", 5, seq, **({"needs": MODEL} | facts)))


def taken(ahead: ClaimAhead) -> list[list[str]]:
    batches = []
    while ahead.peek():
        batches.append(sorted(work.job_id for work in ahead.take()))
    return batches


def test_as_many_batches_are_claimed_at_once_as_the_device_is_busy_with_for_a_while(
    scheduler: Scheduler, claims: Claims, ahead: ClaimAhead
) -> None:
    wait(scheduler, 9, batch_key="model", batch_limit=2)
    ahead.begin(AHEAD_MS / 3, MODEL)
    eventually(lambda: claims.made)
    ahead.end()
    claimed = [f"run-{number}" for number in range(6)]
    assert claims.made == [claimed]
    assert sorted(claims.prepared) == claimed
    assert taken(ahead) == [claimed[:2], claimed[2:4], claimed[4:]]
    assert len(scheduler) == 3


def test_nothing_more_is_claimed_while_something_claimed_waits(
    scheduler: Scheduler, claims: Claims, ahead: ClaimAhead
) -> None:
    wait(scheduler, 5)
    ahead.begin(AHEAD_MS / 2, MODEL)
    eventually(lambda: claims.made)
    ahead.end()
    assert [work.job_id for work in ahead.take()] == ["run-0"]
    ahead.begin(AHEAD_MS / 2, MODEL)
    ahead.end()
    assert claims.made == [["run-0", "run-1"]]
    assert taken(ahead) == [["run-1"]]


def test_a_batch_that_takes_long_claims_one_and_a_short_one_none(
    scheduler: Scheduler, claims: Claims, ahead: ClaimAhead
) -> None:
    wait(scheduler, 5)
    ahead.begin(LONG_MS / 2, MODEL)
    ahead.end()
    assert claims.made == []
    ahead.begin(AHEAD_MS * 20, MODEL)
    eventually(lambda: claims.made)
    ahead.end()
    assert claims.made == [["run-0"]]


def test_of_what_may_take_any_time_one_is_claimed(scheduler: Scheduler, claims: Claims, ahead: ClaimAhead) -> None:
    wait(scheduler, 2)
    for seq in (2, 3):
        scheduler.admit(Entry(f"of-another-{seq}", "inference.run", 5, seq, needs=("another",)))
    ahead.begin(AHEAD_MS / 4, MODEL)
    eventually(lambda: claims.made)
    ahead.end()
    assert taken(ahead) == [["run-0"], ["run-1"]]
    ahead.begin(AHEAD_MS / 4, MODEL)
    eventually(lambda: len(claims.made) == 2)
    ahead.end()
    assert taken(ahead) == [["of-another-2"]]


def test_what_others_have_ended_is_left_out(scheduler: Scheduler, claims: Claims, ahead: ClaimAhead) -> None:
    claims.gone = {"run-0", "run-3"}
    wait(scheduler, 4)
    ahead.begin(AHEAD_MS / 4, MODEL)
    eventually(lambda: claims.made)
    ahead.end()
    assert taken(ahead) == [["run-1"], ["run-2"]]


def test_nothing_is_claimed_that_may_not_be_begun(scheduler: Scheduler, claims: Claims, ahead: ClaimAhead) -> None:
    claims.allowed = False
    wait(scheduler, 4)
    ahead.begin(AHEAD_MS, MODEL)
    ahead.end()
    assert claims.made == []
    assert taken(ahead) == []


def test_inputs_are_read_ahead_until_they_are_much(
    database_url: str, settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference, "AHEAD_BYTES", 20)
    given = {"x": {"dtype": "float32", "shape": [4], "base64": base64.b64encode(bytes(16)).decode()}}
    works = [ClaimedJob(Entry(f"run-{n}", "inference.run", 5, n), {}, {"inputs": given}) for n in range(4)]
    bench = Bench(database_url, settings(DATABASE_URL=database_url), tmp_path, 1000)
    try:
        inference.read_ahead(bench.resident, works)
    finally:
        bench.close()
    assert [work.feeds is not None for work in works] == [True, True, False, False]
