"""Bringing training sessions into memory: built, or brought back to where the record says they stand.

    record ─▶ build ─▶ last whole checkpoint ─▶ replay of the steps logged since ─▶ held

The record is the truth. A session whose memory is not where the record says is dropped and brought back from it.
"""

from __future__ import annotations

import structlog

from device_operations.errors import OperationError, failure
from device_operations.requests.training import Initialize
from tasks.devices import store as device_store
from tasks.jobs import lifecycle
from tasks.memory.admission import reserve
from tasks.statements import Row, transaction
from tasks.training import checkpoints as checkpoint_store
from tasks.training import effects
from tasks.training import sessions as store
from tasks.training import steps as steps_store
from tasks.training.named import gone
from workers.execution.claimed_job import named
from workers.operations.training.batches import data_of, options_of, plan_of
from workers.operations.training.files import (
    read_checkpoint,
    sources_of,
)
from workers.operations.training.sessions import HeldSession, session_facts
from workers.resident.models import make_room
from workers.resident.residents import Resident
from workers.training.outcomes import StepRecord
from workers.training.session import Limits, build_session

log = structlog.get_logger(__name__)

#: Failures after which a session may still come back later; after any other it is lost.
_PASSING = {
    "insufficient_memory", "out_of_memory", "storage_unavailable", "storage_full", "database_unavailable",
    "device_lost", "cancelled", "timeout",
}  # fmt: skip


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
        effects.settled(connection, row["session_id"], resident.epoch, session_facts(held, state))
    resident.training[row["session_id"]] = held
    return held


def restore_all(resident: Resident, rows: list[Row]) -> None:
    """Brings back what the last epoch held. One that cannot come back must not keep the others away."""
    for row in rows:
        try:
            held = wake(resident, row)
        except Exception as error:  # noqa: BLE001 - recorded with the session, or tried again by its next step
            log.error("session did not come back", session_id=row["session_id"], error=named(error).message)
            continue
        log.info("session is back", session_id=held.session_id, step=held.session.step, sequence=held.session.sequence)


def limits(resident: Resident, own_bytes: int) -> Limits:
    """What a session may take: what the device's budget has left, and what is reserved for itself."""
    device = resident.read(device_store.get, resident.device_id)
    free = None
    if device is not None and device["budget_bytes"] is not None:
        free = max(0, device["budget_bytes"] - device["reserved_bytes"]) + own_bytes
    settings = resident.settings.training
    return Limits(free, settings.max_batch_size, settings.trust_programs)


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
        # Nothing was made again that would have shown what the next step's batch gives.
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
    lost = failure("session_lost", error.message, detail=error.detail).as_job_error()
    with transaction(resident.engine) as connection:
        ended: list[Row] = []
        for session_id, why in effects.over(connection, row["session_id"], "lost", lost):
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
