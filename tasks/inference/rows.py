"""The rows of models, graphs and inference sessions, as PostgreSQL gives them."""

from __future__ import annotations

from datetime import datetime
from typing import TypedDict

from device_operations.wire.json_types import FreeJson


class ModelRow(TypedDict):
    """A row of `models`."""

    model_id: str
    name: str
    version: str
    model_type: str
    device_id: str
    epoch: int | None
    #: loading -> loaded, failed; loaded -> unloaded, evicted, lost (its worker died); lost -> loaded (the next epoch
    #: brought it back), failed, unloaded; unloaded, evicted, failed -> loading (a load of the same was waiting).
    state: str
    #: sha256 over content and the options that shape the session: models of one key on one device share a graph.
    content_key: str
    #: sha256 over the content key and all options: a name and version with the same key means the same as before.
    load_key: str
    sha256: str | None
    source: FreeJson
    options: FreeJson
    pinned: bool
    owner: str
    #: Whether other owners may run it and read what it is.
    shared: bool
    load_job_id: str
    blob_ids: list[str]
    inputs: list[FreeJson] | None
    outputs: list[FreeJson] | None
    #: What its graph takes, as measured.
    memory_bytes: int | None
    #: What unloading it gave back: 0 where its graph stayed for another model.
    freed_bytes: int | None
    load_ms: float | None
    provider: str | None
    cpu_fallback_ops: int | None
    #: Whether runs may be joined, as the worker found out: the fields of `workers.resident.batching.Batching`.
    batching: FreeJson | None
    #: [{"name", "side", "reason"}]: inputs and outputs that callers cannot give or get, as the worker found out.
    not_offered: list[FreeJson] | None
    #: Of a pipeline, [{"name", "memory_bytes", "file_bytes", "dtype", "load_ms"}]; of a single graph, nothing.
    parts: list[FreeJson] | None
    run_count: int
    failed_count: int
    statistics: dict[str, float]
    error: FreeJson | None
    created_at: datetime
    #: When the last load of it was submitted: of the models of one name, the newest is meant.
    named_at: datetime
    #: The model that its name and version mean since `replaced_at`: it takes no new runs and leaves once it is idle.
    replaced_by: str | None
    replaced_at: datetime | None
    last_used_at: datetime | None
    ended_at: datetime | None


class GraphRow(TypedDict):
    """A row of `graphs`: what lies on a device for the models that share it."""

    device_id: str
    content_key: str
    #: Estimated until loaded, then measured; counted against the device's budget, once for all its models.
    reserved_bytes: int
    created_at: datetime


class SessionRow(TypedDict):
    """A row of `inference_sessions`, with how many of its runs are open."""

    session_id: str
    model_id: str
    device_id: str
    epoch: int | None
    #: active, expired, closed, lost; `idle` is derived: active without a run under way
    state: str
    owner: str
    #: {output name: input name}
    state_map: dict[str, str]
    #: {input name: tensor} of the first run
    initial: dict[str, FreeJson]
    blob_ids: list[str]
    succeeded: int
    failed: int
    last_job_id: str | None
    opened_at: datetime
    last_used_at: datetime
    expires_at: datetime
    ended_at: datetime | None
    running: int


class EndedModel(TypedDict):
    """A model that has left its device, and the graph that it had there."""

    model_id: str
    device_id: str
    content_key: str


class LostModel(TypedDict):
    """A model that was lost with its worker."""

    model_id: str
    name: str


class IdleGraph(TypedDict):
    """A graph that can leave its device, with its models."""

    content_key: str
    reserved_bytes: int
    model_ids: list[str]


class OpenSessionRow(TypedDict):
    """An open session of a model."""

    session_id: str
    owner: str


class KnownModel(TypedDict):
    """What planning knows of a model: recorded, or made by an earlier entry. `ModelRow` has it all."""

    model_id: str
    name: str
    version: str
    model_type: str
    device_id: str
    state: str
    load_key: str
    owner: str
    load_job_id: str
    #: None until the model is loaded.
    inputs: list[FreeJson] | None
    outputs: list[FreeJson] | None
    error: FreeJson | None
    replaced_by: str | None
