"""The spine: one tiny job over HTTP beside a bare Celery echo on the same Redis, and what idle processes hold."""

from __future__ import annotations

import http.client
import json
import statistics
import subprocess
import sys
import time

import numpy as np
import psutil
from celery import Celery

from benchmarks import running
from benchmarks.measure import Figure, absolute, compare
from tests.support import graphs
from tests.support.stack import RunningStack, eventually

#: Round trips in one round.
COUNT = 200

ECHO = """
from celery import Celery
app = Celery("echo", broker={url!r}, backend={url!r})
app.conf.update(worker_prefetch_multiplier=64, task_default_queue="echo", worker_hijack_root_logger=False)
@app.task(name="echo")
def echo(value):
    return value
app.worker_main(["--quiet", "worker", "--pool=threads", "--concurrency=64", "--without-gossip", "--without-mingle", "--loglevel=ERROR"])
"""


def run() -> list[Figure]:
    """All figures of the spine."""
    with running.servers() as servers, running.stack(servers) as stack:
        figures = [
            absolute("resident memory of the gateway", "MiB", resident(stack, "gateway"), at_most=150),
            absolute("resident memory of an idle cpu worker", "MiB", resident(stack, "cpu_0"), at_most=250),
        ]
        graphs.tiny(stack.folder / "models" / "tiny.onnx")
        body = {"name": "tiny", "source": {"path": "tiny.onnx"}}
        stack.client.post("/api/inference/load-model", json=body, headers={"Prefer": "wait=30"}).raise_for_status()
        worker = subprocess.Popen([sys.executable, "-c", ECHO.format(url=stack.redis_url)])
        try:
            app = Celery(broker=stack.redis_url, backend=stack.redis_url)
            echo_once(app, 30)
            figures.append(
                compare(
                    "`Prefer: wait` on a tiny model over HTTP, p50",
                    "ms",
                    lambda: jobs_over_http(stack),
                    lambda: echo_round_trips(app),
                    "bare Celery echo, 64 threads",
                    at_most=3.0,
                )
            )
        finally:
            worker.terminate()
            worker.wait(timeout=20)
    return figures


def jobs_over_http(stack: RunningStack) -> float:
    """The median round trip of a run, submit to result, in ms.

    The standard library's client: httpx takes most of a millisecond itself, and is not what is measured.
    """
    body = {"model_name": "tiny", "inputs": {"x": graphs.tensor(np.ones((1, 4), np.float32))}}
    headers = {"Prefer": "wait=10", "Content-Type": "application/json"}
    connection = http.client.HTTPConnection(stack.http_url.removeprefix("http://"), timeout=30)
    taken = []
    for _ in range(COUNT):
        began = time.perf_counter()
        connection.request("POST", "/api/inference/run", json.dumps(body), headers)
        answer = connection.getresponse()
        job = json.loads(answer.read())
        taken.append(time.perf_counter() - began)
        assert (answer.status, job["state"]) == (200, "succeeded"), job
    connection.close()
    return statistics.median(taken) * 1000


def echo_round_trips(app: Celery) -> float:
    """The median round trip of the echo task, in ms."""
    return statistics.median(echo_once(app, 10) for _ in range(COUNT)) * 1000


def echo_once(app: Celery, timeout_seconds: float) -> float:
    began = time.perf_counter()
    assert app.send_task("echo", args=[1], queue="echo").get(timeout=timeout_seconds) == 1
    return time.perf_counter() - began


def resident(stack: RunningStack, part: str) -> float:
    """The resident memory of a part, in MiB, once it has settled."""
    process: psutil.Process = stack.process(part)
    eventually(lambda: process.cpu_percent(0.2) < 20)
    everyone = [process, *process.children(recursive=True)]
    return sum(one.memory_info().rss for one in everyone) / 2**20
