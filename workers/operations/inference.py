"""Loading, running and unloading models."""

from __future__ import annotations

import gc
import time
from pathlib import Path
from typing import Any

import numpy as np
import structlog

from device_operations.errors import OperationError, failure
from device_operations.jobs import Kind
from tasks.effects.inference import evicted, lost, settled
from tasks.lifecycle import Outcome
from tasks.plans.models import ESTIMATE_BYTES, entry_file, model_file
from tasks.store import devices as device_store
from tasks.store import models as store
from tasks.store.connection import transaction
from workers.devices.base import BufferView, ModelOptions
from workers.devices.onnx import OnnxModel
from workers.resident import Resident, ResidentModel
from workers.tensors import feed, give, view
from workers.work import Work, named

log = structlog.get_logger(__name__)


def load_model(resident: Resident, work: Work) -> Outcome:
    """Makes a model resident, unless the same content already is."""
    model_id = work.request["model_id"]
    if model_id in resident.models:
        return work.succeeded(_loaded_result(resident, resident.models[model_id]))
    with resident.engine.connect() as connection:
        row = store.get(connection, model_id)
    if row is None or row["state"] not in ("loading", "lost"):
        raise failure(
            "model_not_found", f"model {model_id} is {row['state'] if row else 'not recorded'}; load it again"
        )
    model = open_model(resident, row, work)
    return work.succeeded(_loaded_result(resident, model), model=_facts(model))


def open_model(resident: Resident, row: dict[str, Any], work: Work | None = None) -> ResidentModel:
    """Opens a recorded model on the device and keeps it; idle unpinned ones make room where memory runs out."""
    options = row["options"]
    path, root = _files(resident, row)
    wanted = ModelOptions(
        intra_op_threads=options.get("intra_op_threads"),
        graph_optimization=options.get("graph_optimization", "all"),
        free_dimensions=options.get("free_dimensions") or {},
        root=root,
    )
    make_room(resident, row["reserved_bytes"])
    cancel = work.cancel if work else None
    while True:
        try:
            onnx = resident.device.open_model(path, wanted, cancel)
            break
        except OperationError as error:
            if error.code != "out_of_memory":
                raise
            if not evict_one(resident):
                raise failure("insufficient_memory", error.message, detail=error.detail) from error
    model = ResidentModel(
        model_id=row["model_id"],
        name=row["name"],
        onnx=onnx,
        pinned=row["pinned"],
        max_batch_size=options.get("max_batch_size", 1),
        max_delay_ms=options.get("max_delay_ms", 0.0),
        batchable=_batchable(onnx),
        # At least the file's own size: the system's figure is rounded, shared, or not to be had.
        memory_bytes=max(onnx.memory_bytes or 0, onnx.file_bytes or 0, ESTIMATE_BYTES),
        last_used=time.monotonic(),
    )
    if options.get("warmup"):
        onnx.run(_warm_feeds(onnx), cancel=cancel)
    resident.models[model.model_id] = model
    return model


def bring_back(resident: Resident) -> None:
    """Loads again what the device's last epoch had loaded. A model that does not load any more is failed, and told."""
    with resident.engine.connect() as connection:
        rows = store.resident(connection, resident.device_id)
    for row in rows:
        try:
            model = open_model(resident, row)
        except Exception as error:  # noqa: BLE001 - one model that cannot come back must not keep the others away
            known = named(error)
            log.error("model did not come back", model_id=row["model_id"], name=row["name"], error=known.message)
            with transaction(resident.engine) as connection:
                lost(connection, row["model_id"], known.as_job_error())
            continue
        with transaction(resident.engine) as connection:
            settled(connection, row["model_id"], resident.epoch, _facts(model))
        log.info("model is back", model_id=row["model_id"], name=row["name"], load_ms=model.onnx.load_ms)


def make_room(resident: Resident, size_bytes: int) -> None:
    """Evicts idle unpinned models until what is reserved fits the budget again."""
    while size_bytes:
        with resident.engine.connect() as connection:
            device = device_store.get(connection, resident.device_id)
        if device is None or device["reserved_bytes"] <= device["budget_bytes"] or not evict_one(resident):
            return


def evict_one(resident: Resident) -> bool:
    """Takes the least recently used idle, unpinned model off the device; False when there is none."""
    with transaction(resident.engine) as connection:
        for row in store.evictable(connection, resident.device_id):
            model = resident.models.pop(row["model_id"], None)
            if model is None:
                continue
            freed = model.onnx.close()
            evicted(connection, row["model_id"], "evicted", freed)
            log.info("model evicted", model_id=row["model_id"], name=row["name"], freed_bytes=freed)
            return True
    return False


def unload_model(resident: Resident, work: Work) -> Outcome:
    """Takes a model off the device."""
    model_id = work.request["model_id"]
    model = resident.models.pop(model_id, None)
    if model is None:
        raise failure("model_not_found", f"{resident.device_id} does not hold model {model_id}")
    for session_id in [key for key, session in resident.sessions.items() if session.model_id == model_id]:
        del resident.sessions[session_id]
    freed = model.onnx.close()
    gc.collect()
    return work.succeeded({"model_id": model_id, "freed_bytes": freed}, freed_bytes=freed)


def run(resident: Resident, work: Work) -> Outcome:
    """Runs a model once."""
    return run_batch(resident, [work])[0]


def run_batch(resident: Resident, works: list[Work]) -> list[Outcome]:
    """Runs works of one batch together; if that fails, each alone, so that one bad input fails alone."""
    model = resident.models.get(works[0].request["model_id"])
    if model is None:
        missing = failure("model_not_found", f"{resident.device_id} does not hold model {works[0].request['model_id']}")
        return [work.failed(missing) for work in works]
    model.last_used = time.monotonic()
    if len(works) == 1:
        return [_alone(resident, model, works[0])]
    try:
        return _joined(resident, model, works)
    except OperationError as error:
        if error.code == "device_lost":
            raise
        log.info("batch failed, its jobs run alone", model=model.name, size=len(works), error=error.message)
        return [_alone(resident, model, work) for work in works]


def _alone(resident: Resident, model: ResidentModel, work: Work) -> Outcome:
    try:
        request = work.request
        feeds = {name: feed(resident, name, tensor) for name, tensor in request["inputs"].items()}
        into = {
            name: view(resident, place["allocation_id"], place.get("offset", 0))
            for name, place in (request.get("into") or {}).items()
        }
        began = time.perf_counter()
        outputs = model.onnx.run(feeds, request.get("outputs"), into=into, cancel=work.cancel)
        device_ms = round((time.perf_counter() - began) * 1000, 3)
        return _result(resident, work, outputs, 1, device_ms, model.onnx.staged_bytes)
    except OperationError as error:
        if error.code == "device_lost":
            raise
        return work.failed(error)
    except Exception as error:  # noqa: BLE001 - any failure of one run is that run's outcome
        return work.failed(named(error))


def _joined(resident: Resident, model: ResidentModel, works: list[Work]) -> list[Outcome]:
    """One run over the rows of all works."""
    fed = [{name: feed(resident, name, t) for name, t in work.request["inputs"].items()} for work in works]
    feeds: dict[str, Any] = {}
    for name, first in fed[0].items():
        assert isinstance(first, np.ndarray)
        feeds[name] = first if first.ndim == 0 else np.concatenate([one[name] for one in fed])  # type: ignore[misc]
    rows = next(array.shape[0] for array in fed[0].values() if array.ndim)  # type: ignore[union-attr]
    began = time.perf_counter()
    outputs = model.onnx.run(feeds, works[0].request.get("outputs"))
    device_ms = round((time.perf_counter() - began) * 1000, 3)
    outcomes = []
    for index, work in enumerate(works):
        own = {name: value[index * rows : (index + 1) * rows] for name, value in outputs.items()}  # type: ignore[index]
        outcomes.append(_result(resident, work, own, len(works), device_ms, 0))
    return outcomes


def _result(
    resident: Resident, work: Work, outputs: dict[str, Any], batch_size: int, device_ms: float, staged_bytes: int
) -> Outcome:
    form = work.request.get("form", "auto")
    told: dict[str, Any] = {}
    for name, value in outputs.items():
        if isinstance(value, BufferView):
            place = work.request["into"][name]
            told[name] = {
                "dtype": value.dtype,
                "shape": list(value.shape or ()),
                "allocation_id": place["allocation_id"],
                "offset": place.get("offset", 0),
            }
        else:
            told[name] = give(resident, value, form, work.row["owner"])
    result = {
        "session_id": work.request.get("session_id") or work.job_id,
        "outputs": told,
        "batch_size": batch_size,
        "device_ms": device_ms,
    }
    if staged_bytes:
        result["staged_bytes"] = staged_bytes
    return work.succeeded(result, device_ms=device_ms, session_id=work.request.get("session_id"))


def _files(resident: Resident, row: dict[str, Any]) -> tuple[Path, Path]:
    """The graph's file, and the folder that its external data must not leave."""
    source = row["source"]
    if "path" in source:
        found = model_file(resident.settings.model_cache_path, source["path"])
        return (entry_file(found), found) if found.is_dir() else (found, found.parent)
    folder = resident.settings.data_dir / "models" / row["model_id"]
    named_blobs = {"model.onnx": source["blob_id"]} if "blob_id" in source else source["blobs"]
    for relative, blob_id in named_blobs.items():
        target = folder / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        resident.blobs.fetch(blob_id, target)
    return entry_file(folder), folder


def _batchable(onnx: OnnxModel) -> bool:
    """Whether every input and output has a first axis that the model leaves open; scalars are no obstacle as inputs."""
    inputs = [spec.shape for spec in onnx.inputs if len(spec.shape)]
    outputs = [spec.shape for spec in onnx.outputs]
    axes = [shape[0] if len(shape) else 0 for shape in [*inputs, *outputs]]
    return bool(inputs) and bool(outputs) and all(not isinstance(axis, int) for axis in axes) and len(set(axes)) == 1


def _warm_feeds(onnx: OnnxModel) -> dict[str, Any]:
    """Zeros in the smallest shape that the model takes."""
    feeds: dict[str, Any] = {}
    for spec in onnx.inputs:
        shape = tuple(side if isinstance(side, int) else 1 for side in spec.shape)
        feeds[spec.name] = np.full(shape, "", object) if spec.dtype == "string" else np.zeros(shape, spec.dtype)
    return feeds


def _facts(model: ResidentModel) -> dict[str, Any]:
    onnx = model.onnx
    return {
        "inputs": [{"name": s.name, "dtype": s.dtype, "shape": list(s.shape)} for s in onnx.inputs],
        "outputs": [{"name": s.name, "dtype": s.dtype, "shape": list(s.shape)} for s in onnx.outputs],
        "memory_bytes": model.memory_bytes,
        "load_ms": round(onnx.load_ms, 3),
        "provider": onnx.provider,
        "cpu_fallback_ops": onnx.cpu_fallback_ops,
    }


def _loaded_result(resident: Resident, model: ResidentModel) -> dict[str, Any]:
    return {"model_id": model.model_id, "name": model.name, "device_id": resident.device_id, **_facts(model)}


OPERATIONS = {
    Kind.INFERENCE_LOAD_MODEL.value: load_model,
    Kind.INFERENCE_RUN.value: run,
    Kind.INFERENCE_UNLOAD_MODEL.value: unload_model,
}
BATCHES = {Kind.INFERENCE_RUN.value: run_batch}
