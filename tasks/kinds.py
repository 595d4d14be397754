"""What a kind of job is: one entry for each, which everything that asks about a kind reads.

To add a kind: a member of `device_operations.jobs.Kind`, its request in `device_operations.requests.kinds`, an entry in
`KINDS` with its functions, what it does on a device in `workers.operations`, and a row in docs/operations.md. A test
names what is missing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from device_operations.errors import failure
from device_operations.jobs import Kind
from device_operations.requests.base import JobRequest
from device_operations.requests.kinds import REQUESTS
from device_operations.wire.json_types import FreeJson
from tasks.devices.directory import Directory
from tasks.inference import effects as inference_effects
from tasks.inference import plan as inference
from tasks.jobs.effects import Effect, EndAtOnce, JointEffect
from tasks.jobs.model import Facts
from tasks.memory import effects as memory_effects
from tasks.memory import plan as memory
from tasks.owners import Asker
from tasks.planning.context import Context
from tasks.planning.earlier import Earlier
from tasks.planning.plan import Plan
from tasks.training import effects as training_effects
from tasks.training import plan as training

#: Makes the plan of a checked request of the kind, under a job id; raises why it is refused. Never writes the database.
Planner: TypeAlias = Callable[[Context, Any, str], Plan]

#: Notes what a planned job will make, so that later entries of the same submission can name it.
Foresee: TypeAlias = Callable[[Earlier, str, FreeJson], None]

#: Whether a request can be planned without reading the database and without storing anything.
IsLight: TypeAlias = Callable[[Directory, Asker, Any], bool]


@dataclass(frozen=True, slots=True)
class KindSpec:
    """One kind of job: how it is planned, what its end does to the records, and what may be done with it."""

    kind: Kind
    planner: Planner
    foresee: Foresee | None = None
    is_light: IsLight | None = None
    #: What the end of one such job does to the records of what it made or used.
    effect: Effect | None = None
    #: The same for all such jobs that ended together; a kind has one or the other.
    joint_effect: JointEffect | None = None
    #: The fact without which `effect` does nothing; None if it always may do something.
    effect_fact: str | None = None
    #: The fact with which one statement ends a job and has all its effects, and that statement.
    end_at_once: tuple[str, EndAtOnce] | None = None
    #: Whether a job that its device had begun may run again after its worker died.
    repeatable: bool = False
    #: Whether a job that needs nothing but one model or session changes nothing but its own record.
    leaves_nothing: bool = False
    #: Whether a job still makes sense when what it names is gone: it takes it away.
    takes_away: bool = False
    #: Whether a model is, or is no longer, on its device after the job.
    changes_models: bool = False
    #: Whether the job is a run of a model: it is counted as one, and without a session it stands for one of its own.
    runs_model: bool = False
    #: Whether jobs that wait together may run on the device as one batch.
    joined: bool = False
    #: Whether whole batches may be claimed while another job has the device.
    claimed_ahead: bool = False

    @property
    def request(self) -> type[JobRequest]:
        """The model of the kind's requests. What trying a job again needs to know stands there."""
        return REQUESTS[self.kind]

    def changes_records(self, facts: Facts) -> bool:
        """Whether the end of a job with these facts may change other records than its own."""
        if self.effect is None:
            return self.joint_effect is not None
        return self.effect_fact is None or bool(facts.get(self.effect_fact))

    def ends_at_once(self, facts: Facts) -> EndAtOnce | None:
        """The one statement that ends a job with these facts and has all its effects; None if there is none."""
        fact, end = self.end_at_once or (None, None)
        return end if fact in facts else None


_SPECS = (
    KindSpec(
        Kind.MEMORY_ALLOCATE,
        memory.plan_allocate,
        foresee=memory.foresee,
        joint_effect=memory_effects.allocated,
        joined=True,
    ),
    KindSpec(
        Kind.MEMORY_DEALLOCATE,
        memory.plan_deallocate,
        joint_effect=memory_effects.deallocated,
        repeatable=True,
        joined=True,
    ),
    KindSpec(Kind.MEMORY_COPY, memory.plan_copy, joint_effect=memory_effects.changed),
    KindSpec(Kind.MEMORY_CLEAR, memory.plan_clear, joint_effect=memory_effects.changed),
    KindSpec(Kind.MEMORY_WRITE, memory.plan_write, joint_effect=memory_effects.changed),
    KindSpec(Kind.MEMORY_READ, memory.plan_read, joint_effect=memory_effects.was_read),
    KindSpec(
        Kind.INFERENCE_LOAD_MODEL,
        inference.plan_load,
        foresee=inference.foresee,
        effect=inference_effects.loaded,
        repeatable=True,
        changes_models=True,
    ),
    KindSpec(
        Kind.INFERENCE_RUN,
        inference.plan_run,
        is_light=inference.is_light,
        effect=inference_effects.ran,
        effect_fact="session_id",
        repeatable=True,
        leaves_nothing=True,
        runs_model=True,
        joined=True,
        claimed_ahead=True,
    ),
    KindSpec(
        Kind.INFERENCE_UNLOAD_MODEL,
        inference.plan_unload,
        effect=inference_effects.unloaded,
        repeatable=True,
        takes_away=True,
        changes_models=True,
    ),
    KindSpec(
        Kind.INFERENCE_CLOSE_SESSION,
        inference.plan_close,
        effect=inference_effects.closed,
        repeatable=True,
        takes_away=True,
    ),
    # Training is fenced by epoch and sequenced: what was applied is not applied again.
    KindSpec(
        Kind.TRAINING_INITIALIZE,
        training.plan_initialize,
        foresee=training.foresee,
        effect=training_effects.initialized,
        repeatable=True,
    ),
    KindSpec(
        Kind.TRAINING_STEP,
        training.plan_step,
        is_light=training.is_light,
        effect=training_effects.stepped,
        end_at_once=("applied", training_effects.applied),
        repeatable=True,
    ),
    KindSpec(
        Kind.TRAINING_CHECKPOINT,
        training.plan_checkpoint,
        effect=training_effects.checkpointed,
        repeatable=True,
    ),
    KindSpec(
        Kind.TRAINING_VALIDATE,
        training.plan_validate,
        is_light=training.is_light,
        repeatable=True,
        leaves_nothing=True,
    ),
    KindSpec(
        Kind.TRAINING_END_SESSION,
        training.plan_end,
        effect=training_effects.ended,
        repeatable=True,
        takes_away=True,
    ),
)

#: Every kind. Its keys are strings as well: `KINDS["inference.run"]`.
KINDS: dict[str, KindSpec] = {spec.kind: spec for spec in _SPECS}


def spec_of(kind: str) -> KindSpec:
    """What the kind of a recorded job is. One that this version does not know has no effect and may nothing."""
    return KINDS.get(kind, _UNKNOWN)


def _refuse(context: Context, request: object, job_id: str) -> Plan:
    raise failure("validation_failed", "jobs of this kind cannot be taken here")


#: Of a kind that a newer version recorded in the same database. Its own `kind` says nothing.
_UNKNOWN = KindSpec(Kind.INFERENCE_RUN, _refuse)
