"""The job: its kinds, its states and the transitions between them, and the value that callers see.

    scheduled ──▶ queued ──▶ reserved ──▶ running ──▶ succeeded
        │           │           │        │  ▲  │
        │           │           │        ▼  │  ├────▶ failed
        │           │           │      retrying│
        │           │           │        │     └────▶ cancelled
        └───────────┴───────────┴────────┴──────────▶ cancelled, expired, failed

A job is `reserved` while it waits for its device, also where its worker has claimed it ahead; `running` begins when the
device begins with it. A run that is over within milliseconds may go from `reserved` to its end, with its start recorded
then. A claimed job goes back to `queued` when its worker died and the job may run again. A terminal state never
changes. A job whose claim PostgreSQL lost in a crash waits again, and goes from there to the end that it had.

`TRANSITIONS` is the one table of this: the store's UPDATEs take the states that they may leave from it, and a trigger
in the database, made from it, refuses every other change.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from pydantic import BaseModel, ConfigDict

from device_operations.wire.json_types import FreeJson


class State(StrEnum):
    """Where a job stands."""

    SCHEDULED = "scheduled"
    QUEUED = "queued"
    RESERVED = "reserved"
    RUNNING = "running"
    RETRYING = "retrying"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"

    @property
    def terminal(self) -> bool:
        """Whether the job has ended for good."""
        return self in TERMINAL

    @property
    def celery(self) -> str:
        """Celery's name for this state."""
        return _CELERY[self]


TERMINAL = frozenset({State.SUCCEEDED, State.FAILED, State.CANCELLED, State.EXPIRED})
#: States from which a worker may claim a job.
CLAIMABLE = frozenset({State.SCHEDULED, State.QUEUED, State.RESERVED, State.RETRYING})
#: States in which a worker may hold a claim on a job.
CLAIMED = frozenset({State.RESERVED, State.RUNNING})
#: States that have not ended.
OPEN = CLAIMABLE | CLAIMED


@dataclass(frozen=True, slots=True)
class Transition:
    """One way in which a job changes its state: from any of `leaving` to any of `entering`."""

    leaving: frozenset[State]
    entering: frozenset[State]


#: A worker received the job's message.
RECEIVE = Transition(frozenset({State.QUEUED}), frozenset({State.RESERVED}))
#: The time of a scheduled job, or of another attempt, has come.
FALL_DUE = Transition(frozenset({State.SCHEDULED, State.RETRYING}), frozenset({State.QUEUED}))
#: A worker claimed the job for its device, which begins with it now.
CLAIM = Transition(CLAIMABLE, frozenset({State.RUNNING}))
#: A worker claimed the job ahead of its device.
CLAIM_AHEAD = Transition(CLAIMABLE, frozenset({State.RESERVED}))
#: The device began with a job that was claimed ahead.
BEGIN = Transition(frozenset({State.RESERVED}), frozenset({State.RUNNING}))
#: The worker that claimed the job ended it.
FINISH = Transition(CLAIMED, TERMINAL)
#: The worker that claimed the job puts it back for another attempt.
RETRY = Transition(CLAIMED, frozenset({State.RETRYING}))
#: The worker that claimed the job is gone, and the job may run again.
REQUEUE = Transition(CLAIMED, frozenset({State.QUEUED}))
#: The job was ended by another than the worker that claimed it: it never ran, or its worker is gone.
WITHDRAW = Transition(OPEN, TERMINAL - {State.SUCCEEDED})
#: An end is recorded again: PostgreSQL crashed and lost it, and perhaps the claim before it.
RECOVER = Transition(OPEN, TERMINAL)

#: Every transition, by name. Tests hold the store's UPDATEs and the database's trigger to them.
TRANSITIONS: dict[str, Transition] = {
    "receive": RECEIVE,
    "fall_due": FALL_DUE,
    "claim": CLAIM,
    "claim_ahead": CLAIM_AHEAD,
    "begin": BEGIN,
    "finish": FINISH,
    "retry": RETRY,
    "requeue": REQUEUE,
    "withdraw": WITHDRAW,
    "recover": RECOVER,
}

#: The other states that may follow each state, by any transition.
FOLLOWING: dict[State, frozenset[State]] = {
    state: frozenset(
        after for way in TRANSITIONS.values() if state in way.leaving for after in way.entering if after != state
    )
    for state in State
}

_CELERY = {
    State.SCHEDULED: "PENDING",
    State.QUEUED: "PENDING",
    State.RESERVED: "RECEIVED",
    State.RUNNING: "STARTED",
    State.RETRYING: "RETRY",
    State.SUCCEEDED: "SUCCESS",
    State.FAILED: "FAILURE",
    State.CANCELLED: "REVOKED",
    State.EXPIRED: "REVOKED",
}


class Kind(StrEnum):
    """What a job does. The Celery task of a kind is `device_operations.<kind>`."""

    MEMORY_ALLOCATE = "memory.allocate"
    MEMORY_DEALLOCATE = "memory.deallocate"
    MEMORY_COPY = "memory.copy"
    MEMORY_CLEAR = "memory.clear"
    MEMORY_WRITE = "memory.write"
    MEMORY_READ = "memory.read"
    INFERENCE_LOAD_MODEL = "inference.load_model"
    INFERENCE_RUN = "inference.run"
    INFERENCE_UNLOAD_MODEL = "inference.unload_model"
    INFERENCE_CLOSE_SESSION = "inference.close_session"
    TRAINING_INITIALIZE = "training.initialize"
    TRAINING_STEP = "training.step"
    TRAINING_CHECKPOINT = "training.checkpoint"
    TRAINING_VALIDATE = "training.validate"
    TRAINING_END_SESSION = "training.end_session"

    @property
    def task(self) -> str:
        """The name of the kind's Celery task."""
        return f"device_operations.{self.value}"


#: The prefix of every Celery task's name.
TASK_PREFIX = "device_operations."


class Resource(BaseModel):
    """What a job makes: known at submission, so that dependent jobs can be submitted at once."""

    type: str
    id: str


class Timings(BaseModel):
    """Milliseconds from submission to start, on the device, and from submission to the end."""

    queued_ms: float | None = None
    device_ms: float | None = None
    total_ms: float | None = None


class Job(BaseModel):
    """One unit of work as every caller sees it."""

    model_config = ConfigDict(extra="allow")

    job_id: str
    kind: str
    state: State
    celery_state: str
    device_id: str | None
    queue: str
    priority: int
    attempt: int
    max_attempts: int
    queue_position: int | None = None
    progress: FreeJson | None = None
    resource: Resource | None = None
    submitted_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None
    expires_at: datetime | None = None
    timings: Timings = Timings()
    result: FreeJson | None = None
    error: FreeJson | None = None
    owner: str
    labels: dict[str, str] = {}
    #: The ended job that this one tries again.
    retried_from: str | None = None

    @property
    def terminal(self) -> bool:
        """Whether the job has ended for good."""
        return self.state.terminal


def new_id() -> str:
    """A UUIDv7 (RFC 9562): 48 bits of Unix milliseconds first, so that ids sort by time of making."""
    value = (time.time_ns() // 1_000_000) << 80 | _random_bits()
    value = value & ~(0xF << 76) | 7 << 76
    value = value & ~(0x3 << 62) | 2 << 62
    digits = f"{value:032x}"
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


#: How many ids' random bits are read from the system at once: a read lets go of the interpreter, each time.
_DRAWN_AT_ONCE = 256

_drawn: list[int] = []


def _random_bits() -> int:
    """80 random bits, given out once. Any thread may call."""
    try:
        return _drawn.pop()
    except IndexError:
        noise = os.urandom(10 * _DRAWN_AT_ONCE)
        first, *rest = (int.from_bytes(noise[at : at + 10], "big") for at in range(0, len(noise), 10))
        _drawn.extend(rest)
        return first


if hasattr(os, "register_at_fork"):
    # A forked child would otherwise give the ids that its parent gives.
    os.register_at_fork(after_in_child=_drawn.clear)
