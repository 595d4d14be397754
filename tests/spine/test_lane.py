"""The lane: who goes next."""

from __future__ import annotations

import random
import time

from hypothesis import given, settings
from hypothesis import strategies as st

from workers.execution.scheduler import Entry, Lane


def entry(job_id: str, priority: int = 5, seq: int = 0, after: set[str] | None = None, **more: object) -> Entry:
    return Entry(job_id, "inference.run", priority, seq, after=after or set(), **more)  # type: ignore[arg-type]


def drain(lane: Lane) -> list[str]:
    order = []
    while batch := lane.take(timeout_seconds=0):
        ids = [one.job_id for one in batch]
        order += ids
        lane.ended(ids)
    return order


def test_higher_priority_goes_first_and_equals_go_in_order_of_submission() -> None:
    lane = Lane()
    for job_id, priority, seq in [("a", 1, 1), ("b", 9, 2), ("c", 5, 3), ("d", 9, 4)]:
        lane.admit(entry(job_id, priority, seq))
    assert drain(lane) == ["b", "d", "c", "a"]


def test_a_job_waits_for_what_it_names_even_if_that_is_not_here() -> None:
    lane = Lane()
    lane.admit(entry("late", 9, 2, after={"elsewhere"}))
    assert lane.take(timeout_seconds=0) == []
    assert lane.foreign() == {"elsewhere"}
    lane.ended(["elsewhere"])
    assert drain(lane) == ["late"]


def test_a_blocked_job_lends_its_priority_along_the_chain() -> None:
    lane = Lane()
    lane.admit(entry("first", 1, 1))
    lane.admit(entry("second", 1, 2, after={"first"}))
    lane.admit(entry("middle", 5, 3))
    lane.admit(entry("urgent", 9, 4, after={"second"}))
    assert drain(lane) == ["first", "second", "urgent", "middle"]


def test_priority_is_lent_to_a_predecessor_that_arrives_later() -> None:
    lane = Lane()
    lane.admit(entry("urgent", 9, 2, after={"first"}))
    lane.admit(entry("other", 5, 3))
    lane.admit(entry("first", 1, 1))
    assert drain(lane) == ["first", "urgent", "other"]


def test_a_run_does_not_wait_for_others_while_anything_more_urgent_is_eligible() -> None:
    lane = Lane()
    lane.admit(entry("run", 5, 1, batch_key="model", batch_limit=2, batch_delay_seconds=30))
    (run,) = lane.take(timeout_seconds=0)
    # Entries that left the lane stand at the top of the heap until they are looked at.
    for number in range(20):
        lane.admit(entry(f"gone {number}", 9, 2 + number))
        lane.discard(f"gone {number}")
    lane.admit(entry("urgent", 6, 50))
    began = time.monotonic()
    assert lane.mates(run, 1) == []
    assert time.monotonic() - began < 10
    assert drain(lane) == ["urgent"]


def test_a_job_that_has_ended_may_be_admitted_again() -> None:
    lane = Lane()
    assert lane.admit(entry("a"))
    assert drain(lane) == ["a"]
    assert lane.admit(entry("a"))


def test_a_duplicate_is_refused_while_it_waits_and_while_it_runs() -> None:
    lane = Lane()
    assert lane.admit(entry("a"))
    assert not lane.admit(entry("a"))
    lane.take(timeout_seconds=0)
    assert not lane.admit(entry("a"))
    lane.put_back(["a"])
    assert lane.admit(entry("a"))


def test_runs_of_one_batch_are_taken_together_up_to_the_limit() -> None:
    lane = Lane()
    for seq in range(6):
        lane.admit(entry(f"m{seq}", 5, seq, batch_key="model", batch_limit=4))
    lane.admit(entry("other", 5, 2))
    assert [one.job_id for one in lane.take(timeout_seconds=0)] == ["m0", "m1", "m2", "m3"]


def test_only_what_is_more_urgent_is_taken_between_the_steps_of_a_long_job() -> None:
    lane = Lane()
    lane.admit(entry("same", 5, 1))
    assert lane.take(timeout_seconds=0, above=5) == []
    lane.admit(entry("more", 6, 2))
    assert [one.job_id for one in lane.take(timeout_seconds=0, above=5)] == ["more"]


def test_what_waits_only_for_a_recording_is_not_overtaken_by_something_less_urgent() -> None:
    lane = Lane()
    lane.admit(entry("first", 9, 1))
    lane.admit(entry("next", 9, 2, after={"first"}))
    lane.admit(entry("lesser", 1, 3))
    lane.take(timeout_seconds=0)
    lane.finishing(["first"])
    assert lane.take(timeout_seconds=0) == []
    lane.ended(["first"])
    assert drain(lane) == ["next", "lesser"]


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
    lane = Lane()
    for job in jobs:
        lane.admit(job)
    order = drain(lane)
    assert sorted(order) == sorted(needed)
    for position, job_id in enumerate(order):
        assert needed[job_id] <= set(order[:position])


def test_what_waits_its_turn_on_a_resource_passes_a_job_that_is_done_with_it() -> None:
    lane = Lane()
    lane.admit(entry("running"))
    assert [one.job_id for one in lane.take(0)] == ["running"]
    lane.admit(entry("same", after={"running"}, needs=("session",)))
    lane.admit(entry("other", after={"running"}, needs=("elsewhere",)))
    assert lane.take(0) == []
    lane.pass_by("running", "session")
    # One that is admitted later passes too, and one that needs the job itself still waits.
    lane.admit(entry("late", after={"running"}, needs=("session",)))
    assert sorted(one.job_id for one in [*lane.take(0), *lane.take(0)]) == ["late", "same"]
    assert lane.take(0) == []
    lane.ended(["running"])
    assert [one.job_id for one in lane.take(0)] == ["other"]


def test_only_whole_batches_of_the_kind_asked_for_are_given_ahead() -> None:
    lane = Lane()

    def full(kind: str) -> list[list[str]]:
        batches = lane.take_full([kind], (), 3, iter([True, False]).__next__)
        return [[one.job_id for one in batch] for batch in batches]

    lane.admit(entry("a", 5, 1, batch_key="m", batch_limit=2))
    assert full("inference.run") == []
    for seq, job_id in enumerate("bcdefgh", start=2):
        lane.admit(entry(job_id, 5, seq, batch_key="m", batch_limit=2))
    assert full("memory.copy") == []
    assert full("inference.run") == [["a", "b"], ["c", "d"], ["e", "f"]]
    assert "a" in lane
    lane.admit(entry("i", 5, 9, batch_key="m", batch_limit=2))
    # What is left over is no whole batch, and waits for who joins it.
    assert full("inference.run") == [["g", "h"]]
    assert lane.eligible == 1


def test_the_most_urgent_is_known_without_taking_it() -> None:
    lane = Lane()
    assert lane.most_urgent == -1
    lane.admit(entry("usual", 5, 1))
    assert lane.most_urgent == 5
    lane.admit(entry("first", 1, 2))
    lane.admit(entry("urgent", 9, 3, after={"first"}))
    # What an urgent one waits for is as urgent as that.
    assert lane.most_urgent == 9
    assert [one.job_id for one in lane.take(0, above=5)] == ["first"]


def test_nothing_is_given_ahead_that_a_running_job_may_let_something_more_urgent_overtake() -> None:
    lane = Lane()
    lane.admit(entry("running", 5, 1))
    assert lane.take(timeout_seconds=0)
    lane.admit(entry("urgent", 9, 2, after={"running"}))
    lane.admit(entry("usual", 5, 3))
    assert lane.take_full(["inference.run"], (), 3, iter([True, False]).__next__) == []
    lane.ended(["running"])
    assert drain(lane) == ["urgent", "usual"]


def test_entries_count_as_eligible_from_when_nothing_holds_them_until_they_leave() -> None:
    lane = Lane()
    lane.admit(entry("first", 5, 1))
    lane.admit(entry("second", 5, 2, after={"first"}))
    lane.admit(entry("third", 5, 3, after={"first", "elsewhere"}))
    assert lane.eligible == 1
    lane.take(timeout_seconds=0)
    assert lane.eligible == 0
    lane.ended(["first"])
    assert lane.eligible == 1
    lane.discard("second")
    lane.discard("third")
    assert lane.eligible == 0
