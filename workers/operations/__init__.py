"""What each kind of job does on the device, one module a noun.

An operation takes the resident state and a claimed job, and returns its outcome; or it is a generator that yields
`Progress` between steps, so that the lane can run something more urgent, and returns its outcome at the end. What it
raises is the job's failure.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

from device_operations.jobs import Kind
from tasks.lifecycle import Outcome
from workers.operations import inference, memory
from workers.resident import Resident
from workers.work import Detached, Passed, Progress, Work

Steps = Generator[Progress, None, Outcome | Passed | Detached]
Operation = Callable[[Resident, Work], Outcome | Passed | Detached | Steps]


def train(resident: Resident, work: Work) -> Any:
    """Any operation on a training session. The first one loads torch, for which nobody else needs to wait."""
    from workers.operations import training

    return training.OPERATIONS[work.kind](resident, work)


OPERATIONS: dict[str, Operation] = {
    **inference.OPERATIONS,
    **memory.OPERATIONS,
    **{kind.value: train for kind in Kind if kind.value.startswith("training.")},
}

#: Kinds whose jobs may run joined: several works in, an outcome each out.
BATCHES: dict[str, Callable[[Resident, list[Work]], list[Outcome]]] = {**inference.BATCHES, **memory.BATCHES}

__all__ = ["BATCHES", "OPERATIONS", "Operation", "Steps"]
