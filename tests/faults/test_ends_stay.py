"""An end that was told stays told: PostgreSQL is killed under load, and loses the last of its log each time."""

from __future__ import annotations

import itertools
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from device_operations.stack.servers import Servers
from tests.faults.test_spine_faults import load
from tests.support import graphs
from tests.support.crashing import CrashingPostgres, crashing_postgres
from tests.support.databases import Databases
from tests.support.folders import reachable_folder
from tests.support.stack import RunningStack, eventually

KILLS = 20
#: What is answered while the server is away; nothing was promised then.
REFUSED = {404, 503}


@pytest.fixture
def crashing() -> Iterator[CrashingPostgres]:
    with reachable_folder() as folder, crashing_postgres(folder / "own") as server:
        yield server


@pytest.fixture
def stack(crashing: CrashingPostgres, servers: Servers, tmp_path: Path) -> Iterator[RunningStack]:
    own = Databases(Servers(crashing.url, servers.redis_url))
    with own.migrated() as url:
        running = RunningStack(tmp_path / "stack", url, own.redis_url(), settings={"LEASE_SECONDS": 10})
        running.start()
        try:
            running.wait_ready()
            yield running
        finally:
            running.close()


def run(number: int) -> dict:
    return {"model_name": "tiny", "inputs": {"x": graphs.tensor(np.full((1, 4), number, np.float32))}}


class Callers:
    """Callers of every kind at once, and what each was told."""

    def __init__(self, stack: RunningStack) -> None:
        self.stack = stack
        #: What was told of ended jobs, and ids that were accepted with a 202.
        self.told: dict[str, dict] = {}
        self.accepted: list[str] = []
        self.numbers: dict[str, int] = {}
        self.over = threading.Event()
        self.step = 0
        self._count = itertools.count(1)

    def all(self) -> list[Callable[[], None]]:
        return [self.waiting_for_ends, self.waiting_for_ends, self.by_open_inference, self.accepting, self.training]

    def waiting_for_ends(self) -> None:
        with self._client() as client:
            while not self.over.is_set():
                number = next(self._count)
                job = self._post(client, "/api/inference/run", run(number), {"Prefer": "wait=20"})
                if job is not None:
                    self.numbers[job["job_id"]] = number

    def by_open_inference(self) -> None:
        with self._client() as client:
            while not self.over.is_set():
                tensor = {"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 1, 1, 1]}
                answer = client.post("/v2/models/tiny/infer", json={"inputs": [tensor]})
                assert answer.status_code in {200, *REFUSED}, answer.text

    def accepting(self) -> None:
        """Bulks are rare: each waits for the disk, and what was told before is there with it."""
        with self._client() as client:
            while not self.over.wait(0.4):
                numbers = [next(self._count) for _ in range(30)]
                jobs = [{"kind": "inference.run", "request": run(number)} for number in numbers]
                answer = client.post("/api/jobs", json={"jobs": jobs})
                assert answer.status_code in {202, *REFUSED}, answer.text
                if answer.status_code == 202:
                    ids = [job["job_id"] for job in answer.json()["jobs"]]
                    self.numbers.update(zip(ids, numbers, strict=True))
                    self.accepted += ids
                    heard = client.get(f"/api/jobs/{ids[-1]}", params={"wait": 5})
                    if heard.status_code == 200 and heard.json()["finished_at"]:
                        self.told[ids[-1]] = heard.json()

    def begin_training(self) -> None:
        """Makes the session, before any fault."""
        with self._client() as client:
            layers = [{"type": "linear", "name": "a", "in_features": 4, "out_features": 1}]
            body: dict[str, Any] = {"model": {"kind": "layers", "layers": layers}, "loss": "mse",
                                    "optimizer": {"type": "sgd", "learning_rate": 0.001}}  # fmt: skip
            made = client.post("/api/training/initialize", json=body, headers={"Prefer": "wait=30"}).json()
            self.session = made["resource"]["id"]

    def training(self) -> None:
        with self._client() as client:
            while not self.over.wait(0.2):
                inputs = {"input": graphs.tensor(np.ones((1, 4), np.float32))}
                body = {"session_id": self.session, "sequence": self.step + 1, "inputs": inputs,
                        "targets": graphs.tensor(np.ones((1, 1), np.float32))}  # fmt: skip
                job = self._post(client, "/api/training/step", body, {"Prefer": "wait=20"})
                if job is not None and job["state"] == "succeeded":
                    self.step += 1
                elif job is None:
                    # Not known whether it was taken: a number can be told to have been.
                    self.step = max(self.step, self._applied(client))

    def _applied(self, client: httpx.Client) -> int:
        def ask() -> httpx.Response | None:
            answer = client.get(f"/api/training/status/{self.session}")
            return answer if answer.status_code == 200 else None

        return int(eventually(ask, 30).json()["step"])

    def _post(self, client: httpx.Client, path: str, body: dict, headers: dict[str, str]) -> dict | None:
        answer = client.post(path, json=body, headers=headers)
        assert answer.status_code in {200, 202, 409, *REFUSED}, answer.text
        if answer.status_code == 202:
            self.accepted.append(answer.json()["job_id"])
        if answer.status_code != 200:
            return None
        job: dict = answer.json()
        self.told[job["job_id"]] = job
        return job

    def _client(self) -> httpx.Client:
        return httpx.Client(base_url=self.stack.http_url, timeout=60, trust_env=False)


@pytest.mark.slow
def test_told_ends_and_accepted_jobs_outlive_twenty_kills_of_postgresql(
    stack: RunningStack, crashing: CrashingPostgres
) -> None:
    load(stack, "tiny")
    callers = Callers(stack)
    callers.begin_training()
    with ThreadPoolExecutor(8) as threads:
        working = [threads.submit(one) for one in callers.all()]
        try:
            for number in range(KILLS):
                before = len(callers.told)
                eventually(lambda before=before: len(callers.told) > before + 40, 60)
                if number % 2:
                    crashing.crash()
                else:
                    crashing.kill()
        finally:
            callers.over.set()
        for one in working:
            one.result(timeout=60)

    ended = {job_id: stack.client.get(f"/api/jobs/{job_id}", params={"wait": 30}).json() for job_id in callers.accepted}
    assert {job["state"] for job in ended.values()} == {"succeeded"}
    later = {job_id: stack.client.get(f"/api/jobs/{job_id}").json() for job_id in callers.told}
    changed = {job_id: (told, later[job_id]) for job_id, told in callers.told.items() if told != later[job_id]}
    assert not changed, f"{len(changed)} of {len(callers.told)}: {next(iter(changed.values()))}"
    for job_id, number in callers.numbers.items():
        values = (later.get(job_id) or ended[job_id])["result"]["outputs"]["y"]["data"]
        assert np.array(values).ravel().tolist() == [2 * number + 1] * 4
    status = stack.client.get(f"/api/training/status/{callers.session}").json()
    assert (status["state"], status["step"]) in {("ready", callers.step), ("ready", callers.step + 1)}
    # Ends were lost, or nothing was tried.
    lost = re.findall(r"had lost ends that were announced", stack.log("cpu_0"))
    assert len(lost) >= KILLS // 4, f"{len(lost)} of {KILLS} kills lost an announced end"
    assert stack.client.get("/api/devices/cpu_0").json()["epoch"] == 1


def test_a_told_run_whose_row_waits_again_is_not_run_again(stack: RunningStack, crashing: CrashingPostgres) -> None:
    hold_seconds = 8.0
    stack.stop("cpu_0")
    stack.run_instead("cpu_0", "tests.faults.late_worker", HOLD_SECONDS=str(hold_seconds))
    stack.start("cpu_0")
    stack.wait_ready()
    load(stack, "tiny")

    def lose() -> dict | None:
        job_id = stack.client.post("/api/inference/run", json=run(1)).json()["job_id"]
        told: dict = stack.client.get(f"/api/jobs/{job_id}", params={"wait": 10}).json()
        crashing.kill()
        now = eventually(lambda: (answer := stack.client.get(f"/api/jobs/{job_id}")).status_code == 200 and answer)
        return told if now.json()["attempt"] == 0 else None

    told = eventually(lose, 60)
    seen = []
    since = time.monotonic()
    until = since + 30
    while not seen or seen[-1]["attempt"] == 0:
        assert time.monotonic() < until
        seen.append(stack.client.get(f"/api/jobs/{told['job_id']}").json())
        time.sleep(0.05)
    # Its message came again meanwhile, since the record said that it waits.
    assert time.monotonic() - since > 2, "the row was lost for long enough to be found waiting"
    assert {job["state"] for job in seen[:-1]} <= {"queued", "reserved"}
    assert seen[-1] == told
