"""Single tasks, their results and Celery's remote control, as Celery's integration tests try them.

ETA, expiry, time limits and revocation are in `test_times.py`; docs/celery-tests.md says where each of Celery's own is.
"""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import uuid4

import pytest
from celery import Signature, chain, chord, group
from celery.canvas import StampingVisitor
from celery.exceptions import ChordError, NotRegistered, TaskRevokedError
from celery.exceptions import TimeoutError as CeleryTimeout
from celery.result import AsyncResult, ResultSet

from device_operations.jobs import Kind
from tests.direct.conftest import Caller
from tests.direct.shapes import Shapes, sizes
from tests.support.stack import eventually

#: What Redis says of the lifetime of a key that is not there.
GONE = -2


@pytest.fixture
def s(plain: Caller) -> Shapes:
    plain.forget_notes()
    return Shapes(plain)


def channels(caller: Caller) -> set[bytes]:
    """The channels on which results are waited for."""
    return {name for name in caller.redis.pubsub_channels() if name.startswith(b"celery-task-meta-")}


# ---- results


def test_results_of_many_tasks(s: Shapes) -> None:
    sent = [(size, s.n(size).apply_async()) for size in range(1, 11)]
    for size, result in sent:
        assert sizes(result.get(timeout=10)) == size
        assert (result.status, result.ready(), result.successful(), result.failed()) == ("SUCCESS", True, True, False)


def test_a_result_that_is_ignored_is_none_and_not_waited_for(plain: Caller, s: Shapes) -> None:
    before = channels(plain)
    sent = s.n(1).apply_async(ignore_result=True)
    assert (sent.ignored, sent.get()) == (True, None)
    assert channels(plain) == before
    assert plain.ended(sent.id)["state"] == "succeeded"
    assert plain.app.backend.get_task_meta(sent.id)["status"] == "PENDING"


def test_a_task_sent_by_its_name_stores_its_result(plain: Caller) -> None:
    sent = plain.app.send_task(
        "device_operations.memory.allocate", kwargs={"request": {"size_bytes": 4}}, queue="device.cpu_0"
    )
    assert sent.get(timeout=10)["size_bytes"] == 4


def test_a_timeout_ends_the_waiting_and_not_the_task(occupied: AsyncResult[Any]) -> None:
    with pytest.raises(CeleryTimeout):
        occupied.get(timeout=0.1)
    assert occupied.state == "STARTED"


def test_a_failure_says_so(s: Shapes) -> None:
    sent = s.fails.apply_async()
    with pytest.raises(Exception, match="not-there") as raised:
        sent.get(timeout=10)
    assert raised.value.args[0] == "allocation_not_found"
    assert (sent.status, sent.ready(), sent.failed(), sent.successful()) == ("FAILURE", True, True, False)
    assert sent.get(propagate=False).args == raised.value.args


@pytest.mark.parametrize("arguments", [{"kwargs": {}}, {"kwargs": {"request": {}, "wrong": 1}}, {"args": (1, 2)}])
def test_wrong_arguments_are_a_failure(plain: Caller, arguments: dict[str, Any]) -> None:
    sent = plain.app.send_task("device_operations.memory.allocate", queue="device.cpu_0", **arguments)
    with pytest.raises(Exception, match=r".") as raised:
        sent.get(timeout=10)
    # A caller that has this project's classes is given one of them.
    assert "validation_failed" in (getattr(raised.value, "code", None), *raised.value.args)
    assert sent.status == "FAILURE"


@pytest.mark.parametrize("form", ["starmap", "map", "chunks"])
def test_tasks_that_celery_runs_inside_another_are_not_ours(plain: Caller, s: Shapes, form: str) -> None:
    """Differs: `map`, `starmap` and `chunks` call a task's code where they run, and only our workers have it."""
    task = plain.task("memory.allocate", {"size_bytes": 4})
    more = {"n": 1} if form == "chunks" else {}
    made = plain.app.signature(f"celery.{form}", kwargs={"task": task, "it": [[], []], **more}, queue="device.cpu_0")
    with pytest.raises(NotRegistered):
        made.apply_async().get(timeout=10)


def test_texts_of_any_language(plain: Caller) -> None:
    sent = plain.task("memory.allocate", {"size_bytes": 4, "label": "håå®ƒ hiöäüß 料"}, shadow="プロ").apply_async()
    made = sent.get(timeout=10)
    found = plain.stack.client.get(f"/api/memory/allocations/{made['allocation_id']}").json()
    assert found["label"] == "håå®ƒ hiöäüß 料"


def test_a_waiting_get_is_given_each_state(caller: Caller, long_run: Signature) -> None:
    seen: list[str] = []
    sent = long_run.apply_async(time_limit=1)
    with pytest.raises(Exception, match="timeout"):
        sent.get(timeout=30, on_message=lambda message: seen.append(message["status"]))
    assert seen[-2:] == ["STARTED", "FAILURE"]


# ---- many threads, many waiters


def test_threads_send_and_wait_at_once(s: Shapes) -> None:
    gathered: dict[int, int] = {}

    def send_and_get(size: int) -> None:
        gathered[size] = sizes(s.n(size).apply_async().get(timeout=60))

    with ThreadPoolExecutor(20) as pool:
        list(pool.map(send_and_get, range(1, 51)))
    assert gathered == {size: size for size in range(1, 51)}


def test_threads_wait_for_one_apps_results_at_once(s: Shapes) -> None:
    sent = [s.n(size).apply_async() for size in range(1, 13)]
    gathered: dict[str, int] = {}
    threads = [
        threading.Thread(target=lambda one=one: gathered.update({one.id: sizes(one.get(timeout=30))})) for one in sent
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert gathered == {one.id: size for size, one in enumerate(sent, 1)}


def test_getting_and_forgetting_a_result_end_the_waiting(plain: Caller, s: Shapes) -> None:
    before = channels(plain)
    first, second = s.n(1).apply_async(), s.n(2).apply_async()
    assert {f"celery-task-meta-{one.id}".encode() for one in (first, second)} <= channels(plain)
    first.get(timeout=10)
    second.forget()
    assert channels(plain) <= before
    plain.ended(second.id)


# ---- sets of results


def test_a_result_set_grows_and_goes_on(plain: Caller, s: Shapes) -> None:
    results = ResultSet([s.n(1).apply_async(), s.n(2).apply_async()], app=plain.app)
    assert sizes(results.get(timeout=10)) == [1, 2]
    results.add(s.n(3).apply_async())
    assert sizes(results.get(timeout=10)) == [1, 2, 3]
    assert sizes(results.join_native(timeout=10)) == [1, 2, 3]
    plain.app.backend._cache.clear()
    assert sizes(results.join_native(timeout=0, interval=30)) == [1, 2, 3]


def test_a_result_set_with_an_error(plain: Caller, s: Shapes) -> None:
    results = ResultSet([s.fails.apply_async(), s.n(1).apply_async()], app=plain.app)
    results.get(timeout=10, propagate=False)
    assert results.results[0].failed()
    assert results.results[1].successful()
    made = group(s.n(1), s.fails).apply_async()
    eventually(made.ready)


def test_a_join_gives_up_in_time(plain: Caller, s: Shapes, occupied: AsyncResult[Any]) -> None:
    waiting = s.n(1).apply_async()
    ended = plain.app.AsyncResult(plain.plain("note", "x").apply_async().id)
    ended.get(timeout=10)
    received: list[Any] = []
    results = ResultSet([ended, waiting], app=plain.app)
    with pytest.raises(CeleryTimeout):
        results.join(timeout=0.5, callback=lambda task_id, value: received.append(value))
    assert received == ["x"]
    began = time.monotonic()
    with pytest.raises(CeleryTimeout):
        ResultSet([AsyncResult(str(uuid4()), app=plain.app)], app=plain.app).join_native(timeout=0, interval=30)
    assert time.monotonic() - began < 10


def test_what_a_chord_leaves_in_redis_expires(plain: Caller, s: Shapes) -> None:
    good = chord([s.n(1), s.n(2)])(s.total)
    good.get(timeout=30)
    bad = chord([s.n(1), s.fails])(s.total)
    with pytest.raises(Exception, match="not-there"):
        bad.get(timeout=30)
    failed = plain.app.backend.get_key_for_task(bad.parent.results[1].id)
    assert 0 < plain.redis.ttl(failed) <= 86_400
    for sent in (good, bad):
        for key, seconds in lifetimes(plain, f"celery-taskset-meta-{sent.parent.id}*"):
            assert 0 < seconds <= 86_400, key
    for key, seconds in lifetimes(plain, "celery-*"):
        assert seconds > 0, key


def lifetimes(plain: Caller, pattern: str) -> list[tuple[bytes, int]]:
    """The keys, each with the seconds after which it expires; without those that went since they were listed."""
    found = [(key, plain.redis.ttl(key)) for key in plain.redis.keys(pattern)]
    return [(key, seconds) for key, seconds in found if seconds != GONE]


# ---- stamps


class Batch(StampingVisitor):
    """Stamps tasks as those of one batch."""

    def __init__(self, name: str) -> None:
        self._name = name

    def on_signature(self, sig: Signature, **headers: Any) -> dict[str, Any]:
        return {"batch": self._name, "stamped_headers": ["batch"]}


def test_what_is_linked_to_a_stamped_task_is_stamped(plain: Caller, s: Shapes) -> None:
    made = s.n(1)
    made.link(s.noted("linked"))
    made.stamp(visitor=Batch("night"))
    made.apply_async().get(timeout=10)
    failing = s.fails
    failing.link_error(s.noted("linked"))
    failing.stamp(visitor=Batch("night"))
    failing.apply_async().get(timeout=10, propagate=False)
    assert [note["stamps"] for note in s.errors(2, "linked")] == [{"batch": "night"}] * 2


def test_each_task_of_a_stamped_canvas_is_stamped(plain: Caller, s: Shapes) -> None:
    for made, times in (
        (chain(s.n(1), s.listed, s.same, s.listed), 2),
        (group(s.n(1) | s.listed, s.n(2) | s.listed), 2),
        (chord([s.n(1), s.n(2)], s.listed), 1),
        (chord([s.n(1) | s.listed, s.n(2) | s.listed], chain(s.total, s.same, s.listed)), 4),
        (chord(group(chain(s.n(1), s.same), chord([s.n(3), s.n(4)], s.total)), s.total), 2),
    ):
        plain.forget_notes()
        made.stamp(visitor=Batch("night"))
        sent = made.apply_async()
        sent.get(timeout=30)
        notes = plain.noted(times)
        assert len(notes) == times
        assert {str(note["stamps"]) for note in notes} == {"{'batch': 'night'}"}


def test_a_canvas_is_revoked_by_its_stamps(plain: Caller, s: Shapes) -> None:
    stamped = str(uuid4())

    def task() -> Signature:
        made = s.n(1)
        made.stamp(visitor=Batch(stamped))
        return made

    (reply,) = [
        said
        for one in plain.app.control.revoke_by_stamped_headers({"batch": [stamped]}, reply=True, timeout=2)
        for name, said in one.items()
        if name.startswith("cpu_0@")
    ]
    assert reply == {"ok": "headers batch flagged as revoked"}
    for made in (
        group([task()]),
        chord(group([task()]), s.n(2)),
        chord(group([s.n(2)]), task()),
        chain(task(), app=plain.app),
        group([s.n(2), task(), s.n(2)]),
        chord([s.n(2), task()], s.n(3)),
        chord([s.n(2), s.n(2)], task()),
        chain(s.n(2), task()),
        chain(s.n(2), group([s.n(2), task(), s.n(2)])),
        chain(s.n(2), group([s.n(2), task()]), s.n(3)),
        chain(s.n(2), group([s.n(2), s.n(2)]), task()),
    ):
        with pytest.raises((TaskRevokedError, ChordError), match=r"revoked|cancelled"):
            made.apply_async().get(timeout=10)


# ---- what `inspect` answers


def test_inspect_answers_as_of_any_worker(caller: Caller, occupied: AsyncResult[Any]) -> None:
    worker = f"cpu_0@{os.uname().nodename}"
    inspect = caller.app.control.inspect([worker], timeout=5)

    def asked(name: str, *arguments: Any) -> Any:
        return getattr(inspect, name)(*arguments)[worker]

    assert asked("ping") == {"ok": "pong"}
    assert asked("clock")["clock"] > 0
    assert {kind.task for kind in Kind} <= set(asked("registered"))
    assert [queue["name"] for queue in asked("active_queues")] == ["device.cpu_0"]
    (active,) = asked("active")
    assert (active["id"], active["name"]) == (occupied.id, "device_operations.inference.run")
    assert asked("query_task", str(uuid4())) == {}
    assert asked("query_task", occupied.id)[occupied.id][0] == "active"
    waiting = caller.allocate().apply_async()
    eventually(lambda: waiting.id in [task["id"] for task in asked("reserved")])
    later = caller.allocate().apply_async(countdown=60)
    eventually(lambda: caller.job(later.id))
    # Differs: what has an ETA waits in PostgreSQL, as a `scheduled` job, and in no worker.
    assert asked("scheduled") == []
    later.revoke()
    eventually(lambda: later.id in asked("revoked"))
    assert asked("stats")["pid"] == caller.stack.process("cpu_0").pid
    assert "software -> celery:" in asked("report")["ok"]
    assert asked("conf")["accept_content"] == ["json"]
    assert caller.stack.redis_url.partition("@")[0].rpartition(":")[2] not in str(asked("conf"))
    assert asked("hello", "other@host")["clock"] > 0
