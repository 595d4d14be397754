"""What the end of a job does to the records of what it made or used, one module for each noun.

An `Effect` is called with the ended job's row, the worker's facts and the epoch, and returns the resources that are
gone with the job. `tasks.kinds` says which kind has which. `lose` is what a worker's death does to every noun's
records.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from sqlalchemy import Connection

from device_operations.wire.json_types import JsonObject
from tasks.inference import effects as inference
from tasks.jobs.model import Ending, Facts, Fallen, JobRow
from tasks.memory import effects as memory
from tasks.training import effects as training

#: What the end of one job does, given the facts about it and the epoch that ran it.
Effect: TypeAlias = Callable[[Connection, JobRow, Facts, int | None], Fallen]

#: The same for all jobs of a kind that ended together, with the facts of each by job id.
JointEffect: TypeAlias = Callable[[Connection, list[JobRow], Mapping[str, Facts], int | None], Fallen]

#: Ends one job and has all its effects, after which nothing falls; gives the rows that ended. Raises if it is refused.
EndAtOnce: TypeAlias = Callable[[Connection, Ending, Facts, int], list[JobRow]]


@dataclass(frozen=True, slots=True)
class Lost:
    """What a device held when its worker died."""

    allocations: list[str] = field(default_factory=list)
    models: list[str] = field(default_factory=list)
    sessions: list[str] = field(default_factory=list)

    def failing(self) -> list[tuple[list[str], JsonObject]]:
        """The lost resources whose jobs fail, with the error. Models come back by themselves."""
        failing: list[tuple[list[str], JsonObject]] = []
        if self.allocations:
            failing.append((self.allocations, memory.LOST))
        if self.sessions:
            failing.append((self.sessions, inference.SESSION_LOST))
        return failing


def lose(connection: Connection, device_id: str, epoch: int) -> Lost:
    """A worker died: what its epochs up to `epoch` held on the device is lost, in every noun's records."""
    training.lose(connection, device_id, epoch)
    return Lost(
        allocations=memory.lose(connection, device_id, epoch),
        models=inference.lose_models(connection, device_id),
        sessions=inference.lose_sessions(connection, device_id, epoch),
    )
