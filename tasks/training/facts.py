"""What a worker finds out about training jobs, for the effects of their ends."""

from __future__ import annotations

from typing import NotRequired, TypedDict

from device_operations.wire.json_types import FreeJson


class SessionFacts(TypedDict):
    """A session as it was built and measured: the fields of its record."""

    state: str
    step: int
    sequence: int
    samples_seen: int
    learning_rate: float | None
    memory_bytes: int
    #: Each tensor of the model, if the session was built for the first time.
    parameters: NotRequired[list[FreeJson]]


class Standing(TypedDict):
    """How far a session is, with its history since that was last recorded."""

    step: int
    loss: float | None
    gradient_norm: float | None
    learning_rate: float | None
    samples_seen: int
    steps_per_second: float | None
    cpu_fallback_operators: list[str]
    #: `{"step", "loss", "gradient_norm", "learning_rate", "at"}`, with `at` in seconds since 1970.
    history: list[FreeJson]


class AppliedStep(Standing):
    """A step that is in the session's parameters: what its end writes into the session's record."""

    session_id: str
    sequence: int
    #: How many steps a dataset's job made; None for a single step.
    steps_applied: int | None
    #: Inputs that lay in allocations, as copied to blobs: `{name: tensor}`; and the ids of those blobs.
    spooled: FreeJson
    spooled_ids: list[str]


class NewCheckpoint(TypedDict):
    """A whole checkpoint, whose blobs are in the store."""

    checkpoint_id: str
    session_id: str
    owner: str
    name: str | None
    #: None for an automatic one.
    job_id: str | None
    step: int
    sequence: int
    run_job_id: str | None
    sha256: str
    size_bytes: int
    blob_id: str
    onnx_blob_id: str | None
    #: The rows of its blobs: `{"blob_id", "sha256", "size_bytes"}`.
    blobs: list[FreeJson]
    #: How many checkpoints of the session to keep; None or 0 keeps all.
    keep_last: int | None


class InitializeFacts(TypedDict, total=False):
    """Of an initialization."""

    session: SessionFacts


class StepFacts(TypedDict, total=False):
    """Of a step."""

    #: Absent if the step changed nothing.
    applied: AppliedStep


class CheckpointFacts(TypedDict, total=False):
    """Of a checkpoint, or of a session's end."""

    #: Absent if none was made.
    checkpoint: NewCheckpoint
