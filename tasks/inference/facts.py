"""What a worker finds out about models and runs, for the effects of their ends."""

from __future__ import annotations

from typing import NotRequired, TypedDict

from device_operations.wire.json_types import FreeJson


class ModelFacts(TypedDict):
    """A model as it was loaded and measured: the fields of its record."""

    inputs: list[FreeJson]
    outputs: list[FreeJson]
    not_offered: list[FreeJson]
    #: Of a pipeline only.
    parts: NotRequired[list[FreeJson]]
    memory_bytes: int
    load_ms: float
    provider: str
    cpu_fallback_ops: int | None
    batching: FreeJson


class LoadFacts(TypedDict, total=False):
    """Of a load."""

    #: Absent if the same content was on the device already.
    model: ModelFacts


class RunFacts(TypedDict, total=False):
    """Of a run."""

    #: The session that the run belongs to.
    session_id: str | None
    #: How many executions of the model it took, and the size of the batch.
    executions: int
    batch_size: int


class UnloadFacts(TypedDict, total=False):
    """Of an unload."""

    #: What the device gave back, as measured.
    freed_bytes: int | None
