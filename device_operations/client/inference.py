"""Models, runs and inference sessions over HTTP, with NumPy arrays in and out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Unpack, cast

from device_operations.client.arrays import TensorLike, all_sent, received
from device_operations.client.submission import MAX_WAIT_SECONDS, Submission, said, submission, succeeded
from device_operations.client.transport.calls import Call, Flow, at, get, json_of, send
from device_operations.client.transport.operations import Mode, Noun, operation
from device_operations.jobs import Job, Kind
from device_operations.views import InferenceSessionView, ModelView
from device_operations.wire.json_types import FreeJson


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a run gave: arrays by the outputs' names; where an output was left on the device, the object saying where.

    `batch_size` is how many runs went together; `device_ms` is the time that they took.
    """

    outputs: FreeJson
    session_id: str
    batch_size: int
    device_ms: float
    job_id: str


class Inference(Noun[Mode]):
    """The methods on models, runs and sessions."""

    @operation
    def load_model(
        self,
        name: str,
        source: str | Mapping[str, object],
        *,
        version: str = "1",
        model_type: str = "onnx",
        device_id: str | None = None,
        pin: bool | None = None,
        shared: bool | None = None,
        sha256: str | None = None,
        options: Mapping[str, object] | None = None,
        **given: Unpack[Submission],
    ) -> Flow[Job]:
        """Makes a model resident. `source` is a path below the model folder, or `{"blob_id"}`, or `{"blobs"}`.

        The model's id is the job's `resource.id`, so that runs can be submitted at once. `pin` keeps it loaded,
        `shared` lets other owners run it; loading the same again leaves both as they are where they are not given.
        """
        fields = said(
            name=name,
            version=version,
            model_type=model_type,
            source={"path": source} if isinstance(source, str) else dict(source),
            device_id=device_id,
            pin=pin,
            shared=shared,
            sha256=sha256,
            options=options,
        )
        return (yield from submission(Kind.INFERENCE_LOAD_MODEL, fields, given))

    @operation
    def run(
        self,
        inputs: Mapping[str, TensorLike],
        *,
        model_id: str | None = None,
        model_name: str | None = None,
        session_id: str | None = None,
        outputs: Sequence[str] | None = None,
        form: str = "auto",
        into: Mapping[str, Mapping[str, object]] | None = None,
        timeout: float | None = None,
        **given: Unpack[Submission],
    ) -> Flow[RunResult]:
        """Runs a model and waits for its outputs. Raises the job's error, `TimeoutError` after `timeout` seconds."""
        wait = MAX_WAIT_SECONDS if timeout is None else min(timeout, MAX_WAIT_SECONDS)
        fields = yield from _run(inputs, model_id, model_name, session_id, outputs, form, into)
        job = yield from submission(Kind.INFERENCE_RUN, fields, {"wait": wait, **given})
        return (yield from _result(job, timeout))

    @operation
    def submit_run(
        self,
        inputs: Mapping[str, TensorLike],
        *,
        model_id: str | None = None,
        model_name: str | None = None,
        session_id: str | None = None,
        outputs: Sequence[str] | None = None,
        form: str = "auto",
        into: Mapping[str, Mapping[str, object]] | None = None,
        **given: Unpack[Submission],
    ) -> Flow[Job]:
        """Submits a run and does not wait for it; `run_result(job)` gives the outputs."""
        fields = yield from _run(inputs, model_id, model_name, session_id, outputs, form, into)
        return (yield from submission(Kind.INFERENCE_RUN, fields, given))

    @operation
    def run_result(self, job: Job | str, timeout: float | None = None) -> Flow[RunResult]:
        """Waits for a run and gives its outputs as arrays; raises its error."""
        return (yield from _result(job, timeout))

    @operation
    def unload_model(
        self, model_id: str, *, force: bool = False, recycle: bool = False, **given: Unpack[Submission]
    ) -> Flow[Job]:
        """Takes a model off its device once its runs are done, or with `force` cancels them."""
        fields = {"model_id": model_id, "force": force, "recycle": recycle}
        return (yield from submission(Kind.INFERENCE_UNLOAD_MODEL, fields, given))

    @operation
    def models(self, *, device_id: str | None = None, state: str | None = None) -> Flow[list[ModelView]]:
        """Models, newest first."""
        answer = yield from get("/api/inference/models", device_id=device_id, state=state)
        models: list[ModelView] = answer["models"]
        return models

    @operation
    def model(self, model_id: str) -> Flow[ModelView]:
        """One model."""
        return cast("ModelView", (yield from get(at("/api/inference/models/{}", model_id))))

    @operation
    def open_session(
        self,
        *,
        model_id: str | None = None,
        model_name: str | None = None,
        state: Mapping[str, str] | None = None,
        initial: Mapping[str, TensorLike] | None = None,
        owner: str | None = None,
    ) -> Flow[InferenceSessionView]:
        """Opens a session. `state` names, for each output kept on the device, the input that it feeds next."""
        tensors = (yield from all_sent(initial)) if initial else None
        body = said(model_id=model_id, model_name=model_name, state=state and dict(state), initial=tensors, owner=owner)
        response = yield from send(Call("POST", "/api/inference/sessions", json=body, keyed=True))
        return cast("InferenceSessionView", json_of(response))

    @operation
    def session(self, session_id: str) -> Flow[InferenceSessionView]:
        """How a session stands; the id of a run without a session is its job's."""
        return cast("InferenceSessionView", (yield from get(at("/api/inference/status/{}", session_id))))

    @operation
    def sessions(self, *, state: str | None = None) -> Flow[list[InferenceSessionView]]:
        """The newest sessions, at most 100; `state` is active, closed, expired or lost."""
        answer = yield from get("/api/inference/sessions", state=state)
        sessions: list[InferenceSessionView] = answer["sessions"]
        return sessions

    @operation
    def close_session(self, session_id: str, **given: Unpack[Submission]) -> Flow[Job]:
        """Closes a session after the runs that were submitted before, and frees its state."""
        return (yield from submission(Kind.INFERENCE_CLOSE_SESSION, {"session_id": session_id}, given))


def _run(
    inputs: Mapping[str, TensorLike],
    model_id: str | None,
    model_name: str | None,
    session_id: str | None,
    outputs: Sequence[str] | None,
    form: str,
    into: Mapping[str, Mapping[str, object]] | None,
) -> Flow[FreeJson]:
    tensors = yield from all_sent(inputs)
    return said(
        model_id=model_id,
        model_name=model_name,
        session_id=session_id,
        inputs=tensors,
        outputs=None if outputs is None else list(outputs),
        form=form,
        into=into and {name: dict(place) for name, place in into.items()},
    )


def _result(job: Job | str, timeout_seconds: float | None) -> Flow[RunResult]:
    result = yield from succeeded(job, timeout_seconds)
    outputs = {}
    for name, tensor in result["outputs"].items():
        outputs[name] = yield from received(tensor, name)
    job_id = job.job_id if isinstance(job, Job) else job
    return RunResult(outputs, result["session_id"], result["batch_size"], result["device_ms"], job_id)
