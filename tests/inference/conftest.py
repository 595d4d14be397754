"""Fixtures of the inference tests: a client that loads graphs and runs them over HTTP, on the module's own stack."""

from __future__ import annotations

import base64
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.support.stack import RunningStack

_names = itertools.count(1)


class Api:
    """The inference routes of one stack, with tensors as NumPy arrays."""

    def __init__(self, stack: RunningStack) -> None:
        self.stack = stack
        self.http: httpx.Client = stack.client
        self.models = Path(stack.environment["DEVICE_OPERATIONS_MODEL_CACHE_PATH"])

    def post(self, path: str, body: dict[str, Any], wait: float = 30) -> httpx.Response:
        return self.http.post(path, json=body, headers={"Prefer": f"wait={wait}"} if wait else {})

    def save(self, content: bytes, name: str | None = None) -> str:
        """Puts a graph into the model folder and gives its path there."""
        relative = name or f"graph-{next(_names)}.onnx"
        path = self.models / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return relative

    def load(self, content: bytes, name: str | None = None, **more: Any) -> dict[str, Any]:
        """Loads a graph and gives the job's result; the model's id and name are in it."""
        job = self.load_job(content, name, **more)
        assert job["state"] == "succeeded", job["error"]
        return job["result"]

    def load_job(self, content: bytes, name: str | None = None, **more: Any) -> dict[str, Any]:
        body = {"name": name or f"model-{next(_names)}", "source": {"path": self.save(content)}, **more}
        answer = self.post("/api/inference/load-model", body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def run(self, model_id: str | None, inputs: dict[str, Any], wait: float = 30, **more: Any) -> dict[str, Any]:
        """Runs a model and gives the job."""
        body = {"inputs": {name: as_tensor(value) for name, value in inputs.items()}, **more}
        if model_id:
            body["model_id"] = model_id
        answer = self.post("/api/inference/run", body, wait)
        assert answer.status_code in (200, 202), answer.text
        return answer.json()

    def outputs(self, model_id: str | None, inputs: dict[str, Any], **more: Any) -> dict[str, np.ndarray]:
        """Runs a model and gives its outputs as arrays."""
        job = self.run(model_id, inputs, **more)
        assert job["state"] == "succeeded", job["error"]
        return self.arrays(job)

    def arrays(self, job: dict[str, Any]) -> dict[str, np.ndarray]:
        return {name: self.as_array(tensor) for name, tensor in job["result"]["outputs"].items()}

    def as_array(self, tensor: dict[str, Any]) -> np.ndarray:
        dtype, shape = tensor["dtype"], tensor["shape"]
        if dtype == "string":
            return np.array(tensor["data"], object).reshape(shape)
        if "data" in tensor:
            return np.array(tensor["data"], dtype).reshape(shape)
        if "base64" in tensor:
            raw = base64.b64decode(tensor["base64"])
        else:
            raw = self.http.get(f"/api/blobs/{tensor['blob_id']}").content
        return np.frombuffer(raw, dtype).reshape(shape)

    def job(self, job_id: str, wait: float = 30) -> dict[str, Any]:
        return self.http.get(f"/api/jobs/{job_id}", params={"wait": wait}).json()

    def model(self, model_id: str) -> dict[str, Any]:
        return self.http.get(f"/api/inference/models/{model_id}").json()

    def model_id(self, name: str) -> str:
        """The id of the loaded model of that name."""
        models = self.http.get("/api/inference/models", params={"state": "loaded"}).json()["models"]
        return next(model["model_id"] for model in models if model["name"] == name)

    def unload(self, model_id: str, **params: Any) -> dict[str, Any]:
        answer = self.http.delete(
            f"/api/inference/unload-model/{model_id}", params=params, headers={"Prefer": "wait=30"}
        )
        assert answer.status_code == 200, answer.text
        return answer.json()


def as_tensor(value: Any) -> dict[str, Any]:
    """The wire form of an array; a dictionary is taken as it is."""
    if isinstance(value, dict):
        return value
    array = np.asarray(value)
    if array.dtype.kind in "OU":
        return {"dtype": "string", "shape": list(array.shape), "data": array.reshape(-1).tolist()}
    return {
        "dtype": array.dtype.name,
        "shape": list(array.shape),
        "base64": base64.b64encode(np.ascontiguousarray(array).tobytes()).decode(),
    }


@pytest.fixture(scope="module")
def api(stack: RunningStack) -> Api:
    """The inference routes of the module's stack."""
    return Api(stack)


@pytest.fixture
def start_api(start_stack: Callable[..., RunningStack]) -> Callable[..., Api]:
    """Starts a stack of the test's own and gives its inference routes."""
    return lambda **settings: Api(start_stack(**settings))
