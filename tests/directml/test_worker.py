"""A whole worker of ours as a Windows process, in the rig, taking jobs from a Linux gateway over the loopback.

Run by `run.sh`, which says where the rig is (RIG) and where it was built (RIG_DIR).
"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from device_operations.settings import PREFIX, load
from device_operations.stack.processes import Command
from tasks.app import make_app
from tests.devices import graphs
from tests.pipelines.conftest import base_scheduler
from tests.pipelines.driving import context, made, opened
from tests.support.databases import Databases
from tests.support.pipelines import export_sdxl, tiny_sdxl
from tests.support.stack import REPOSITORY, RunningStack, eventually
from workers.devices import open_device

pytestmark = pytest.mark.skipif("RIG" not in os.environ, reason="make test-directml runs it, with the rig")

DEVICE = "gpu_0"
WAIT = {"Prefer": "wait=60"}
IMAGE = np.random.default_rng(1).standard_normal((2, 3, 8, 8)).astype(np.float32)


class WindowsWorker:
    """The worker of `gpu_0` in the rig, beside a gateway on Linux."""

    def __init__(self, stack: RunningStack) -> None:
        self.stack = stack
        self.run()

    def run(self, **more: str) -> None:
        """From the next start on, the worker runs under Windows' own Python, with `more` in its environment."""
        settings = {name: value for name, value in self.stack.environment.items() if name.startswith(PREFIX)}
        site = REPOSITORY / ".cache" / "rig-site"
        shaders = f"{os.environ['RIG_DIR']}/shaders"
        inside = settings | {
            "PYTHONPATH": f"{site};{REPOSITORY}", "OMP_NUM_THREADS": "1", "MESA_SHADER_CACHE_DIR": shaders, **more
        }  # fmt: skip
        arguments = [
            f"{os.environ['RIG']}/run.sh", os.environ["RIG_DIR"], "--timeout", "540",
            *(part for folder in (REPOSITORY, self.stack.folder, shaders) for part in ("--mount", str(folder))),
            *(part for name, value in inside.items() for part in ("--env", f"{name}={value}")),
            "--", "-m", "workers", "--device", DEVICE,
        ]  # fmt: skip
        command = Command(f"worker-{DEVICE}", arguments, dict(os.environ), grace_seconds=5)
        self.stack._services[DEVICE] = replace(self.stack._services[DEVICE], command=command)

    def start(self) -> None:
        self.stack.start(DEVICE)
        self.stack.wait_ready(180, [DEVICE])

    def ensure(self) -> None:
        """Starts it unless it runs."""
        if not self.stack.is_running(DEVICE):
            self.stack._processes.pop(DEVICE, None)
            self.run()
            self.start()

    def kill(self) -> None:
        self.stack.kill(DEVICE)

    def shut_down_warm(self) -> None:
        """Asks it to stop by Celery's remote control, since signals do not reach a Windows service."""
        control = make_app(load()).control
        eventually(lambda: control.ping(timeout=1.0), 60)  # a device is online before its worker hears Celery
        control.shutdown()

    def status(self) -> int:
        """Waits until it has ended; its exit status."""
        status = int(self.stack.process(DEVICE).wait(120))
        self.stack._processes.pop(DEVICE)
        return status

    def log(self) -> str:
        return self.stack.log(DEVICE)

    def tell(self) -> dict[str, Any]:
        told: dict[str, Any] = self.stack.client.get(f"/api/devices/{DEVICE}").json()
        return told


@pytest.fixture(scope="module")
def windows(databases: Databases, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WindowsWorker]:
    folder = tmp_path_factory.mktemp("windows")
    with databases.migrated() as database_url, pytest.MonkeyPatch.context() as patch:
        stack = RunningStack(folder, database_url, databases.redis_url(), "directml:0")
        for name, value in stack.environment.items():
            if name.startswith(PREFIX):
                patch.setenv(name, value)
        load.cache_clear()
        try:
            stack.start("gateway")
            write_models(folder / "models")
            yield WindowsWorker(stack)
        finally:
            stack.close()
            load.cache_clear()


def write_models(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for name in ("convnet", "linear", "recurrent"):
        (folder / f"{name}.onnx").write_bytes(getattr(graphs, name)())
    (folder / "slow.onnx").write_bytes(graphs.slow(60, 256))


@pytest.fixture(autouse=True)
def _running(windows: WindowsWorker) -> None:
    """Whatever the test before did to it."""
    windows.ensure()


@pytest.fixture(scope="module")
def http(windows: WindowsWorker) -> httpx.Client:
    return windows.stack.client


def succeeded(answer: httpx.Response) -> dict[str, Any]:
    """The job of a request that waited, once it has succeeded."""
    job: dict[str, Any] = answer.json()
    assert job.get("state") == "succeeded", job
    return job


def ended(http: httpx.Client, job_id: str) -> dict[str, Any]:
    """The job once it is terminal."""

    def terminal() -> dict[str, Any] | None:
        job: dict[str, Any] = http.get(f"/api/jobs/{job_id}", params={"wait": 30}).json()
        return job if job["state"] in ("succeeded", "failed", "cancelled", "expired") else None

    job: dict[str, Any] = eventually(terminal, seconds=240)
    return job


def allocate(http: httpx.Client, size_bytes: int) -> str:
    body = {"device_id": DEVICE, "size_bytes": size_bytes}
    return str(succeeded(http.post("/api/memory/allocate", json=body, headers=WAIT))["resource"]["id"])


def load_model(http: httpx.Client, name: str) -> str:
    body = {"name": name, "source": {"path": f"{name}.onnx"}, "device_id": DEVICE}
    job = ended(http, http.post("/api/inference/load-model", json=body, headers=WAIT).json()["job_id"])
    assert job["state"] == "succeeded", job
    return str(job["resource"]["id"])


def run(http: httpx.Client, name: str, headers: dict[str, str] | None = None, **inputs: Any) -> dict[str, Any]:
    given = {key: tensor(value) if isinstance(value, np.ndarray) else value for key, value in inputs.items()}
    job: dict[str, Any] = http.post(
        "/api/inference/run", json={"model_name": name, "inputs": given}, headers=WAIT if headers is None else headers
    ).json()
    return job


def tensor(array: np.ndarray[Any, Any]) -> dict[str, Any]:
    data = base64.b64encode(array.tobytes()).decode()
    return {"dtype": array.dtype.name, "shape": list(array.shape), "base64": data}


def on_the_cpu(graph: bytes, folder: Path, **inputs: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """What the graph's output `y` is on this very machine's CPU."""
    path = folder / "reference.onnx"
    path.write_bytes(graph)
    model = open_device("cpu").open_model(path)
    return np.asarray(model.run(inputs)["y"])


def test_its_adapter_is_a_device_under_lease(http: httpx.Client, windows: WindowsWorker) -> None:
    device = windows.tell()
    assert (device["state"], device["backend"], device["epoch"]) == ("online", "directml", 1)
    assert device["providers"] == ["DmlExecutionProvider"]
    assert device["name"]
    assert device["total_bytes"]
    assert device["capabilities"]["zero_copy"] is False


def test_memory_jobs_submitted_back_to_back_take_effect_in_order(http: httpx.Client) -> None:
    content = np.random.default_rng(0).integers(0, 256, 5001, np.uint8).tobytes()
    first, second = allocate(http, 5001), allocate(http, 5001)
    http.put(f"/api/memory/data/{first}", content=content)
    body = {
        "source": {"allocation_id": first, "offset": 7},
        "destination": {"allocation_id": second, "offset": 1},
        "size_bytes": 4000,
    }
    http.post("/api/memory/copy", json=body)
    overlapping = {
        "source": {"allocation_id": second, "offset": 0},
        "destination": {"allocation_id": second, "offset": 3},
        "size_bytes": 3000,
    }
    http.post("/api/memory/copy", json=overlapping)
    clear = {"value": 9, "offset": 10, "size_bytes": 5}
    succeeded(http.post(f"/api/memory/clear/{second}", json=clear, headers=WAIT))
    expected = bytearray(5001)
    expected[1:4001] = content[7:4007]
    expected[3:3003] = bytes(expected[0:3000])
    expected[10:15] = b"\x09" * 5
    assert http.get(f"/api/memory/data/{second}").content == bytes(expected)
    for allocation in (first, second):
        succeeded(http.delete(f"/api/memory/deallocate/{allocation}", headers=WAIT))


def test_a_model_runs_on_directml_and_answers_as_on_the_cpu(http: httpx.Client, tmp_path: Path) -> None:
    load_model(http, "convnet")
    job = run(http, "convnet", x=IMAGE)
    assert job["state"] == "succeeded", job
    got = np.array(job["result"]["outputs"]["y"]["data"], np.float32).reshape(2, 5)
    np.testing.assert_allclose(got, on_the_cpu(graphs.convnet(), tmp_path, x=IMAGE), atol=1e-4)
    model = next(one for one in http.get("/api/inference/models").json()["models"] if one["name"] == "convnet")
    assert (model["provider"], model["state"]) == ("DmlExecutionProvider", "loaded")


def test_tensors_in_allocations_pass_through_the_host_and_the_job_says_how_much(
    http: httpx.Client, tmp_path: Path
) -> None:
    load_model(http, "linear")
    x = np.random.default_rng(2).standard_normal((3, 16)).astype(np.float32)
    source, into = allocate(http, x.nbytes), allocate(http, 3 * 8 * 4)
    succeeded(http.put(f"/api/memory/data/{source}", content=x.tobytes(), headers=WAIT))
    body = {
        "model_name": "linear",
        "inputs": {"x": {"dtype": "float32", "shape": [3, 16], "allocation_id": source}},
        "into": {"y": {"allocation_id": into}},
    }
    job = succeeded(http.post("/api/inference/run", json=body, headers=WAIT))
    assert job["result"]["staged_bytes"] == x.nbytes + 96
    got = np.frombuffer(http.get(f"/api/memory/data/{into}").content, np.float32).reshape(3, 8)
    np.testing.assert_allclose(got, on_the_cpu(graphs.linear(), tmp_path, x=x), atol=1e-4)
    for allocation in (source, into):
        succeeded(http.delete(f"/api/memory/deallocate/{allocation}", headers=WAIT))


def test_bad_input_is_refused_and_the_next_run_succeeds(http: httpx.Client) -> None:
    wrong = run(http, "convnet", x=IMAGE[:, :2].copy())
    assert wrong.get("code") == "input_mismatch" or wrong["error"]["code"] == "input_mismatch"
    assert run(http, "convnet", x=IMAGE)["state"] == "succeeded"


def test_a_waiting_job_is_cancelled_and_never_starts_while_the_running_one_ends(http: httpx.Client) -> None:
    load_model(http, "slow")
    x = np.zeros((256, 256), np.float32)
    running = run(http, "slow", headers={}, x=x)["job_id"]
    waiting = run(http, "slow", headers={}, x=x)["job_id"]
    assert http.delete(f"/api/jobs/{waiting}").status_code == 202
    assert ended(http, waiting)["state"] == "cancelled"
    assert ended(http, waiting)["started_at"] is None
    assert ended(http, running)["state"] == "succeeded"


def test_a_drained_device_keeps_its_jobs_until_it_is_resumed(http: httpx.Client, windows: WindowsWorker) -> None:
    assert http.post(f"/api/devices/{DEVICE}/drain").status_code == 200
    eventually(lambda: windows.tell()["state"] == "draining")
    refused = http.post("/api/memory/allocate", json={"device_id": DEVICE, "size_bytes": 8})
    assert refused.json()["code"] == "device_draining"
    assert http.post(f"/api/devices/{DEVICE}/resume").status_code == 200
    eventually(lambda: windows.tell()["state"] == "online")
    allocation = allocate(http, 8)
    succeeded(http.delete(f"/api/memory/deallocate/{allocation}", headers=WAIT))


def test_after_a_kill_what_was_in_memory_is_lost_and_models_and_waiting_jobs_come_back(
    http: httpx.Client, windows: WindowsWorker
) -> None:
    load_model(http, "convnet")
    load_model(http, "slow")
    allocation = allocate(http, 4096)
    jobs = [run(http, "slow", headers={}, x=np.zeros((256, 256), np.float32))["job_id"] for _ in range(3)]
    eventually(lambda: http.get(f"/api/jobs/{jobs[0]}").json()["state"] == "running")
    epoch = windows.tell()["epoch"]
    windows.kill()
    windows.start()
    assert windows.tell()["epoch"] == epoch + 1
    assert http.get(f"/api/memory/allocations/{allocation}").json()["state"] == "lost"
    assert http.post(f"/api/memory/clear/{allocation}", json={}).json()["code"] == "allocation_lost"
    assert [ended(http, job_id)["state"] for job_id in jobs] == ["succeeded"] * 3
    told = http.get(f"/api/jobs/{jobs[0]}").json()
    assert (told["attempt"], told["deaths"]) == (1, 1)
    assert run(http, "convnet", x=IMAGE)["state"] == "succeeded", "the models were loaded again by the worker itself"


def test_an_image_is_made_from_a_prompt_as_on_the_cpu(http: httpx.Client, windows: WindowsWorker) -> None:
    folder = windows.stack.folder / "models" / "tiny-sdxl"
    export_sdxl(tiny_sdxl(), folder, base_scheduler())
    body = {"name": "tiny", "model_type": "sdxl", "source": {"path": "tiny-sdxl"}, "device_id": DEVICE}
    loaded = ended(http, http.post("/api/inference/load-model", json=body).json()["job_id"])
    assert loaded["state"] == "succeeded", loaded["error"]
    asked = {"prompt": "a lighthouse", "steps": 4, "width": 32, "height": 32, "seed": 7, "preview_every": 2}
    job = ended(http, http.post("/api/inference/run", json={"model_name": "tiny", **asked}).json()["job_id"])
    assert job["state"] == "succeeded", job["error"]
    assert (job["progress"]["done"], job["progress"]["total"]) == (4, 4)
    (image,) = job["result"]["images"]
    content = http.get(f"/api/blobs/{image['blob_id']}").content
    there = np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).astype(int)
    here = made(opened("sdxl", folder), context(asked)).images[0].pixels
    assert np.abs(there - here).max() <= 1
    assert here.std() > 5
    model = next(one for one in http.get("/api/inference/models").json()["models"] if one["name"] == "tiny")
    assert (model["provider"], model["state"]) == ("DmlExecutionProvider", "loaded")


LAYERS = [
    {"type": "linear", "name": "fc1", "in_features": 8, "out_features": 4},
    {"type": "tanh"},
    {"type": "linear", "name": "fc2", "in_features": 4, "out_features": 4},
]


def initialize(http: httpx.Client) -> str:
    """A training session of linear layers with SGD."""
    body = {
        "device_id": DEVICE,
        "model": {"kind": "layers", "layers": LAYERS},
        "loss": "mse",
        "optimizer": {"type": "sgd", "learning_rate": 0.1, "momentum": 0.9},
        "seed": 3,
    }
    return str(succeeded(http.post("/api/training/initialize", json=body, headers=WAIT))["resource"]["id"])


def step(http: httpx.Client, session_id: str, sequence: int) -> float:
    """Step number `sequence`, on the batch of that number; its loss."""
    random = np.random.RandomState(sequence)
    body = {
        "session_id": session_id,
        "sequence": sequence,
        "inputs": {"input": tensor(random.randn(4, 8).astype(np.float32))},
        "targets": tensor(random.randn(4, 4).astype(np.float32)),
    }
    answer = http.post("/api/training/step", json=body)
    job = ended(http, answer.json()["job_id"])
    assert job["state"] == "succeeded", job
    return float(job["result"]["loss"])


def test_a_training_session_survives_a_kill_and_goes_on_bit_for_bit(http: httpx.Client, windows: WindowsWorker) -> None:
    session_id = initialize(http)
    losses = [step(http, session_id, sequence) for sequence in (1, 2, 3)]
    body = {"session_id": session_id}
    succeeded(http.post("/api/training/checkpoint", json=body, headers=WAIT))
    losses += [step(http, session_id, sequence) for sequence in (4, 5)]
    windows.kill()
    windows.start()
    losses += [step(http, session_id, sequence) for sequence in (6, 7)]
    status = http.get(f"/api/training/status/{session_id}").json()
    assert (status["step"], status["applied_sequence"]) == (7, 7)
    undisturbed = initialize(http)
    assert [step(http, undisturbed, sequence) for sequence in range(1, 8)] == losses


def test_a_warm_shutdown_finishes_what_runs_and_leaves_what_waits_to_the_next_worker(
    http: httpx.Client, windows: WindowsWorker
) -> None:
    load_model(http, "slow")
    jobs = [run(http, "slow", headers={}, x=np.zeros((256, 256), np.float32))["job_id"] for _ in range(6)]
    eventually(lambda: http.get(f"/api/jobs/{jobs[0]}").json()["state"] == "running")
    windows.shut_down_warm()
    assert windows.status() == 0
    states = [http.get(f"/api/jobs/{job_id}").json()["state"] for job_id in jobs]
    assert "running" not in states
    assert states[0] == "succeeded"
    eventually(lambda: windows.tell()["state"] == "offline")
    windows.start()
    assert [ended(http, job_id)["state"] for job_id in jobs] == ["succeeded"] * 6
    assert all(http.get(f"/api/jobs/{job_id}").json()["attempt"] == 1 for job_id in jobs)


def test_a_removed_device_ends_the_process_with_its_own_status_and_its_models_come_back(
    http: httpx.Client, windows: WindowsWorker
) -> None:
    removed = windows.stack.folder / "removed"
    windows.shut_down_warm()
    windows.status()
    windows.run(RIG_REMOVED_FILE=str(removed))
    windows.start()
    load_model(http, "convnet")
    assert run(http, "convnet", x=IMAGE)["state"] == "succeeded", "the device is there"
    removed.touch()
    job = run(http, "convnet", headers={}, x=IMAGE)
    assert windows.status() == 75
    removed.unlink()
    windows.run()
    windows.start()
    job = ended(http, job["job_id"])
    if job["state"] == "failed":
        assert job["error"]["code"] == "device_lost"
        assert job["error"]["retryable"] is True
        assert "887A0005" in job["error"]["message"]
    else:
        assert (job["state"], job["attempt"], job["deaths"]) == ("succeeded", 1, 1), "the next worker ran it again"
    assert "887A0005" in windows.log()
    assert run(http, "convnet", x=IMAGE)["state"] == "succeeded", "the next process loaded the model again by itself"
