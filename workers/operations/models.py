"""Loading and unloading models on the device, and freeing the state of inference sessions."""

from __future__ import annotations

import gc

from device_operations.errors import OperationError, failure
from device_operations.wire.json_types import JsonObject
from tasks.inference import models as store
from tasks.inference.residents import no_model
from tasks.jobs.lifecycle import Outcome
from workers.devices.onnx.tensors import Kept
from workers.execution.claimed_job import ClaimedJob
from workers.resident.models import close, model_facts, open_model, revive
from workers.resident.residents import Resident, ResidentModel


def load_model(resident: Resident, work: ClaimedJob) -> Outcome:
    """Makes a model resident, unless it is."""
    model_id = work.request["model_id"]
    row = resident.read(store.get, model_id)
    if row is None:
        raise failure("model_not_found", f"model {model_id} is not recorded; load it again")
    model = resident.models.get(model_id)
    if model is not None:
        model.pinned = row["pinned"]
        return work.succeeded(_loaded(resident, model))
    if row["state"] not in ("loading", "lost"):
        row = revive(resident, row, work.job_id, work.request.get("estimate_bytes", 0))
    model = open_model(resident, row, work.cancel)
    return work.succeeded(_loaded(resident, model), model=model_facts(model))


def unload_model(resident: Resident, work: ClaimedJob) -> Outcome:
    """Takes a model off the device, and says what that freed: 0 where another model uses its graph.

    `recycle` ends the process where nothing else would give memory back.
    """
    model_id = work.request["model_id"]
    model = resident.models.pop(model_id, None)
    if model is None:
        raise missing_model(resident, model_id)
    freed = close(resident, model)
    if model.graph.content_key not in resident.graphs:
        gc.collect()
    returns = bool(resident.device.describe().capabilities.get("returns_memory", True))
    result: JsonObject = {"model_id": model_id, "freed_bytes": freed, "returns_memory": returns}
    if work.request.get("recycle"):
        resident.recycle = resident.recycle or not returns
        result["recycles"] = not returns
    return work.succeeded(result, freed_bytes=freed)


def close_session(resident: Resident, work: ClaimedJob) -> Outcome:
    """Frees a session's state."""
    session_id = work.request["session_id"]
    session = resident.sessions.pop(session_id, None)
    freed = sum(value.size_bytes for value in session.state.values() if isinstance(value, Kept)) if session else 0
    return work.succeeded({"session_id": session_id, "state_bytes": freed})


def _loaded(resident: Resident, model: ResidentModel) -> JsonObject:
    result = {"model_id": model.model_id, "name": model.name, "device_id": resident.device_id, **model_facts(model)}
    return result if model.pipeline is None else {**result, "pipeline": model.pipeline.about()}


def missing_model(resident: Resident, model_id: str) -> OperationError:
    """Why the device does not hold a model, as its record says."""
    row = resident.read(store.get, model_id)
    if row is not None and row["device_id"] == resident.device_id and row["state"] in ("loading", "loaded", "lost"):
        return failure("model_not_found", f"{resident.device_id} does not hold model {model_id}: it is {row['state']}")
    return no_model(model_id, row)
