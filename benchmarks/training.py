"""Training: jobs of many steps, jobs of one, checkpoints and exports, each beside the same work in bare torch.

Every process uses one thread. The network and its digits are those of the demo.
"""

from __future__ import annotations

import io
import itertools
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable
from datetime import datetime
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from celery import Celery
from safetensors.numpy import save
from torch import nn

from benchmarks import running
from benchmarks.measure import Figure, absolute, compare, seconds_of
from benchmarks.spine import ECHO, echo_once
from device_operations.requests.training import LayersModel
from examples import digits
from examples.digits import Digits
from tests.support.stack import RunningStack
from tests.training_service.calls import tensor
from workers.training.model.definition import Sources, define
from workers.training.onnx.export import OPSET

#: Steps in one job, and samples in a batch.
STEPS, BATCH_SIZE = 500, 32

#: One-step jobs in one round.
COUNT = 60

#: A linear layer of this side has 500 MB of weights; plain SGD keeps nothing beside them.
LARGE_SIDE = 11_180

#: Automatic checkpoints taken of it, and the steps from one to the next.
STALL_ROUNDS, STALL_STEPS = 5, 6

WAIT = {"Prefer": "wait=60"}

MODEL: dict[str, Any] = {"kind": "layers", "layers": digits.LAYERS}


def run() -> list[Figure]:
    """All figures of training."""
    torch.set_num_threads(1)
    learned, _ = digits.load()
    bare = Bare(learned)
    with running.servers() as servers, running.stack(servers) as stack:
        session_id = initialize(stack, MODEL, {"type": "adamw", "learning_rate": 0.002})
        blob_id = stack.client.post("/api/blobs", content=save(learned.as_tensors())).json()["blob_id"]
        dataset = {"blob_id": blob_id, "batch_size": BATCH_SIZE, "steps": STEPS}
        job_of(stack, "step", {"session_id": session_id, "dataset": {**dataset, "steps": 20}})
        figures = [
            compare(
                f"a job of {STEPS} steps, submit to result",
                "steps/s",
                lambda: (
                    STEPS / seconds_of(lambda: job_of(stack, "step", {"session_id": session_id, "dataset": dataset}))
                ),
                lambda: STEPS / seconds_of(lambda: bare.steps(STEPS)),
                "bare torch loop, loss and gradient norm taken at each step",
                at_least=0.97,
            ),
            *one_step_jobs(stack, session_id, bare),
            *validations(stack, session_id, learned, bare),
        ]
        job_of(stack, "session", {"session_id": session_id})
        figures.append(checkpoint_stall(stack))
    return figures


class Bare:
    """The demo's network in plain torch."""

    def __init__(self, given: Digits) -> None:
        self._module = define(LayersModel.model_validate(MODEL), Sources(), trust_programs=False).build(1).train()
        self._optimizer = torch.optim.AdamW(self._module.parameters(), lr=0.002)
        self.images, self.labels = torch.from_numpy(given.images), torch.from_numpy(given.labels)

    def steps(self, count: int) -> None:
        """So many steps on shuffled batches."""
        done = 0
        while done < count:
            for rows in torch.randperm(len(self.labels)).split(BATCH_SIZE)[: count - done]:
                self.step(self.images[rows], self.labels[rows])
                done += 1

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
        """One step: (loss, gradient norm)."""
        loss = nn.functional.cross_entropy(self._module(images), labels)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self._module.parameters(), float("inf"))
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss.item(), norm.item()

    def export(self) -> bytes:
        """The network as ONNX, by the exporter that the product uses too."""
        buffer = io.BytesIO()
        self._module.eval()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                self._module, (self.images[:2],), buffer,  # type: ignore[arg-type] # a file object is taken where dynamo is off
                input_names=["input"], output_names=["output"],
                dynamic_axes={"input": {0: "batch"}, "output": {0: "batch"}}, opset_version=OPSET, dynamo=False,
            )  # fmt: skip
        self._module.train()
        return buffer.getvalue()


def one_step_jobs(stack: RunningStack, session_id: str, bare: Bare) -> list[Figure]:
    """What a job of one step costs beyond the step, beside a Celery task that does nothing."""
    images, labels = bare.images[:BATCH_SIZE], bare.labels[:BATCH_SIZE]
    body = {
        "session_id": session_id,
        "inputs": {"input": tensor(images.numpy())},
        "targets": tensor(labels.numpy()),
    }
    worker = subprocess.Popen([sys.executable, "-c", ECHO.format(url=stack.redis_url)])
    try:
        app = Celery(broker=stack.redis_url, backend=stack.redis_url)
        echo_once(app, 30)

        def overhead() -> float:
            step = median_seconds(lambda: bare.step(images, labels))
            return (median_seconds(lambda: job_of(stack, "step", body)) - step) * 1000

        def together() -> float:
            step = median_seconds(lambda: bare.step(images, labels)) * 1000
            entries = [{"kind": "training.step", "request": body} for _ in range(300)]
            taken = stack.client.post("/api/jobs", json={"jobs": entries}, timeout=120)
            jobs = [one["job_id"] for one in taken.json()["jobs"]]
            last = stack.client.get(f"/api/jobs/{jobs[-1]}", params={"wait": 60}).json()
            done = [stack.client.get(f"/api/jobs/{job_id}").json() for job_id in jobs[::10]]
            assert {one["state"] for one in [last, *done]} == {"succeeded"}, last
            took = datetime.fromisoformat(last["finished_at"]) - datetime.fromisoformat(done[0]["started_at"])
            return took.total_seconds() * 1000 / len(jobs) - step

        def echo() -> float:
            return median_seconds(lambda: echo_once(app, 10)) * 1000

        named = "bare Celery echo, 64 threads"
        return [
            compare("one-step jobs back to back, each beyond a bare step", "ms", together, echo, named, at_most=1.5),
            compare(
                "a one-step job over HTTP with `Prefer: wait`, beyond a bare step, p50", "ms", overhead, echo, named
            ),
        ]
    finally:
        worker.terminate()
        worker.wait(timeout=20)


def checkpoint_stall(stack: RunningStack) -> Figure:
    """How long no step ends while a checkpoint of 500 MB is taken, beyond what copying the weights alone takes.

    A job of many steps runs all the while, and the checkpoints are its own automatic ones: only those are taken between
    two of its steps. The history has the time of each step.
    """
    rows = 4 * BATCH_SIZE
    given = {"input": np.zeros((rows, LARGE_SIDE), np.float32), "targets": np.zeros((rows, 1), np.float32)}
    blob_id = stack.client.post("/api/blobs", content=save(given)).json()["blob_id"]
    model = {
        "kind": "layers",
        "layers": [
            {"type": "linear", "in_features": LARGE_SIDE, "out_features": LARGE_SIDE, "bias": False},
            {"type": "linear", "in_features": LARGE_SIDE, "out_features": 1},
        ],
    }
    session_id = initialize(
        stack,
        model,
        {"type": "sgd", "learning_rate": 1e-6},
        loss="mse",
        checkpoint_every_steps=STALL_STEPS,
        keep_last=1,
    )
    dataset = {"blob_id": blob_id, "batch_size": 1, "steps": STALL_STEPS * STALL_ROUNDS + STALL_STEPS // 2}
    job_of(stack, "step", {"session_id": session_id, "dataset": dataset})
    answer = stack.client.get(f"/api/training/status/{session_id}", params={"history": dataset["steps"]}).json()
    assert answer["error"] is None, answer["error"]
    assert answer["checkpoints"][0]["size_bytes"] > 490e6, answer["checkpoints"]
    at = [datetime.fromisoformat(str(one["time"])).timestamp() for one in answer["history"]]
    pauses = [after - before for before, after in pairwise(at)]
    usual = statistics.median(pauses)
    # The checkpoint is taken after step n, so the pause lies between n and n + 1.
    stalls = [pauses[number - 1] - usual for number in range(STALL_STEPS, len(at), STALL_STEPS)]
    job_of(stack, "session", {"session_id": session_id})
    weights = torch.zeros(LARGE_SIDE, LARGE_SIDE)
    copies = [seconds_of(weights.clone) for _ in range(STALL_ROUNDS)]
    return absolute(
        "a checkpoint of 500 MB: no step for, beyond a copy of its weights",
        "s",
        statistics.median(stalls) - statistics.median(copies),
        at_most=0.2,
    )


def initialize(
    stack: RunningStack, model: dict[str, Any], optimizer: dict[str, Any], *, loss: str = "cross_entropy", **more: Any
) -> str:
    """The id of a new session."""
    return str(
        job_of(stack, "initialize", {"model": model, "optimizer": optimizer, "loss": loss, "seed": 1, **more})[
            "session_id"
        ]
    )


def validate(stack: RunningStack, session_id: str, given: Digits) -> dict[str, Any]:
    """One validation, on one batch of the digits."""
    return job_of(stack, "validate", batch(session_id, given))


def batch(session_id: str, given: Digits) -> dict[str, Any]:
    """A request for one batch of the digits."""
    images, labels = given.images[:BATCH_SIZE], given.labels[:BATCH_SIZE]
    return {"session_id": session_id, "inputs": {"input": tensor(images)}, "targets": tensor(labels)}


def validations(stack: RunningStack, session_id: str, given: Digits, bare: Bare) -> list[Figure]:
    """Export and validation, submit to result, beside torch's exporter alone.

    The exporter runs once for a network: in time that the device has to spare, or in the validation that comes sooner.
    """

    def figure(named: str, take: Callable[[], float], at_most: float | None = 2.0) -> Figure:
        return compare(
            named,
            "ms",
            lambda: take() * 1000,
            lambda: seconds_of(bare.export) * 1000,
            "torch.onnx.export of the same module",
            at_most=at_most,
        )

    def trained() -> float:
        """After a job of steps, of a network that the worker has not met."""
        new = initialize(stack, new_network(), {"type": "adamw", "learning_rate": 0.002})
        given_rows = {
            name: tensor(rows[: 10 * BATCH_SIZE]) for name, rows in (("i", given.images), ("t", given.labels))
        }
        dataset = {
            "inputs": {"input": given_rows["i"]},
            "targets": given_rows["t"],
            "batch_size": BATCH_SIZE,
            "epochs": 2,
        }
        job_of(stack, "step", {"session_id": new, "dataset": dataset})
        took = seconds_of(lambda: validate(stack, new, given))
        job_of(stack, "session", {"session_id": new})
        return took

    return [
        figure(
            "export and validate the digits network, submit to result, after a job of 20 steps, new to the worker",
            trained,
        ),
        figure(
            "the same, the first of a session whose network the worker has met",
            lambda: first_validation(stack, given, MODEL),
        ),
        figure("the same, a later one", lambda: seconds_of(lambda: validate(stack, session_id, given))),
        figure(
            "the same, new to the worker, right after its very first step",
            lambda: first_validation(stack, given, new_network(), steps=1),
            at_most=None,
        ),
        figure(
            "the same, new to the worker, before any step",
            lambda: first_validation(stack, given, new_network()),
            at_most=None,
        ),
    ]


def first_validation(stack: RunningStack, given: Digits, model: dict[str, Any], steps: int = 0) -> float:
    """Seconds that the first validation of a new session takes, after so many steps."""
    session_id = initialize(stack, model, {"type": "adamw", "learning_rate": 0.002})
    for _ in range(steps):
        job_of(stack, "step", batch(session_id, given))
    took = seconds_of(lambda: validate(stack, session_id, given))
    job_of(stack, "session", {"session_id": session_id})
    return took


def new_network() -> dict[str, Any]:
    """The network of the digits with another share dropped, by which it counts as one never seen."""
    share = 0.2 + 1e-6 * next(_networks)
    layers = [{**layer, "p": share} if layer["type"] == "dropout" else layer for layer in digits.LAYERS]
    return {"kind": "layers", "layers": layers}


_networks = itertools.count(1)


def job_of(stack: RunningStack, verb: str, body: dict[str, Any]) -> dict[str, Any]:
    """The result of a job, submitted and waited for in one request where that is long enough."""
    if verb == "session":
        answer = stack.client.delete(f"/api/training/session/{body['session_id']}", headers=WAIT)
    else:
        answer = stack.client.post(f"/api/training/{verb}", json=body, headers=WAIT)
    answer.raise_for_status()
    job = answer.json()
    while job["finished_at"] is None:
        job = stack.client.get(f"/api/jobs/{job['job_id']}", params={"wait": 50}).json()
    assert job["state"] == "succeeded", job["error"]
    return dict(job["result"])


def median_seconds(step: Any) -> float:
    """The median of `COUNT` times."""
    return statistics.median(seconds_of(step) for _ in range(COUNT))
