"""The models of one device: opened, made room for, brought back after a death, and let go when nobody uses them.

Everything here runs on the device's thread.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import structlog
from sqlalchemy.exc import IntegrityError

from device_operations.errors import OperationError, failure
from tasks.effects.inference import evicted, lost, settled
from tasks.plans.models import ESTIMATE_BYTES, entry_file, model_file
from tasks.store import devices as device_store
from tasks.store import models as store
from tasks.store.connection import Row, transaction
from workers import batching
from workers.devices.onnx import Cancel, OnnxModel
from workers.loaders import LOADERS
from workers.resident import Resident, ResidentModel
from workers.work import named

log = structlog.get_logger(__name__)

#: How long a warm-up may take where a model comes back after a death, before it is stopped.
WARMUP_AGAIN_SECONDS = 10.0


def open_model(resident: Resident, row: Row, cancel: Cancel | None = None) -> ResidentModel:
    """Opens a recorded model on the device and keeps it; idle unpinned ones make room where memory runs out."""
    options = row["options"]
    file, root = _files(resident, row)
    loader = LOADERS.get(row["model_type"])
    if loader is None:
        raise failure("model_invalid", f"this worker cannot load models of type {row['model_type']!r}")
    make_room(resident)
    while True:
        try:
            with resident.loading(row["reserved_bytes"]):
                onnx = loader(resident.device, file, root, options, cancel)
            break
        except OperationError as error:
            if error.code != "out_of_memory":
                raise
            if not evict_one(resident):
                raise failure("insufficient_memory", error.message, detail=error.detail) from error
    try:
        model = _made(row, onnx, cancel)
    except BaseException:
        onnx.close()
        raise
    resident.models[model.model_id] = model
    return model


def _made(row: Row, onnx: OnnxModel, cancel: Cancel | None) -> ResidentModel:
    options = row["options"]
    asked = options.get("max_batch_size")
    # A model that comes back after a death has been tried: what it did then is recorded, and is not done again.
    again = row["state"] == "lost"
    earlier = row["batching"] if again else None
    warmup = _warmed(onnx, cancel, again, earlier or {}) if options.get("warmup") else None
    found = batching.find_out(onnx, asked, cancel, earlier=earlier, may_try=not again)
    return ResidentModel(
        model_id=row["model_id"],
        name=row["name"],
        onnx=onnx,
        pinned=row["pinned"],
        max_batch_size=batching.decide(onnx.rows, asked),
        max_delay_ms=options.get("max_delay_ms", 0.0),
        batching=replace(found, warmup=warmup),
        # At least the file's own size: the system's figure is rounded, shared, or not to be had.
        memory_bytes=max(onnx.memory_bytes or 0, onnx.file_bytes or 0, ESTIMATE_BYTES),
        last_used=time.monotonic(),
    )


def _warmed(onnx: OnnxModel, cancel: Cancel | None, again: bool, earlier: Mapping[str, Any]) -> str:
    """Runs the model once on zeros, and says what came of it.

    At a load a failure is the load's. Where the model comes back after a death, a failure leaves it unwarmed, what
    failed before is left out, and a run that takes long is stopped: no caller waits there who could cancel it.
    """
    reason = batching.too_large(onnx, 1, 1)
    if reason is not None:
        return f"left out: {reason}"
    if not again:
        onnx.run(_zeros(onnx), cancel=cancel)
        return "done"
    if str(earlier.get("warmup", "")).startswith("failed"):
        return str(earlier["warmup"])
    limit: Any
    with batching.Within(WARMUP_AGAIN_SECONDS, cancel) as limit:
        try:
            onnx.run(_zeros(onnx), cancel=limit)
        except OperationError as error:
            if error.code == "device_lost":
                raise
            log.warning("a model came back without its warm-up", error=error.message)
            return f"failed at a restart: {error.message}"
    return "done"


def facts(model: ResidentModel) -> dict[str, Any]:
    """What the model's record is to hold of it, as found and measured."""
    onnx = model.onnx
    return {
        "inputs": [spec.as_json() for spec in onnx.inputs],
        "outputs": [spec.as_json() for spec in onnx.outputs],
        "memory_bytes": model.memory_bytes,
        "load_ms": round(onnx.load_ms, 3),
        "provider": onnx.provider,
        "cpu_fallback_ops": onnx.cpu_fallback_ops,
        "batching": model.batching.as_json(),
    }


def revive(resident: Resident, row: Row, job_id: str, reserved_bytes: int) -> Row:
    """A model that left the device while this load waited behind it: recorded as loading again.

    Raises `model_not_found` where it is in any other state, or its content came back under another id.
    """
    gone = failure("model_not_found", f"model {row['model_id']} is {row['state']}; load it again")
    try:
        with transaction(resident.engine) as connection:
            again = store.revive(connection, row["model_id"], job_id, reserved_bytes)
            if again is None:
                raise gone
            device_store.adjust_reservation(connection, resident.device_id, reserved_bytes)
    except IntegrityError:
        raise gone from None
    return again


def bring_back(resident: Resident) -> None:
    """Loads again what the device's last epoch had loaded. A model that does not load any more is failed, and told."""
    rows = resident.read(store.resident, resident.device_id)
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
            settled(connection, row["model_id"], resident.epoch, facts(model))
        log.info("model is back", model_id=row["model_id"], name=row["name"], load_ms=model.onnx.load_ms)


def make_room(resident: Resident) -> bool:
    """Evicts idle unpinned models until what is reserved fits the budget again; whether it does."""
    while True:
        device = resident.read(device_store.get, resident.device_id)
        if device is None or device["budget_bytes"] is None or device["reserved_bytes"] <= device["budget_bytes"]:
            return True
        if not evict_one(resident):
            return False


def evict_one(resident: Resident) -> bool:
    """Takes the least recently used idle, unpinned model off the device; False when there is none."""
    return _let_go(resident, "evicted", None, limit=1) > 0


def look_after(resident: Resident) -> None:
    """Frees the state of sessions that have ended, and unloads unpinned models that were idle too long."""
    if resident.sessions:
        with resident.engine.connect() as connection:
            still_open = store.still_open(connection, list(resident.sessions))
        for session_id in [key for key in resident.sessions if key not in still_open]:
            del resident.sessions[session_id]
    if any(not model.pinned for model in resident.models.values()):
        _let_go(resident, "unloaded", resident.settings.inference.session_timeout_minutes * 60)


def _let_go(resident: Resident, state: str, idle_seconds: float | None, limit: int | None = None) -> int:
    """Takes idle models off the device: first in the records, so that no further run is planned for them."""
    let_go: list[ResidentModel] = []
    with transaction(resident.engine) as connection:
        for row in store.evictable(connection, resident.device_id, idle_seconds):
            if row["model_id"] in resident.models and len(let_go) != limit:
                evicted(connection, row["model_id"], state, None)
                let_go.append(resident.models[row["model_id"]])
    for model in let_go:
        del resident.models[model.model_id]
        freed = close(resident, model)
        with resident.engine.connect() as connection:
            store.set_freed(connection, model.model_id, freed)
        log.info("model let go", model_id=model.model_id, name=model.name, state=state, freed_bytes=freed)
    return len(let_go)


def close(resident: Resident, model: ResidentModel) -> int | None:
    """Unloads a model that is no longer in `resident.models`; the bytes freed, as measured."""
    for session_id in [key for key, session in resident.sessions.items() if session.model_id == model.model_id]:
        del resident.sessions[session_id]
    freed = model.onnx.close()
    shutil.rmtree(_folder(resident, model.model_id), ignore_errors=True)
    return freed


def _files(resident: Resident, row: Row) -> tuple[Path, Path]:
    """The graph's file, and the folder that its external data must not leave."""
    source = row["source"]
    if "path" in source:
        found = model_file(resident.settings.model_cache_path, source["path"])
        return (entry_file(found), found) if found.is_dir() else (found, found.parent)
    if "blob_id" in source:
        stored = resident.blobs.file(source["blob_id"])
        if stored is not None and stored.is_file():
            # Read where it lies; its neighbours there are other callers', so it may refer to no other file.
            return stored, _folder(resident, row["model_id"])
    folder = _folder(resident, row["model_id"])
    named_blobs = {"model.onnx": source["blob_id"]} if "blob_id" in source else source["blobs"]
    for relative, blob_id in named_blobs.items():
        target = folder / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        resident.blobs.fetch(blob_id, target)
    return entry_file(folder), folder


def _folder(resident: Resident, model_id: str) -> Path:
    return resident.settings.data_dir / "models" / resident.device_id / model_id


def _zeros(onnx: OnnxModel) -> dict[str, Any]:
    """Zeros in the smallest shape that the model takes."""
    feeds: dict[str, Any] = {}
    for spec in onnx.inputs:
        shape = tuple(side if isinstance(side, int) else 1 for side in spec.shape)
        feeds[spec.name] = np.full(shape, "", object) if spec.dtype == "string" else np.zeros(shape, spec.dtype)
    return feeds
