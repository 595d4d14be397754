"""The rows of training sessions, their steps and their checkpoints, as PostgreSQL gives them."""

from __future__ import annotations

from datetime import datetime
from typing import TypedDict

from device_operations.wire.json_types import FreeJson


class TrainingSessionRow(TypedDict):
    """A row of `training_sessions`."""

    session_id: str
    device_id: str
    #: The epoch that holds the session in memory; null while it is only recorded (not built yet, unloaded, its worker
    #: dead). A worker records that a step was applied, or how far it came, only under its own epoch.
    epoch: int | None
    #: initializing -> ready -> ended; failed, lost; a dead worker's: initializing -> restored -> ready.
    #: `stepping` is derived: a step of it runs.
    state: str
    owner: str
    #: The request that made it, and the checkpoint that it started from: {checkpoint_id, blob_id, sha256}.
    spec: FreeJson
    resumed: FreeJson | None
    blob_ids: list[str]
    init_job_id: str
    #: The last sequence number given out, and the last whose step is in the parameters.
    submitted_sequence: int
    applied_sequence: int
    step: int
    loss: float | None
    gradient_norm: float | None
    learning_rate: float | None
    samples_seen: int
    steps_per_second: float | None
    #: Operators of torch that the device's process runs on the CPU instead, as of the session's last step.
    cpu_fallback_operators: list[str]
    #: Each tensor of the model, whether it is trained and why: [{name, shape, dtype, trained, reason}].
    parameters: list[FreeJson]
    #: Estimated until built, then measured; counted against the device's budget while the device holds it.
    reserved_bytes: int
    #: Null until it was built once.
    memory_bytes: int | None
    lease_seconds: float | None
    lease_expires_at: datetime | None
    #: Why it failed or was lost; while it is open, why its last automatic checkpoint could not be written.
    error: FreeJson | None
    opened_at: datetime
    last_used_at: datetime
    ended_at: datetime | None


class StepRow(TypedDict):
    """A row of `training_steps`: a step in a session's log."""

    session_id: str
    sequence: int
    job_id: str
    payload_sha256: str
    applied: bool
    #: Of a dataset job: how many steps were applied, which is fewer than asked where it was cut short.
    steps_applied: int | None
    #: Inputs that lay in allocations, spooled to blobs: {name: tensor}. Everything else is in the job's own request.
    spooled: FreeJson | None
    blob_ids: list[str]
    #: Whether a replay may still need it; until then its job and its blobs are kept.
    kept: bool


class CheckpointRow(TypedDict):
    """A row of `checkpoints`."""

    checkpoint_id: str
    session_id: str
    owner: str
    name: str | None
    #: The job that made it; null for an automatic one.
    job_id: str | None
    step: int
    sequence: int
    #: The dataset job in the middle of which it was taken.
    run_job_id: str | None
    sha256: str
    size_bytes: int
    blob_id: str
    onnx_blob_id: str | None
    #: Why it could not be read when a session was to be brought back from it.
    damage: FreeJson | None
    created_at: datetime


class SessionStanding(TypedDict):
    """Where a training session stands: its state, what ended it, and the number of the last step applied."""

    session_id: str
    state: str
    error: FreeJson | None
    applied_sequence: int


class HistoryRow(TypedDict):
    """A step of a session's history."""

    step: int
    loss: float | None
    gradient_norm: float | None
    learning_rate: float | None
    time: datetime


class ReservedBefore(TypedDict):
    """The device of a session, and the bytes of its budget that were reserved for the session before."""

    device_id: str
    before: int


class HeldRow(TypedDict):
    """A session that its device's epoch holds; `idle` if its lease is over and no open job needs it."""

    session_id: str
    applied_sequence: int
    idle: bool | None


class LoggedStep(TypedDict):
    """An applied step that a replay makes again; `request` is None if its job is no longer kept."""

    sequence: int
    steps_applied: int | None
    spooled: FreeJson | None
    job_id: str
    request: FreeJson | None


class CheckpointBeingMade(TypedDict):
    """The open job that makes a checkpoint."""

    id: str
    owner: str
    device_id: str
    request: FreeJson


class SessionPlace(TypedDict):
    """What never changes of a training session. `TrainingSessionRow` and `KnownSession` have it all."""

    session_id: str
    device_id: str
    owner: str


class KnownSession(SessionPlace):
    """What planning knows of a session: recorded, or made by an earlier entry. `TrainingSessionRow` has it all."""

    state: str
    error: FreeJson | None


class EndedSession(TypedDict):
    """What callers learn about a session that is not open. `KnownSession` and `SessionStanding` have it all."""

    session_id: str
    state: str
    error: FreeJson | None
