"""Which request belongs to which job kind, and the one way to check a request that came as plain JSON."""

from __future__ import annotations

from pydantic import ValidationError

from device_operations.jobs import Kind
from device_operations.requests import inference, memory, pipelines, training
from device_operations.requests.base import JobRequest, invalid

REQUESTS: dict[Kind, type[JobRequest]] = {
    Kind.MEMORY_ALLOCATE: memory.Allocate,
    Kind.MEMORY_DEALLOCATE: memory.Deallocate,
    Kind.MEMORY_COPY: memory.Copy,
    Kind.MEMORY_CLEAR: memory.Clear,
    Kind.MEMORY_WRITE: memory.Write,
    Kind.MEMORY_READ: memory.Read,
    Kind.INFERENCE_LOAD_MODEL: inference.LoadModel,
    Kind.INFERENCE_RUN: inference.Run,
    Kind.INFERENCE_UNLOAD_MODEL: inference.UnloadModel,
    Kind.INFERENCE_CLOSE_SESSION: inference.CloseSession,
    Kind.TRAINING_INITIALIZE: training.Initialize,
    Kind.TRAINING_STEP: training.Step,
    Kind.TRAINING_CHECKPOINT: training.Checkpoint,
    Kind.TRAINING_VALIDATE: training.Validate,
    Kind.TRAINING_END_SESSION: training.EndSession,
}


#: What a kind takes besides: a run of a pipeline has a request of its own for each type of pipeline.
_OTHERS: dict[Kind, tuple[type[JobRequest], ...]] = {Kind.INFERENCE_RUN: tuple(pipelines.RUNS.values())}


def requests_of(kind: Kind) -> tuple[type[JobRequest], ...]:
    """The requests that a kind takes: one, and for runs those of each type of pipeline besides."""
    return (REQUESTS[kind], *_OTHERS.get(kind, ()))


def parse(kind: Kind, request: object) -> JobRequest:
    """The checked request of `kind`; `validation_failed` names every field that does not fit."""
    schema = REQUESTS[kind]
    if kind in _OTHERS and pipelines.is_pipeline_run(request):
        schema = pipelines.AnyPipelineRun
    try:
        return schema.model_validate(request)
    except ValidationError as error:
        raise invalid(error, f"The request of {kind.value} does not fit the contract") from error
