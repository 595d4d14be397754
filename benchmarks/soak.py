"""Mixed work with faults for as long as asked: `python -m benchmarks.soak [--minutes 60]`.

Clients allocate, write, read, copy and free, and run models, all the while workers are killed, Redis is emptied and
database connections are cut. At the end every accepted job must have ended, with a result that is right or an error that
the fault explains; nothing may be reserved any more, and no process may have grown without bound.
"""

from __future__ import annotations

import argparse
import collections
import random
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import psycopg2
import redis

from benchmarks import running
from tests.support import graphs
from tests.support.stack import RunningStack, eventually

CLIENTS = 6
FAULT_SECONDS = 20.0

#: What a fault may do to a job, and to a request. Anything else is a finding.
EXPLAINED = {"worker_lost", "allocation_lost", "device_unavailable", "database_unavailable", "allocation_not_found",
             "session_lost", "model_not_found", "queue_full", "insufficient_memory"}  # fmt: skip

#: How much a process may hold more at the end than after the first minute, in MiB.
GROWTH_MIB = 200


class Soak:
    """What all clients share."""

    def __init__(self, stack: RunningStack) -> None:
        self.stack = stack
        self.stop = threading.Event()
        self.jobs: list[str] = []
        self.counts: collections.Counter[str] = collections.Counter()
        self.findings: list[str] = []
        self.lock = threading.Lock()

    def accept(self, answer: httpx.Response) -> str | None:
        """The id of an accepted job; None for a refusal that a fault explains."""
        body = answer.json()
        if answer.status_code in (200, 202):
            with self.lock:
                self.jobs.append(body["job_id"])
            return str(body["job_id"])
        with self.lock:
            self.counts[f"refused: {body.get('code')}"] += 1
            if body.get("code") not in EXPLAINED:
                self.findings.append(f"refused with {answer.status_code} {body}")
        return None


def main() -> int:
    """Runs the soak; exit status 1 where something was found."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    given = parser.parse_args()
    with running.servers() as servers, running.stack(servers, "cpu:2", LEASE_SECONDS=4) as stack:
        soak = Soak(stack)
        graphs.tiny(stack.folder / "models" / "tiny.onnx")
        for device_id in stack.device_ids:
            body = {"name": "tiny", "source": {"path": "tiny.onnx"}, "device_id": device_id, "pin": True}
            stack.client.post("/api/inference/load-model", json=body, headers={"Prefer": "wait=30"}).raise_for_status()
        threads = [threading.Thread(target=work, args=(soak, number)) for number in range(CLIENTS)]
        for thread in threads:
            thread.start()
        after_a_minute: dict[str, float] = {}
        end = time.monotonic() + given.minutes * 60
        began, faults = time.monotonic(), random.Random(1)
        while time.monotonic() < end:
            time.sleep(min(FAULT_SECONDS, max(0.0, end - time.monotonic())))
            if not after_a_minute and time.monotonic() - began > 60:
                after_a_minute = {"gateway": resident(stack)}
            hurt(soak, faults)
        soak.stop.set()
        for thread in threads:
            thread.join()
        judge(soak, after_a_minute)
    print(f"{len(soak.jobs)} jobs in {given.minutes:g} minutes")
    for what, count in sorted(soak.counts.items()):
        print(f"  {count:8d}  {what}")
    for finding in soak.findings[:20]:
        print(f"FOUND: {finding}")
    return 1 if soak.findings else 0


def work(soak: Soak, number: int) -> None:
    """One client: a random walk over memory and inference, checking each result that it gets."""
    chosen = random.Random(number)
    with httpx.Client(base_url=soak.stack.http_url, timeout=70, trust_env=False) as client:
        while not soak.stop.is_set():
            try:
                (run_model if chosen.random() < 0.6 else use_memory)(soak, client, chosen)
            except httpx.HTTPError as error:
                soak.counts[f"no answer: {type(error).__name__}"] += 1
                time.sleep(0.2)


def run_model(soak: Soak, client: httpx.Client, chosen: random.Random) -> None:
    """A run whose result must be right."""
    value = chosen.randrange(1000)
    body = {
        "model_name": "tiny",
        "inputs": {"x": graphs.tensor(np.full((1, 4), value, np.float32))},
        "job": {"priority": chosen.randrange(10)},
    }
    job_id = soak.accept(client.post("/api/inference/run", json=body))
    if job_id is None:
        time.sleep(0.5)
        return
    job = client.get(f"/api/jobs/{job_id}", params={"wait": 60}).json()
    if job.get("state") == "succeeded" and job["result"]["outputs"]["y"]["data"] != [2.0 * value + 1] * 4:
        soak.findings.append(f"wrong result of {job_id}")


def use_memory(soak: Soak, client: httpx.Client, chosen: random.Random) -> None:
    """An allocation written, copied, read and freed; what is read must be what was written."""
    size = chosen.randrange(1, 1 << 18)
    content = chosen.randbytes(size)
    first, second = (f"soak-{chosen.getrandbits(64):x}" for _ in range(2))
    for name in (first, second):
        if soak.accept(client.post("/api/memory/allocate", json={"size_bytes": size, "allocation_id": name})) is None:
            time.sleep(0.5)
            return
    written = soak.accept(client.put(f"/api/memory/data/{first}", content=content))
    copy = {"source": {"allocation_id": first}, "destination": {"allocation_id": second}}
    copied = soak.accept(client.post("/api/memory/copy", json=copy))
    got = client.get(f"/api/memory/data/{second}")
    states = {client.get(f"/api/jobs/{job_id}").json().get("state") for job_id in (written, copied) if job_id}
    # What was refused, or failed with its worker, was not promised; what succeeded must be there.
    if written and copied and states == {"succeeded"} and got.status_code == 200 and got.content != content:
        soak.findings.append(f"{second} holds other bytes than were written to {first}")
    for name in (first, second):
        soak.accept(client.delete(f"/api/memory/deallocate/{name}"))


def hurt(soak: Soak, faults: random.Random) -> None:
    """One fault."""
    fault = faults.choice(["kill", "flush", "cut"])
    soak.counts[f"fault: {fault}"] += 1
    if fault == "kill":
        name = faults.choice(soak.stack.device_ids)
        soak.stack.kill(name)
        time.sleep(faults.choice([0.0, 6.0]))
        soak.stack.start(name)
    elif fault == "flush":
        redis.Redis.from_url(soak.stack.redis_url).flushdb()
    else:
        with psycopg2.connect(soak.stack.database_url) as connection, connection.cursor() as cursor:
            cursor.execute(
                "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )


def judge(soak: Soak, before: dict[str, float]) -> None:
    """Every job has ended as it may, nothing is reserved, nothing has grown."""
    stack = soak.stack
    stack.wait_ready(60)
    ended = dict(ended_jobs(stack))
    for job_id in soak.jobs:
        job = ended.get(job_id) or stack.client.get(f"/api/jobs/{job_id}", params={"wait": 60}).json()
        code = (job.get("error") or {}).get("code", "")
        soak.counts[f"{job.get('state', job.get('code'))} {code}".strip()] += 1
        if job.get("state") not in ("succeeded", "failed") or (code and code not in EXPLAINED):
            soak.findings.append(f"{job_id} {job.get('kind')}: {job.get('state')} {code}")
    for allocation in stack.client.get("/api/memory/allocations", params={"state": "active"}).json()["allocations"]:
        stack.client.delete(f"/api/memory/deallocate/{allocation['allocation_id']}", headers={"Prefer": "wait=30"})
    models = sum(
        model["memory_bytes"] for model in stack.client.get("/api/inference/models?state=loaded").json()["models"]
    )

    def reserved() -> int:
        return sum(one["reserved_bytes"] for one in stack.client.get("/api/memory/status").json()["devices"])

    try:
        eventually(lambda: reserved() == models, 20)
    except AssertionError:
        soak.findings.append(f"{reserved() - models} bytes are still reserved for nothing")
    if before and resident(stack) - before["gateway"] > GROWTH_MIB:
        soak.findings.append(f"the gateway grew by {resident(stack) - before['gateway']:.0f} MiB")


def ended_jobs(stack: RunningStack) -> Iterator[tuple[str, dict[str, Any]]]:
    """What the list tells of all jobs that have ended, by id: an hour's are too many to ask for one by one."""
    cursor = None
    while True:
        page = stack.client.get("/api/jobs", params={"limit": 1000, **({"cursor": cursor} if cursor else {})}).json()
        for job in page["jobs"]:
            if job["finished_at"] is not None:
                yield job["job_id"], {key: job[key] for key in ("kind", "state", "error")}
        cursor = page["next_cursor"]
        if cursor is None:
            return


def resident(stack: RunningStack) -> float:
    """The gateway's resident memory in MiB."""
    return float(stack.process("gateway").memory_info().rss) / 2**20


if __name__ == "__main__":
    sys.exit(main())
