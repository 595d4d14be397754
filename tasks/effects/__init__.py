"""What the end of a job does to the records of what it made or used, one module for each noun.

Each noun's module offers `EFFECTS`: for a kind, the function called with the ended job's row, the worker's facts and
the epoch. It returns the resources that fell with the job, each with the error that jobs needing it fail with.
`TOGETHER` holds the same for all jobs of a kind that ended at once, with the facts of each by job id. `lose` is what a
worker's death does to the noun's records.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection

from device_operations.jobs import Kind
from tasks.effects import inference, memory, training
from tasks.store.connection import Row
from tasks.store.jobs import Ending

#: Resources that fell, each with the error that the jobs needing it fail with.
Fallen = list[tuple[str, dict[str, Any]]]
Effect = Callable[[Connection, Row, dict[str, Any], int | None], Fallen]

EFFECTS: dict[str, Effect] = {**inference.EFFECTS, **training.EFFECTS}
TOGETHER: dict[str, Callable[[Connection, list[Row], dict[str, dict[str, Any]], int | None], Fallen]] = {
    **memory.TOGETHER
}

#: Kinds whose jobs may bring facts by which one statement ends them and all that goes with them, and nothing falls:
#: the name of the fact, and that statement. The end of such a job costs no more than that.
AT_ONCE: dict[str, tuple[str, Callable[[Connection, Ending, dict[str, Any], int], list[Row]]]] = {**training.AT_ONCE}

#: Kinds whose jobs still make sense when what they name is gone: they take it away.
_TAKES_AWAY = {
    Kind.INFERENCE_UNLOAD_MODEL: "model",
    Kind.INFERENCE_CLOSE_SESSION: "inference_session",
    Kind.TRAINING_END_SESSION: "training_session",
}


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


def none_for(kind: str, facts: dict[str, Any]) -> bool:
    """Whether the end of such a job touches no other record: a run without a session is the hot path."""
    if kind in TOGETHER:
        return False
    return kind not in EFFECTS or (kind == Kind.INFERENCE_RUN and not facts.get("session_id"))


def at_once(kind: str, facts: dict[str, Any]) -> Callable[[Connection, Ending, dict[str, Any], int], list[Row]] | None:
    """The one statement that ends such a job with all its effects; None where there is none."""
    fact, end = AT_ONCE.get(kind, (None, None))
    return end if fact in facts else None


def apply(connection: Connection, jobs: Sequence[Row], facts: dict[str, dict[str, Any]], epoch: int | None) -> Fallen:
    """Runs the effects of jobs that have just ended, with what the worker found out about each."""
    fallen: Fallen = []
    by_kind: dict[str, list[Row]] = {}
    for job in jobs:
        by_kind.setdefault(job["kind"], []).append(job)
    for kind, ended in by_kind.items():
        if kind in TOGETHER:
            fallen += TOGETHER[kind](connection, ended, facts, epoch)
        elif kind in EFFECTS:
            for job in ended:
                fallen += EFFECTS[kind](connection, job, facts.get(job["id"], {}), epoch)
    return fallen


def does_without(job: Row, resource_ids: Sequence[str]) -> bool:
    """Whether the job can run although these resources fell."""
    return job["kind"] in _TAKES_AWAY


def may_repeat(connection: Connection, job: Row, safe: Collection[str]) -> bool:
    """Whether a job that ran when its worker died may simply be run again."""
    return job["kind"] in safe


def lose(connection: Connection, device_id: str, epoch: int) -> Lost:
    """A worker died: what its epochs up to `epoch` held on the device is lost, in every noun's records."""
    training.lose(connection, device_id, epoch)
    return Lost(
        allocations=memory.lose(connection, device_id, epoch),
        models=inference.lose_models(connection, device_id),
        sessions=inference.lose_sessions(connection, device_id, epoch),
    )
