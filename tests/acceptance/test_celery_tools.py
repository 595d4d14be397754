"""Celery's own tools on our worker: Flower shows each job's true outcome, `inspect` answers, broadcasts are heard."""

from __future__ import annotations

import json
import subprocess
import sys

import celery
import httpx
import numpy as np

from tests.inference.graphs import busy
from tests.support import graphs
from tests.support.stack import REPOSITORY, RunningStack, eventually

SECRET = "a-long-label-that-nobody-needs-to-see-in-flower" * 40


def test_flower_shows_each_job_by_its_task_name_with_its_true_outcome(
    stack: RunningStack, flower: httpx.Client
) -> None:
    graphs.tiny(stack.folder / "models" / "tiny.onnx")
    (stack.folder / "models" / "bad.onnx").write_bytes(b"no model")
    wait = {"Prefer": "wait=30"}

    def submit(path: str, body: dict) -> str:
        return stack.client.post(path, json=body, headers=wait).json()["job_id"]

    load = submit("/api/inference/load-model", {"name": "tiny", "source": {"path": "tiny.onnx"}})
    bad = submit("/api/inference/load-model", {"name": "bad", "source": {"path": "bad.onnx"}})
    many = graphs.tensor(np.ones((2000, 4), np.float32))
    run = submit(
        "/api/inference/run", {"model_name": "tiny", "inputs": {"x": many}, "job": {"labels": {"k": SECRET[:200]}}}
    )

    def seen(job_id: str) -> dict | None:
        answer = flower.get(f"/api/task/info/{job_id}")
        task = answer.json() if answer.status_code == 200 else {}
        return task if task.get("state") in ("SUCCESS", "FAILURE") else None

    loaded, failed, ran = (eventually(lambda job_id=job_id: seen(job_id), 20) for job_id in (load, bad, run))
    assert (loaded["name"], loaded["state"]) == ("device_operations.inference.load_model", "SUCCESS")
    assert (failed["name"], failed["state"]) == ("device_operations.inference.load_model", "FAILURE")
    assert "model_invalid" in failed["exception"]
    assert (ran["name"], ran["state"]) == ("device_operations.inference.run", "SUCCESS")
    assert "tiny" in ran["kwargs"]
    assert len(ran["kwargs"]) <= 160
    assert "1.0" not in ran["kwargs"]


def test_celery_inspect_answers_while_jobs_run(stack: RunningStack) -> None:
    def inspected(*arguments: str) -> dict:
        command = [sys.executable, "-m", "celery", "-A", "tasks.app", *arguments, "--json"]
        ran = subprocess.run(command, env=stack.environment, cwd=REPOSITORY, capture_output=True, timeout=60)
        assert ran.returncode == 0, ran.stderr
        return json.loads(ran.stdout)

    (name,) = inspected("inspect", "ping")
    assert name.startswith("cpu_0@")
    stats = inspected("inspect", "stats")[name]
    assert stats["pool"]["scheduler"]["device_id"] == "cpu_0"
    assert "device_operations.training.step" in inspected("inspect", "registered")[name]
    assert [queue["name"] for queue in inspected("inspect", "active_queues")[name]] == ["device.cpu_0"]

    (stack.folder / "models" / "busy.onnx").write_bytes(busy(2000, 256))
    body = {"name": "busy", "source": {"path": "busy.onnx"}, "options": {"max_batch_size": 1}}
    assert stack.client.post("/api/inference/load-model", json=body, headers={"Prefer": "wait=30"}).status_code == 200
    run = {"model_name": "busy", "inputs": {"x": graphs.tensor(np.zeros((1, 256, 256), np.float32))}}
    # More than end while the command line starts three times.
    entries = [{"kind": "inference.run", "request": run}] * 60
    jobs = stack.client.post("/api/jobs", json={"jobs": entries}).json()["jobs"]
    ids = [job["job_id"] for job in jobs]
    try:
        eventually(lambda: stack.client.get(f"/api/jobs/{ids[0]}").json()["state"] == "running", interval_seconds=0.01)
        active = {task["id"]: task for task in inspected("inspect", "active")[name]}
        reserved = {task["id"]: task for task in inspected("inspect", "reserved")[name]}
        assert active.keys() <= set(ids)
        assert reserved.keys() <= set(ids)
        assert active, "a run is under way"
        assert reserved, "others wait for it"
        last = inspected("inspect", "query_task", ids[-1])[name][ids[-1]]
        assert last[0] in ("reserved", "active")
        assert last[1]["name"] == "device_operations.inference.run"
        assert "busy" in last[1]["kwargs"]
    finally:
        for job_id in ids:
            stack.client.delete(f"/api/jobs/{job_id}")


def test_where_the_server_lacks_blmpop_recorded_and_direct_jobs_come_one_at_a_time(stack: RunningStack) -> None:
    graphs.tiny(stack.folder / "models" / "tiny.onnx")
    wait = {"Prefer": "wait=30"}
    loaded = {"name": "single", "source": {"path": "tiny.onnx"}}
    assert stack.client.post("/api/inference/load-model", json=loaded, headers=wait).json()["state"] == "succeeded"
    stack.stop("cpu_0")
    # Every server here has the command; a worker that was told otherwise is this one.
    program = (
        "import sys; from tasks.celery_bridge.transport import Channel; Channel._takes_many = False; "
        "from workers.__main__ import main; sys.exit(main(['--device', 'cpu_0']))"
    )
    log = (stack.folder / "one-at-a-time.log").open("w")
    worker = subprocess.Popen(
        [sys.executable, "-c", program], env=stack.environment, cwd=REPOSITORY, stdout=log, stderr=log
    )
    try:
        request = {"model_name": "single", "inputs": {"x": graphs.tensor(np.ones((1, 4), np.float32))}}

        def ran() -> bool:
            answer = stack.client.post("/api/inference/run", json=request, headers=wait)
            return answer.status_code == 200 and answer.json()["state"] == "succeeded"

        eventually(ran, 40)
        client = celery.Celery(broker=stack.redis_url, backend=stack.redis_url)
        direct = client.send_task("device_operations.inference.run", kwargs={"request": request}, queue="device.cpu_0")
        assert direct.get(timeout=30)["outputs"]["y"]
        assert worker.poll() is None
    finally:
        worker.terminate()
        worker.wait(20)
        log.close()
        stack.start("cpu_0")
        stack.wait_ready()
