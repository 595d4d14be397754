"""Plans for models, runs and inference sessions."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection

from device_operations.errors import failure
from device_operations.jobs import Kind, new_id
from device_operations.requests.inference import CloseSession, LoadModel, Run, UnloadModel
from device_operations.tensors import Tensor
from tasks.plans.admission import reserve
from tasks.plans.base import Context, new_job, owner_of, place, store_tensors
from tasks.plans.models import content_of
from tasks.store import jobs as job_store
from tasks.store import models as model_store
from tasks.store.connection import Row
from tasks.submit import Plan

#: The types of model that workers know how to load. Pipelines register here and in `workers.models`.
MODEL_TYPES = ("onnx",)


def plan_load(context: Context, request: LoadModel, job_id: str) -> Plan:
    """Loads a model; the same content on the same device gives the model that is there."""
    if request.model_type not in MODEL_TYPES:
        raise failure(
            "validation_failed", f"model_type {request.model_type!r} is not known; there are: {', '.join(MODEL_TYPES)}"
        )
    key, sha256, estimate = content_of(context, request)
    snapshot = context.directory.snapshot()
    holding = [model["device_id"] for model in snapshot.models.values() if model["content_key"] == key]
    device = place(context, request.device_id, size_bytes=estimate, holding=holding)
    device_id = device["device_id"]
    with context.engine.connect() as connection:
        there = model_store.same_content(connection, device_id, key)
    model_id = there["model_id"] if there else new_id()
    blob_ids = request.blob_ids()
    job = new_job(
        context, Kind.INFERENCE_LOAD_MODEL, request, job_id, device,
        payload={**request.payload(), "model_id": model_id},
        resource_type="model", resource_id=model_id, needs=[model_id], blob_ids=blob_ids,
        after=[there["load_job_id"]] if there and there["state"] == "loading" else [],
    )  # fmt: skip

    def record(connection: Connection) -> None:
        if there is not None:
            return
        row = {
            "model_id": model_id, "name": request.name, "version": request.version, "model_type": request.model_type,
            "device_id": device_id, "content_key": key, "sha256": sha256,
            "source": request.source.model_dump(mode="json", exclude_none=True),
            "options": request.options.model_dump(mode="json"), "pinned": request.pin,
            "owner": job.owner, "load_job_id": job_id, "blob_ids": blob_ids, "reserved_bytes": estimate,
        }  # fmt: skip
        if not model_store.insert(connection, row):
            raise failure("model_in_use", "the same content is being loaded at this moment; submit the request again",
                          retryable=True)  # fmt: skip
        reserve(connection, device_id, estimate, "the model")

    return Plan(job, exclusive=(), record=record)


def plan_run(context: Context, request: Run, job_id: str) -> Plan:
    """Runs a model where it is. A run without a session has one of its own, whose id is the job's."""
    owner = owner_of(context, request.job)
    session = _session(context, request.session_id) if request.session_id else None
    model = find_model(context, session["model_id"] if session else request.model_id, request.model_name)
    device = context.directory.snapshot().devices.get(model["device_id"])
    if device is None:
        device = context.directory.device(model["device_id"])
    if context.device_id != device["device_id"]:
        context.directory.require_online(device)
    fed = set(session["state_map"].values()) if session else set()
    check_against_model(model, request.inputs, request.outputs, fed)
    inputs, blob_ids = store_tensors(context, request.inputs, owner)
    allocations = sorted(_allocations(request))
    payload = request.payload()
    payload["model_id"] = model["model_id"]
    payload["inputs"] = {name: tensor.model_dump(mode="json", exclude_unset=True) for name, tensor in inputs.items()}
    needs = [model["model_id"], *allocations]
    if session:
        needs.append(session["session_id"])
    job = new_job(
        context, Kind.INFERENCE_RUN, request, job_id, device, payload=payload,
        resource_type="inference_session", resource_id=session["session_id"] if session else job_id,
        needs=needs, blob_ids=blob_ids,
        after=[model["load_job_id"]] if model["state"] == "loading" else [],
    )  # fmt: skip
    exclusive = (*allocations, session["session_id"]) if session else tuple(allocations)
    return Plan(job, exclusive=exclusive)


def plan_unload(context: Context, request: UnloadModel, job_id: str) -> Plan:
    """Unloads a model once the runs submitted before have ended."""
    model = find_model(context, request.model_id, None)
    device = context.directory.device(model["device_id"])
    with context.engine.connect() as connection:
        before = job_store.open_ids_needing(connection, model["model_id"])
    job = new_job(
        context, Kind.INFERENCE_UNLOAD_MODEL, request, job_id, device,
        resource_type="model", resource_id=model["model_id"], needs=[model["model_id"]], after=before,
    )  # fmt: skip
    return Plan(job)


def plan_close(context: Context, request: CloseSession, job_id: str) -> Plan:
    """Closes a session after the runs submitted before."""
    session = _session(context, request.session_id)
    device = context.directory.device(session["device_id"])
    job = new_job(
        context, Kind.INFERENCE_CLOSE_SESSION, request, job_id, device,
        resource_type="inference_session", resource_id=session["session_id"], needs=[session["session_id"]],
    )  # fmt: skip
    return Plan(job, exclusive=(session["session_id"],))


def find_model(context: Context, model_id: str | None, name: str | None, version: str | None = None) -> Row:
    """The model to run: by id, or by name the one on the device with the shortest queue. Else `model_not_found`."""
    if model_id is not None:
        found = context.directory.model(model_id)
        if found is None:
            with context.engine.connect() as connection:
                gone = model_store.get(connection, model_id)
            raise _no_model(model_id, gone)
        return found
    assert name is not None
    named = context.directory.models_named(name, version)
    if context.device_id is not None:
        named = [model for model in named if model["device_id"] == context.device_id] or named
    if not named:
        raise failure(
            "model_not_found", f"no model named {name!r} is loaded; load it with POST /api/inference/load-model"
        )
    snapshot = context.directory.snapshot()
    newest = [model for model in named if model["version"] == named[0]["version"]]
    return min(newest, key=lambda model: _readiness(model, snapshot))


def check_against_model(model: Row, inputs: dict[str, Tensor], outputs: list[str] | None, fed: set[str]) -> None:
    """Refuses names, dtypes and shapes that the loaded model does not take, with all that is wrong at once."""
    if not model["inputs"] or model["model_type"] != "onnx":
        return
    specs = {spec["name"]: spec for spec in model["inputs"]}
    wrong = [f"unknown input {name!r}" for name in inputs if name not in specs]
    wrong += [f"missing input {name!r}" for name in specs if name not in inputs and name not in fed]
    for name, tensor in inputs.items():
        spec = specs.get(name)
        if spec is None:
            continue
        if tensor.dtype != spec["dtype"]:
            wrong.append(f"input {name!r} is {tensor.dtype}, the model takes {spec['dtype']}")
        wanted = spec["shape"]
        fits = len(wanted) == len(tensor.shape) and all(
            not isinstance(side, int) or side == given for side, given in zip(wanted, tensor.shape, strict=True)
        )
        if not fits:
            wrong.append(f"input {name!r} has shape {tensor.shape}, the model takes {wanted}")
    known = {spec["name"] for spec in model["outputs"]}
    wrong += [f"unknown output {name!r}" for name in outputs or () if name not in known]
    if wrong:
        takes = [{key: spec[key] for key in ("name", "dtype", "shape")} for spec in model["inputs"]]
        raise failure(
            "input_mismatch", f"{'; '.join(wrong)} (model {model['name']!r})", detail={"errors": wrong, "inputs": takes}
        )


def _allocations(request: Run) -> set[str]:
    named = {tensor.allocation_id for tensor in request.inputs.values() if tensor.allocation_id}
    return named | {into.allocation_id for into in (request.into or {}).values()}


def _session(context: Context, session_id: str) -> Row:
    with context.engine.connect() as connection:
        found = model_store.get_session(connection, session_id)
    if found is None or not context.may_see(found["owner"]):
        raise failure("session_not_found", f"there is no inference session {session_id!r}")
    if found["state"] != "active":
        code = {"expired": "session_expired", "lost": "session_lost"}.get(found["state"], "session_closed")
        raise failure(code, f"session {session_id} is {found['state']}; open a new one")
    return found


def _no_model(model_id: str, gone: Row | None) -> Exception:
    if gone is None:
        return failure("model_not_found", f"there is no model {model_id!r}")
    error = gone["error"]
    if gone["state"] == "failed" and error:
        return failure(
            "model_not_found", f"model {model_id} failed to load: {error['message']}", detail={"error": error}
        )
    return failure("model_not_found", f"model {model_id} is {gone['state']}; load it again")


def _readiness(model: Row, snapshot: Any) -> tuple[Any, ...]:
    device = snapshot.devices.get(model["device_id"], {})
    return (
        device.get("state") != "online",
        model["state"] != "loaded",
        snapshot.load_of(model["device_id"]),
        -model["created_at"].timestamp(),
    )


PLANNERS = {
    Kind.INFERENCE_LOAD_MODEL: plan_load,
    Kind.INFERENCE_RUN: plan_run,
    Kind.INFERENCE_UNLOAD_MODEL: plan_unload,
    Kind.INFERENCE_CLOSE_SESSION: plan_close,
}
