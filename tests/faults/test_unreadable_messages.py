"""Nothing unreadable stops a worker: it is refused, logged once, acknowledged and gone, also at the worker's start."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from celery.exceptions import NotRegistered

from device_operations.jobs import new_id
from tasks.database import open_engine
from tasks.jobs import store
from tasks.jobs.store import NewJob
from tasks.redis.queues import DONE_CHANNEL, NOTED, control_queue, redis_keys
from tests.support.device_queue import DeviceQueue
from tests.support.messages import REQUEST, changed, direct, packed, raw, recorded, unreadable, wrong_requests
from tests.support.stack import REPOSITORY, RunningStack, eventually

WAIT = {"Prefer": "wait=30"}


@pytest.fixture(scope="module")
def queue(stack: RunningStack) -> Iterator[DeviceQueue]:
    made = DeviceQueue(stack)
    yield made
    made.close()


def test_each_unreadable_message_is_refused_in_one_line_and_gone(queue: DeviceQueue) -> None:
    process = queue.stack.process("cpu_0")
    for name, message in unreadable().items():
        before = len(queue.refusals())
        queue.put([message])
        try:
            queue.settle()
            eventually(lambda before=before: len(queue.refusals()) > before)  # type: ignore[misc]
        except AssertionError as error:
            raise AssertionError(f"{name}: {queue.left()}: {queue.stack.log('cpu_0')[-3000:]}") from error
        (refusal,) = queue.refusals()[before:]
        assert (refusal["queue"], refusal["size_bytes"]) == ("device.cpu_0", len(message)), name
        assert queue.stack.process("cpu_0") is process, name
        assert process.is_running(), name
    queue.serves()
    assert all("exception" not in line for line in queue.log())


def test_unreadable_messages_in_any_of_the_lists_and_for_any_device_are_gone_too(queue: DeviceQueue) -> None:
    cases = list(unreadable().values())
    before = len(queue.refusals())
    for number, key in enumerate([*redis_keys("device.cpu_0"), *redis_keys("device.any")]):
        queue.redis.lpush(key, cases[number], cases[-1 - number])
    queue.settle()
    queue.serves()
    assert len(queue.refusals()) == before + 40


def test_a_readable_message_between_unreadable_ones_is_served(queue: DeviceQueue) -> None:
    good = direct()
    cases = list(unreadable().values())
    queue.put([*cases[:30], raw(good), *cases[30:60]])
    with pytest.raises(Exception, match="nobody-has-this"):
        queue.result(good["headers"]["id"]).get(timeout=30)
    queue.settle()


@pytest.mark.parametrize("name", wrong_requests())
def test_a_wrong_request_is_a_failed_job(queue: DeviceQueue, name: str) -> None:
    envelope = wrong_requests()[name]
    job_id = envelope["headers"]["id"]
    queue.put([raw(envelope)])
    ended = eventually(lambda: _job(queue, job_id))
    assert (ended["state"], ended["error"]["code"]) == ("failed", "validation_failed"), ended
    assert len(json.dumps(ended)) < 20_000
    with pytest.raises(Exception, match=r"."):
        queue.result(job_id).get(timeout=30)
    queue.settle()


def _job(queue: DeviceQueue, job_id: str) -> Any:
    """The job once it has ended."""
    answer = queue.stack.client.get(f"/api/jobs/{job_id}", params={"wait": 10})
    return answer.json() if answer.status_code == 200 and answer.json()["finished_at"] else None


def test_the_caller_of_a_task_that_is_none_here_is_told_so_by_celery(queue: DeviceQueue) -> None:
    envelope = changed(direct(), "headers.task", "someone.elses.task")
    queue.put([raw(envelope)])
    with pytest.raises(NotRegistered):
        queue.result(envelope["headers"]["id"]).get(timeout=30)
    queue.settle()


def test_an_unknown_task_under_a_jobs_id_leaves_the_jobs_result_alone(queue: DeviceQueue) -> None:
    task = queue.send("memory.allocate", {"size_bytes": 16, "allocation_id": "stays"})
    made = task.get(timeout=30)
    before = len(queue.refusals())
    queue.put([raw(changed(changed(direct(), "headers.task", "someone.elses"), "headers.id", task.id))])
    eventually(lambda: len(queue.refusals()) > before)
    queue.serves()
    assert queue.result(task.id).get(timeout=5) == made
    queue.send("memory.deallocate", {"allocation_id": "stays"}).get(timeout=30)


def test_a_task_that_is_shown_under_another_name_is_the_task_it_is(queue: DeviceQueue) -> None:
    envelope = changed(direct(), "headers.shadow", "what Flower shows")
    queue.put([raw(envelope)])
    ended = eventually(lambda: _job(queue, envelope["headers"]["id"]))
    assert (ended["kind"], ended["error"]["code"]) == ("memory.deallocate", "allocation_not_found")
    queue.settle()


SEND = {
    "key": "k", "to": "x", "allocation_id": "a", "offset": 0, "size_bytes": 1, "blob_id": "b", "ring": "nodashes",
}  # fmt: skip
CONTROL = [5, [], {"cancel": 5}, {"cancel": "a\0b"}, {"follow": {}}, {"send": {}}, {"send": 5}, {"send": SEND}]


@pytest.mark.parametrize(
    "told",
    [
        *(b"garbage", b"", b"{}", b"[]", raw(direct()), raw(recorded())),
        *(raw({**direct(), "properties": {}, "body": json.dumps(body)}) for body in CONTROL),
    ],
)
def test_what_the_control_queue_cannot_mean_is_refused(queue: DeviceQueue, told: bytes) -> None:
    before = len(queue.refusals())
    queue.redis.lpush(control_queue("cpu_0"), told)
    eventually(lambda: len(queue.refusals()) == before + 1)
    queue.serves()
    queue.settle()


def test_what_celerys_remote_control_cannot_mean_is_refused(queue: DeviceQueue) -> None:
    number = queue.redis.connection_pool.connection_kwargs["db"]
    remote = {**direct(), "headers": {"clock": 1}}
    told = [
        b"garbage", b"{}", b"5", b"[" * 100_000, b"\xff", raw(direct()), raw({**remote, "body": packed([])}),
        raw({**remote, "body": packed({"method": 5})}), raw({**remote, "headers": {"clock": "x"}}),
        raw({**remote, "headers": {"clock": 2**63}}), raw({**remote, "body": packed({"method": "ping", "matcher": 5})}),
        raw({**remote, "body": packed({"method": "ping", "pattern": "(a+)+$", "matcher": "pcre"})}),
    ]  # fmt: skip
    for one in told:
        before = len(queue.refusals())
        assert queue.redis.publish(f"/{number}.celery.pidbox", one)
        eventually(lambda before=before: len(queue.refusals()) == before + 1)  # type: ignore[misc]
    ping = [sys.executable, "-m", "celery", "-A", "tasks.app", "inspect", "ping", "--json", "--timeout", "10"]
    answer = subprocess.run(ping, env=queue.stack.environment, cwd=REPOSITORY, capture_output=True, timeout=60)
    assert b"pong" in answer.stdout, answer.stderr
    queue.serves()


def test_keys_of_a_wrong_type_are_removed(queue: DeviceQueue) -> None:
    lists = [*redis_keys("device.cpu_0"), *redis_keys("device.any"), control_queue("cpu_0")]
    for number, key in enumerate(lists):
        queue.redis.delete(key)
        _put_wrong(queue, key, number)
    eventually(lambda: all(queue.redis.type(key) in (b"none", b"list") for key in lists))
    queue.serves()
    for number in range(3):
        for key in (queue.unacked, queue.unacked_index):
            queue.redis.delete(key)
            _put_wrong(queue, key, number)
        queue.serves()
    queue.settle()


def _put_wrong(queue: DeviceQueue, key: str, number: int) -> None:
    if number % 3 == 0:
        queue.redis.set(key, "x")
    elif number % 3 == 1:
        queue.redis.sadd(key, "x")
    else:
        queue.redis.xadd(key, {"a": "b"})


# ---- at the worker's start


@pytest.mark.slow
def test_a_worker_starts_over_anything_that_lies_in_redis(start_stack: Callable[..., RunningStack]) -> None:
    stack = start_stack()
    queue = DeviceQueue(stack)
    queue.serves()
    stack.stop("cpu_0")
    cases = list(unreadable().values())
    before = len(queue.refusals())
    queue.put(cases)
    queue.redis.lpush(redis_keys("device.cpu_0")[3], *cases[:20])
    kept = {f"kept {number}": raw([json.loads(case), "", "device.cpu_0"]) for number, case in _objects(cases)}
    odd = {
        b"not JSON": b"garbage", b"\xff\xfe": b"\xff", b"empty": b"", b"a number": b"5", b"nothing": b"[]",
        b"deep": b"[" * 100_000, b"no list": b"{}", b"": raw([None, None, None]), b"null": b"null",
        b"no route": raw([{}, 5, []]), b"recorded": raw([recorded(), "", "device.cpu_0"]),
    }  # fmt: skip
    elsewhere, unrouted = direct(), direct()
    good = {
        b"elsewhere": raw([elsewhere, "", "somewhere.else"]),
        b"unrouted": raw([unrouted, {"a": 1}, None]),
    }
    queue.redis.hset(queue.unacked, mapping={**kept, **odd, **good})
    queue.redis.zadd(queue.unacked_index, {"stale": 0, b"\xff": 1, "elsewhere": 2})
    stack.start("cpu_0")
    stack.wait_ready()
    queue.settle()
    for envelope in (elsewhere, unrouted):
        ended = eventually(lambda envelope=envelope: _job(queue, envelope["headers"]["id"]))  # type: ignore[misc]
        assert ended["error"]["code"] == "allocation_not_found"
    assert not queue.redis.exists("somewhere.else")
    queue.serves()
    assert len(queue.refusals()) == before + len(cases) + 20 + len(kept) + len(odd)
    # And nothing of it comes back.
    stack.restart("cpu_0")
    stack.wait_ready()
    queue.settle()
    queue.serves()
    assert len(queue.refusals()) == before + len(cases) + 20 + len(kept) + len(odd)
    queue.close()


def _objects(cases: list[bytes]) -> Iterator[tuple[int, bytes]]:
    for number, case in enumerate(cases):
        try:
            value = json.loads(case)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict) and len(case) < 1 << 20:
            yield number, case


def test_a_worker_starts_over_keys_of_a_wrong_type(start_stack: Callable[..., RunningStack]) -> None:
    stack = start_stack()
    queue = DeviceQueue(stack)
    stack.stop("cpu_0")
    lists = [*redis_keys("device.cpu_0"), *redis_keys("device.any"), control_queue("cpu_0")]
    bindings = ["_kombu.binding.celery.pidbox", "_kombu.binding_permanent.celery.pidbox", "_kombu.binding_deadlines"]
    for key in [*lists, queue.unacked, queue.unacked_index, *bindings]:
        queue.redis.delete(key)
        queue.redis.set(key, "x")
    stack.start("cpu_0")
    stack.wait_ready()
    queue.serves()
    eventually(lambda: all(queue.redis.type(key) in (b"none", b"list") for key in lists))
    queue.settle()
    queue.close()


# ---- recorded jobs


def test_a_recorded_job_whose_message_is_unreadable_is_run_from_the_record(queue: DeviceQueue) -> None:
    job = NewJob(
        id=new_id(), kind="memory.deallocate", device_id="cpu_0", queue="device.cpu_0", owner="default",
        request=REQUEST,
    )  # fmt: skip
    before = len(queue.refusals())
    engine = open_engine(queue.stack.database_url)
    with engine.connect() as connection:
        store.insert(connection, [job])
    engine.dispose()
    queue.put([raw(changed(recorded(job.id), f"headers.{NOTED}.after", "not a list"))])
    ended = eventually(lambda: _job(queue, job.id))
    assert (ended["state"], ended["error"]["code"], ended["attempt"]) == ("failed", "allocation_not_found", 1), ended
    assert len(queue.refusals()) == before + 1
    queue.settle()


def test_a_record_that_makes_an_unreadable_message_again_and_again_is_run_all_the_same(
    start_stack: Callable[..., RunningStack],
) -> None:
    stack = start_stack(wait=False)
    stack.wait_ready()
    stack.stop("cpu_0")
    stack.run_instead("cpu_0", "tests.faults.unreading_worker")
    stack.start("cpu_0")
    stack.wait_ready()
    ended = stack.client.post("/api/memory/allocate", json={"size_bytes": 32}, headers=WAIT).json()
    assert ended["state"] == "succeeded", ended
    queue = DeviceQueue(stack)
    queue.settle()
    refused = len(queue.refusals())
    assert 2 <= refused <= 6
    queue.close()


# ---- gateways


def test_announcements_that_are_none_stop_no_gateway(queue: DeviceQueue) -> None:
    client = queue.stack.client
    for told in (b"", b"garbage", b"\xff\n\0", b"{}", b"[" * 100_000, b"\n" * 100_000):
        assert queue.redis.publish(DONE_CHANNEL, told)
    made = client.post("/api/memory/allocate", json={"size_bytes": 8}, headers=WAIT).json()
    assert made["state"] == "succeeded"
    assert (
        client.delete(f"/api/memory/deallocate/{made['resource']['id']}", headers=WAIT).json()["state"] == "succeeded"
    )
