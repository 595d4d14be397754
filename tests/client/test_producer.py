"""Enqueuing without HTTP: with the producer, and with a Celery app that knows nothing of this project."""

from __future__ import annotations

import json
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from device_operations import Client, Producer, State
from device_operations.errors import NotFound
from device_operations.requests.inference import LoadModel, Run
from tests.support import graphs
from tests.support.stack import RunningStack, eventually

#: What a stranger's process runs: plain Celery, started in an empty folder without this project on its path.
STRANGER = """
import json, sys, uuid
import celery

url, name, queue, kwargs, how = sys.argv[1:]
app = celery.Celery(broker=url, backend=url)
sent = app.send_task(name, kwargs=json.loads(kwargs), queue=queue, task_id=str(uuid.uuid4()), **json.loads(how))
answer = {"id": sent.id}
try:
    answer["result"] = sent.get(timeout=30)
except Exception as error:
    answer["raised"] = f"{type(error).__name__}: {error}"
answer["state"] = sent.state
assert not any(name.partition(".")[0] in ("device_operations", "tasks") for name in sys.modules)
print(json.dumps(answer))
"""


@pytest.fixture
def producer(loaded: RunningStack) -> Iterator[Producer]:
    with Producer(loaded.redis_url) as made:
        yield made


def run_request(**job: object) -> Run:
    inputs = {"x": graphs.tensor(np.ones((1, 4), np.float32))}
    return Run.model_validate({"model_name": "tiny", "inputs": inputs, "job": job})


def send_as_a_stranger(
    stack: RunningStack, folder: Path, kind: str, kwargs: dict, queue: str = "device.cpu_0", **how: object
) -> dict:
    (folder / "stranger.py").write_text(STRANGER)
    command = [
        sys.executable, "-I", str(folder / "stranger.py"),
        stack.redis_url, f"device_operations.{kind}", queue, json.dumps(kwargs), json.dumps(how),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# ---- strangers


def test_a_stranger_loads_a_model_and_http_shows_the_job(loaded: RunningStack, client: Client, tmp_path: Path) -> None:
    request = {"name": "tiny", "source": {"path": "tiny.onnx"}}
    answer = send_as_a_stranger(loaded, tmp_path, "inference.load_model", {"request": request})
    assert answer["state"] == "SUCCESS"
    job = client.job(answer["id"])
    assert (job.state, job.celery_state, job.kind) == (State.SUCCEEDED, "SUCCESS", "inference.load_model")
    assert answer["result"] == job.result


def test_a_stranger_gets_the_outputs_of_a_run(loaded: RunningStack, tmp_path: Path) -> None:
    request = {"model_name": "tiny", "inputs": {"x": graphs.tensor(np.ones((1, 4), np.float32))}}
    for queue in ("device.cpu_0", "device.any"):
        answer = send_as_a_stranger(loaded, tmp_path, "inference.run", {"request": request}, queue)
        assert answer["result"]["outputs"]["y"]["data"] == [3.0] * 4


@pytest.mark.parametrize(
    "kwargs",
    [{"wrong": {}}, {"request": {"model_name": "tiny"}}, {"request": "text"}, {"request": {}, "job": {"priority": 99}}],
)
def test_what_does_not_fit_is_a_failed_job_for_both_sides(
    loaded: RunningStack, client: Client, tmp_path: Path, kwargs: dict
) -> None:
    answer = send_as_a_stranger(loaded, tmp_path, "inference.run", kwargs)
    assert answer["state"] == "FAILURE" and "validation_failed" in answer["raised"]
    job = client.job(answer["id"])
    assert job.state is State.FAILED and job.error is not None and job.error["code"] == "validation_failed"


def test_a_stranger_who_asks_for_no_result_leaves_a_job_all_the_same(
    loaded: RunningStack, client: Client, tmp_path: Path
) -> None:
    request = {"model_name": "tiny", "inputs": {"x": graphs.tensor(np.ones((1, 4), np.float32))}}
    (tmp_path / "stranger.py").write_text(STRANGER)
    task_id = str(uuid.uuid4())
    script = (
        "import celery, sys, json; app = celery.Celery(broker=sys.argv[1]); "
        "app.send_task('device_operations.inference.run', kwargs=json.loads(sys.argv[2]), queue='device.cpu_0', "
        "task_id=sys.argv[3], ignore_result=True, priority=9)"
    )
    command = [sys.executable, "-I", "-c", script, loaded.redis_url, json.dumps({"request": request}), task_id]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=60)
    eventually(lambda: is_recorded(client, task_id))
    assert client.wait(task_id, timeout=30).state is State.SUCCEEDED


def is_recorded(client: Client, job_id: str) -> bool:
    """Whether a worker has received the job by now."""
    try:
        return client.job(job_id).job_id == job_id
    except NotFound:
        return False


# ---- the producer


def test_the_producer_sends_typed_requests_and_gets_the_jobs_results(producer: Producer, client: Client) -> None:
    sent = producer.send(LoadModel.model_validate({"name": "tiny", "source": {"path": "tiny.onnx"}}))
    loaded = sent.get(timeout=30)
    assert client.job(sent.id).result == loaded
    run = producer.send(run_request(priority=8, labels={"by": "producer"}), device_id="cpu_0")
    assert run.get(timeout=30)["outputs"]["y"]["data"] == [3.0] * 4
    job = client.job(run.id)
    assert (job.priority, job.labels, job.device_id) == (8, {"by": "producer"}, "cpu_0")
    assert producer.result(run.id).state == "SUCCESS"


def test_a_priority_is_the_same_number_for_the_producer_and_over_http(
    producer: Producer, loaded: RunningStack, client: Client
) -> None:
    priorities = [0, 3, 5, 9]
    sent = [producer.send(run_request(priority=priority), device_id="cpu_0") for priority in priorities]
    for task in sent:
        task.get(timeout=30)
    assert [client.job(task.id).priority for task in sent] == priorities


def test_every_priority_goes_to_the_list_that_workers_read_for_it(producer: Producer, loaded: RunningStack) -> None:
    import redis

    from tasks.redis.queues import redis_key

    with redis.Redis.from_url(loaded.redis_url) as client:
        for priority in range(10):
            producer.send(run_request(priority=priority), device_id="nobody_0", ignore_result=True)
            assert client.llen(redis_key("device.nobody_0", priority)) == 1, priority


def test_a_job_of_the_producer_that_fails_raises_where_its_result_is_asked_for(
    producer: Producer, client: Client
) -> None:
    sent = producer.send(Run.model_validate({"model_name": "unknown", "inputs": {}}))
    for ask in (lambda: sent.get(timeout=30), lambda: client.result(sent.id)):
        with pytest.raises(NotFound) as caught:
            ask()
        assert caught.value.code == "model_not_found"


def test_the_same_task_id_is_the_same_job(producer: Producer, client: Client) -> None:
    task_id = str(uuid.uuid4())
    first = producer.send(run_request(), device_id="cpu_0", task_id=task_id)
    assert first.id == task_id
    result = first.get(timeout=30)
    producer.send(run_request(), device_id="cpu_0", task_id=task_id)
    marker = producer.send(run_request(), device_id="cpu_0")
    marker.get(timeout=30)
    assert client.job(task_id).attempt == 1 and client.job(task_id).result == result


def test_a_job_that_is_cancelled_over_http_is_revoked_for_its_producer(producer: Producer, client: Client) -> None:
    inputs = {"x": graphs.tensor(np.zeros((256, 256), np.float32)), "rounds": graphs.tensor(np.array(10**8))}
    slow = Run.model_validate({"model_name": "slow", "inputs": inputs})
    running, waiting = producer.send(slow, device_id="cpu_0"), producer.send(slow, device_id="cpu_0")
    eventually(lambda: is_recorded(client, waiting.id) and client.job(running.id).state is State.RUNNING)
    for sent in (waiting, running):
        client.cancel(sent.id)
        eventually(lambda sent=sent: sent.state == "REVOKED")
        assert client.job(sent.id).state is State.CANCELLED


def test_an_id_that_nobody_sent_is_not_found(client: Client) -> None:
    with pytest.raises(NotFound) as caught:
        client.job(str(uuid.uuid4()))
    assert caught.value.code == "job_not_found"
