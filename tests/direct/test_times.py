"""Tasks with an ETA, an expiry or a time limit, and revoked ones: each is a job that says so, and Celery says the same."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest
from celery import Signature, chord
from celery.canvas import StampingVisitor
from celery.exceptions import TaskRevokedError
from celery.result import AsyncResult

from tests.direct.conftest import Caller
from tests.support.stack import eventually


def ended_as(caller: Caller, task_id: str, state: str, seconds: float = 10) -> dict[str, Any]:
    job = caller.ended(task_id, seconds)
    assert job["state"] == state, job
    return job


def celery_says(caller: Caller, task_id: str, state: str) -> None:
    eventually(lambda: caller.app.AsyncResult(task_id).state == state, 5)


# ---- ETA


@pytest.mark.parametrize("how", ["countdown", "eta", "eta of another zone"])
def test_a_task_with_an_eta_is_a_scheduled_job_at_once_and_runs_then(caller: Caller, how: str) -> None:
    at = datetime.now(UTC) + timedelta(seconds=3)
    if how == "countdown":
        options: dict[str, Any] = {"countdown": 3}
    else:
        zone = UTC if how == "eta" else None
        options = {"eta": at.astimezone(zone)}
    sent = caller.allocate().apply_async(**options)
    job = eventually(lambda: caller.job(sent.id), 2)
    assert job["state"] == "scheduled"
    assert sent.state == "PENDING"
    assert sent.get(timeout=20)["size_bytes"] == 16
    started = datetime.fromisoformat(caller.ended(sent.id)["started_at"])
    assert started >= at - timedelta(seconds=0.1)


def test_an_eta_that_is_past_means_now(caller: Caller) -> None:
    sent = caller.allocate().apply_async(eta=datetime.now(UTC) - timedelta(hours=1))
    assert sent.get(timeout=10)["size_bytes"] == 16


def test_an_eta_far_ahead_is_kept(caller: Caller) -> None:
    sent = caller.allocate().apply_async(eta=datetime.now(UTC) + timedelta(days=400))
    assert eventually(lambda: caller.job(sent.id))["state"] == "scheduled"
    caller.app.control.revoke(sent.id)
    ended_as(caller, sent.id, "cancelled")


def test_a_scheduled_task_survives_an_empty_redis(caller: Caller) -> None:
    sent = caller.allocate().apply_async(countdown=3)
    eventually(lambda: caller.job(sent.id))
    eventually(lambda: caller.redis.hlen("device-operations.unacked.cpu_0") == 0)
    caller.redis.flushdb()
    ended_as(caller, sent.id, "succeeded", 20)
    celery_says(caller, sent.id, "SUCCESS")


# ---- expiry


def test_a_task_that_waits_past_its_expiry_is_expired(caller: Caller, occupied: AsyncResult) -> None:
    sent = caller.allocate().apply_async(expires=1)
    job = ended_as(caller, sent.id, "expired")
    assert job["error"]["code"] == "expired"
    celery_says(caller, sent.id, "REVOKED")
    with pytest.raises(TaskRevokedError, match="expired"):
        sent.get(timeout=5)


def test_a_task_that_expired_before_it_was_received_is_an_expired_job(caller: Caller) -> None:
    sent = caller.allocate().apply_async(expires=datetime.now(UTC) - timedelta(seconds=5))
    job = ended_as(caller, sent.id, "expired")
    assert job["error"]["code"] == "expired"
    assert "before its message was received" in job["error"]["message"]
    celery_says(caller, sent.id, "REVOKED")


def test_a_task_that_expires_before_its_eta_is_expired(caller: Caller) -> None:
    sent = caller.allocate().apply_async(countdown=30, expires=1)
    ended_as(caller, sent.id, "expired")
    celery_says(caller, sent.id, "REVOKED")


def test_a_task_that_is_in_time_runs(caller: Caller) -> None:
    sent = caller.allocate().apply_async(expires=60)
    assert sent.get(timeout=10)["size_bytes"] == 16
    assert caller.ended(sent.id)["expires_at"] is not None


def test_a_chord_hears_of_a_part_that_expired(plain: Caller, occupied: AsyncResult) -> None:
    body = chord([plain.allocate(), plain.allocate(expires=1)])(plain.plain("note"))
    plain.stack.client.delete(f"/api/jobs/{occupied.id}")
    plain.ended(occupied.id)
    # Either part may have run in time; if not, the body fails instead of waiting for ever.
    eventually(lambda: body.ready(), 20)


# ---- time limits


def test_a_time_limit_is_the_jobs(caller: Caller, long_run: Signature) -> None:
    sent = long_run.apply_async(time_limit=60, soft_time_limit=1)
    job = ended_as(caller, sent.id, "failed", 20)
    assert job["error"]["code"] == "timeout"
    celery_says(caller, sent.id, "FAILURE")


# ---- revoked


@pytest.mark.serial
@pytest.mark.parametrize("terminate", [False, True])
def test_a_waiting_task_that_is_revoked_is_cancelled_within_a_second(
    caller: Caller, occupied: AsyncResult, terminate: bool
) -> None:
    sent = caller.allocate().apply_async()
    eventually(lambda: caller.job(sent.id))
    began = time.monotonic()
    sent.revoke(terminate=terminate)
    ended_as(caller, sent.id, "cancelled", 1)
    assert time.monotonic() - began < 1.5
    celery_says(caller, sent.id, "REVOKED")


@pytest.mark.serial
@pytest.mark.parametrize("terminate", [False, True])
def test_a_running_task_that_is_revoked_is_cancelled_within_a_second(
    caller: Caller, long_run: Signature, terminate: bool
) -> None:
    sent = long_run.apply_async()
    eventually(lambda: (caller.job(sent.id) or {}).get("state") == "running")
    eventually(lambda: sent.state == "STARTED")
    began = time.monotonic()
    sent.revoke(terminate=terminate)
    ended_as(caller, sent.id, "cancelled", 2)
    assert time.monotonic() - began < 2
    celery_says(caller, sent.id, "REVOKED")
    with pytest.raises(TaskRevokedError):
        sent.get(timeout=5)


def test_a_scheduled_task_that_is_revoked_is_cancelled(caller: Caller) -> None:
    sent = caller.allocate().apply_async(countdown=60)
    eventually(lambda: caller.job(sent.id))
    sent.revoke()
    ended_as(caller, sent.id, "cancelled", 2)
    celery_says(caller, sent.id, "REVOKED")


def test_a_revoke_that_comes_before_its_task_is_remembered_by_the_next_worker_too(caller: Caller) -> None:
    first, second = str(uuid4()), str(uuid4())
    caller.app.control.revoke([first, second])
    eventually(lambda: {first, second} <= {task for held in revoked(caller) for task in held})
    celery_says(caller, first, "REVOKED")
    assert caller.job(first) is None
    sent = caller.allocate().apply_async(task_id=first)
    ended_as(caller, sent.id, "cancelled")
    celery_says(caller, first, "REVOKED")
    caller.stack.kill("cpu_0")
    caller.stack.start("cpu_0")
    caller.stack.wait_ready()
    caller.allocate().apply_async(task_id=second)
    ended_as(caller, second, "cancelled", 20)
    celery_says(caller, second, "REVOKED")


def revoked(caller: Caller) -> list[list[str]]:
    return list((caller.app.control.inspect(timeout=2).revoked() or {}).values())


def test_a_job_over_http_is_revoked_by_its_id(caller: Caller, occupied: AsyncResult) -> None:
    body = {"size_bytes": 16, "device_id": "cpu_0"}
    job_id = caller.stack.client.post("/api/memory/allocate", json=body).json()["job_id"]
    caller.app.control.revoke(job_id)
    ended_as(caller, job_id, "cancelled", 2)


def test_what_has_ended_stays_as_it_was(caller: Caller) -> None:
    sent = caller.allocate().apply_async()
    sent.get(timeout=10)
    sent.revoke(terminate=True)
    later = caller.allocate().apply_async()
    later.get(timeout=10)
    assert caller.ended(sent.id)["state"] == "succeeded"
    assert sent.state == "SUCCESS"


def test_the_signal_of_terminate_and_many_ids(caller: Caller, occupied: AsyncResult) -> None:
    sent = [caller.allocate().apply_async() for _ in range(20)]
    for one in sent:
        eventually(lambda one=one: caller.job(one.id))
    caller.app.control.terminate([one.id for one in sent], signal="SIGKILL")
    for one in sent:
        ended_as(caller, one.id, "cancelled", 5)


def test_a_revoked_part_fails_its_chord(plain: Caller, occupied: AsyncResult) -> None:
    parts = [plain.allocate(task_id=str(uuid4())), plain.allocate(task_id=str(uuid4()))]
    body = chord(parts)(plain.plain("note"))
    ids = [part.options["task_id"] for part in parts]
    for task_id in ids:
        eventually(lambda task_id=task_id: plain.job(task_id))
    plain.app.control.revoke(ids)
    with pytest.raises(Exception, match=r"(?i)revoked|cancelled"):
        body.get(timeout=20)


class Batch(StampingVisitor):
    """Stamps tasks as those of one batch."""

    def __init__(self, name: str) -> None:
        self._name = name

    def on_signature(self, sig: Signature, **headers: Any) -> dict[str, Any]:
        return {"batch": self._name, "stamped_headers": ["batch"]}


def test_tasks_are_revoked_by_their_stamps_waiting_and_later(caller: Caller, occupied: AsyncResult) -> None:
    def send(name: str) -> Any:
        task = caller.allocate()
        task.stamp(visitor=Batch(name))
        return task.apply_async()

    night, day = send("night"), send("day")
    for one in (night, day):
        eventually(lambda one=one: caller.job(one.id))
    caller.app.control.revoke_by_stamped_headers({"batch": ["night"]}, reply=True)
    ended_as(caller, night.id, "cancelled", 2)
    celery_says(caller, night.id, "REVOKED")
    ended_as(caller, send("night").id, "cancelled", 2)
    caller.stack.client.delete(f"/api/jobs/{occupied.id}")
    ended_as(caller, day.id, "succeeded")
