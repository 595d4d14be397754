"""The models of one device and their graphs: opened, made room for, brought back after a death, and let go.

Everything here runs on the device's thread.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import structlog
from sqlalchemy import Connection
from sqlalchemy.exc import IntegrityError

from device_operations.errors import OperationError, failure
from tasks.devices import store as device_store
from tasks.devices.directory import MAX_AGE_SECONDS
from tasks.inference import graphs as graph_store
from tasks.inference import idle, session_store
from tasks.inference import models as store
from tasks.inference.content import ESTIMATE_BYTES
from tasks.inference.effects import let_go, lost, settled
from tasks.inference.facts import ModelFacts
from tasks.inference.residents import no_model
from tasks.statements import Row, transaction
from workers import pipelines
from workers.devices.onnx.runtime import Cancel, LoadedGraph
from workers.execution.claimed_job import named
from workers.resident import batching
from workers.resident.files import files_of, folder_of
from workers.resident.loaders import load_onnx
from workers.resident.residents import Graph, Resident, ResidentModel
from workers.resident.warmup import warm_up

if TYPE_CHECKING:
    from workers.pipelines.base import Pipeline

log = structlog.get_logger(__name__)

#: Seconds for which a replaced model stays: runs that were being planned when it was replaced are recorded by then.
REPLACED_SECONDS = MAX_AGE_SECONDS + 1.0


def open_model(resident: Resident, row: Row, cancel: Cancel | None = None) -> ResidentModel:
    """Makes a recorded model resident, on the graph that is there for its content or on one that is opened."""
    graph = resident.graphs.get(row["content_key"]) or _open_graph(resident, row, cancel)
    try:
        model = _made(row, graph, cancel)
    except BaseException:
        _leave(resident, graph)
        raise
    resident.models[model.model_id] = model
    return model


def _open_graph(resident: Resident, row: Row, cancel: Cancel | None) -> Graph:
    """Opens a model's graph on the device and keeps it; idle unpinned models make room where memory runs out."""
    key = row["content_key"]
    file, root = files_of(resident, row)
    opens = _opener(resident, row, file, root, cancel)
    reserved_bytes = resident.read(graph_store.reserved, resident.device_id, key)
    make_room(resident)
    while True:
        try:
            with resident.loading(reserved_bytes):
                loaded = opens()
            break
        except OperationError as error:
            if error.code != "out_of_memory":
                raise
            if not evict_one(resident):
                raise failure("insufficient_memory", error.message, detail=error.detail) from error
    # At least the file's own size: the system's figure is rounded, shared, or not to be had.
    if isinstance(loaded, LoadedGraph):
        graph = Graph(key, loaded, max(loaded.memory_bytes or 0, loaded.file_bytes or 0, ESTIMATE_BYTES))
    else:
        graph = Graph(key, loaded, _needed(loaded))
    resident.graphs[key] = graph
    log.info("graph opened", content_key=key, memory_bytes=graph.memory_bytes)
    return graph


def _opener(
    resident: Resident, row: Row, file: Path, root: Path, cancel: Cancel | None
) -> Callable[[], LoadedGraph | Pipeline]:
    """What opens a model's files on the device. A pipeline is read and checked here, before any of it is loaded."""
    if row["model_type"] == "onnx":
        return lambda: load_onnx(resident.device, file, root, row["options"], cancel)
    pipeline = pipelines.read(row["model_type"], file, root, row["options"])
    pipeline.parts.evict = lambda: evict_one(resident)
    pipeline.parts.returning = lambda: _record_parts(resident, row["content_key"], pipeline)

    def opened() -> Pipeline:
        pipeline.open(resident.device, cancel)
        return pipeline

    return opened


def _made(row: Row, graph: Graph, cancel: Cancel | None) -> ResidentModel:
    options = row["options"]
    onnx, asked = graph.loaded, options.get("max_batch_size")
    if not isinstance(onnx, LoadedGraph):
        max_rows, together = onnx.batching(asked)
        return ResidentModel(
            row["model_id"], row["name"], graph, row["pinned"], max_rows, options.get("max_delay_ms", 0.0), together,
            time.monotonic(),
        )  # fmt: skip
    # A model that comes back after a death has been tried: what it did then is recorded, and is not done again.
    again = row["state"] == "lost"
    earlier = row["batching"] if again else None
    warmup = warm_up(onnx, cancel, again, earlier or {}) if options.get("warmup") else None
    found = batching.find_out(onnx, asked, cancel, earlier=earlier, may_try=not again)
    return ResidentModel(
        model_id=row["model_id"],
        name=row["name"],
        graph=graph,
        pinned=row["pinned"],
        max_batch_size=batching.decide(onnx.rows, asked),
        max_delay_ms=options.get("max_delay_ms", 0.0),
        batching=replace(found, warmup=warmup),
        last_used=time.monotonic(),
    )


def model_facts(model: ResidentModel) -> ModelFacts:
    """What the model's record is to hold of it, as found and measured."""
    pipeline = model.pipeline
    if pipeline is not None:
        return {
            "inputs": [],
            "outputs": [],
            "not_offered": [],
            "parts": pipeline.parts.facts(),
            "memory_bytes": _needed(pipeline),
            "load_ms": round(pipeline.parts.load_ms, 3),
            "provider": pipeline.parts.provider,
            "cpu_fallback_ops": pipeline.parts.cpu_fallback_ops,
            "batching": model.batching.as_json(),
        }
    onnx = model.onnx
    return {
        "inputs": [spec.as_json() for spec in (*onnx.inputs, *onnx.optional_inputs)],
        "outputs": [spec.as_json() for spec in onnx.outputs],
        "not_offered": [one.as_json() for one in onnx.not_offered],
        "memory_bytes": model.graph.memory_bytes,
        "load_ms": round(onnx.load_ms, 3),
        "provider": onnx.provider,
        "cpu_fallback_ops": onnx.cpu_fallback_ops,
        "batching": model.batching.as_json(),
    }


def revive(resident: Resident, row: Row, job_id: str, reserved_bytes: int) -> Row:
    """A model that left the device while this load waited behind it: recorded as loading again.

    Raises `model_not_found` where it is in any other state, or its name was loaded anew under another id.
    """
    try:
        with transaction(resident.engine) as connection:
            device_store.lock_budget(connection, resident.device_id)
            again = store.revive(connection, row["model_id"], job_id)
            if again is None:
                raise no_model(row["model_id"], row)
            if graph_store.join(connection, resident.device_id, row["content_key"], reserved_bytes):
                device_store.adjust_reservation(connection, resident.device_id, reserved_bytes)
    except IntegrityError:
        raise no_model(row["model_id"], row) from None
    return again


def bring_models_back(resident: Resident) -> None:
    """Loads again what the device's last epoch had loaded. A model that no longer loads is recorded as failed."""
    let_replaced_go(resident)
    for row in resident.read(store.resident, resident.device_id):
        try:
            model = open_model(resident, row)
        except Exception as error:  # noqa: BLE001 - one model that cannot come back must not keep the others away
            known = named(error)
            log.error("model did not come back", model_id=row["model_id"], name=row["name"], error=known.message)
            with transaction(resident.engine) as connection:
                lost(connection, row["model_id"], known.as_job_error())
            continue
        with transaction(resident.engine) as connection:
            settled(connection, row["model_id"], resident.epoch, model_facts(model))
        log.info("model is back", model_id=row["model_id"], name=row["name"])


def make_room(resident: Resident) -> bool:
    """Evicts graphs of idle unpinned models until what is reserved fits the budget again; whether it does."""
    while True:
        device = resident.read(device_store.get, resident.device_id)
        if device is None or device["budget_bytes"] is None or device["reserved_bytes"] <= device["budget_bytes"]:
            return True
        if not evict_one(resident):
            return False


def evict_one(resident: Resident) -> bool:
    """Takes the least recently used graph that can go off the device, with its models; False when there is none.

    A pipeline goes part by part: while parts are left its models stay, and a run brings back what it needs.
    """
    oldest = resident.read(_evictable, resident)
    if oldest is None:
        return False
    pipeline = resident.graphs[oldest["content_key"]].pipeline
    if pipeline is not None and pipeline.parts.evict_part():
        _record_parts(resident, oldest["content_key"], pipeline)
        return True

    def of_one_graph(connection: Connection) -> list[str]:
        graph = _evictable(connection, resident)
        return [] if graph is None else list(graph["model_ids"])

    return bool(_let_go(resident, "evicted", of_one_graph))


def _evictable(connection: Connection, resident: Resident) -> Row | None:
    """The least recently used graph that can go, among those whose models are all here."""
    for graph in idle.evictable_graphs(connection, resident.device_id):
        if resident.models.keys() >= set(graph["model_ids"]):
            return graph
    return None


def _needed(pipeline: Pipeline) -> int:
    """Bytes that a pipeline's parts need now, as they are reserved."""
    return max(pipeline.parts.memory_bytes, ESTIMATE_BYTES)


def _record_parts(resident: Resident, content_key: str, pipeline: Pipeline) -> None:
    """Records what a pipeline's parts need now, of which some were evicted or one comes back, and makes room for it."""
    needed = _needed(pipeline)
    with transaction(resident.engine) as connection:
        device_store.lock_budget(connection, resident.device_id)
        more = graph_store.settle(connection, resident.device_id, content_key, needed)
        device_store.adjust_reservation(connection, resident.device_id, more)
        store.set_parts(connection, resident.device_id, content_key, needed, pipeline.parts.facts())
    if more > 0:
        make_room(resident)


def look_after_models(resident: Resident) -> None:
    """Frees the state of sessions that have ended, and unloads unpinned models that were idle too long."""
    if resident.sessions:
        with resident.engine.connect() as connection:
            still_open = session_store.still_open(connection, list(resident.sessions))
        for session_id in [key for key in resident.sessions if key not in still_open]:
            del resident.sessions[session_id]
    if any(not model.pinned for model in resident.models.values()):
        idle_seconds = resident.settings.inference.session_timeout_minutes * 60
        _let_go(resident, "unloaded", lambda connection: idle.idle(connection, resident.device_id, idle_seconds))


def let_replaced_go(resident: Resident) -> None:
    """Unloads models whose names mean others by now and whose last runs and sessions have ended."""
    _let_go(resident, "unloaded", lambda connection: replaced(connection, resident.device_id))


def replaced(connection: Connection, device_id: str) -> list[str]:
    """The models of a device that are replaced and can go."""
    return idle.replaced(connection, device_id, REPLACED_SECONDS)


def _let_go(resident: Resident, state: str, choose: Callable[[Connection], list[str]]) -> list[str]:
    """Takes idle models off the device: first in the records, so that no further run is planned for them."""
    with transaction(resident.engine) as connection:
        device_store.lock_budget(connection, resident.device_id)
        model_ids = choose(connection)
        if model_ids:
            let_go(connection, model_ids, state)
    for model_id in model_ids:
        model = resident.models.pop(model_id, None)
        if model is None:
            continue
        freed = close(resident, model)
        with resident.engine.connect() as connection:
            store.set_freed(connection, model_id, freed)
        log.info("model let go", model_id=model_id, name=model.name, state=state, freed_bytes=freed)
    return model_ids


def close(resident: Resident, model: ResidentModel) -> int | None:
    """Unloads a model that is no longer in `resident.models`; the bytes freed, as measured: 0 where its graph stays."""
    for session_id in [key for key, session in resident.sessions.items() if session.model_id == model.model_id]:
        del resident.sessions[session_id]
    return _leave(resident, model.graph)


def _leave(resident: Resident, graph: Graph) -> int | None:
    """Closes a graph unless a resident model uses it; the bytes freed."""
    if any(model.graph is graph for model in resident.models.values()):
        return 0
    del resident.graphs[graph.content_key]
    freed = graph.loaded.close()
    shutil.rmtree(folder_of(resident, graph.content_key), ignore_errors=True)
    return freed
