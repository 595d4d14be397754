"""Who may do what, what a gateway refuses to start with, how it waits, and what a worker logs."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import redis

from device_operations.stack import services
from tests.support import graphs
from tests.support.stack import RunningStack, eventually

Start = Callable[..., RunningStack]
KEYS = "root:key-of-root-1:admin,anna:key-of-anna-1,bert:key-of-bert-1"
RUN = {"model_name": "tiny", "inputs": {"x": graphs.tensor(np.ones((1, 4), np.float32))}}


def load(stack: RunningStack) -> None:
    graphs.tiny(stack.folder / "models" / "tiny.onnx")
    body = {"name": "tiny", "source": {"path": "tiny.onnx"}}
    stack.client.post("/api/inference/load-model", json=body, headers={"Prefer": "wait=30"}).raise_for_status()


def test_a_key_stands_for_an_owner_who_sees_only_its_own(start_stack: Start) -> None:
    stack = start_stack(API_KEYS=KEYS)
    load(stack)
    url = stack.http_url
    anna = httpx.Client(base_url=url, headers={"Authorization": "Bearer key-of-anna-1"}, trust_env=False, timeout=30)
    bert = httpx.Client(base_url=url, headers={"X-API-Key": "key-of-bert-1"}, trust_env=False, timeout=30)
    nobody = httpx.Client(base_url=url, trust_env=False, timeout=30)
    for wrong in ({}, {"X-API-Key": "key-of-bert-2"}, {"Authorization": "Basic key-of-anna-1"}):
        refused = nobody.post("/api/inference/run", json=RUN, headers=wrong)
        assert (refused.status_code, refused.json()["code"]) == (401, "unauthorized")
    job = anna.post("/api/inference/run", json=RUN).json()
    assert job["owner"] == "anna"
    assert anna.get(f"/api/jobs/{job['job_id']}").status_code == 200
    assert bert.get(f"/api/jobs/{job['job_id']}").status_code == 404
    assert bert.delete(f"/api/jobs/{job['job_id']}").status_code == 404
    assert bert.get(f"/api/jobs/{job['job_id']}/events").status_code == 404
    assert stack.client.get(f"/api/jobs/{job['job_id']}").status_code == 200
    assert {one["owner"] for one in anna.get("/api/jobs").json()["jobs"]} == {"anna"}
    assert bert.get("/api/jobs", params={"owner": "anna"}).json()["code"] == "forbidden"
    foreign = anna.post("/api/inference/run", json={**RUN, "job": {"owner": "bert"}})
    assert (foreign.status_code, foreign.json()["code"]) == (403, "forbidden")
    assert stack.client.post("/api/inference/run", json={**RUN, "job": {"owner": "bert"}}).json()["owner"] == "bert"
    assert bert.post("/api/devices/cpu_0/drain").json()["code"] == "forbidden"
    blob = anna.post("/api/blobs", content=b"secret").json()["blob_id"]
    assert anna.get(f"/api/blobs/{blob}").content == b"secret"
    assert bert.get(f"/api/blobs/{blob}").json()["code"] == "blob_not_found"
    stolen = {"x": {"dtype": "uint8", "shape": [6], "blob_id": blob}}
    assert bert.post("/api/inference/run", json={**RUN, "inputs": stolen}).status_code in (404, 422)
    key = {"Idempotency-Key": "same"}
    first = anna.post("/api/inference/run", json=RUN, headers=key).json()["job_id"]
    assert bert.post("/api/inference/run", json=RUN, headers=key).json()["job_id"] != first


def test_without_keys_the_gateway_refuses_to_listen_beyond_loopback(stack: RunningStack) -> None:
    environment = services.environment({"HTTP__HOST": "0.0.0.0", "HTTP__PORT": 0}, base=stack.environment)
    ended = subprocess.run(services.python(*services.GATEWAY), env=environment, capture_output=True, timeout=60)
    assert ended.returncode == 2
    assert b"DEVICE_OPERATIONS_API_KEYS" in ended.stderr
    assert "no API keys are set" in stack.log("gateway")


def test_without_keys_a_page_of_another_site_can_do_nothing(stack: RunningStack) -> None:
    own = stack.http_url
    for headers in (
        {"Origin": "https://elsewhere.example"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Host": "rebound.example"},
    ):
        for path in ("/api/inference/run", "/api/devices/cpu_0/drain", "/v2/models/tiny/infer"):
            refused = stack.client.post(path, json=RUN, headers=headers)
            assert refused.status_code == 403, (path, headers, refused.text)
    for headers in ({"Origin": own, "Sec-Fetch-Site": "same-origin"}, {"Host": "localhost:8000"}, {}):
        assert stack.client.get("/api/devices", headers=headers).status_code == 200


def test_forty_requests_that_wait_share_one_subscription(stack: RunningStack) -> None:
    load(stack)
    body = {**RUN, "job": {"delay_seconds": 3}}
    client = redis.Redis.from_url(stack.redis_url)
    index = client.connection_pool.connection_kwargs["db"]

    def wait(_: int) -> str:
        with httpx.Client(base_url=stack.http_url, trust_env=False, timeout=30) as own:
            return own.post("/api/inference/run", json=body, headers={"Prefer": "wait=20"}).json()["state"]

    def gateways() -> list[dict]:
        return [one for one in client.client_list() if int(one["sub"]) and int(one["db"]) == index]

    before = len(gateways())
    with ThreadPoolExecutor(40) as waiting:
        answers = [waiting.submit(wait, number) for number in range(40)]
        eventually(lambda: len(stack.client.get("/api/jobs", params={"state": "scheduled"}).json()["jobs"]) == 40)
        assert len(gateways()) == before
        assert {answer.result() for answer in answers} == {"succeeded"}


def test_a_worker_logs_one_line_of_json_for_each_job(stack: RunningStack) -> None:
    load(stack)
    job = stack.client.post("/api/inference/run", json=RUN, headers={"Prefer": "wait=20"}).json()

    def lines() -> list[dict]:
        told = [json.loads(line) for line in stack.log("cpu_0").splitlines() if line.startswith("{")]
        return [line for line in told if line.get("job_id") == job["job_id"]]

    (line,) = eventually(lines)
    assert (line["event"], line["kind"], line["state"], line["owner"]) == (
        "job",
        "inference.run",
        "succeeded",
        "default",
    )
    assert line["total_ms"] > 0
