"""Memory jobs enqueued with plain Celery, without HTTP."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

import pytest
from celery import Celery

from tests.memory.calls import Memory
from tests.support.stack import RunningStack


@pytest.fixture
def celery(stack: RunningStack) -> Any:
    with Celery(broker=stack.redis_url, backend=stack.redis_url) as app:
        yield app


def send(app: Celery, kind: str, request: dict[str, Any], queue: str = "device.cpu_0") -> Any:
    return app.send_task(
        f"device_operations.memory.{kind}", kwargs={"request": request}, queue=queue, task_id=str(uuid4()),
        ignore_result=False,
    )  # fmt: skip


def test_tasks_sent_without_waiting_take_effect_in_order(stack: RunningStack, celery: Celery) -> None:
    blob = stack.client.post("/api/blobs", content=b"0123456789").json()["blob_id"]
    place = {"allocation_id": "direct"}
    sent = [
        send(celery, "allocate", {"size_bytes": 10, "allocation_id": "direct"}),
        send(celery, "write", {**place, "blob_id": blob}),
        send(celery, "clear", {**place, "offset": 2, "size_bytes": 3, "value": 46}),
        send(celery, "copy", {"source": {**place, "offset": 8}, "destination": place, "size_bytes": 2}),
        send(celery, "read", place),
        send(celery, "deallocate", place),
    ]
    results = [task.get(timeout=30) for task in sent]
    assert stack.client.get(f"/api/blobs/{results[4]['blob_id']}").content == b"89...56789"
    assert results[5]["freed_bytes"] == 10
    assert Memory(stack).device()["allocation_count"] == 0


def test_any_device_takes_an_allocation_and_what_names_it_finds_its_way(stack: RunningStack, celery: Celery) -> None:
    made = send(celery, "allocate", {"size_bytes": 4, "fill": 65}, "device.any").get(timeout=30)
    send(celery, "clear", {"allocation_id": made["allocation_id"], "size_bytes": 1}, "device.any").get(timeout=30)
    assert Memory(stack).read(made["allocation_id"]) == b"\x00AAA"
    send(celery, "deallocate", {"allocation_id": made["allocation_id"]}).get(timeout=30)


@pytest.mark.parametrize(
    ("kind", "request_", "code"),
    [
        ("allocate", {"size_bytes": 0}, "validation_failed"),
        ("allocate", {"size_bytes": 25 << 30}, "allocation_too_large"),
        ("clear", {"allocation_id": "nobody-has-this"}, "allocation_not_found"),
        ("clear", {"surprise": 1}, "validation_failed"),
    ],
)
def test_what_would_be_refused_over_http_is_a_failed_task_and_a_failed_job(
    stack: RunningStack, celery: Celery, kind: str, request_: dict[str, Any], code: str
) -> None:
    task = send(celery, kind, request_)
    with pytest.raises(Exception, match=r"."):
        task.get(timeout=30)
    job = stack.client.get(f"/api/jobs/{task.id}").json()
    assert (job["state"], job["error"]["code"]) == ("failed", code)


def test_a_task_that_an_earlier_one_answers_says_which(stack: RunningStack, celery: Celery) -> None:
    request = {"size_bytes": 16, "allocation_id": "twice"}
    first, again = send(celery, "allocate", request), send(celery, "allocate", request)
    assert first.get(timeout=30)["size_bytes"] == 16
    with pytest.raises(Exception, match=str(first.id)):
        again.get(timeout=30)
    assert stack.client.get(f"/api/jobs/{again.id}").json()["error"]["code"] == "allocation_exists"
    send(celery, "deallocate", {"allocation_id": "twice"}).get(timeout=30)


def test_a_task_id_of_any_visible_characters_is_a_jobs_id_over_http_too(stack: RunningStack, celery: Celery) -> None:
    request = {"size_bytes": 16, "allocation_id": "by-an-odd-task"}
    name, task_id = "device_operations.memory.allocate", "größe:42#1"
    sent = celery.send_task(name, kwargs={"request": request}, queue="device.cpu_0", task_id=task_id)
    assert sent.get(timeout=30)["size_bytes"] == 16
    # The earlier job answers, and the answer says where it is.
    answer = stack.client.post("/api/memory/allocate", json=request)
    assert (answer.status_code, answer.json()["job_id"]) == (200, task_id), answer.text
    assert stack.client.get(answer.headers["Location"]).json()["job_id"] == task_id
    after = {"allocation_id": "by-an-odd-task", "job": {"after": [task_id]}}
    send(celery, "deallocate", after).get(timeout=30)
