"""The scheduler: who goes next."""

from __future__ import annotations

import random
import time

from hypothesis import given, settings
from hypothesis import strategies as st

from workers.execution.scheduler import Entry, Scheduler


def entry(job_id: str, priority: int = 5, seq: int = 0, after: set[str] | None = None, **more: object) -> Entry:
    return Entry(job_id, "inference.run", priority, seq, after=after or set(), **more)  # type: ignore[arg-type]


def drain(scheduler: Scheduler) -> list[str]:
    order = []
    while batch := scheduler.take(timeout_seconds=0):
        ids = [one.job_id for one in batch]
        order += ids
        scheduler.ended(ids)
    return order


def test_higher_priority_goes_first_and_equals_go_in_order_of_submission() -> None:
    scheduler = Scheduler()
    for job_id, priority, seq in [("a", 1, 1), ("b", 9, 2), ("c", 5, 3), ("d", 9, 4)]:
        scheduler.admit(entry(job_id, priority, seq))
    assert drain(scheduler) == ["b", "d", "c", "a"]


def test_a_job_waits_for_what_it_names_even_if_that_is_not_here() -> None:
    scheduler = Scheduler()
    scheduler.admit(entry("late", 9, 2, after={"elsewhere"}))
    assert scheduler.take(timeout_seconds=0) == []
    assert scheduler.foreign() == {"elsewhere"}
    scheduler.ended(["elsewhere"])
    assert drain(scheduler) == ["late"]


def test_a_blocked_job_lends_its_priority_along_the_chain() -> None:
    scheduler = Scheduler()
    scheduler.admit(entry("first", 1, 1))
    scheduler.admit(entry("second", 1, 2, after={"first"}))
    scheduler.admit(entry("middle", 5, 3))
    scheduler.admit(entry("urgent", 9, 4, after={"second"}))
    assert drain(scheduler) == ["first", "second", "urgent", "middle"]


def test_priority_is_lent_to_a_predecessor_that_arrives_later() -> None:
    scheduler = Scheduler()
    scheduler.admit(entry("urgent", 9, 2, after={"first"}))
    scheduler.admit(entry("other", 5, 3))
    scheduler.admit(entry("first", 1, 1))
    assert drain(scheduler) == ["first", "urgent", "other"]


def test_a_run_does_not_wait_for_others_while_anything_more_urgent_is_eligible() -> None:
    scheduler = Scheduler()
    scheduler.admit(entry("run", 5, 1, batch_key="model", batch_limit=2, batch_delay_seconds=30))
    (run,) = scheduler.take(timeout_seconds=0)
    # Entries that left the scheduler stand at the top of the heap until they are looked at.
    for number in range(20):
        scheduler.admit(entry(f"gone {number}", 9, 2 + number))
        scheduler.discard(f"gone {number}")
    scheduler.admit(entry("urgent", 6, 50))
    began = time.monotonic()
    assert scheduler.mates(run, 1) == []
    assert time.monotonic() - began < 10
    assert drain(scheduler) == ["urgent"]


def test_a_job_that_has_ended_may_be_admitted_again() -> None:
    scheduler = Scheduler()
    assert scheduler.admit(entry("a"))
    assert drain(scheduler) == ["a"]
    assert scheduler.admit(entry("a"))


def test_a_duplicate_is_refused_while_it_waits_and_while_it_runs() -> None:
    scheduler = Scheduler()
    assert scheduler.admit(entry("a"))
    assert not scheduler.admit(entry("a"))
    scheduler.take(timeout_seconds=0)
    assert not scheduler.admit(entry("a"))
    scheduler.put_back(["a"])
    assert scheduler.admit(entry("a"))


def test_runs_of_one_batch_are_taken_together_up_to_the_limit() -> None:
    scheduler = Scheduler()
    for seq in range(6):
        scheduler.admit(entry(f"m{seq}", 5, seq, batch_key="model", batch_limit=4))
    scheduler.admit(entry("other", 5, 2))
    assert [one.job_id for one in scheduler.take(timeout_seconds=0)] == ["m0", "m1", "m2", "m3"]


def test_only_what_is_more_urgent_is_taken_between_the_steps_of_a_long_job() -> None:
    scheduler = Scheduler()
    scheduler.admit(entry("same", 5, 1))
    assert scheduler.take(timeout_seconds=0, above=5) == []
    scheduler.admit(entry("more", 6, 2))
    assert [one.job_id for one in scheduler.take(timeout_seconds=0, above=5)] == ["more"]


def test_what_waits_only_for_a_recording_is_not_overtaken_by_something_less_urgent() -> None:
    scheduler = Scheduler()
    scheduler.admit(entry("first", 9, 1))
    scheduler.admit(entry("next", 9, 2, after={"first"}))
    scheduler.admit(entry("lesser", 1, 3))
    scheduler.take(timeout_seconds=0)
    scheduler.finishing(["first"])
    assert scheduler.take(timeout_seconds=0) == []
    scheduler.ended(["first"])
    assert drain(scheduler) == ["next", "lesser"]


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 40))
def test_every_order_respects_predecessors_and_takes_the_highest_eligible(seed: int, count: int) -> None:
    random_source = random.Random(seed)
    jobs = []
    for seq in range(count):
        after = {f"j{random_source.randrange(seq)}" for _ in range(random_source.randrange(3))} if seq else set()
        jobs.append(entry(f"j{seq}", random_source.randrange(10), seq, after=after))
    needed = {job.job_id: set(job.after) for job in jobs}
    random_source.shuffle(jobs)
    scheduler = Scheduler()
    for job in jobs:
        scheduler.admit(job)
    order = drain(scheduler)
    assert sorted(order) == sorted(needed)
    for position, job_id in enumerate(order):
        assert needed[job_id] <= set(order[:position])


def test_what_waits_its_turn_on_a_resource_passes_a_job_that_is_done_with_it() -> None:
    scheduler = Scheduler()
    scheduler.admit(entry("running"))
    assert [one.job_id for one in scheduler.take(0)] == ["running"]
    scheduler.admit(entry("same", after={"running"}, needs=("session",)))
    scheduler.admit(entry("other", after={"running"}, needs=("elsewhere",)))
    assert scheduler.take(0) == []
    scheduler.pass_by("running", "session")
    # One that is admitted later passes too, and one that needs the job itself still waits.
    scheduler.admit(entry("late", after={"running"}, needs=("session",)))
    assert sorted(one.job_id for one in [*scheduler.take(0), *scheduler.take(0)]) == ["late", "same"]
    assert scheduler.take(0) == []
    scheduler.ended(["running"])
    assert [one.job_id for one in scheduler.take(0)] == ["other"]


def test_only_whole_batches_of_the_kind_asked_for_are_given_ahead() -> None:
    scheduler = Scheduler()

    def full(kind: str) -> list[list[str]]:
        batches = scheduler.take_full([kind], (), 3, iter([True, False]).__next__)
        return [[one.job_id for one in batch] for batch in batches]

    scheduler.admit(entry("a", 5, 1, batch_key="m", batch_limit=2))
    assert full("inference.run") == []
    for seq, job_id in enumerate("bcdefgh", start=2):
        scheduler.admit(entry(job_id, 5, seq, batch_key="m", batch_limit=2))
    assert full("memory.copy") == []
    assert full("inference.run") == [["a", "b"], ["c", "d"], ["e", "f"]]
    assert "a" in scheduler
    scheduler.admit(entry("i", 5, 9, batch_key="m", batch_limit=2))
    # What is left over is no whole batch, and waits for who joins it.
    assert full("inference.run") == [["g", "h"]]
    assert scheduler.eligible == 1


def test_the_most_urgent_is_known_without_taking_it() -> None:
    scheduler = Scheduler()
    assert scheduler.most_urgent == -1
    scheduler.admit(entry("usual", 5, 1))
    assert scheduler.most_urgent == 5
    scheduler.admit(entry("first", 1, 2))
    scheduler.admit(entry("urgent", 9, 3, after={"first"}))
    # What an urgent one waits for is as urgent as that.
    assert scheduler.most_urgent == 9
    assert [one.job_id for one in scheduler.take(0, above=5)] == ["first"]


def test_nothing_is_given_ahead_that_a_running_job_may_let_something_more_urgent_overtake() -> None:
    scheduler = Scheduler()
    scheduler.admit(entry("running", 5, 1))
    assert scheduler.take(timeout_seconds=0)
    scheduler.admit(entry("urgent", 9, 2, after={"running"}))
    scheduler.admit(entry("usual", 5, 3))
    assert scheduler.take_full(["inference.run"], (), 3, iter([True, False]).__next__) == []
    scheduler.ended(["running"])
    assert drain(scheduler) == ["urgent", "usual"]


def test_entries_count_as_eligible_from_when_nothing_holds_them_until_they_leave() -> None:
    scheduler = Scheduler()
    scheduler.admit(entry("first", 5, 1))
    scheduler.admit(entry("second", 5, 2, after={"first"}))
    scheduler.admit(entry("third", 5, 3, after={"first", "elsewhere"}))
    assert scheduler.eligible == 1
    scheduler.take(timeout_seconds=0)
    assert scheduler.eligible == 0
    scheduler.ended(["first"])
    assert scheduler.eligible == 1
    scheduler.discard("second")
    scheduler.discard("third")
    assert scheduler.eligible == 0
