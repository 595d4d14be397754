"""Queues that no device reads, and Flower's own ways to send and to revoke."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

import httpx
import pytest
from celery import chain

from tasks.redis.queues import redis_keys
from tests.direct.conftest import Caller
from tests.support import messages
from tests.support.stack import RunningStack, eventually


def left_in(caller: Caller, queue: str) -> int:
    return sum(caller.redis.llen(key) for key in redis_keys(queue))


def test_tasks_for_a_device_that_never_was_fail_within_seconds(caller: Caller) -> None:
    sent = [caller.allocate(queue="device.gpu_77").apply_async(priority=priority) for priority in (None, 0, 3, 9)]
    for one in sent:
        job = caller.ended(one.id, 10)
        assert (job["state"], job["error"]["code"]) == ("failed", "device_not_found")
        assert "gpu_77" in job["error"]["message"]
        with pytest.raises(Exception, match="gpu_77"):
            one.get(timeout=10)
    eventually(lambda: left_in(caller, "device.gpu_77") == 0)


def test_what_is_linked_to_such_a_task_hears_of_it(plain: Caller) -> None:
    plain.forget_notes()
    sent = plain.allocate(queue="device.gpu_78", link_error=plain.plain("note", "error")).apply_async()
    last = chain(plain.allocate(queue="device.gpu_78"), plain.plain("note")).apply_async()
    with pytest.raises(Exception, match="gpu_78"):
        last.get(timeout=15)
    assert [note["args"] for note in plain.noted()] == [[sent.id, "error"]]


def test_what_is_unreadable_there_goes_and_what_is_no_task_of_ours_fails(caller: Caller) -> None:
    caller.redis.lpush("device.gpu_79", b"no message", b"{}")
    sent = caller.app.send_task("nobody.knows", queue="device.gpu_79")
    with pytest.raises(Exception, match=r"nobody\.knows"):
        sent.get(timeout=15)
    eventually(lambda: left_in(caller, "device.gpu_79") == 0)


def test_a_device_that_is_away_keeps_its_queue(caller: Caller, stack: RunningStack) -> None:
    stack.stop("cpu_0")
    try:
        sent = caller.allocate().apply_async()
        # Another queue's message, put there later, has failed by the time that this one might have.
        other = caller.allocate(queue="device.gpu_80").apply_async()
        caller.ended(other.id, 10)
        assert caller.job(sent.id) is None
        assert left_in(caller, "device.cpu_0") == 1
    finally:
        stack.start("cpu_0")
        stack.wait_ready()
    assert sent.get(timeout=20)["size_bytes"] == 16


def test_other_lists_of_redis_are_let_be(caller: Caller) -> None:
    caller.redis.lpush("devices", b"mine")
    caller.redis.set("device.text", b"mine")
    other = caller.allocate(queue="device.gpu_81").apply_async()
    caller.ended(other.id, 10)
    assert caller.redis.lrange("devices", 0, -1) == [b"mine"]
    assert caller.redis.get("device.text") == b"mine"
    caller.redis.delete("devices", "device.text")


def test_a_message_whose_job_exists_changes_nothing_of_it(caller: Caller) -> None:
    sent = caller.allocate().apply_async()
    sent.get(timeout=10)
    envelope = messages.direct("device_operations.memory.allocate", {"size_bytes": 1})
    envelope["headers"]["id"] = sent.id
    caller.redis.lpush("device.gpu_82", messages.json.dumps(envelope))
    eventually(lambda: left_in(caller, "device.gpu_82") == 0, 10)
    assert caller.ended(sent.id)["state"] == "succeeded"
    assert sent.state == "SUCCESS"


# ---- Flower


def seen(flower: httpx.Client, task_id: str, state: str) -> dict[str, Any]:
    def look() -> dict[str, Any] | None:
        answer = flower.get(f"/api/task/info/{task_id}")
        task: dict[str, Any] = answer.json() if answer.status_code == 200 else {}
        return task if task.get("state") == state else None

    found: dict[str, Any] = eventually(look, 20)
    return found


@pytest.mark.parametrize("queue", [None, "device.cpu_0"])
def test_flower_sends_a_task(caller: Caller, flower: httpx.Client, queue: str | None) -> None:
    body: dict[str, Any] = {"kwargs": {"request": {"size_bytes": 16}}}
    if queue:
        body["queue"] = queue
    answer = flower.post("/api/task/async-apply/device_operations.memory.allocate", json=body)
    assert answer.status_code == 200, answer.text
    task_id = answer.json()["task-id"]
    assert caller.ended(task_id)["state"] == "succeeded"
    seen(flower, task_id, "SUCCESS")


@pytest.mark.parametrize("terminate", ["false", "true"])
def test_flower_revokes_a_task(caller: Caller, flower: httpx.Client, terminate: str) -> None:
    sent = caller.allocate().apply_async(countdown=60)
    eventually(lambda: caller.job(sent.id))
    answer = flower.post(f"/api/task/revoke/{sent.id}", params={"terminate": terminate})
    assert answer.status_code == 200, answer.text
    assert caller.ended(sent.id, 5)["state"] == "cancelled"
    seen(flower, sent.id, "REVOKED")


def test_flower_sees_an_expired_and_a_lost_task(caller: Caller, flower: httpx.Client, stack: RunningStack) -> None:
    expired = caller.allocate().apply_async(countdown=60, expires=1)
    seen(flower, expired.id, "REVOKED")
    failed = caller.allocate(queue="device.gpu_83").apply_async(task_id=str(uuid4()))
    seen(flower, failed.id, "FAILURE")
