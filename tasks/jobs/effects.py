"""What the end of a job does to the records of what it made or used, one module for each noun.

An `Effect` is called with the ended job's row, the worker's facts and the epoch, and returns the resources that fell
with the job, each with the error that jobs needing it fail with. `tasks.kinds` says which kind has which. `lose` is
what a worker's death does to the records of every noun.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection

from tasks.inference import effects as inference
from tasks.jobs.model import Ending, JobRow
from tasks.memory import effects as memory
from tasks.training import effects as training

#: Resources that fell, each with the error that the jobs needing it fail with.
Fallen = list[tuple[str, dict[str, Any]]]
Effect = Callable[[Connection, JobRow, dict[str, Any], int | None], Fallen]

#: The same for all jobs of a kind that ended together, with the facts of each by job id.
JointEffect = Callable[[Connection, list[JobRow], dict[str, dict[str, Any]], int | None], Fallen]

#: Ends one job and has all its effects, after which nothing falls; gives the rows that ended. Raises if it is refused.
EndAtOnce = Callable[[Connection, Ending, dict[str, Any], int], list[JobRow]]


@dataclass(frozen=True, slots=True)
class Lost:
    """What a device held when its worker died."""

    allocations: list[str] = field(default_factory=list)
    models: list[str] = field(default_factory=list)
    sessions: list[str] = field(default_factory=list)

    def failing(self) -> list[tuple[list[str], dict[str, Any]]]:
        """The lost resources whose jobs fail, with the error. Models come back by themselves."""
        told = []
        if self.allocations:
            told.append((self.allocations, memory.LOST))
        if self.sessions:
            told.append((self.sessions, inference.SESSION_LOST))
        return told


def lose(connection: Connection, device_id: str, epoch: int) -> Lost:
    """A worker died: what its epochs up to `epoch` held on the device is lost, in every noun's records."""
    training.lose(connection, device_id, epoch)
    return Lost(
        allocations=memory.lose(connection, device_id, epoch),
        models=inference.lose_models(connection, device_id),
        sessions=inference.lose_sessions(connection, device_id, epoch),
    )
