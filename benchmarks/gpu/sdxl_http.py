"""Images over HTTP: how long they take, what stops and what goes between their steps, and the memory of it."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import running
from benchmarks.gpu import WAIT, sdxl_models
from benchmarks.gpu.sdxl_torch import PROMPT
from benchmarks.gpu.two import NotHere
from benchmarks.measure import Figure, absolute
from tests.devices import graphs
from tests.support.stack import RunningStack

#: Images in a row, of which each takes its share of the whole.
IMAGES = 4

GIB = 2**30


def figures(folder: Path, facts: dict[str, Any], *, tiny: bool) -> list[Figure]:
    """One worker, on gpu_0."""
    with _stack(folder, 1, tiny=tiny) as stack:
        idle = _used(tiny=tiny)
        with _Peak(tiny=tiny) as peak:
            model = _load(stack, folder, "whole", {})
            _image(stack, model, tiny=tiny)
        facts["memory"] = {"loaded": _used(tiny=tiny) - idle, "peak": peak.bytes - idle}
        found = _times(stack, model, facts, tiny=tiny)
        found += _cancelled(stack, model, facts, tiny=tiny)
        found += _urgent(stack, model, folder, facts, tiny=tiny)
        stack.client.delete(f"/api/inference/unload-model/{model}", headers=WAIT).raise_for_status()
        before = _used(tiny=tiny)
        with _Peak(tiny=tiny) as frugal:
            low = _load(stack, folder, "frugal", {"low_memory": True})
            job = _image(stack, low, tiny=tiny)
        facts["memory"] |= {
            "unloaded": before - idle, "low_memory_peak": frugal.bytes - idle, "low_memory_rest": _used(tiny=tiny) - idle,
            "low_memory_image_ms": job["result"]["device_ms"],
        }  # fmt: skip
        about = stack.client.get(f"/api/inference/models/{low}").json()
        facts["memory"]["parts"] = about.get("parts")
        share = (frugal.bytes - idle) / max(1.0, peak.bytes - idle)
        found += [
            absolute("peak memory of load and image", "GiB", (peak.bytes - idle) / GIB),
            absolute("the same with low_memory", "GiB", (frugal.bytes - idle) / GIB),
            absolute("low_memory's share of it", "", share, at_most=1.0),
        ]
    return found


def scaling(folder: Path, facts: dict[str, Any], *, tiny: bool) -> list[Figure]:
    """Images a second of two and four workers beside one. Raises `NotHere` where there is one GPU."""
    from workers.devices.adapters import nvml

    here = 2 if tiny else len(nvml.gpus())
    if here < 2:
        raise NotHere(f"it needs two GPUs, and this machine shows {here}")
    counts = [count for count in (1, 2, 4) if count <= here]
    with _stack(folder, counts[-1], tiny=tiny) as stack:
        names = stack.device_ids[: counts[-1]]
        models = {name: _load(stack, folder, f"on-{name}", {}, device_id=name) for name in names}
        for model in models.values():
            _image(stack, model, tiny=tiny)
        rates = {}
        for count in counts:
            used = [models[name] for name in names[:count]]
            began = time.perf_counter()
            jobs = _submitted(stack, [model for _ in range(IMAGES) for model in used], tiny=tiny)
            for job in jobs:
                _ended(stack, job)
            rates[count] = len(jobs) / (time.perf_counter() - began)
    facts["images_per_second"] = rates
    return [
        Figure(f"images a second on {count} GPUs", "per s", rate, rates[1] * count, "as many times that of one",
               rate / (rates[1] * count), "at least 0.97x", rate / (rates[1] * count) >= 0.97)
        for count, rate in rates.items() if count > 1
    ]  # fmt: skip


def _times(stack: RunningStack, model: str, facts: dict[str, Any], *, tiny: bool) -> list[Figure]:
    walls, on_device = [], []
    for _ in range(3):
        began = time.perf_counter()
        job = _image(stack, model, tiny=tiny)
        walls.append(time.perf_counter() - began)
        on_device.append(job["result"]["device_ms"] / 1e3)
    began = time.perf_counter()
    for one in _submitted(stack, [model] * IMAGES, tiny=tiny):
        _ended(stack, one)
    each = (time.perf_counter() - began) / IMAGES
    facts["http"] = {"walls": walls, "device": on_device, "in_a_row": each}
    found = [absolute("submit to result over HTTP, PNG included", "s", statistics.median(walls)),
             absolute("of it on the device", "s", statistics.median(on_device)),
             absolute(f"{IMAGES} images waiting, seconds of each", "s", each)]  # fmt: skip
    bare = next((one for one in facts.get("bare_seconds", [])), None)
    if bare:
        found.append(
            Figure(f"{IMAGES} images waiting, seconds of each", "s", each, bare, "bare loop", each / bare, "", True)
        )
    return found


def _cancelled(stack: RunningStack, model: str, facts: dict[str, Any], *, tiny: bool) -> list[Figure]:
    """From the request to the job's end, beside a step."""
    took, step = [], []
    for _ in range(3):
        job, one_step = _begun(stack, model, tiny=tiny)
        began = time.perf_counter()
        stack.client.delete(f"/api/jobs/{job}").raise_for_status()
        ended = stack.client.get(f"/api/jobs/{job}", params={"wait": 30}).json()
        took.append(time.perf_counter() - began)
        step.append(one_step)
        assert ended["state"] == "cancelled", ended
    facts["cancel"] = {"seconds": took, "step_seconds": step}
    # What is over a step is the way through gateway, Redis and database: a tenth of a second at most.
    return [absolute("time to cancel, beyond one step", "s", statistics.median(took) - statistics.median(step), at_most=0.1),
            absolute("time to cancel", "s", statistics.median(took))]  # fmt: skip


def _urgent(stack: RunningStack, model: str, folder: Path, facts: dict[str, Any], *, tiny: bool) -> list[Figure]:
    """A small model's run with a higher priority while images are made: it waits for the step under way."""
    (folder / "linear.onnx").write_bytes(graphs.linear())
    body = {"name": "linear", "source": {"path": f"{folder.name}/linear.onnx"}}
    loaded = stack.client.post("/api/inference/load-model", json=body, headers=WAIT).json()
    assert loaded["state"] == "succeeded", loaded
    inputs = {"x": {"dtype": "float32", "shape": [3, 16], "data": np.ones((3, 16), np.float32).tolist()}}
    request = {"model_name": "linear", "inputs": inputs, "job": {"priority": 9}}

    def small() -> float:
        began = time.perf_counter()
        done = stack.client.post("/api/inference/run", json=request, headers=WAIT).json()
        assert done["state"] == "succeeded", done
        return time.perf_counter() - began

    alone = statistics.median(small() for _ in range(5))
    job, step = _begun(stack, model, tiny=tiny)
    between = [small() for _ in range(5)]
    running_still = stack.client.get(f"/api/jobs/{job}").json()["state"] == "running"
    stack.client.delete(f"/api/jobs/{job}")
    stack.client.get(f"/api/jobs/{job}", params={"wait": 30})
    facts["urgent"] = {"alone": alone, "between_steps": between, "step_seconds": step, "image_went_on": running_still}
    return [
        absolute("an urgent small run between steps, beyond its time alone", "s", statistics.median(between) - alone,
                 at_most=round(max(step, 0.01) * 1.1, 4)),
        absolute("the image was still being made", "", float(running_still), at_least=1),
    ]  # fmt: skip


def _begun(stack: RunningStack, model: str, *, tiny: bool) -> tuple[str, float]:
    """A long run that has done some steps; its id, and how long one step takes by its own account."""
    (job,) = _submitted(stack, [model], tiny=tiny, steps=1000)
    until = time.monotonic() + 60
    while time.monotonic() < until:
        progress = stack.client.get(f"/api/jobs/{job}").json()["progress"] or {}
        if progress.get("done", 0) >= 5:
            return job, progress["seconds_left"] / (1000 - progress["done"])
        time.sleep(0.05)
    raise AssertionError("no step in a minute")


def _load(stack: RunningStack, folder: Path, name: str, options: dict[str, Any], device_id: str | None = None) -> str:
    body = {"name": name, "model_type": "sdxl", "source": {"path": folder.name}, "options": options}
    body |= {"device_id": device_id} if device_id else {}
    job = stack.client.post("/api/inference/load-model", json=body, headers=WAIT).json()
    assert "job_id" in job, job
    done = _ended(stack, job["job_id"])
    return str(done["result"]["model_id"])


def _request(model: str, *, tiny: bool, **more: Any) -> dict[str, Any]:
    side = 32 if tiny else sdxl_models.SIDE
    return {
        "model_id": model, "prompt": PROMPT, "width": side, "height": side, "steps": 3 if tiny else sdxl_models.STEPS,
        "guidance_scale": 5.0, "seed": 7, **more,
    }  # fmt: skip


def _image(stack: RunningStack, model: str, *, tiny: bool) -> dict[str, Any]:
    answer = stack.client.post("/api/inference/run", json=_request(model, tiny=tiny), headers=WAIT).json()
    return _ended(stack, answer["job_id"])


def _submitted(stack: RunningStack, models: list[str], *, tiny: bool, **more: Any) -> list[str]:
    jobs = [{"kind": "inference.run", "request": _request(model, tiny=tiny, **more)} for model in models]
    answer = stack.client.post("/api/jobs", json={"jobs": jobs})
    answer.raise_for_status()
    return [job["job_id"] for job in answer.json()["jobs"]]


def _ended(stack: RunningStack, job_id: str) -> dict[str, Any]:
    until = time.monotonic() + 180
    while time.monotonic() < until:
        job: dict[str, Any] = stack.client.get(f"/api/jobs/{job_id}", params={"wait": 50}).json()
        if job.get("finished_at"):
            assert job["state"] == "succeeded", job
            return job
    raise AssertionError(f"{job_id} did not end")


@contextmanager
def _stack(folder: Path, count: int, *, tiny: bool) -> Iterator[RunningStack]:
    devices = f"cpu:{count}" if tiny else ",".join(f"cuda:{number}" for number in range(count))
    # The folder of models is the one above: nothing of gigabytes is copied.
    with running.servers() as servers, running.stack(servers, devices, MODEL_CACHE_PATH=folder.parent) as stack:
        yield stack


class _Peak:
    """The most that the driver says is in use on GPU 0, looked at a hundred times a second."""

    def __init__(self, *, tiny: bool) -> None:
        self.bytes = 0.0
        self._tiny = tiny
        self._over = threading.Event()
        self._watching = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> _Peak:
        self._watching.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._watching.join()

    def _watch(self) -> None:
        while not self._over.wait(0.01):
            self.bytes = max(self.bytes, _used(tiny=self._tiny, settle=False))


def _used(*, tiny: bool, settle: bool = True) -> float:
    if tiny:
        return 0.0
    from workers.devices.adapters import nvml

    if settle:
        time.sleep(0.5)
    usage = nvml.usage(nvml.gpus()[0].index)
    assert usage is not None
    return float(usage.used_bytes)
