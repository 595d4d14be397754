"""One thing of every kind that an owner may have, made over HTTP, and how each stands."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from device_operations.jobs import new_id
from tests.inference.graphs import FLOAT, build, constant, node
from tests.support.stack import RunningStack

#: Two owners and an admin; no owner's name is part of another word that an answer may hold.
KEYS = "zelda:key-of-zelda,bob:key-of-bob,root:key-of-root:admin"

FLOATS = {"dtype": "float32", "shape": [1], "data": [1.0]}

#: Latents of the smallest image, in as many bytes as the owner's allocation has.
LATENTS = {"dtype": "float32", "shape": [1, 4, 4, 4], "data": [0.0] * 64}

#: A batch for the training session, whose tensors take 8 and 4 bytes.
BATCH = {
    "inputs": {"input": {"dtype": "float32", "shape": [1, 2], "data": [1.0, 2.0]}},
    "targets": {"dtype": "float32", "shape": [1, 1], "data": [1.0]},
}

NETWORK = {
    "model": {"kind": "layers", "layers": [{"type": "linear", "in_features": 2, "out_features": 1}]},
    "loss": "mse",
    "optimizer": {"type": "sgd", "learning_rate": 0.01},
}


def client_of(stack: RunningStack, owner: str) -> httpx.Client:
    """A client with the owner's key."""
    headers = {"X-API-Key": f"key-of-{owner}"}
    return httpx.Client(base_url=stack.http_url, headers=headers, timeout=60, trust_env=False)


def counting(step: float) -> bytes:
    """total = before + x + step: the state is a sum; another step is other content."""
    return build(
        [node("Add", "x before", "sum"), node("Add", "sum step", "total")],
        [("x", FLOAT, [1]), ("before", FLOAT, [1])],
        [("total", FLOAT, [1])],
        [constant("step", np.float32(step), np.float32)],
    )


@dataclass(frozen=True, slots=True)
class Things:
    """What one owner has: a thing's id by its noun. The job is one that is scheduled for later."""

    owner: str
    client: httpx.Client
    ids: dict[str, str]

    @property
    def label(self) -> str:
        """The value of every label of the owner's."""
        return f"secret-of-{self.owner}"

    def standing(self) -> dict[str, Any]:
        """How everything stands, as its owner sees it; what goes on by itself is left out."""
        ids = self.ids
        standing = {
            "job": self._read(f"/api/jobs/{ids['job']}", without="queue_position"),
            "allocation": self._read(f"/api/memory/allocations/{ids['allocation']}"),
            "model": self._read(f"/api/inference/models/{ids['model']}"),
            "inference session": self._read(f"/api/inference/status/{ids['inference session']}"),
            "training session": self._read(
                f"/api/training/status/{ids['training session']}", without="lease_expires_at"
            ),
            "checkpoint": self._read(f"/api/training/checkpoints/{ids['checkpoint']}"),
        }
        blob = self.client.get(f"/api/blobs/{ids['blob']}")
        return standing | {"blob": (blob.status_code, hashlib.sha256(blob.content).hexdigest())}

    def _read(self, address: str, without: str = "") -> tuple[int, dict[str, Any]]:
        answer = self.client.get(address)
        return answer.status_code, {name: value for name, value in answer.json().items() if name != without}


def make_things(client: httpx.Client, owner: str, step: float, pipelines: Mapping[str, Path] | None = None) -> Things:
    """Makes one thing of every kind for the client's owner; `step` makes the model's content.

    `pipelines` are folders by the type of model, each of which is loaded.
    """
    things = Things(owner, client, {})
    ids = things.ids
    ids["blob"] = str(client.post("/api/blobs", content=counting(step)).json()["blob_id"])
    body = {"size_bytes": 4096, "label": things.label}
    ids["allocation"] = done(client, client.post("/api/memory/allocate", json=body))["resource"]["id"]
    ids["model name"] = f"model-of-{owner}"
    load = {"name": ids["model name"], "source": {"blob_id": ids["blob"]}}
    ids["model"] = done(client, client.post("/api/inference/load-model", json=load))["resource"]["id"]
    for model_type, folder in (pipelines or {}).items():
        ids[model_type] = _pipeline(client, model_type, folder)
    opening = {"model_id": ids["model"], "state": {"total": "before"}, "initial": {"before": FLOATS}}
    ids["inference session"] = client.post("/api/inference/sessions", json=opening).json()["session_id"]
    trained = done(client, client.post("/api/training/initialize", json=NETWORK))
    ids["training session"] = trained["resource"]["id"]
    keeping = {"session_id": ids["training session"]}
    ids["checkpoint"] = done(client, client.post("/api/training/checkpoint", json=keeping))["resource"]["id"]
    later = {"size_bytes": 16, "job": {"delay_seconds": 86_400, "labels": {"secret": things.label}}}
    ids["job"] = client.post("/api/memory/allocate", json=later).json()["job_id"]
    return things


def _pipeline(client: httpx.Client, model_type: str, folder: Path) -> str:
    """The id of a model that is loaded from a folder's files."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    uploaded = [client.post("/api/blobs", content=file.read_bytes()).json()["blob_id"] for file in files]
    blobs = {str(file.relative_to(folder)): blob_id for file, blob_id in zip(files, uploaded, strict=True)}
    load = {"name": f"own-{model_type}", "model_type": model_type, "source": {"blobs": blobs}}
    return str(done(client, client.post("/api/inference/load-model", json=load))["resource"]["id"])


def absent_like(noun: str) -> str:
    """An id, or a name, of nothing that exists."""
    return f"model-of-{new_id()}" if noun == "model name" else new_id()


def done(client: httpx.Client, answer: httpx.Response, state: str = "succeeded") -> dict[str, Any]:
    """The job that was submitted, once it has ended so."""
    assert answer.status_code in (200, 202), answer.text
    job: dict[str, Any] = client.get(f"/api/jobs/{answer.json()['job_id']}", params={"wait": 50}).json()
    assert job["state"] == state, job
    return job
