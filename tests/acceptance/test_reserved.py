"""A run behind a long run is `reserved`, however far ahead its worker claimed it, until the device begins with it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime

import httpx
import numpy as np
import pytest

from tests.support import graphs
from tests.support.records import claim_of
from tests.support.stack import REPOSITORY, RunningStack, eventually

WAIT = {"Prefer": "wait=30"}

#: Rounds of the slow model: far longer than a test takes, and long enough for the worker to claim ahead.
ENDLESS = 10_000_000
SHORT = 300


def load(stack: RunningStack) -> None:
    graphs.slow(stack.folder / "models" / "slow.onnx")
    body = {"name": "slow", "source": {"path": "slow.onnx"}, "options": {"max_batch_size": 1}}
    assert stack.client.post("/api/inference/load-model", json=body, headers=WAIT).json()["state"] == "succeeded"
    # How long a run takes is known by the last one: only then is it worth claiming ahead.
    assert stack.client.post("/api/inference/run", json=slow(SHORT), headers=WAIT).json()["state"] == "succeeded"


def slow(rounds: int, **job: object) -> dict:
    inputs = {"x": graphs.tensor(np.zeros((256, 256), np.float32)), "rounds": graphs.tensor(np.array(rounds))}
    return {"model_name": "slow", "inputs": inputs, "job": job}


@pytest.fixture
def http(stack: RunningStack) -> Iterator[httpx.Client]:
    if not stack.client.get("/api/inference/models").json()["models"]:
        load(stack)
    yield stack.client
    for state in ("running", "reserved", "queued"):
        for job in stack.client.get("/api/jobs", params={"state": state}).json()["jobs"]:
            stack.client.delete(f"/api/jobs/{job['job_id']}")


def behind(stack: RunningStack, rounds: int = SHORT, **job: object) -> tuple[str, str]:
    """A run that goes on and on, and one behind it that the worker has claimed ahead."""
    busy = stack.client.post("/api/inference/run", json=slow(ENDLESS)).json()["job_id"]
    eventually(lambda: stack.client.get(f"/api/jobs/{busy}").json()["state"] == "running")
    waiting = stack.client.post("/api/inference/run", json=slow(rounds, **job)).json()["job_id"]
    eventually(lambda: claim_of(stack.database_url, waiting)[1] is not None)
    return busy, waiting


def test_it_is_reserved_and_has_not_started(stack: RunningStack, http: httpx.Client) -> None:
    _, waiting = behind(stack)
    told = http.get(f"/api/jobs/{waiting}").json()
    assert (told["state"], told["celery_state"], told["started_at"]) == ("reserved", "RECEIVED", None)
    assert (told["attempt"], told["timings"]["queued_ms"], told["timings"]["device_ms"]) == (0, None, None)
    assert told["queue_position"] == 0
    device = http.get("/api/devices/cpu_0").json()
    assert (device["running"], device["queued"]) == (1, 1)
    listed = http.get("/api/jobs", params={"state": "running"}).json()["jobs"]
    assert waiting not in {job["job_id"] for job in listed}


def test_its_expiry_still_counts(stack: RunningStack, http: httpx.Client) -> None:
    busy, waiting = behind(stack, expires_in_seconds=0.8)
    asked = time.monotonic()
    ended = http.get(f"/api/jobs/{waiting}", params={"wait": 10}).json()
    assert time.monotonic() - asked < 3
    assert (ended["state"], ended["celery_state"], ended["started_at"]) == ("expired", "REVOKED", None)
    assert (ended["attempt"], ended["timings"]["queued_ms"]) == (0, None)
    assert "expires_in_seconds was 0.8" in ended["error"]["message"]
    assert http.get(f"/api/jobs/{busy}").json()["state"] == "running"


def test_it_is_cancelled_at_once_and_never_begun(stack: RunningStack, http: httpx.Client) -> None:
    busy, waiting = behind(stack)
    asked = time.monotonic()
    answer = http.delete(f"/api/jobs/{waiting}")
    assert (answer.status_code, answer.json()["state"]) == (202, "cancelled")
    assert time.monotonic() - asked < 2
    assert http.delete(f"/api/jobs/{waiting}").json()["code"] == "job_finished"
    assert http.delete(f"/api/jobs/{busy}").status_code == 202
    assert http.get(f"/api/jobs/{busy}", params={"wait": 10}).json()["state"] == "cancelled"
    assert http.post("/api/inference/run", json=slow(SHORT), headers=WAIT).json()["state"] == "succeeded"
    told = http.get(f"/api/jobs/{waiting}").json()
    assert (told["state"], told["started_at"], told["attempt"]) == ("cancelled", None, 0)


def test_it_starts_when_the_device_begins_with_it(stack: RunningStack, http: httpx.Client) -> None:
    busy, waiting = behind(stack)
    time.sleep(0.5)
    http.delete(f"/api/jobs/{busy}")
    ended = http.get(f"/api/jobs/{waiting}", params={"wait": 10}).json()
    before = http.get(f"/api/jobs/{busy}").json()
    timings = ended["timings"]
    assert (ended["state"], ended["attempt"]) == ("succeeded", 1)
    assert timings["queued_ms"] >= 500
    assert timings["queued_ms"] + timings["device_ms"] <= timings["total_ms"]
    # The device has let go of the one before when it begins; the record of that one's end comes a little later.
    started, ended_before = (datetime.fromisoformat(at) for at in (ended["started_at"], before["finished_at"]))
    assert abs((started - ended_before).total_seconds()) < 1


@pytest.mark.serial
def test_once_begun_it_is_soon_seen_to_run(stack: RunningStack, http: httpx.Client) -> None:
    busy, waiting = behind(stack, ENDLESS)
    http.delete(f"/api/jobs/{busy}")
    http.get(f"/api/jobs/{busy}", params={"wait": 10})
    let_go = time.monotonic()
    told = eventually(lambda: (job := http.get(f"/api/jobs/{waiting}").json())["state"] == "running" and job)
    assert time.monotonic() - let_go < 1
    assert told["started_at"] is not None
    assert (told["celery_state"], told["attempt"]) == ("STARTED", 1)
    http.delete(f"/api/jobs/{waiting}")
    ended = http.get(f"/api/jobs/{waiting}", params={"wait": 10}).json()
    assert (ended["state"], ended["started_at"], ended["attempt"]) == ("cancelled", told["started_at"], 1)


def test_who_follows_it_hears_of_its_start(stack: RunningStack, http: httpx.Client) -> None:
    busy, waiting = behind(stack)
    told: list[dict] = []
    with http.stream("GET", f"/api/jobs/{waiting}/events") as events:
        for line in events.iter_lines():
            if not line.startswith("data: "):
                continue
            told.append(json.loads(line[6:]))
            if len(told) == 1:
                http.delete(f"/api/jobs/{busy}")
    states = [one["state"] for one in told]
    assert states[0] == "reserved" and states[-2:] == ["running", "succeeded"], states
    assert [one["started_at"] for one in told[-2:]] == [told[-1]["started_at"]] * 2
    assert told[0]["started_at"] is None


def test_celery_says_the_same(stack: RunningStack, http: httpx.Client) -> None:
    busy, waiting = behind(stack)

    def inspected(what: str) -> set[str]:
        command = [sys.executable, "-m", "celery", "-A", "tasks.app", "inspect", what, "--json"]
        ran = subprocess.run(command, env=stack.environment, cwd=REPOSITORY, capture_output=True, timeout=60)
        (found,) = json.loads(ran.stdout).values()
        return {task["id"] for task in found}

    assert inspected("active") == {busy}
    assert inspected("reserved") == {waiting}


def test_a_death_of_the_worker_is_not_its_own(start_stack: Callable[..., RunningStack]) -> None:
    stack = start_stack(LEASE_SECONDS=2)
    load(stack)
    busy, waiting = behind(stack)

    def has_killed(workers: int) -> bool:
        told = stack.client.get(f"/api/jobs/{busy}").json()
        return (told["state"], told["deaths"], told["attempt"]) == ("running", workers, 1)

    for deaths in (1, 2, 3):
        stack.kill("cpu_0")
        stack.start("cpu_0")
        if deaths < 3:
            eventually(lambda: has_killed(deaths), 30)  # noqa: B023 - called at once
    ended = stack.client.get(f"/api/jobs/{waiting}", params={"wait": 30}).json()
    assert (ended["state"], ended["deaths"], ended["attempt"]) == ("succeeded", 0, 1)
    poison = stack.client.get(f"/api/jobs/{busy}").json()
    assert (poison["state"], poison["error"]["code"]) == ("failed", "poison")
