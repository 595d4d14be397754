"""The values of a job: as it is recorded, as PostgreSQL gives it, as it is claimed, and as it ended."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import NotRequired, TypeAlias, TypedDict

from device_operations.jobs import State
from device_operations.wire.json_types import FreeJson, JsonObject
from tasks.inference.facts import LoadFacts, RunFacts, UnloadFacts
from tasks.memory.facts import HashFacts
from tasks.training.facts import CheckpointFacts, InitializeFacts, StepFacts

#: A request as its job's record holds it: checked at submission against the kind's model, completed by its planner.
StoredRequest: TypeAlias = FreeJson


class JobRow(TypedDict):
    """A job's row: the selected ones of `tasks.jobs.store.columns.COLUMNS`. Times are aware datetimes in UTC."""

    #: A UUID that the submitter chose: this service, or a Celery caller.
    id: str
    #: The order of submission.
    seq: int
    #: A value of `device_operations.jobs.Kind`.
    kind: str
    #: A value of `device_operations.jobs.State`.
    state: str
    #: The device that the job is for; None for a Celery caller's job until some device's worker takes it.
    device_id: str | None
    #: The Celery queue that the job was submitted to.
    queue: str
    #: 0 to 9; higher goes first.
    priority: int
    #: How often the device has begun with the job.
    attempt: int
    #: How often it may begin at most.
    max_attempts: int
    #: Workers that died during the job.
    deaths: int
    #: The noun of `resource_id`.
    resource_type: str | None
    #: The allocation, model, session or checkpoint that the job makes or changes.
    resource_id: str | None
    #: The allocations, models and sessions that the job uses.
    needs: list[str]
    #: The jobs that must have ended before this one starts.
    after: list[str]
    #: The owner of the job and of what it makes.
    owner: str
    #: The caller's own names and values.
    labels: dict[str, str]
    #: When the job was recorded.
    submitted_at: datetime
    #: When a scheduled or retrying job becomes `queued`.
    due_at: datetime | None
    #: When the device began with the last attempt.
    started_at: datetime | None
    #: When the job ended.
    finished_at: datetime | None
    #: When a job that has not started expires.
    expires_at: datetime | None
    #: Seconds that the job may run.
    timeout_seconds: float | None
    #: Milliseconds that the job had the device.
    device_ms: float | None
    #: The epoch of the device under which the job is claimed or ended; None while no worker has a claim on it.
    epoch: int | None
    #: Whether its end was asked for.
    cancel_requested: bool
    #: How far a long job is.
    progress: FreeJson | None
    #: The result of a job that succeeded.
    result: FreeJson | None
    #: The error of a job that ended otherwise, or of the last attempt: `code`, `message`, `retryable`, `detail`.
    error: FreeJson | None
    #: What Celery is given at the end of a Celery caller's task: see `tasks.celery_bridge.outbox`.
    celery: FreeJson | None
    #: The address that is called once the job has ended.
    webhook_url: str | None
    #: The ended job that this one tries again.
    retried_from: str | None


class ClaimedRow(JobRow):
    """The row of a job as its claim gives it, or as it is published again: with its request."""

    #: The request as its kind's planner stored it.
    request: FreeJson
    #: The database's clock at a claim ahead of the device.
    claimed_at: NotRequired[datetime]


class AskedRow(JobRow):
    """The row of a job with its request and what its caller gave of that: see `tasks.jobs.options`."""

    request: FreeJson
    asked: FreeJson | None


class RequiringRow(JobRow):
    """The row of a job that runs only if the jobs `requires` succeed."""

    requires: list[str]


class Predecessor(TypedDict):
    """What a job that waits for another must know of it."""

    id: str
    state: str
    owner: str


class FailedPredecessor(TypedDict):
    """A job that had to succeed for another to run, and did not. `JobRow` has these keys too."""

    id: str
    kind: str
    state: str
    error: FreeJson | None


class ClaimedSince(TypedDict):
    """A job that a worker has claimed, and how long ago it started, or else was submitted."""

    id: str
    cancel_requested: bool
    age_seconds: float


class WebhookRow(JobRow):
    """The row of an ended job whose webhook is due, with the number of this delivery."""

    webhook_attempt: int


class KeyAnswer(TypedDict):
    """What was answered for an idempotency key: the hash of the body, and the ids that were made, in order."""

    body_sha256: str
    job_ids: list[str]


class CancelRequested(TypedDict):
    """An open job that is to be cancelled, and the device whose worker has to know."""

    id: str
    device_id: str


class KindCount(TypedDict):
    """How many jobs of a kind are in a state."""

    kind: str
    state: str
    jobs: int


def resource_of(job: JobRow) -> str:
    """The resource that the job makes, uses or takes away. Empty, which no record's id is, if it was never planned."""
    return job["resource_id"] or ""


class ResourceView(TypedDict):
    """What a job makes or changes."""

    type: str | None
    id: str


class TimingsView(TypedDict):
    """Milliseconds from submission to start, on the device, and from submission to the end."""

    queued_ms: float | None
    device_ms: float | None
    total_ms: float | None


class JobView(TypedDict):
    """A job as its callers see it: the fields of `device_operations.jobs.Job`. Times are aware datetimes."""

    job_id: str
    kind: str
    state: str
    celery_state: str
    device_id: str | None
    queue: str
    priority: int
    attempt: int
    max_attempts: int
    #: Jobs before it in its device's queue, if that was asked for.
    queue_position: int | None
    progress: FreeJson | None
    resource: ResourceView | None
    submitted_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    expires_at: datetime | None
    timings: TimingsView
    result: FreeJson | None
    error: FreeJson | None
    owner: str
    labels: dict[str, str]
    deaths: int
    retried_from: str | None


@dataclass(frozen=True, slots=True)
class NewJob:
    """A job to be recorded. `delay_seconds` and `expires_in_seconds` count from the database's clock."""

    id: str
    kind: str
    device_id: str | None
    queue: str
    #: The request as the kind's planner stores it.
    request: FreeJson
    owner: str
    priority: int = 5
    state: str = State.QUEUED.value
    max_attempts: int = 1
    resource_type: str | None = None
    resource_id: str | None = None
    needs: Sequence[str] = ()
    after: Sequence[str] = ()
    #: Those of `after` that must be jobs of the same owner; an admin may name any owner's.
    own_after: Sequence[str] = ()
    #: Blobs that may not expire while the job is open.
    blob_ids: Sequence[str] = ()
    labels: dict[str, str] = field(default_factory=dict)
    delay_seconds: float | None = None
    expires_in_seconds: float | None = None
    timeout_seconds: float | None = None
    #: What Celery is given at the end: see `tasks.celery_bridge.outbox`.
    celery: FreeJson | None = None
    webhook_url: str | None = None
    error: FreeJson | None = None
    #: The predecessors that have to succeed; None for a job that runs however they end.
    requires: Sequence[str] | None = None
    #: What the caller gave, as far as `request` does not say it.
    asked: FreeJson | None = None
    retried_from: str | None = None
    #: Jobs that may wait for the device, this one included; None if the queue's length does not count.
    queue_limit: int | None = None


@dataclass(frozen=True, slots=True)
class Ending:
    """How a job ended: `state` is terminal, with a `result` or an `error`."""

    id: str
    state: str
    result: JsonObject | None = None
    error: JsonObject | None = None
    device_ms: float | None = None
    #: When the device began with a job that was claimed ahead, if no statement has recorded that yet.
    started_at: datetime | None = None


class Facts(HashFacts, LoadFacts, RunFacts, UnloadFacts, InitializeFacts, StepFacts, CheckpointFacts, total=False):
    """What a worker found out about a job, for the effects of its end: the facts of any kind."""


#: Resources that are gone with a job, each with the error that jobs needing it fail with.
Fallen: TypeAlias = list[tuple[str, JsonObject]]


@dataclass(slots=True)
class Outcome:
    """What came of a job on a device."""

    job_id: str
    state: State
    result: JsonObject | None = None
    error: JsonObject | None = None
    device_ms: float | None = None
    facts: Facts = field(default_factory=Facts)
    #: Makes the result once the device is free, before the end is recorded, if making it takes long.
    pending: Callable[[], JsonObject] | None = None

    def ending(self, claimed: ClaimedRow) -> Ending:
        """The same, as the store records it; `claimed` is the job's row as the worker has it."""
        device_ms = None if self.device_ms is None else round(self.device_ms, 3)
        # The start of a job that was claimed ahead is recorded with its end.
        started_at = claimed["started_at"] if "claimed_at" in claimed else None
        return Ending(self.job_id, self.state.value, self.result, self.error, device_ms, started_at)
