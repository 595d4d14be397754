"""Training sessions in a device's memory: checkpointed automatically, exported ahead of need, and let go.

How one comes into memory is in `workers.operations.training.restoring`. Everything here runs on the device's thread;
automatic checkpoints are written on another, and recorded on the completer's.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import structlog

from device_operations.errors import OperationError
from device_operations.jobs import new_id
from device_operations.requests.training import Initialize
from tasks.devices import store as device_store
from tasks.statements import transaction
from tasks.training import effects
from tasks.training import sessions as store
from tasks.training.facts import NewCheckpoint, SessionFacts
from workers.execution.claimed_job import clear_calls, named
from workers.operations.training.files import (
    clear_scratch,
    drop_checkpoint,
    keep_checkpoint,
)
from workers.resident.residents import Resident
from workers.training.onnx.export import export_ahead
from workers.training.session import TrainingSession

log = structlog.get_logger(__name__)


#: Automatic checkpoints of one session on their way to the disk; where it is slower than training, training waits.
WRITING_AT_ONCE = 2


@dataclass(slots=True, eq=False)
class HeldSession:
    """A session in this device's memory."""

    session_id: str
    owner: str
    session: TrainingSession
    #: The dataset job that the session is in the middle of.
    run_job_id: str | None = None
    #: The step of the last checkpoint that was taken, recorded or on its way; and the sequence of the last recorded.
    checkpoint_step: int = 0
    checkpoint_sequence: int = -1
    writing: threading.BoundedSemaphore = field(default_factory=lambda: threading.BoundedSemaphore(WRITING_AT_ONCE))
    #: Whether a checkpoint is being written so that the session can leave the device.
    leaving: bool = False
    #: Whether its graph was exported ahead of need, or is about to be: once, for the first shapes that are known.
    exported: bool = False

    @property
    def spec(self) -> Initialize:
        """The request that made the session."""
        return self.session.spec


def let_go(resident: Resident) -> None:
    """Drops sessions that have ended, and unloads those whose lease is over, checkpointed first."""
    with resident.engine.connect() as connection:
        recorded = store.still_held(connection, resident.device_id, resident.epoch)
    for session_id, held in list(resident.training.items()):
        if session_id not in recorded:
            del resident.training[session_id]
            clear_scratch(resident, session_id)
        elif recorded[session_id]["idle"] and not held.leaving:
            if held.session.sequence > held.checkpoint_sequence and held.session.sequence > 0:
                held.leaving = True
                checkpoint_beside(resident, held, leaving=True)
            else:
                _unload(resident, held)


def export_in_spare_time(resident: Resident, held: HeldSession) -> None:
    """Has the session's graph exported once no job waits, so that its first export or validation need not."""
    if held.exported:
        return
    shapes = held.session.state.last_inputs
    if shapes is None:
        return
    held.exported = True

    def export() -> None:
        if resident.training.get(held.session_id) is not held:
            return
        try:
            export_ahead(held.session.definition, shapes)
        except OperationError as error:
            log.info("no graph is exported ahead", session_id=held.session_id, why=error.message)

    resident.spare.append(export)


def checkpoint_beside(resident: Resident, held: HeldSession, *, leaving: bool = False) -> None:
    """Takes an automatic checkpoint: copied now, written and recorded on a background thread."""
    held.writing.acquire()
    try:
        snapshot = held.session.snapshot()
    except BaseException:
        held.writing.release()
        raise
    held.checkpoint_step = snapshot.step
    run_job_id = held.run_job_id if held.session.state.unfinished_run is not None else None
    row = {
        "session_id": held.session_id, "owner": held.owner, "keep_last": held.spec.keep_last, "run_job_id": run_job_id,
    }  # fmt: skip

    def write() -> None:
        """On a background thread; recorded on the completer's, after the history up to it, which it stands for."""
        try:
            checkpoint = keep_checkpoint(resident, snapshot, {**row, "checkpoint_id": new_id()})
        except Exception as error:  # noqa: BLE001 - training goes on; the session's record says what went wrong
            known = named(error)
            log.error("automatic checkpoint failed", session_id=held.session_id, error=known.message)
            resident.record(lambda: _record_failure(resident, held, known))
        else:
            resident.record(lambda: _record(resident, held, checkpoint))
        finally:
            held.leaving = held.leaving and not leaving
            held.writing.release()

    resident.background.submit(write)


def session_facts(held: HeldSession, state: str = "ready") -> SessionFacts:
    """What the session's record is to hold of it, as built and measured."""
    session = held.session
    return {
        "state": state, "step": session.step, "sequence": session.sequence, "samples_seen": session.state.samples_seen,
        "learning_rate": session.learning_rate, "memory_bytes": session.memory_bytes(),
    }  # fmt: skip


# ---- from the record


# ---- leaving


def _record(resident: Resident, held: HeldSession, checkpoint: NewCheckpoint) -> None:
    with transaction(resident.engine) as connection:
        recorded = effects.kept(connection, checkpoint, resident.epoch)
        if recorded:
            store.set_error(connection, held.session_id, None)
    if not recorded:
        drop_checkpoint(resident, checkpoint)
        return
    held.checkpoint_sequence = max(held.checkpoint_sequence, checkpoint["sequence"])


def _record_failure(resident: Resident, held: HeldSession, error: OperationError) -> None:
    with resident.engine.connect() as connection:
        store.set_error(connection, held.session_id, error.as_job_error())


def _unload(resident: Resident, held: HeldSession) -> None:
    with transaction(resident.engine) as connection:
        freed = store.unload(connection, held.session_id, resident.epoch)
        if freed is None:
            return
        device_store.adjust_reservation(connection, resident.device_id, -freed)
    del resident.training[held.session_id]
    log.info("session unloaded", session_id=held.session_id, freed_bytes=freed)


def classified(resident: Resident, error: BaseException) -> OperationError:
    """A step's error with its code; raised on where the device is lost."""
    known = named(error, resident.device)
    if known.code == "out_of_memory":
        clear_calls(error, resident.device)
    if known.code == "device_lost":
        raise known from error
    return known
