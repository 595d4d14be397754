"""Short ways to train over HTTP in tests."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from safetensors.numpy import load

from tests.support.stack import RunningStack, eventually

#: A classifier with everything that has state of its own: dropout, running statistics, Adam.
LAYERS: list[dict[str, Any]] = [
    {"type": "linear", "name": "fc1", "in_features": 6, "out_features": 16},
    {"type": "batch_norm1d", "name": "norm", "num_features": 16},
    {"type": "relu"},
    {"type": "dropout", "p": 0.3},
    {"type": "linear", "name": "fc2", "in_features": 16, "out_features": 4},
]


def described(**fields: Any) -> dict[str, Any]:
    plain: dict[str, Any] = {
        "model": {"kind": "layers", "layers": LAYERS},
        "loss": "cross_entropy",
        "optimizer": {"type": "adam", "learning_rate": 0.01},
        "seed": 5,
    }
    return plain | fields


def tensor(array: np.ndarray) -> dict[str, Any]:
    raw = base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
    return {"dtype": array.dtype.name, "shape": list(array.shape), "base64": raw}


def arrays(number: int, size: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Samples of four classes that can be told apart; the same for the same number."""
    random = np.random.RandomState(number)
    classes = random.randint(0, 4, size)
    inputs = random.randn(size, 6).astype(np.float32) * 0.5
    inputs[np.arange(size), classes] += 2
    return inputs, classes.astype(np.int64)


def batch(number: int, size: int = 8) -> dict[str, Any]:
    inputs, targets = arrays(number, size)
    return {"inputs": {"input": tensor(inputs)}, "targets": tensor(targets)}


class Training:
    """The training routes of one stack. Submitting calls answer the job; `done` waits for its end."""

    def __init__(self, stack: RunningStack, client: httpx.Client | None = None) -> None:
        self.stack = stack
        self.client = client or stack.client
        #: Sessions that were asked for, whatever became of them.
        self.made: list[str] = []

    def initialize(self, **fields: Any) -> str:
        """The id of a session that is ready."""
        return str(self.done(self.initialize_job(**fields))["resource"]["id"])

    def initialize_job(self, **fields: Any) -> dict[str, Any]:
        job = self.submit("initialize", described(**fields))
        self.made.append(job["resource"]["id"])
        return job

    def step(self, session_id: str, number: int | None = None, **fields: Any) -> dict[str, Any]:
        content = {} if fields.get("mode") == "apply" or "dataset" in fields else batch(number or 1)
        sequence = {} if number is None else {"sequence": number}
        return self.submit("step", {"session_id": session_id, **content, **sequence, **fields})

    def checkpoint(self, session_id: str, **fields: Any) -> dict[str, Any]:
        return dict(self.done(self.submit("checkpoint", {"session_id": session_id, **fields}))["result"])

    def end(self, session_id: str, **params: Any) -> dict[str, Any]:
        return self.done(self.answered(self.client.delete(f"/api/training/session/{session_id}", params=params)))

    def end_all(self) -> None:
        """Ends what is still open of the sessions that were made."""
        while self.made:
            session_id = self.made.pop()
            if self.status(session_id)["state"] not in ("ended", "failed", "lost"):
                self.end(session_id)

    def submit(self, verb: str, body: dict[str, Any]) -> dict[str, Any]:
        return self.answered(self.client.post(f"/api/training/{verb}", json=body))

    def submit_all(self, kind: str, bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
        entries = [{"kind": kind, "request": body} for body in bodies]
        answer = self.client.post("/api/jobs", json={"jobs": entries})
        assert answer.status_code == 202, answer.text
        return list(answer.json()["jobs"])

    def status(self, session_id: str, history: int = 0) -> dict[str, Any]:
        answer = self.client.get(f"/api/training/status/{session_id}", params={"history": history})
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def done(self, job: dict[str, Any], state: str = "succeeded", seconds: float = 60) -> dict[str, Any]:
        ended = self.client.get(f"/api/jobs/{job['job_id']}", params={"wait": seconds}).json()
        assert ended["state"] == state, ended
        return dict(ended)

    def failed(self, job: dict[str, Any], code: str) -> dict[str, Any]:
        ended = self.done(job, "failed")
        assert ended["error"]["code"] == code, ended
        return ended

    def blob(self, blob_id: str) -> bytes:
        answer = self.client.get(f"/api/blobs/{blob_id}")
        assert answer.status_code == 200, answer.text
        return answer.content

    def state(self, session_id: str) -> dict[str, bytes]:
        """Every tensor of the session's whole state, by its name in a checkpoint, as bytes."""
        raw = self.blob(self.checkpoint(session_id)["blob_id"])
        return {name: array.tobytes() for name, array in load(raw).items()}

    def losses(self, session_id: str) -> list[tuple[Any, ...]]:
        """The history, but for the times."""
        steps = self.status(session_id, history=100_000)["history"]
        return [(one["step"], one["loss"], one["gradient_norm"], one["learning_rate"]) for one in steps]

    def upload(self, content: bytes | Path) -> str:
        raw = content.read_bytes() if isinstance(content, Path) else content
        answer = self.client.post("/api/blobs", content=raw)
        assert answer.status_code == 201, answer.text
        return str(answer.json()["blob_id"])

    def applied(self, session_id: str, at_least: int, seconds: float = 30) -> int:
        return int(eventually(
            lambda: (there := self.status(session_id)["applied_sequence"]) >= at_least and there, seconds, 0.005
        ))  # fmt: skip

    @staticmethod
    def answered(answer: httpx.Response) -> dict[str, Any]:
        assert answer.status_code in (200, 202), answer.text
        return dict(answer.json())


def refused(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """The problem that a refusal carries, once it is the one expected."""
    assert (answer.status_code, answer.json().get("code")) == (status, code), answer.text
    return dict(answer.json())
