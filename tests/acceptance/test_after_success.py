"""`after_success`: a job whose named predecessors did not all succeed is cancelled, and so is what requires it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any

import celery
import httpx
import numpy as np
import pytest

from device_operations.jobs import new_id
from tests.memory.calls import Memory
from tests.support import graphs
from tests.support.stack import RunningStack, eventually

_numbers = count(1)
WAIT = {"Prefer": "wait=30"}


@pytest.fixture(scope="module")
def http(stack: RunningStack) -> httpx.Client:
    graphs.tiny(stack.folder / "models" / "tiny.onnx")
    (stack.folder / "models" / "bad.onnx").write_bytes(b"no model")
    return stack.client


def allocate(http: httpx.Client, **job: Any) -> dict[str, Any]:
    answer = http.post("/api/memory/allocate", json={"size_bytes": 64, "job": job})
    assert answer.status_code in (200, 202), answer.text
    return dict(answer.json())


def bad_load(http: httpx.Client, **job: Any) -> dict[str, Any]:
    body = {"name": f"bad-{next(_numbers)}", "source": {"path": "bad.onnx"}, "job": job}
    answer = http.post("/api/inference/load-model", json=body)
    assert answer.status_code == 202, answer.text
    return dict(answer.json())


def ended(http: httpx.Client, job: dict[str, Any]) -> dict[str, Any]:
    told = http.get(f"/api/jobs/{job['job_id']}", params={"wait": 30}).json()
    assert told["finished_at"] is not None, told
    return dict(told)


def in_vain(http: httpx.Client, job: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    told = ended(http, job)
    assert (told["state"], told["celery_state"]) == ("cancelled", "REVOKED")
    assert (told["error"]["code"], told["error"]["detail"]["job_id"]) == ("predecessor_failed", before["job_id"])
    assert (told["started_at"], told["attempt"]) == (None, 0)
    assert before["job_id"] in told["error"]["message"]
    return told


def test_a_successor_runs_however_its_predecessor_ended_unless_it_says_otherwise(http: httpx.Client) -> None:
    first = bad_load(http, delay_seconds=0.3)
    usual = allocate(http, after=[first["job_id"]])
    careful = allocate(http, after=[first["job_id"]], after_success=True)
    assert ended(http, first)["state"] == "failed"
    assert ended(http, usual)["state"] == "succeeded"
    told = in_vain(http, careful, first)
    assert told["error"]["detail"]["code"] == "model_invalid"
    memory = http.get(f"/api/memory/allocations/{careful['resource']['id']}").json()
    assert (memory["state"], memory["error"]["code"]) == ("failed", "predecessor_failed")


def test_a_successor_of_what_succeeds_runs(http: httpx.Client) -> None:
    first = allocate(http, delay_seconds=0.3)
    second = allocate(http, after=[first["job_id"]], after_success=True)
    third = allocate(http, after=[first["job_id"], second["job_id"]], after_success=True)
    assert ended(http, third)["state"] == "succeeded"
    assert ended(http, second)["finished_at"] <= ended(http, third)["started_at"]
    late = allocate(http, after=[first["job_id"]], after_success=True)
    assert ended(http, late)["state"] == "succeeded", "its predecessor had ended before"


def test_chains_fall_from_link_to_link_and_waiters_hear_of_it(http: httpx.Client) -> None:
    first = bad_load(http, delay_seconds=0.5)
    second = allocate(http, after=[first["job_id"]], after_success=True)
    third = allocate(http, after=[second["job_id"]], after_success=True)
    fourth = allocate(http, after=[third["job_id"]])
    clearing = http.post(
        f"/api/memory/clear/{third['resource']['id']}",
        json={"job": {"after": [third["job_id"]], "after_success": True}},
    ).json()
    in_vain(http, second, first)
    in_vain(http, third, second)
    assert ended(http, fourth)["state"] == "succeeded"
    assert ended(http, clearing)["state"] in ("cancelled", "failed")


@pytest.mark.parametrize("how", ["cancelled", "expired"])
def test_cancelled_and_expired_count_as_failed(http: httpx.Client, how: str) -> None:
    options = {"expires_in_seconds": 0.3} if how == "expired" else {}
    first = allocate(http, delay_seconds=30, **options)
    second = allocate(http, after=[first["job_id"]], after_success=True)
    third = allocate(http, after=[second["job_id"]], after_success=True, delay_seconds=60)
    if how == "cancelled":
        http.delete(f"/api/jobs/{first['job_id']}")
    assert ended(http, first)["state"] == how
    in_vain(http, second, first)
    in_vain(http, third, second)


def test_one_whose_predecessor_had_failed_already_is_cancelled_as_it_is_submitted(http: httpx.Client) -> None:
    first = bad_load(http)
    assert ended(http, first)["state"] == "failed"
    job = {"after": [first["job_id"]], "after_success": True}
    used = http.get("/api/memory/device/cpu_0").json()["reserved_bytes"]
    answer = http.post("/api/memory/allocate", json={"size_bytes": 64, "job": job}, headers=WAIT)
    assert (answer.status_code, answer.json()["state"]) == (200, "cancelled")
    in_vain(http, answer.json(), first)
    assert http.get("/api/memory/device/cpu_0").json()["reserved_bytes"] == used
    again = allocate(http, after=[answer.json()["job_id"]], after_success=True)
    in_vain(http, again, answer.json())
    entries = [{"kind": "memory.allocate", "request": {"size_bytes": 64, "job": job}} for _ in range(3)]
    many = http.post("/api/jobs", json={"jobs": entries}, headers=WAIT)
    assert (many.status_code, {one["state"] for one in many.json()["jobs"]}) == (200, {"cancelled"})


def test_a_predecessor_that_is_tried_again_and_succeeds_has_not_failed(http: httpx.Client) -> None:
    one, other = allocate(http), allocate(http, delay_seconds=0.2)
    second = allocate(http, after=[one["job_id"], other["job_id"]], after_success=True)
    assert ended(http, second)["state"] == "succeeded"


def test_direct_messages_may_say_so_too(stack: RunningStack, http: httpx.Client) -> None:
    client = celery.Celery(broker=stack.redis_url, backend=stack.redis_url)
    failing = bad_load(http, delay_seconds=0.5)
    for first in (failing, None):
        if first is None:
            first = failing  # it has failed by now
            assert ended(http, first)["state"] == "failed"
        request = {"size_bytes": 64, "job": {"after": [first["job_id"]], "after_success": True}}
        job_id = new_id()
        sent = client.send_task(
            "device_operations.memory.allocate", kwargs={"request": request}, queue="device.cpu_0", task_id=job_id
        )
        eventually(lambda: http.get(f"/api/jobs/{job_id}").status_code == 200)  # noqa: B023 - called at once
        in_vain(http, {"job_id": job_id}, first)
        eventually(lambda: sent.state == "REVOKED")  # noqa: B023 - called at once


def test_predecessors_on_other_devices_count(start_stack: Callable[..., RunningStack]) -> None:
    stack = start_stack(devices="cpu:2")
    graphs.slow(stack.folder / "models" / "slow.onnx")
    load = {"name": "slow", "source": {"path": "slow.onnx"}, "device_id": "cpu_1"}
    assert stack.client.post("/api/inference/load-model", json=load, headers=WAIT).json()["state"] == "succeeded"
    inputs = {"x": graphs.tensor(np.zeros((256, 256), np.float32)), "rounds": graphs.tensor(np.array(10_000_000))}
    body = {"model_name": "slow", "inputs": inputs, "job": {"timeout_seconds": 0.5}}
    first = stack.client.post("/api/inference/run", json=body).json()
    assert first["device_id"] == "cpu_1"
    after = {"after": [first["job_id"]], "after_success": True}
    second = Memory(stack).allocate(size_bytes=64, device_id="cpu_0", job=after)
    assert ended(stack.client, first)["error"]["code"] == "timeout"
    in_vain(stack.client, second, first)
