"""What a task's end leads to happens once, wherever the worker that ended it dies, and whatever becomes of Redis."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from celery import chord

from tests.direct.conftest import Caller
from tests.support.stack import REPOSITORY, eventually


@contextmanager
def dying_at(caller: Caller, point: str) -> Iterator[None]:
    """In the block the stack's worker is one that dies there. Then it has died, and a sound one runs again."""
    stack = caller.stack
    stack.stop("cpu_0")
    log = (stack.folder / "dying.log").open("a")
    worker = subprocess.Popen(
        [sys.executable, "-m", "tests.direct.dying_worker", point],
        env=stack.environment, cwd=REPOSITORY, stdout=log, stderr=log,
    )  # fmt: skip
    try:
        yield
        assert worker.wait(60) == 9
    finally:
        worker.kill()
        worker.wait()
        log.close()
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


@pytest.mark.parametrize("point", ["before the body", "after the body"])
def test_a_chords_body_runs_once_wherever_the_worker_dies(plain: Caller, point: str) -> None:
    plain.forget_notes()
    with dying_at(plain, point):
        body = chord([plain.allocate(16), plain.allocate(32)])(plain.plain("note"))
    # A claim on the chord that died with its worker runs out first.
    assert [made["size_bytes"] for made in body.get(timeout=90)] == [16, 32]
    began = time.monotonic()
    eventually(lambda: time.monotonic() - began > 8, 10)
    assert len(plain.notes()) == 1


@pytest.mark.parametrize("last", ["made", "refused"])
@pytest.mark.parametrize("point", ["within the chord's error", "before a part's own errbacks", "after the body"])
def test_the_errback_of_a_chord_is_called_once_wherever_the_worker_dies(plain: Caller, last: str, point: str) -> None:
    plain.forget_notes()
    good, bad = plain.allocate(16), plain.refused(link_error=plain.plain("note", "part"))
    (bad if last == "refused" else good).set(countdown=1)
    with dying_at(plain, point):
        made = chord([good, bad])(plain.plain("note").on_error(plain.plain("note", "error")))
    with pytest.raises(Exception, match="not-there"):
        # The header's error is known at once; the body's own comes once its errback was published.
        made.get(timeout=90, follow_parents=False)
    called = [note["args"] for note in plain.noted(2)]
    assert sorted(called, key=str) == sorted([[made.id, "error"], [made.parent.results[1].id, "part"]], key=str)
    began = time.monotonic()
    eventually(lambda: time.monotonic() - began > 8, 10)
    assert len(plain.notes()) == 2


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
