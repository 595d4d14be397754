"""What a worker holds: the device begins with a job or it is withdrawn, never both, and its start is when it begins."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from workers.execution.claimed_job import ClaimedJob
from workers.execution.held_jobs import HeldJobs
from workers.execution.scheduler import Entry


def work(name: str, *, ahead: bool = True, expires_in_seconds: float | None = None) -> ClaimedJob:
    now = datetime.now(UTC)
    row: dict[str, Any] = {"state": "reserved" if ahead else "running", "attempt": 0, "started_at": None}
    row["expires_at"] = None if expires_in_seconds is None else now + timedelta(seconds=expires_in_seconds)
    return ClaimedJob(Entry(name, "inference.run", 5, 1), row, {}, ahead=now if ahead else None)


def names(works: list[ClaimedJob]) -> list[str]:
    return [one.job_id for one in works]


def test_a_job_claimed_ahead_starts_when_the_device_begins_with_it() -> None:
    held, one = HeldJobs(), work("a")
    held.add([one])
    assert (names(held.waiting()), names(held.begun())) == (["a"], [])
    one.claimed -= 5
    assert held.begin([one]) == [one]
    assert (names(held.waiting()), names(held.begun())) == ([], ["a"])
    assert (one.row["state"], one.row["attempt"]) == ("running", 1)
    assert 5 <= (one.row["started_at"] - one.ahead).total_seconds() < 60


def test_what_the_device_itself_claims_has_begun() -> None:
    held, one = HeldJobs(), work("a", ahead=False)
    held.add([one])
    assert names(held.begun()) == ["a"]
    assert held.withdraw("a") is None
    assert held.begin([one]) == [one]
    assert one.row["attempt"] == 0, "its claim counted already"
    held.discard([one])
    assert len(held) == 0


def test_what_was_withdrawn_is_not_begun_and_what_has_begun_is_not_withdrawn() -> None:
    held, first, second = HeldJobs(), work("a"), work("b")
    held.add([first, second])
    assert held.withdraw("a") is first
    assert held.begin([first, second]) == [second]
    assert held.withdraw("b") is None
    assert first.row["started_at"] is None


def test_what_is_past_its_expiry_is_withdrawn_or_not_begun() -> None:
    held, soon, late = HeldJobs(), work("soon", expires_in_seconds=-1), work("late", expires_in_seconds=60)
    held.add([soon, late])
    assert held.begin([soon, late]) == [late]
    assert names(held.withdraw_overdue()) == ["soon"]
    assert held.withdraw_overdue() == []


def test_after_the_close_nothing_that_waits_is_begun() -> None:
    held, one, running = HeldJobs(), work("a"), work("b", ahead=False)
    held.add([one, running])
    held.close()
    assert held.begin([one, running]) == [running]
    assert names(held.waiting()) == ["a"]


@pytest.mark.parametrize("seed", range(3))
def test_of_beginning_and_withdrawing_at_once_exactly_one_wins(seed: int) -> None:
    for number in range(300):
        held, one = HeldJobs(), work(f"{seed}-{number}")
        held.add([one])
        together = threading.Barrier(2)
        withdrawn: list[ClaimedJob | None] = []

        def withdraw(
            held: HeldJobs, one: ClaimedJob, together: threading.Barrier, withdrawn: list[ClaimedJob | None]
        ) -> None:
            together.wait()
            withdrawn.append(held.withdraw(one.job_id))

        thread = threading.Thread(target=withdraw, args=(held, one, together, withdrawn))
        thread.start()
        together.wait()
        begun = held.begin([one])
        thread.join()
        assert (withdrawn == [one]) is (begun == [])
