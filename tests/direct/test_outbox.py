"""What a task's end leads to happens once, wherever the worker that ended it dies, and whatever becomes of Redis."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from celery import chord
from celery.result import AsyncResult

from tasks.celery_bridge.outbox import CHORD_AGAIN_SECONDS
from tests.direct.conftest import Caller
from tests.support.stack import eventually

#: Where the worker dies that ended the last part of a chord, or its failing part.
BODY_DEATHS = ["before the body", "after the body"]
ERROR_DEATHS = [
    (point, last)
    for point in ("within the chord's error", "before a part's own errbacks", "after the body")
    for last in ("made", "refused")
]


@contextmanager
def dying_at(caller: Caller, point: str) -> Iterator[None]:
    """In the block the stack's worker is one that dies there. Then it has died, and a sound one runs again."""
    stack = caller.stack
    stack.stop("cpu_0")
    stack.run_instead("cpu_0", "tests.direct.dying_worker", DIES_AT=point)
    stack.start("cpu_0")
    try:
        # What is sent finds a worker that runs: a part with a countdown is not begun by the time the other one ends.
        stack.wait_ready()
        yield
        assert stack.process("cpu_0").wait(60) == 9
    finally:
        stack.kill("cpu_0")
        stack.run_instead("cpu_0", "workers")
        stack.start("cpu_0")
        stack.wait_ready()


@pytest.mark.parametrize("point", ["before anything", "after the callbacks", "after the result"])
def test_callbacks_are_called_once_wherever_the_worker_dies(plain: Caller, point: str) -> None:
    plain.forget_notes()
    with dying_at(plain, point):
        good = plain.allocate(link=plain.plain("note", "link")).apply_async()
    made = good.get(timeout=30)
    with dying_at(plain, point):
        bad = plain.refused(link_error=plain.plain("note", "error")).apply_async()
    eventually(lambda: bad.state == "FAILURE", 30)
    assert [note["args"] for note in plain.noted(2)] == [[made, "link"], [bad.id, "error"]]
    assert [child.id for child in good.children] == [plain.notes()[0]["id"]]
    # A second message would have been published by now, and another task of the same queue comes after it.
    last = plain.plain("note", "last").apply_async()
    last.get(timeout=30)
    assert len(plain.notes()) == 3


@dataclass
class Chord:
    """One whose worker died, and what its tasks noted, once nothing more is to come."""

    result: AsyncResult
    called: list[Any]


def parts_ended(made: AsyncResult) -> AsyncResult:
    """The chord, once its parts have results: a message of theirs that came again would kill the next worker."""
    assert made.parent is not None
    eventually(lambda: all(part.ready() for part in made.parent.results), 60)
    return made


@pytest.fixture(scope="module")
def chords(plain: Caller) -> dict[tuple[str, ...], Chord]:
    """All of them: the waiting for claims that run out, and for calls that must not come, is theirs together."""
    plain.forget_notes()
    sent: dict[tuple[str, ...], AsyncResult] = {}
    for point in BODY_DEATHS:
        with dying_at(plain, point):
            made = chord([plain.allocate(16), plain.allocate(32)])(plain.plain("note", point))
        sent[(point,)] = parts_ended(made)
    for point, last in ERROR_DEATHS:
        name = f"{point}, {last}"
        good, bad = plain.allocate(16), plain.refused(link_error=plain.plain("note", name, "part"))
        (bad if last == "refused" else good).set(countdown=2)
        with dying_at(plain, point):
            body = plain.plain("note").on_error(plain.plain("note", name, "error"))
            made = chord([good, bad])(body)
        sent[point, last] = parts_ended(made)
    # A claim on a chord that died with its worker runs out first: Celery's own is thirty seconds.
    wanted = len(BODY_DEATHS) + 2 * len(ERROR_DEATHS)
    plain.noted(wanted, 120)
    # Each part is returned again meanwhile, and would call once more what had not been marked.
    until = time.monotonic() + 3 * CHORD_AGAIN_SECONDS
    eventually(lambda: time.monotonic() > until, 3 * CHORD_AGAIN_SECONDS + 10, 0.5)
    notes = [note["args"] for note in plain.notes()]
    return {key: Chord(result, [args for args in notes if ", ".join(key) in args]) for key, result in sent.items()}


@pytest.mark.slow
@pytest.mark.parametrize("point", BODY_DEATHS)
def test_a_chords_body_runs_once_wherever_the_worker_dies(chords: dict[tuple[str, ...], Chord], point: str) -> None:
    made = chords[(point,)]
    (args,) = made.called
    assert [part["size_bytes"] for part in args[0]] == [16, 32]
    assert [part["size_bytes"] for part in made.result.get(timeout=10)] == [16, 32]


@pytest.mark.parametrize(("point", "last"), ERROR_DEATHS)
def test_the_errback_of_a_chord_is_called_once_wherever_the_worker_dies(
    chords: dict[tuple[str, ...], Chord], point: str, last: str
) -> None:
    made, name = chords[point, last], f"{point}, {last}"
    with pytest.raises(Exception, match="not-there"):
        # The header's error is known at once; the body's own comes once its errback was published.
        made.result.get(timeout=30, follow_parents=False)
    failed = made.result.parent.results[1].id
    assert Counter(map(tuple, made.called)) == Counter([(made.result.id, name, "error"), (failed, name, "part")])


def test_an_end_that_redis_did_not_hear_of_is_given_once_it_is_back(plain: Caller) -> None:
    plain.forget_notes()
    sent = plain.allocate(countdown=1, link=plain.plain("note")).apply_async()
    eventually(lambda: plain.job(sent.id))
    # A list where the mark of this task's callbacks goes: publishing fails until it is gone.
    mark = f"device-operations.sent.{sent.id}"
    plain.redis.lpush(mark, "in the way")
    assert plain.ended(sent.id)["state"] == "succeeded"
    assert sent.state == "PENDING"
    plain.redis.delete(mark)
    assert sent.get(timeout=20)["size_bytes"] == 16
    assert len(plain.noted()) == 1
