"""What ended jobs do to training sessions: a step and its number commit with the job, or not at all.

step applied     the number, loss and history move on; guarded by the number before and the epoch (fencing)
step unapplied   its number is free again, and queued steps with higher numbers fail with `sequence_gap`
"""

from __future__ import annotations

from sqlalchemy import Connection

from device_operations.errors import error_of, failure, from_job_error
from device_operations.jobs import State
from device_operations.wire.json_types import JsonObject
from tasks.devices import store as devices
from tasks.jobs.model import Ending, Fallen, JobRow, resource_of
from tasks.training import checkpoints, steps
from tasks.training import sessions as store
from tasks.training.facts import CheckpointFacts, InitializeFacts, NewCheckpoint, SessionFacts, StepFacts

#: The error of jobs that were submitted for a session after what ended it.
SESSION_CLOSED = failure(
    "session_closed", "The training session was ended by a job submitted before; initialize a new one."
).as_job_error()

#: The error of steps whose predecessor ended without being applied.
SEQUENCE_GAP = failure(
    "sequence_gap", "A step before this one ended without being applied, and its number is free again; send both again."
).as_job_error()


def number_of(session_id: str, sequence: int) -> str:
    """What a step needs of its predecessor, as a resource that falls when that one ends unapplied."""
    return f"{session_id}#{sequence}"


def initialized(connection: Connection, job: JobRow, facts: InitializeFacts, epoch: int | None) -> Fallen:
    """A `training.initialize` ended: the session is ready as measured, or failed and its reservation given back."""
    session_id = resource_of(job)
    if job["state"] == State.SUCCEEDED:
        assert epoch is not None
        settled(connection, session_id, epoch, facts["session"])
        return []
    error = error_of(job["error"], job["state"], "The session's initialization")
    return over(connection, session_id, "failed", error)


def settled(connection: Connection, session_id: str, epoch: int, facts: SessionFacts) -> None:
    """A session is on its device: what was reserved for it becomes what was measured.

    Raises `session_closed` where it has ended meanwhile, or the device has another epoch.
    """
    before = store.settle(connection, session_id, epoch, facts)
    if before is None:
        raise failure("session_closed", f"training session {session_id} is no longer this worker's to hold")
    devices.adjust_reservation(connection, before["device_id"], facts["memory_bytes"] - before["before"])


def over(connection: Connection, session_id: str, state: str, error: JsonObject | None) -> Fallen:
    """A session is over: its reservation is free again, and jobs that need it fail with `error`."""
    gone = store.end(connection, session_id, state, error=error if state != "ended" else None)
    if gone is None:
        return []
    devices.adjust_reservation(connection, gone["device_id"], -gone["before"])
    return [(session_id, error)] if error else []


def applied(connection: Connection, ending: Ending, facts: StepFacts, epoch: int) -> list[JobRow]:
    """Ends a `training.step` that was applied. One that was cut short counts with the steps that it made.

    Raises, with nothing written, where the step is not the session's next one under `epoch`: who held the session
    before has nothing to say about it any more.
    """
    step = facts["applied"]
    held, ended = steps.end_applied(connection, ending, epoch, step)
    if held and ended is None:
        session = store.get(connection, step["session_id"])
        if session is not None and session["epoch"] == epoch and session["applied_sequence"] < step["sequence"] - 1:
            # It ran while the step before was being recorded, and that could not be.
            raise from_job_error(SEQUENCE_GAP)
        raise failure("internal_error", f"step {step['sequence']} of session {step['session_id']} is not the next one")
    return [ended] if ended else []


def stepped(connection: Connection, job: JobRow, facts: object, epoch: int | None) -> Fallen:
    """A `training.step` ended that was not applied, or changes nothing."""
    session_id = resource_of(job)
    sequence = _sequence_of(job)
    if job["state"] == State.SUCCEEDED or sequence is None:
        store.touch(connection, session_id)
        return []
    freed = steps.free_numbers(connection, session_id, sequence, job["id"])
    return [(number_of(session_id, number), SEQUENCE_GAP) for number in freed]


def checkpointed(connection: Connection, job: JobRow, facts: CheckpointFacts, epoch: int | None) -> Fallen:
    """A `training.checkpoint` ended: the checkpoint is recorded with the job's end, or is not there."""
    if job["state"] == State.SUCCEEDED:
        kept(connection, facts["checkpoint"])
        store.touch(connection, facts["checkpoint"]["session_id"])
    return []


def kept(connection: Connection, checkpoint: NewCheckpoint, epoch: int | None = None) -> bool:
    """Records a whole checkpoint, and lets go of older ones and of the log behind it; False unless `epoch` holds it."""
    if not checkpoints.insert(connection, checkpoint, epoch):
        return False
    session_id = checkpoint["session_id"]
    checkpoints.shorten_log(connection, session_id)
    if checkpoint["keep_last"]:
        checkpoints.retire(connection, session_id, checkpoint["keep_last"], automatic_only=checkpoint["job_id"] is None)
    return True


def ended(connection: Connection, job: JobRow, facts: CheckpointFacts, epoch: int | None) -> Fallen:
    """A `training.end_session` ended: what was submitted for the session after it fails."""
    if job["state"] != State.SUCCEEDED:
        return []
    if facts.get("checkpoint"):
        kept(connection, facts["checkpoint"])
    return over(connection, job["needs"][0], "ended", SESSION_CLOSED)


def lose(connection: Connection, device_id: str, epoch: int) -> list[str]:
    """A worker died: its sessions are brought back by the next epoch, and their jobs wait for that."""
    return store.lose(connection, device_id, epoch)


def _sequence_of(job: JobRow) -> int | None:
    """The number that a step was given, read from what it needs of its predecessor."""
    numbers = [need.rpartition("#")[2] for need in job["needs"] if "#" in need]
    return int(numbers[0]) + 1 if numbers else None
