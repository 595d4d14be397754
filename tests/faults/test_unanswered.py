"""Statements that PostgreSQL carried out although their answers never came; and submissions that it lost."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import httpx
import numpy as np
import psycopg2
import pytest

from tests.faults.test_spine_faults import load, slow
from tests.support import graphs
from tests.support.databases import Databases
from tests.support.severing import Severing, severing
from tests.support.stack import RunningStack, eventually

ROW = graphs.tensor(np.ones((1, 4), np.float32))
RUN = {"model_name": "tiny", "inputs": {"x": ROW}}


@pytest.fixture(scope="module")
def proxy(databases: Databases) -> Iterator[Severing]:
    with databases.migrated() as url, severing(url) as made:
        yield made


@pytest.fixture(scope="module")
def stack(proxy: Severing, databases: Databases, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningStack]:
    running = RunningStack(tmp_path_factory.mktemp("stack"), proxy.url, databases.redis_url())
    running.start()
    try:
        running.wait_ready()
        load(running, "tiny")
        yield running
    finally:
        running.close()


def ended(stack: RunningStack, job_id: str) -> dict:
    return stack.client.get(f"/api/jobs/{job_id}", params={"wait": 30}).json()


def test_a_claim_without_an_answer_is_the_workers_all_the_same(stack: RunningStack, proxy: Severing) -> None:
    stack.client.post("/api/inference/run", json=RUN, headers={"Prefer": "wait=30"})
    before = proxy.severed
    proxy.sever_after("EXECUTE claim_jobs")
    job = ended(stack, stack.client.post("/api/inference/run", json=RUN).json()["job_id"])
    assert proxy.severed == before + 1
    assert (job["state"], job["attempt"], job["deaths"]) == ("succeeded", 1, 0)


def test_so_is_one_that_may_not_be_repeated(stack: RunningStack, proxy: Severing) -> None:
    before = proxy.severed
    proxy.sever_after("EXECUTE claim_jobs")
    made = stack.client.post("/api/memory/allocate", json={"size_bytes": 64, "allocation_id": "unanswered"})
    job = ended(stack, made.json()["job_id"])
    assert proxy.severed == before + 1
    assert (job["state"], job["attempt"], job["deaths"]) == ("succeeded", 1, 0)


def test_an_end_without_an_answer_is_announced(stack: RunningStack, proxy: Severing) -> None:
    before = proxy.severed
    proxy.sever_after("EXECUTE end_running_jobs")
    job = stack.client.post("/api/inference/run", json=RUN, headers={"Prefer": "wait=30"}).json()
    assert proxy.severed == before + 1
    assert (job["state"], job["attempt"]) == ("succeeded", 1)
    # By the worker that ended it: its log has one line for each job, and Celery's caller is given the result.
    eventually(lambda: job["job_id"] in stack.log("cpu_0"))
    assert stack.client.get(f"/api/jobs/{job['job_id']}").json() == job


@pytest.mark.parametrize("prefer", ["wait=30", "respond-async"])
def test_a_submission_without_an_answer_is_taken_once(stack: RunningStack, proxy: Severing, prefer: str) -> None:
    stack.client.post("/api/inference/run", json=RUN, headers={"Prefer": prefer})
    before = proxy.severed
    proxy.sever_after("EXECUTE insert_jobs")
    answer = stack.client.post("/api/inference/run", json=RUN, headers={"Prefer": prefer})
    assert proxy.severed == before + 1
    assert answer.status_code in (200, 202), answer.text
    assert ended(stack, answer.json()["job_id"])["state"] == "succeeded"


# ---- submissions that were lost before anything was promised


@pytest.fixture
def busy(stack: RunningStack) -> Iterator[RunningStack]:
    """What is submitted now waits."""
    load(stack, "slow")
    holding = stack.client.post("/api/inference/run", json=slow(10_000_000)).json()["job_id"]
    eventually(lambda: stack.client.get(f"/api/jobs/{holding}").json()["state"] == "running")
    yield stack
    stack.client.delete(f"/api/jobs/{holding}")
    assert ended(stack, holding)["state"] == "cancelled"


def forget_waiting(stack: RunningStack) -> list[tuple]:
    with closing(psycopg2.connect(stack.database_url)) as connection, connection.cursor() as cursor:
        cursor.execute("DELETE FROM jobs WHERE state IN ('queued', 'reserved') RETURNING id")
        gone = cursor.fetchall()
        connection.commit()
        return gone


OPEN_INFERENCE = {"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 1, 1, 1]}]}


@pytest.mark.parametrize(
    ("path", "body"), [("/api/inference/run", RUN), ("/v2/models/tiny/infer", OPEN_INFERENCE)], ids=["api", "v2"]
)
def test_a_caller_whose_job_is_gone_is_answered_soon(busy: RunningStack, path: str, body: dict) -> None:
    def ask() -> tuple[httpx.Response, float]:
        began = time.monotonic()
        with httpx.Client(base_url=busy.http_url, timeout=60, trust_env=False) as client:
            answer = client.post(path, json=body, headers={"Prefer": "wait=50"})
        return answer, time.monotonic() - began

    with ThreadPoolExecutor(1) as threads:
        asking = threads.submit(ask)
        eventually(lambda: forget_waiting(busy))
        answer, seconds = asking.result()
    assert answer.status_code == 503, answer.text
    assert "submit it again" in answer.text
    assert int(answer.headers["retry-after"]) >= 1
    assert seconds < 15


def test_a_wait_that_is_over_promises_nothing_that_is_gone(busy: RunningStack) -> None:
    def ask() -> httpx.Response:
        with httpx.Client(base_url=busy.http_url, timeout=60, trust_env=False) as client:
            return client.post("/api/inference/run", json=RUN, headers={"Prefer": "wait=1"})

    with ThreadPoolExecutor(1) as threads:
        asking = threads.submit(ask)
        eventually(lambda: forget_waiting(busy))
        answer = asking.result()
    assert (answer.status_code, answer.json()["code"]) == (503, "database_unavailable")
