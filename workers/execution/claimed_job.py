"""The values that pass through the worker: a claimed job at work, what it waits in, and how it stops."""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, TypeAlias, Unpack

from device_operations.errors import OperationError, failure
from device_operations.jobs import State
from device_operations.wire.json_types import JsonObject
from tasks.database import is_disconnect
from tasks.jobs.lifecycle import Outcome
from tasks.jobs.model import Facts, StoredRequest
from tasks.statements import Row
from workers.devices.libraries import tidy
from workers.devices.onnx.session import Cancel
from workers.devices.onnx.tensors import Feed
from workers.execution.scheduler import Entry

if TYPE_CHECKING:
    from workers.devices.base import Device


#: How far a long job is, as its caller sees it.
ProgressFacts: TypeAlias = JsonObject


@dataclass(slots=True, eq=False)
class ClaimedJob:
    """One claimed job. `cancel` may be tripped from any thread; `deadline` is in the monotonic clock's seconds."""

    entry: Entry
    row: Row
    request: StoredRequest
    cancel: Cancel = field(default_factory=Cancel)
    deadline: float | None = None
    #: The inputs, where they were read while another job had the device.
    feeds: dict[str, Feed] | None = None
    started: float = field(default_factory=time.perf_counter)
    #: When the job was claimed, by the database's clock, where that was ahead of the device; and by this process's.
    ahead: datetime | None = None
    claimed: float = field(default_factory=time.perf_counter)

    @property
    def job_id(self) -> str:
        """The job's id."""
        return self.entry.job_id

    @property
    def kind(self) -> str:
        """The job's kind."""
        return self.entry.kind

    def elapsed_ms(self) -> float:
        """Milliseconds since the job got the device."""
        return round((time.perf_counter() - self.started) * 1000, 3)

    def succeeded(self, result: JsonObject, *, device_ms: float | None = None, **facts: Unpack[Facts]) -> Outcome:
        """The outcome of a job that did what it was asked."""
        took = self.elapsed_ms() if device_ms is None else device_ms
        return Outcome(self.job_id, State.SUCCEEDED, result=result, device_ms=took, facts=facts)

    def withdrawn(self, state: State, error: JsonObject) -> Outcome:
        """The outcome of a job that the device never began."""
        return Outcome(self.job_id, state, error=error)

    def failed(self, error: OperationError, **facts: Unpack[Facts]) -> Outcome:
        """The outcome of a job that failed; being cancelled is an outcome of its own."""
        state = State.CANCELLED if error.code == "cancelled" else State.FAILED
        return Outcome(self.job_id, state, error=error.as_job_error(), device_ms=self.elapsed_ms(), facts=facts)


@dataclass(frozen=True, slots=True)
class Progress:
    """What a long job yields between two steps: the scheduler may run something more urgent before it goes on."""

    facts: ProgressFacts | None = None
    #: Whether it is reported even if another was a moment ago: it has what no later one has.
    always: bool = False


@dataclass(frozen=True, slots=True)
class Detached:
    """What a job that goes on without the device returns: `finish` gives its outcome, on a background thread.

    Jobs that wait their turn on `resource_id` may begin meanwhile.
    """

    finish: Callable[[], Outcome]
    resource_id: str


@dataclass(frozen=True, slots=True)
class PlaceReleased:
    """What a job returns that is done, and whose place on `resource_id` may be taken while its end is recorded.

    Only what the record refuses where this end is refused may wait on that resource.
    """

    outcome: Outcome
    resource_id: str


#: What a job gives that is done with the device.
Performed: TypeAlias = Outcome | PlaceReleased | Detached

#: An operation that gives the device away between its steps, and what it gives at its end.
Steps: TypeAlias = Generator[Progress, None, Performed]


def named(error: BaseException, device: Device | None = None) -> OperationError:
    """Any exception as one with a code. One that has no class of its own is an `internal_error`."""
    if isinstance(error, OperationError):
        return error
    if isinstance(error, MemoryError):
        return failure("out_of_memory", f"the worker ran out of memory: {error}")
    if is_disconnect(error):
        return failure("database_unavailable", f"PostgreSQL went away while the job needed it: {tidy(error)}")
    if device is not None:
        return device.classify(error)
    return failure("internal_error", f"{type(error).__name__}: {error}", detail={"type": type(error).__name__})


def clear_calls(error: BaseException, device: Device) -> None:
    """Gives back what the calls that an error came through still hold: their tensors, for as long as the error lives.

    torch's error of CUDA's memory outlived its job, and with it all that had filled the device.
    """
    link: BaseException | None = error
    while link is not None:
        traceback.clear_frames(link.__traceback__)
        link = link.__cause__ or link.__context__
    gc.collect()
    device.trim()
