"""Training sessions in a device's memory: built, brought back to where the record says they stand, and let go.

    record ─▶ build ─▶ last whole checkpoint ─▶ replay of the steps logged since ─▶ held

The record is the truth. A session whose memory is not where the record says is dropped and brought back from it.
Everything here runs on the device's thread; automatic checkpoints are written on another, and recorded on the
completer's.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import structlog

from device_operations.errors import OperationError, failure
from device_operations.jobs import new_id
from device_operations.requests.training import Initialize
from tasks.devices import store as device_store
from tasks.jobs import lifecycle
from tasks.memory.admission import reserve
from tasks.statements import Row, transaction
from tasks.training import checkpoints as checkpoint_store
from tasks.training import effects
from tasks.training import sessions as store
from tasks.training import steps as steps_store
from tasks.training.facts import NewCheckpoint, SessionFacts
from tasks.training.named import gone
from workers.execution.claimed_job import clear_calls, named
from workers.operations.training.batches import data_of, options_of, plan_of
from workers.operations.training.files import (
    clear_scratch,
    drop_checkpoint,
    keep_checkpoint,
    read_checkpoint,
    sources_of,
)
from workers.resident.models import make_room
from workers.resident.residents import Resident
from workers.training.onnx.export import export_ahead
from workers.training.outcomes import StepRecord
from workers.training.session import Limits, TrainingSession, build_session

log = structlog.get_logger(__name__)

#: Failures after which a session may still come back later; after any other it is lost.
_PASSING = {
    "insufficient_memory", "out_of_memory", "storage_unavailable", "storage_full", "database_unavailable",
    "device_lost", "cancelled", "timeout",
}  # fmt: skip

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


def begin(resident: Resident, row: Row) -> HeldSession:
    """Builds a recorded session anew: from its description, or from the checkpoint that it is to start with."""
    held = _built(resident, row)
    if row["resumed"]:
        resumed = row["resumed"]
        if not resumed["blob_id"]:
            made = resident.read(checkpoint_store.get, resumed["checkpoint_id"])
            if made is None:
                raise failure("checkpoint_not_found", f"checkpoint {resumed['checkpoint_id']} was not made")
            resumed = made
        held.session.restore(read_checkpoint(resident, resumed["blob_id"], resumed["sha256"], row["session_id"]))
        held.checkpoint_step = held.session.step
    return held


def awake(resident: Resident, session_id: str, job_id: str, sequence: int | None = None) -> HeldSession:
    """The session as the record has it, with everything before this job applied; brought back where it is not held.

    `sequence` is the job's own number, which saves asking the record. Raises what became of the session.
    """
    held = resident.training.get(session_id)
    if held is not None and held.session.intact and not _in_another_run(held, job_id):
        if sequence is not None and held.session.sequence == sequence - 1:
            return held
        if sequence is None and held.session.sequence == _applied_sequence(resident, session_id):
            return held
        log.warning("session is not where its record says", session_id=session_id, sequence=held.session.sequence)
    resident.training.pop(session_id, None)
    held = wake(resident, _row(resident, session_id))
    if sequence is not None and held.session.sequence != sequence - 1:
        raise failure(
            "sequence_gap",
            f"step {sequence} cannot be made: session {session_id} stands at {held.session.sequence}",
        )
    return held


def wake(resident: Resident, row: Row) -> HeldSession:
    """Brings a recorded session back into memory, reserving what it needs; where that cannot be, it is lost."""
    if row["state"] not in store.OPEN:
        raise failure(*gone(row))
    try:
        if not row["reserved_bytes"]:
            _reserve(resident, row)
        held = _restored(resident, row)
    except Exception as error:
        known = named(error, resident.device)
        if known.code not in _PASSING:
            _lose(resident, row, known)
            raise failure("session_lost", f"session {row['session_id']} is lost: {known.message}") from error
        raise known from error
    state = "restored" if row["state"] == "initializing" else row["state"]
    with transaction(resident.engine) as connection:
        effects.settled(connection, row["session_id"], resident.epoch, facts(held, state))
    resident.training[row["session_id"]] = held
    return held


def restore_all(resident: Resident, rows: list[Row]) -> None:
    """Brings back what the last epoch held. One that cannot come back must not keep the others away."""
    for row in rows:
        try:
            held = wake(resident, row)
        except Exception as error:  # noqa: BLE001 - told in the session's record, or tried again by its next step
            log.error("session did not come back", session_id=row["session_id"], error=named(error).message)
            continue
        log.info("session is back", session_id=held.session_id, step=held.session.step, sequence=held.session.sequence)


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
    """Takes an automatic checkpoint: copied now, written and recorded on a thread beside."""
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
        """Beside the device; recorded on the completer's thread, after the history up to it, which it stands for."""
        try:
            checkpoint = keep_checkpoint(resident, snapshot, {**row, "checkpoint_id": new_id()})
        except Exception as error:  # noqa: BLE001 - training goes on; the session's record says what went wrong
            known = named(error)
            log.error("automatic checkpoint failed", session_id=held.session_id, error=known.message)
            resident.record(lambda: _tell_failed(resident, held, known))
        else:
            resident.record(lambda: _record(resident, held, checkpoint))
        finally:
            held.leaving = held.leaving and not leaving
            held.writing.release()

    resident.background.submit(write)


def facts(held: HeldSession, state: str = "ready") -> SessionFacts:
    """What the session's record is to hold of it, as built and measured."""
    session = held.session
    return {
        "state": state, "step": session.step, "sequence": session.sequence, "samples_seen": session.state.samples_seen,
        "learning_rate": session.learning_rate, "memory_bytes": session.memory_bytes(),
    }  # fmt: skip


def limits(resident: Resident, own_bytes: int) -> Limits:
    """What a session may take: what the device's budget has left, and what is reserved for itself."""
    device = resident.read(device_store.get, resident.device_id)
    free = None
    if device is not None and device["budget_bytes"] is not None:
        free = max(0, device["budget_bytes"] - device["reserved_bytes"]) + own_bytes
    settings = resident.settings.training
    return Limits(free, settings.max_batch_size, settings.trust_programs)


# ---- from the record


def _built(resident: Resident, row: Row) -> HeldSession:
    spec = Initialize.model_validate(row["spec"])
    make_room(resident)
    sources = sources_of(resident, row["session_id"], spec)
    bounds = limits(resident, row["reserved_bytes"])
    session = build_session(spec, sources, resident.device.torch_device(), bounds, resident.networks)
    return HeldSession(row["session_id"], row["owner"], session)


def _restored(resident: Resident, row: Row) -> HeldSession:
    """The session at the record's applied sequence: from its furthest whole checkpoint, and the log since."""
    session_id, until = row["session_id"], row["applied_sequence"]
    candidates = resident.read(checkpoint_store.to_restore, session_id, until)
    held: HeldSession | None = None
    for checkpoint in candidates:
        try:
            snapshot = read_checkpoint(resident, checkpoint["blob_id"], checkpoint["sha256"], session_id)
        except OperationError as error:
            if error.code not in ("checksum_mismatch", "model_invalid", "checkpoint_not_found", "blob_not_found"):
                raise
            log.error("checkpoint refused", checkpoint_id=checkpoint["checkpoint_id"], error=error.message)
            with resident.engine.connect() as connection:
                checkpoint_store.mark_damaged(connection, checkpoint["checkpoint_id"], error.as_job_error())
            continue
        held = _built(resident, row)
        held.session.restore(snapshot)
        held.run_job_id = checkpoint["run_job_id"]
        held.checkpoint_step, held.checkpoint_sequence = held.session.step, held.session.sequence
        break
    if held is None:
        held = begin(resident, row)
    _replay(resident, held, until)
    return held


def _replay(resident: Resident, held: HeldSession, until: int) -> None:
    session = held.session
    steps = resident.read(steps_store.log_since, held.session_id, session.sequence, until)
    wanted = list(range(session.sequence + 1, until + 1))
    if [step["sequence"] for step in steps] != wanted or any(step["request"] is None for step in steps):
        raise failure(
            "session_lost",
            f"its log does not reach back from step {until} to the last whole checkpoint, at {session.sequence}",
        )
    for step in steps:
        request = step["request"]
        assert request is not None
        for name, tensor in (step["spooled"] or {}).items():
            place = request.get("dataset") or request
            if name == "targets":
                place["targets"] = tensor
            else:
                place["inputs"][name.removeprefix("inputs.")] = tensor
        record = StepRecord(step["sequence"], options_of(request), plan_of(request), step["steps_applied"])
        session.replay(record, data_of(resident, held.session_id, request))
    if not steps:
        # Nothing was made again that would have told what the next step's batch gives.
        session.prepare()
    else:
        held.run_job_id = None
        log.info("steps replayed", session_id=held.session_id, steps=len(steps), step=session.step)


def _reserve(resident: Resident, row: Row) -> None:
    size = row["memory_bytes"] or 0
    with transaction(resident.engine) as connection:
        reserve(connection, resident.device_id, size, "waking the training session")
        store.set_reserved(connection, row["session_id"], size)
    row["reserved_bytes"] = size


def _lose(resident: Resident, row: Row, error: OperationError) -> None:
    """Declares a session lost, and fails the jobs that wait for it."""
    told = failure("session_lost", error.message, detail=error.detail).as_job_error()
    with transaction(resident.engine) as connection:
        ended: list[Row] = []
        for session_id, why in effects.over(connection, row["session_id"], "lost", told):
            ended += lifecycle.fail_needing(connection, [session_id], why)
        ended += lifecycle.settle(connection, ended)
    resident.announce(ended)
    log.error("session lost", session_id=row["session_id"], error=error.message)


def _row(resident: Resident, session_id: str) -> Row:
    row = resident.read(store.get, session_id)
    if row is None:
        raise failure("session_not_found", f"there is no training session {session_id!r}")
    return row


def _applied_sequence(resident: Resident, session_id: str) -> int | None:
    found = resident.read(store.standing, session_id)
    return None if found is None else int(found["applied_sequence"])


def _in_another_run(held: HeldSession, job_id: str) -> bool:
    """Whether the memory holds steps of a dataset job that ended without them being recorded."""
    return held.session.state.unfinished_run is not None and held.run_job_id not in (None, job_id)


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


def _tell_failed(resident: Resident, held: HeldSession, error: OperationError) -> None:
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
