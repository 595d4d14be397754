"""What each kind of job does on the device, one module a noun.

An operation takes the resident state and a claimed job, and returns its outcome; or it is a generator that yields
`Progress` between steps, so that the scheduler can run something more urgent, and returns its outcome at the end. What
it raises is the job's failure.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from device_operations.jobs import Kind
from device_operations.wire.json_types import JsonObject
from tasks.jobs.lifecycle import Outcome
from workers.execution.claimed_job import ClaimedJob, Detached, PlaceReleased, Steps
from workers.execution.scheduler import Entry
from workers.operations import allocations, inference, memory, models, reading
from workers.resident.residents import Resident

Operation = Callable[[Resident, ClaimedJob], Outcome | PlaceReleased | Detached | Steps]

#: Several jobs of one batch in, an outcome of each out.
JoinedOperation = Callable[[Resident, list[ClaimedJob]], list[Outcome]]

#: Notes in an entry with which others it may run, from its request.
Join = Callable[[Resident, Entry, JsonObject], None]


@dataclass(frozen=True, slots=True)
class OperationSpec:
    """The worker's side of a kind whose `tasks.kinds.KindSpec` says the rest; the last two if that one is `joined`."""

    run: Operation
    run_joined: JoinedOperation | None = None
    join: Join | None = None


def _training(name: str) -> OperationSpec:
    """An operation on a training session. The first one loads torch, for which no other kind of job needs to wait."""

    def run(resident: Resident, work: ClaimedJob) -> Outcome | PlaceReleased | Detached | Steps:
        operation: Operation = getattr(importlib.import_module("workers.operations.training.jobs"), name)
        return operation(resident, work)

    return OperationSpec(run)


SPECS: dict[str, OperationSpec] = {
    Kind.MEMORY_ALLOCATE: OperationSpec(allocations.allocate, allocations.allocate_batch, allocations.join_small),
    Kind.MEMORY_DEALLOCATE: OperationSpec(allocations.deallocate, allocations.deallocate_batch, allocations.join_all),
    Kind.MEMORY_COPY: OperationSpec(memory.copy),
    Kind.MEMORY_CLEAR: OperationSpec(memory.clear),
    Kind.MEMORY_WRITE: OperationSpec(memory.write),
    Kind.MEMORY_READ: OperationSpec(reading.read),
    Kind.INFERENCE_LOAD_MODEL: OperationSpec(models.load_model),
    Kind.INFERENCE_RUN: OperationSpec(inference.run, inference.run_batch, inference.join),
    Kind.INFERENCE_UNLOAD_MODEL: OperationSpec(models.unload_model),
    Kind.INFERENCE_CLOSE_SESSION: OperationSpec(models.close_session),
    Kind.TRAINING_INITIALIZE: _training("initialize"),
    Kind.TRAINING_STEP: _training("step"),
    Kind.TRAINING_CHECKPOINT: _training("checkpoint"),
    Kind.TRAINING_VALIDATE: _training("validate"),
    Kind.TRAINING_END_SESSION: _training("end_session"),
}

OPERATIONS: dict[str, Operation] = {kind: spec.run for kind, spec in SPECS.items()}

#: Of the kinds whose jobs may run joined.
BATCHES: dict[str, JoinedOperation] = {
    kind: spec.run_joined for kind, spec in SPECS.items() if spec.run_joined is not None
}

__all__ = ["BATCHES", "OPERATIONS", "SPECS", "Operation", "OperationSpec"]
