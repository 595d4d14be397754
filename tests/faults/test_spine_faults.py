"""What must hold when parts of the product die: Redis emptied, a worker killed, an order that nobody may break."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import httpx
import numpy as np
import psycopg2
import pytest
import redis

from tests.support import graphs
from tests.support.stack import RunningStack, eventually

Start = Callable[..., RunningStack]
WAIT = {"Prefer": "wait=30"}


def load(stack: RunningStack, name: str) -> None:
    made = {"tiny": graphs.tiny, "slow": graphs.slow}[name](stack.folder / "models" / f"{name}.onnx")
    body = {"name": name, "source": {"path": made.name}, "options": {"max_batch_size": 1}}
    assert stack.client.post("/api/inference/load-model", json=body, headers=WAIT).json()["state"] == "succeeded"


def tiny(**job: object) -> dict:
    return {"model_name": "tiny", "inputs": {"x": graphs.tensor(np.ones((1, 4), np.float32))}, "job": job}


def slow(rounds: int, **job: object) -> dict:
    inputs = {"x": graphs.tensor(np.zeros((256, 256), np.float32)), "rounds": graphs.tensor(np.array(rounds))}
    return {"model_name": "slow", "inputs": inputs, "job": job}


def wait_all(client: httpx.Client, ids: list[str]) -> list[dict]:
    return [client.get(f"/api/jobs/{job_id}", params={"wait": 60}).json() for job_id in ids]


def test_two_hundred_accepted_jobs_end_although_redis_was_emptied(start_stack: Start) -> None:
    stack = start_stack()
    load(stack, "tiny")
    load(stack, "slow")
    busy = stack.client.post("/api/inference/run", json=slow(1_000_000)).json()["job_id"]
    eventually(lambda: stack.client.get(f"/api/jobs/{busy}").json()["state"] == "running")
    entries = [{"kind": "inference.run", "request": tiny()} for _ in range(200)]
    ids = [job["job_id"] for job in stack.client.post("/api/jobs", json={"jobs": entries}).json()["jobs"]]
    stack.kill("cpu_0")
    redis.Redis.from_url(stack.redis_url).flushdb()
    stack.start("cpu_0")
    stack.wait_ready()
    stack.client.delete(f"/api/jobs/{busy}")
    assert {job["state"] for job in wait_all(stack.client, ids)} == {"succeeded"}
    assert stack.client.get(f"/api/jobs/{busy}", params={"wait": 30}).json()["state"] == "cancelled"


def test_a_flush_under_a_living_worker_loses_nothing_either(start_stack: Start) -> None:
    stack = start_stack()
    load(stack, "tiny")
    client = redis.Redis.from_url(stack.redis_url)
    stop = threading.Event()

    def flush() -> None:
        while not stop.wait(0.05):
            client.flushdb()

    flushing = threading.Thread(target=flush)
    flushing.start()
    ids = [stack.client.post("/api/inference/run", json=tiny()).json()["job_id"] for _ in range(200)]
    stop.set()
    flushing.join()
    assert {job["state"] for job in wait_all(stack.client, ids)} == {"succeeded"}


@pytest.mark.slow
def test_a_worker_killed_in_the_middle_of_a_job_is_told_and_the_job_runs_once_more(start_stack: Start) -> None:
    stack = start_stack(LEASE_SECONDS=2)
    load(stack, "slow")
    job_id = stack.client.post("/api/inference/run", json=slow(20_000)).json()["job_id"]
    eventually(lambda: stack.client.get(f"/api/jobs/{job_id}").json()["state"] == "running")
    epoch = stack.client.get("/api/devices/cpu_0").json()["epoch"]
    stack.kill("cpu_0")
    # The lease tells: nobody has to restart anything for the death to be seen and the job to be put back.
    eventually(lambda: stack.client.get("/api/devices/cpu_0").json()["state"] == "offline", 7)
    back = eventually(lambda: (job := stack.client.get(f"/api/jobs/{job_id}").json())["state"] == "queued" and job, 7)
    assert (back["deaths"], back["attempt"], back["started_at"]) == (1, 0, None)
    refused = stack.client.post("/api/inference/run", json=slow(1))
    assert refused.status_code == 503 and int(refused.headers["retry-after"]) >= 1
    stack.start("cpu_0")
    stack.wait_ready()
    done = stack.client.get(f"/api/jobs/{job_id}", params={"wait": 60}).json()
    assert (done["state"], done["attempt"], done["deaths"]) == ("succeeded", 1, 1), "a death is no attempt"
    assert stack.client.get("/api/devices/cpu_0").json()["epoch"] == epoch + 1


def test_a_job_that_kills_three_workers_is_poison(start_stack: Start) -> None:
    stack = start_stack(LEASE_SECONDS=2)
    load(stack, "slow")
    job_id = stack.client.post("/api/inference/run", json=slow(10_000_000)).json()["job_id"]
    for deaths in (0, 1, 2):
        eventually(lambda: (job := stack.client.get(f"/api/jobs/{job_id}").json())["state"] == "running"
                   and (job["deaths"], job["attempt"]) == (deaths, 1), 30)  # fmt: skip  # noqa: B023 - called at once
        stack.kill("cpu_0")
        stack.start("cpu_0")
    done = stack.client.get(f"/api/jobs/{job_id}", params={"wait": 30}).json()
    assert (done["state"], done["error"]["code"]) == ("failed", "poison")


def test_a_second_worker_for_a_living_device_refuses_to_start(start_stack: Start) -> None:
    import subprocess

    stack = start_stack()
    from device_operations.stack import services

    second = subprocess.run(
        services.python(*services.worker_arguments("cpu_0")), env=stack.environment, capture_output=True, timeout=60
    )
    assert second.returncode == 69 and b"is held by a worker that is alive" in second.stderr
    assert stack.client.get("/api/devices/cpu_0").json()["state"] == "online"


def test_a_warm_stop_finishes_what_runs_and_leaves_the_rest_to_the_next_worker(start_stack: Start) -> None:
    stack = start_stack()
    load(stack, "tiny")
    load(stack, "slow")
    running = stack.client.post("/api/inference/run", json=slow(20_000)).json()["job_id"]
    eventually(lambda: stack.client.get(f"/api/jobs/{running}").json()["state"] == "running")
    waiting = [stack.client.post("/api/inference/run", json=tiny()).json()["job_id"] for _ in range(20)]
    stack.stop("cpu_0")
    assert stack.client.get(f"/api/jobs/{running}").json()["state"] == "succeeded"
    assert {stack.client.get(f"/api/jobs/{job_id}").json()["state"] for job_id in waiting} <= {"queued", "reserved"}
    stack.start("cpu_0")
    stack.wait_ready()
    assert {job["state"] for job in wait_all(stack.client, waiting)} == {"succeeded"}


def test_the_database_away_for_a_moment_costs_no_job(start_stack: Start, servers: object) -> None:
    stack = start_stack(LEASE_SECONDS=5)
    load(stack, "tiny")
    epoch = stack.client.get("/api/devices/cpu_0").json()["epoch"]
    ids = []
    for _ in range(5):
        ids += [stack.client.post("/api/inference/run", json=tiny()).json()["job_id"] for _ in range(10)]
        cut_connections(stack)
        eventually(lambda: stack.client.get("/readyz").status_code == 200)
    assert {job["state"] for job in wait_all(stack.client, ids)} == {"succeeded"}
    assert stack.client.get("/api/devices/cpu_0").json()["epoch"] == epoch


def test_connections_cut_under_work_of_every_kind_cost_no_accepted_job(start_stack: Start) -> None:
    stack = start_stack(LEASE_SECONDS=5)
    ids: list[str] = []
    over = threading.Event()

    def work(number: int) -> None:
        names = itertools.count()
        with httpx.Client(base_url=stack.http_url, timeout=60, trust_env=False) as client:
            while not over.is_set():
                name = f"cut-{number}-{next(names)}"
                taken = [client.post("/api/memory/allocate", json={"size_bytes": 4096, "allocation_id": name})]
                taken += [client.put(f"/api/memory/data/{name}", content=bytes(4096))]
                taken += [client.delete(f"/api/memory/deallocate/{name}")]
                # A request whose own statement was cut is refused, and says that nothing was recorded.
                assert {one.status_code for one in taken} <= {202, 404, 503}, [one.text for one in taken]
                ids.extend(one.json()["job_id"] for one in taken if one.status_code == 202)

    with ThreadPoolExecutor(3) as threads:
        working = [threads.submit(work, number) for number in range(3)]
        for _ in range(12):
            before = len(ids)
            cut_connections(stack)
            eventually(lambda before=before: len(ids) > before + 10)
        over.set()
        for one in working:
            one.result()
    jobs = wait_all(stack.client, ids)
    assert {job["state"] for job in jobs} == {"succeeded"}, [job["error"] for job in jobs if job["error"]]


def cut_connections(stack: RunningStack) -> None:
    """Ends every connection to the stack's database, whatever it is doing."""
    with closing(psycopg2.connect(stack.database_url)) as connection, connection.cursor() as cursor:
        cursor.execute(
            "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )


def test_from_four_clients_dependent_jobs_keep_their_order_and_the_most_urgent_goes_next(start_stack: Start) -> None:
    stack = start_stack()
    load(stack, "tiny")
    load(stack, "slow")
    gate = stack.client.post("/api/inference/run", json=slow(10_000_000)).json()["job_id"]
    eventually(lambda: stack.client.get(f"/api/jobs/{gate}").json()["state"] == "running")

    def submit(number: int) -> list[dict]:
        chosen = random.Random(number)
        made: list[dict] = []
        with httpx.Client(base_url=stack.http_url, timeout=60, trust_env=False) as client:
            for _ in range(50):
                after = [chosen.choice(made)["job_id"]] if made and chosen.random() < 0.4 else []
                body = tiny(priority=chosen.randrange(10), after=after)
                job = client.post("/api/inference/run", json=body).json()
                made.append({**job, "after": after})
        return made

    with ThreadPoolExecutor(4) as clients:
        jobs = list(itertools.chain.from_iterable(clients.map(submit, range(4))))
    # All of them are in the scheduler before the gate opens, so that "next" is well defined.
    eventually(
        lambda: stack.client.get("/api/jobs", params={"state": "reserved", "limit": 300}).json()["jobs"][199:], 30
    )
    stack.client.delete(f"/api/jobs/{gate}")
    ended = {job["job_id"]: job for job in wait_all(stack.client, [job["job_id"] for job in jobs])}
    assert {job["state"] for job in ended.values()} == {"succeeded"}
    assert_highest_eligible_went_next(jobs, sorted(ended, key=lambda job_id: ended[job_id]["started_at"]))


def assert_highest_eligible_went_next(jobs: list[dict], order: list[str]) -> None:
    """Replays the order against the rule: predecessors first, then lent priority, then order of submission."""
    left = {job["job_id"]: job for job in jobs}
    effective = {job_id: job["priority"] for job_id, job in left.items()}
    changed = True
    while changed:
        changed = False
        for job in jobs:
            for before in job["after"]:
                if effective[before] < effective[job["job_id"]]:
                    effective[before] = effective[job["job_id"]]
                    changed = True
    for job_id in order:
        assert not [before for before in left[job_id]["after"] if before in left], "ran before its predecessor"
        eligible = [one for one, job in left.items() if not [before for before in job["after"] if before in left]]
        best = max(effective[one] for one in eligible)
        assert effective[job_id] == best, f"priority {effective[job_id]} went before {best}"
        del left[job_id]


def test_a_worker_stopped_at_any_moment_of_its_start_gives_its_device_back(start_stack: Start) -> None:
    import signal
    import time

    stack = start_stack(LEASE_SECONDS=30)
    for wait_seconds in (0.3, 0.9, 1.5, 2.2, 3.0):
        stack.stop("cpu_0")
        stack.start("cpu_0")
        time.sleep(wait_seconds)
        process = stack.process("cpu_0")
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=30)
        eventually(lambda: stack.client.get("/api/devices/cpu_0").json()["state"] == "offline", 5)
