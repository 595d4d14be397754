"""Plans for training: sessions placed and reserved for, steps numbered, checkpoints found.

A session is an exclusive resource: its jobs take effect in the order of their submission. A step gets its number in
the transaction that records it, and needs its predecessor's number, which falls when that one ends unapplied.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from sqlalchemy import Connection

from device_operations.errors import failure
from device_operations.jobs import Kind, new_id
from device_operations.requests.training import (
    Checkpoint,
    EndSession,
    Initialize,
    Step,
    Validate,
)
from device_operations.wire.json_types import FreeJson
from tasks.devices.directory import Directory
from tasks.jobs import store as job_store
from tasks.memory.admission import reserve
from tasks.memory.named import check_tensors
from tasks.owners import Asker, absent
from tasks.planning.context import Context, check_blobs, new_job, owner_of, place, store_tensors
from tasks.planning.earlier import Earlier
from tasks.planning.plan import Plan, Recorded
from tasks.training import sessions as store
from tasks.training import steps
from tasks.training.effects import number_of
from tasks.training.named import check_open, device_of, find_session, gone, known_session, resumed_from, session_of
from tasks.training.requested import (
    check_batch,
    check_dtypes,
    check_model,
    content_hash,
    estimate,
    stored_tensor,
    with_tensors,
)


def plan_initialize(context: Context, request: Initialize, job_id: str) -> Plan:
    """Makes a session on a device; its memory is reserved at once, as an estimate until it is built."""
    owner = owner_of(context, request.job)
    payload = request.payload()
    blob_ids = request.blob_ids()
    known = check_blobs(context, blob_ids)
    check_model(context, request, payload)
    after: list[str] = []
    resumed, sequence, step = None, 0, 0
    if request.resume_from is not None:
        resumed, sequence, step = resumed_from(context, request.resume_from)
        if resumed["blob_id"]:
            blob_ids = [*blob_ids, resumed["blob_id"]]
        else:
            after = [resumed["job_id"]]
    reserved = estimate(request, {blob_id: row["size_bytes"] for blob_id, row in known.items()})
    device = place(context, request.device_id, size_bytes=reserved)
    if not device["capabilities"].get("training", True):
        raise failure(
            "validation_failed",
            f"{device['device_id']} cannot train: torch is not installed for its backend; name another device",
        )
    session_id = new_id()
    job = new_job(
        context, Kind.TRAINING_INITIALIZE, request, job_id, device,
        payload={**payload, "session_id": session_id}, resource_type="training_session", resource_id=session_id,
        needs=[session_id], blob_ids=blob_ids, after=after,
    )  # fmt: skip
    makes = {
        "session_id": session_id, "device_id": device["device_id"], "owner": owner, "spec": payload,
        "resumed": resumed, "blob_ids": blob_ids, "init_job_id": job_id, "sequence": sequence, "step": step,
        "reserved_bytes": reserved, "lease_seconds": request.lease_seconds,
    }  # fmt: skip
    context.directory.remember_training({"session_id": session_id, "device_id": device["device_id"], "owner": owner})
    return Plan(job, exclusive=(session_id,), together=record_sessions, makes=makes)


def foresee(earlier: Earlier, made_id: str, makes: FreeJson) -> None:
    """Notes the training session that an entry makes."""
    earlier.training_sessions[made_id] = {
        "session_id": made_id, "device_id": makes["device_id"], "owner": makes["owner"], "state": "initializing",
        "error": None,
    }  # fmt: skip


def record_sessions(connection: Connection, plans: Sequence[Plan]) -> Recorded:
    """Records sessions and reserves their memory. Raises `insufficient_memory`."""
    after = {}
    for plan in sorted(plans, key=lambda plan: str(plan.makes["device_id"])):
        store.insert(connection, plan.makes)
        waits_for = reserve(connection, plan.makes["device_id"], plan.makes["reserved_bytes"], "the training session")
        if waits_for:
            after[plan.job.id] = waits_for
    return Recorded(after=after)


def plan_step(context: Context, request: Step, job_id: str) -> Plan:
    """One step, or a dataset's. What changes the session has a number; an `evaluate` has one only if it was given."""
    numbered = request.sequence is not None or request.mode != "evaluate"
    # Whether a session is open is looked at where its step is given a number.
    session = known_session(context, request.session_id) if numbered else find_session(context, request.session_id)
    session_id = session["session_id"]
    check_batch(context, request)
    owner = owner_of(context, request.job)
    named = request.tensors()
    check_dtypes(named)
    allocations, staged = check_tensors(context, named, session["device_id"], "{}")
    tensors, blob_ids = store_tensors(context, named, owner, allocations)
    if request.dataset is not None and request.dataset.blob_id:
        check_blobs(context, [request.dataset.blob_id])
        blob_ids.append(request.dataset.blob_id)
    payload = with_tensors(request, tensors, staged)
    job = new_job(
        context, Kind.TRAINING_STEP, request, job_id, device_of(context, session), payload=payload,
        resource_type="training_session", resource_id=session_id, needs=[session_id, *allocations], blob_ids=blob_ids,
    )  # fmt: skip
    exclusive = (session_id, *allocations)
    if not numbered:
        return Plan(job, exclusive=exclusive)
    makes = {
        "session_id": session_id,
        "sequence": request.sequence,
        "sha256": content_hash(context, job.request, blob_ids),
    }
    return Plan(job, exclusive=exclusive, together=record_steps, makes=makes)


def is_light(directory: Directory, asker: Asker, request: Step | Validate) -> bool:
    """Whether a training step, or a validation, names only a session that is known, and brings its tensors along."""
    if isinstance(request, Step) and request.mode != "train":
        return False
    tensors = request.tensors()
    # A dataset's file is none of them.
    known = bool(tensors) and directory.knows_training(request.session_id, asker)
    return known and all(tensor.blob_id is None and tensor.allocation_id is None for tensor in tensors.values())


def record_steps(connection: Connection, plans: Sequence[Plan]) -> Recorded:
    """Gives steps their numbers, in order. A number given before answers with the job that has it.

    Raises `sequence_conflict` for another body, `sequence_gap` for a number too high, and what became of the session.
    """
    answered = {}
    for plan in plans:
        makes, job = plan.makes, plan.job
        sequence = steps.take_number(
            connection, makes["session_id"], makes["sequence"], job.id, makes["sha256"], job.blob_ids
        )
        if sequence is None:
            answered[job.id] = _earlier(connection, makes)
            continue
        # The number is part of the request, and what the step needs: known only now, under the session's lock.
        job.request["sequence"] = sequence
        assert isinstance(job.needs, list)
        job.needs.append(number_of(makes["session_id"], sequence - 1))
    return Recorded(answered)


def plan_checkpoint(context: Context, request: Checkpoint, job_id: str) -> Plan:
    """Keeps a session's state as it is after the jobs submitted before."""
    session = find_session(context, request.session_id)
    checkpoint_id = new_id()
    job = new_job(
        context, Kind.TRAINING_CHECKPOINT, request, job_id, device_of(context, session),
        payload={**request.payload(), "checkpoint_id": checkpoint_id},
        resource_type="checkpoint", resource_id=checkpoint_id, needs=[session["session_id"]],
    )  # fmt: skip

    def note_sequence(connection: Connection) -> None:
        current = store.lock(connection, session["session_id"])
        job.request["at_sequence"] = current["submitted_sequence"] if current else 0
        job.request["at_step"] = current["step"] if current else 0

    return Plan(job, exclusive=(session["session_id"],), record=note_sequence)


def plan_validate(context: Context, request: Validate, job_id: str) -> Plan:
    """Compares the exported model with the trained one: a session's as it is then, or a checkpoint's."""
    owner = owner_of(context, request.job)
    after: list[str] = []
    exclusive: tuple[str, ...] = ()
    more: FreeJson = {}
    record = None
    if request.session_id is not None:
        # Whether it is open is looked at where the job is recorded.
        session = known_session(context, request.session_id)
        exclusive = (session["session_id"],)
        record = partial(check_open, session_id=session["session_id"])
    else:
        resumed, _, _ = resumed_from(context, str(request.checkpoint_id))
        session = session_of(context, resumed["session_id"])
        more, after = {"checkpoint": resumed}, [] if resumed["blob_id"] else [resumed["job_id"]]
    named = request.tensors()
    check_dtypes(named)
    allocations, staged = check_tensors(context, named, session["device_id"], "{}")
    tensors, blob_ids = store_tensors(context, named, owner, allocations)
    stored = {name: stored_tensor(tensor, staged.get(name)) for name, tensor in tensors.items()}
    payload = {
        **request.model_dump(mode="json", exclude={"job", "inputs", "targets"}, exclude_none=True),
        "inputs": {name: stored[f"inputs.{name}"] for name in request.inputs},
        "targets": stored["targets"],
        **more,
    }
    if more.get("checkpoint", {}).get("blob_id"):
        blob_ids.append(more["checkpoint"]["blob_id"])
    job = new_job(
        context, Kind.TRAINING_VALIDATE, request, job_id, device_of(context, session), payload=payload,
        resource_type="training_session", resource_id=session["session_id"],
        # A checkpoint does without its session.
        needs=[*exclusive, *allocations] or [f"{session['session_id']}#checkpoint"], blob_ids=blob_ids, after=after,
    )  # fmt: skip
    return Plan(job, exclusive=(*exclusive, *allocations), record=record)


def plan_end(context: Context, request: EndSession, job_id: str) -> Plan:
    """Ends a session after the jobs submitted before."""
    session = find_session(context, request.session_id)
    job = new_job(
        context, Kind.TRAINING_END_SESSION, request, job_id, device_of(context, session),
        payload={**request.payload(), "checkpoint_id": new_id()},
        resource_type="training_session", resource_id=session["session_id"], needs=[session["session_id"]],
    )  # fmt: skip
    return Plan(job, exclusive=(session["session_id"],))


# ---- numbers


def _earlier(connection: Connection, makes: FreeJson) -> str:
    """The job that has a number already, for the same body; else why the number cannot be given."""
    session_id, sequence = makes["session_id"], makes["sequence"]
    session = store.lock(connection, session_id)
    if session is None:
        raise absent("training session", session_id)
    if session["state"] not in store.OPEN:
        raise failure(*gone(session))
    detail = {"submitted_sequence": session["submitted_sequence"], "applied_sequence": session["applied_sequence"]}
    if sequence > session["submitted_sequence"]:
        raise failure(
            "sequence_gap",
            f"step {sequence} was sent, and the next number of session {session_id} is "
            f"{session['submitted_sequence'] + 1}; send the steps between first",
            detail=detail,
        )
    step = steps.numbered(connection, session_id, sequence)
    if step is None or step["payload_sha256"] != makes["sha256"]:
        raise failure(
            "sequence_conflict",
            f"step {sequence} of session {session_id} was sent before with another body"
            if step
            else f"step {sequence} lies before the checkpoint that session {session_id} was resumed from",
            detail=detail,
        )
    if not job_store.states(connection, [step["job_id"]]):
        raise failure(
            "sequence_conflict", f"step {sequence} of session {session_id} was made long ago; its job is no longer kept"
        )
    return str(step["job_id"])
