"""What the API gives for each noun, key by key: the gateway's views are made of these, and the client returns them.

Times are RFC 3339 in UTC; sizes are in bytes. A value is None as long as it is not known.
"""

from __future__ import annotations

from typing import NotRequired, TypeAlias, TypedDict

from device_operations.wire.json_types import FreeJson

#: A time, such as `2026-01-31T12:00:00Z`.
Moment: TypeAlias = str


class DeviceView(TypedDict):
    """One device, as its worker last reported it. `queued` and `running` count jobs."""

    device_id: str
    backend: str
    name: str
    vendor: str | None
    #: online, draining or offline.
    state: str
    epoch: int
    node: str | None
    total_bytes: int | None
    free_bytes: int | None
    driver: str | None
    heartbeat_at: Moment | None
    capabilities: FreeJson
    providers: list[str]
    cpu_fallback_ops: int | None
    queued: int
    running: int


class DeviceSample(TypedDict):
    """One point of a device's history."""

    time: Moment
    used_bytes: int | None
    free_bytes: int | None
    #: 0 to 1: how much of the time since the point before it worked.
    busy_share: float | None
    queue_length: int


class DeviceMemoryView(TypedDict):
    """The memory of one device. A figure that its backend cannot measure is None."""

    device_id: str
    #: online, draining or offline.
    state: str
    total_bytes: int | None
    free_bytes: int | None
    budget_bytes: int | None
    reserved_bytes: int | None
    awaiting_bytes: int | None
    used_bytes: int
    peak_bytes: int | None
    allocated_bytes: int
    models_bytes: int
    training_bytes: int
    allocation_count: int
    #: Bytes of the caller's, for an admin of every owner's; and of all other owners together.
    by_owner: dict[str, int]
    others_bytes: int
    #: What lies on the device, largest first, if the request says `map`.
    map: NotRequired[list[FreeJson]]


class AllocationView(TypedDict):
    """One allocation of device memory."""

    allocation_id: str
    device_id: str
    state: str
    size_bytes: int
    dtype: str | None
    shape: list[int] | None
    label: str | None
    owner: str
    job_id: str
    sha256: str | None
    error: FreeJson | None
    created_at: Moment
    ttl_seconds: float | None
    expires_at: Moment | None
    ended_at: Moment | None


class ModelView(TypedDict):
    """One model: a resident one, or what became of it."""

    model_id: str
    name: str
    version: str
    model_type: str
    device_id: str
    state: str
    inputs: list[FreeJson] | None
    outputs: list[FreeJson] | None
    #: `[{"name", "side", "reason"}]`: inputs and outputs that callers cannot give or get.
    not_offered: list[FreeJson] | None
    #: Of a pipeline, one for each graph; of a single graph, None.
    parts: list[FreeJson] | None
    memory_bytes: int | None
    freed_bytes: int | None
    load_ms: float | None
    run_count: int
    failed_count: int
    last_used_at: Moment | None
    pinned: bool
    shared: bool
    provider: str | None
    cpu_fallback_ops: int | None
    batching: FreeJson | None
    statistics: FreeJson
    sha256: str | None
    owner: str
    options: FreeJson
    error: FreeJson | None
    replaced_by: str | None
    replaced_at: Moment | None
    created_at: Moment
    ended_at: Moment | None


class RunCounts(TypedDict):
    """The runs of an inference session."""

    succeeded: int
    failed: int
    running: int


class InferenceSessionView(TypedDict):
    """One inference session. The session of a run without one has the job's id and no `state_map`."""

    session_id: str
    model_id: str
    device_id: str
    #: active or idle while it is open; closed, expired or lost.
    state: str
    runs: RunCounts
    last_job_id: str | None
    opened_at: Moment
    last_used_at: Moment
    expires_at: Moment | None
    ended_at: Moment | None
    owner: str
    state_map: dict[str, str]


class TrainingSessionView(TypedDict):
    """One training session."""

    session_id: str
    device_id: str
    state: str
    step: int
    applied_sequence: int
    submitted_sequence: int
    loss: float | None
    gradient_norm: float | None
    learning_rate: float | None
    steps_per_second: float | None
    samples_seen: int
    memory_bytes: int | None
    lease_expires_at: Moment | None
    owner: str
    error: FreeJson | None
    parameters: list[FreeJson]
    opened_at: Moment
    last_used_at: Moment
    ended_at: Moment | None
    #: Whether the device holds it in memory.
    resident: bool
    cpu_fallback_ops: int
    cpu_fallback_operators: list[str]


class CheckpointView(TypedDict):
    """One checkpoint of a training session."""

    checkpoint_id: str
    session_id: str
    name: str | None
    step: int
    sequence: int
    sha256: str | None
    size_bytes: int | None
    blob_id: str | None
    onnx_blob_id: str | None
    run_job_id: str | None
    created_at: Moment
    owner: str
    damage: FreeJson | None
    #: Whether the session took it by itself.
    automatic: bool


class TrainingStatus(TrainingSessionView):
    """One training session with its last steps and checkpoints."""

    history: list[FreeJson]
    checkpoints: list[CheckpointView]
