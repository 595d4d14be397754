"""A bucket of tokens for each owner: what it holds, and when there is enough again."""

from __future__ import annotations

import pytest

from api_gateway.submission import rates
from api_gateway.submission.rates import Rates
from device_operations.errors import OperationError


class Clock:
    """The time that the buckets see."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(rates, "time", made)
    return made


def refused(rates: Rates, owner: str, jobs: int = 1) -> float | None:
    """The seconds after which the owner may submit again; None where it may now."""
    try:
        rates.spend(owner, jobs)
    except OperationError as error:
        return error.retry_after_seconds if error.code == "rate_limited" else -1
    return None


def test_a_second_of_submissions_is_taken_at_once_and_comes_back_with_time(clock: Clock) -> None:
    limit = Rates(4)
    assert [refused(limit, "a") for _ in range(5)] == [None] * 4 + [1]
    clock.now += 0.25
    assert [refused(limit, "a") for _ in range(2)] == [None, 1]
    clock.now += 3600
    assert [refused(limit, "a") for _ in range(5)] == [None] * 4 + [1], "no more than a second of them is saved up"


def test_each_owner_has_a_bucket(clock: Clock) -> None:
    limit = Rates(1)
    assert [refused(limit, owner) for owner in "aab"] == [None, 1, None]


def test_a_bulk_submission_is_taken_by_a_full_bucket_and_waited_for_by_the_next(clock: Clock) -> None:
    limit = Rates(2)
    assert refused(limit, "a", 10) is None
    assert refused(limit, "a") == 5
    clock.now += 4.5
    assert refused(limit, "a") is None


def test_less_than_one_a_second_lets_one_through(clock: Clock) -> None:
    limit = Rates(0.1)
    assert [refused(limit, "a") for _ in range(2)] == [None, 10]


def test_without_a_limit_nothing_is_counted(clock: Clock) -> None:
    limit = Rates(None)
    assert [refused(limit, "a", 10**9) for _ in range(3)] == [None] * 3
