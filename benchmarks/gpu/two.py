"""Two GPUs, two workers: each model's runs go to where it lies, and bytes go from one GPU to the other and arrive."""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import running
from benchmarks.gpu import WAIT
from benchmarks.gpu.memory import GIB, used
from benchmarks.measure import Figure, absolute
from tests.devices import graphs
from tests.support.stack import RunningStack

#: Bytes whose content is compared after a copy, and bytes of the copies that are timed.
COMPARED, TIMED = 256 << 20, 4 * GIB

#: Runs of each of the two models.
RUNS = 32


class NotHere(Exception):
    """What the part needs is not on this machine."""


def two_gpus() -> list[Figure]:
    """The product with a worker on each of the first two GPUs. Raises `NotHere` where there are not two."""
    from workers.devices.adapters import nvml

    count = len(nvml.gpus())
    if count < 2:
        raise NotHere(f"it needs two GPUs, and this machine shows {count}")
    with running.servers() as servers, running.stack(servers, "cuda:0,cuda:1") as stack:
        return [*_two_workers(stack), *_placed(stack), *_copied(stack)]


def _two_workers(stack: RunningStack) -> list[Figure]:
    devices = {one["device_id"]: one for one in stack.client.get("/api/devices").json()["devices"]}
    online = {name for name, one in devices.items() if one["state"] == "online" and one["backend"] == "cuda"}
    apart = len({one["capabilities"]["uuid"] for one in devices.values()}) == len(devices)
    pids = {stack.process(name).pid for name in stack.device_ids}
    return [
        absolute("workers online on cuda: gpu_0, gpu_1", "workers", len(online & {"gpu_0", "gpu_1"}), at_least=2),
        absolute("they are two processes on two GPUs", "", float(apart and len(pids) == 2), at_least=1),
    ]


def _placed(stack: RunningStack) -> list[Figure]:
    """Runs by model name alone find the device of their model; unnamed allocations the GPU with more room."""
    client = stack.client
    (stack.folder / "models").mkdir(parents=True, exist_ok=True)
    inputs = {"linear": ("gpu_0", [3, 16]), "recurrent": ("gpu_1", None)}
    for name, (device_id, _) in inputs.items():
        (stack.folder / "models" / f"{name}.onnx").write_bytes(getattr(graphs, name)())
        body = {"name": name, "source": {"path": f"{name}.onnx"}, "device_id": device_id}
        loaded = client.post("/api/inference/load-model", json=body, headers=WAIT).json()
        assert loaded["state"] == "succeeded", loaded
    entries = [
        {"kind": "inference.run", "request": {"model_name": name, "inputs": _inputs(name)}}
        for _ in range(RUNS)
        for name in inputs
    ]
    jobs = client.post("/api/jobs", json={"jobs": entries}).json()["jobs"]
    done = [_ended(stack, job["job_id"]) for job in jobs]
    right = sum(
        job["device_id"] == inputs[entry["request"]["model_name"]][0] for job, entry in zip(done, entries, strict=True)
    )
    _allocate(stack, "heavy", 8 * GIB, "gpu_0")
    elsewhere = _allocate(stack, "light", 1 << 20, None)["device_id"]
    for name in ("heavy", "light"):
        _free(stack, name)
    return [
        absolute("runs that went to the GPU of their model, of 64 by name alone", "runs", right, at_least=2 * RUNS),
        absolute("an allocation that names no device goes to the GPU with more room", "",
                 float(elsewhere == "gpu_1"), at_least=1),
    ]  # fmt: skip


def _copied(stack: RunningStack) -> list[Figure]:
    """From gpu_0 to gpu_1 and back, the bytes compared; then the rate, beside what torch does in one process."""
    client = stack.client
    _allocate(stack, "here", COMPARED, "gpu_0")
    before = used(0)
    _allocate(stack, "there", COMPARED, "gpu_1")
    content = np.random.default_rng(8).integers(0, 256, COMPARED, np.uint8).tobytes()
    client.put("/api/memory/data/here", content=content, headers=WAIT, timeout=120).raise_for_status()
    _copy(stack, "here", "there")
    client.post("/api/memory/clear/here", json={}, headers=WAIT).raise_for_status()
    arrived = client.get("/api/memory/data/there", timeout=120).content == content
    on_the_first = used(0) - before
    _copy(stack, "there", "here")
    back = client.get("/api/memory/data/here", timeout=120).content
    same = hashlib.sha256(back).digest() == hashlib.sha256(content).digest()
    for name in ("here", "there"):
        _free(stack, name)
    _allocate(stack, "from", TIMED, "gpu_0")
    _allocate(stack, "to", TIMED, "gpu_1")
    rates = [_copy(stack, "from", "to") for _ in range(6)][1:]
    for name in ("from", "to"):
        _free(stack, name)
    ours = statistics.median(rates)
    direct, staged = _torch_rates()
    name = "copy of 4 GiB from gpu_0 to gpu_1, over HTTP"
    return [
        absolute("256 MiB arrive on gpu_1 as they were on gpu_0", "", float(arrived), at_least=1),
        absolute("and back on gpu_0 as they were on gpu_1", "", float(same), at_least=1),
        absolute("what work on gpu_1 took on GPU 0", "MiB", on_the_first / 2**20, at_most=64),
        Figure(name, "GB/s", ours, staged, "torch in one process, through pinned memory of the host", ours / staged, "", True),
        Figure(name, "GB/s", ours, direct, "torch in one process, GPU to GPU", ours / direct, "", True),
    ]  # fmt: skip


def _torch_rates() -> tuple[float, float]:
    """GB/s of plain torch: from GPU to GPU, and through one pinned block of the host, one way after the other."""
    import torch

    first = torch.ones(GIB, dtype=torch.uint8, device="cuda:0")
    second = torch.zeros(GIB, dtype=torch.uint8, device="cuda:1")
    host = torch.empty(GIB, dtype=torch.uint8, pin_memory=True)

    def through() -> None:
        host.copy_(first)
        second.copy_(host)

    def rate(step: Callable[[], object]) -> float:
        taken = []
        for _ in range(5):
            torch.cuda.synchronize(0)
            torch.cuda.synchronize(1)
            began = time.perf_counter()
            step()
            torch.cuda.synchronize(0)
            torch.cuda.synchronize(1)
            taken.append(GIB / (time.perf_counter() - began) / 1e9)
        return statistics.median(taken[1:])

    return rate(lambda: second.copy_(first)), rate(through)


def _inputs(name: str) -> dict[str, Any]:
    shapes = {"linear": {"x": [3, 16]}, "recurrent": {"x": [1, 3], "h": [1, 5]}}[name]
    return {
        key: {"dtype": "float32", "shape": shape, "data": np.ones(shape, np.float32).tolist()}
        for key, shape in shapes.items()
    }


def _ended(stack: RunningStack, job_id: str) -> dict[str, Any]:
    done: dict[str, Any] = stack.client.get(f"/api/jobs/{job_id}", params={"wait": 60}).json()
    assert done["state"] == "succeeded", done
    return done


def _allocate(stack: RunningStack, name: str, size: int, device_id: str | None) -> dict[str, Any]:
    body = {"size_bytes": size, "allocation_id": name} | ({"device_id": device_id} if device_id else {})
    made: dict[str, Any] = stack.client.post("/api/memory/allocate", json=body, headers=WAIT).json()
    assert made["state"] == "succeeded", made
    return made


def _free(stack: RunningStack, name: str) -> None:
    stack.client.delete(f"/api/memory/deallocate/{name}", headers=WAIT).raise_for_status()


def _copy(stack: RunningStack, source: str, destination: str) -> float:
    """Copies one allocation to the other; GB/s by the client's clock."""
    body = {"source": {"allocation_id": source}, "destination": {"allocation_id": destination}}
    began = time.perf_counter()
    done = stack.client.post("/api/memory/copy", json=body, headers=WAIT, timeout=120).json()
    took = time.perf_counter() - began
    assert done["state"] == "succeeded", done
    return float(done["result"].get("size_bytes", TIMED)) / took / 1e9
