"""What each kind of training job does on the device; a step is in `workers.operations.training.steps`."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import wait
from dataclasses import asdict

import torch

from device_operations.errors import OperationError, failure
from device_operations.wire.json_types import JsonObject
from tasks.jobs.lifecycle import Outcome
from tasks.statements import Row
from tasks.training import sessions as store
from tasks.training.facts import NewCheckpoint
from workers.devices.arrays import Array as HostArray
from workers.devices.onnx.tensors import Feed
from workers.devices.values import SessionOptions
from workers.execution.claimed_job import ClaimedJob, Detached, Progress, Steps
from workers.operations.tensors import host_array
from workers.operations.training.batches import batch_of
from workers.operations.training.files import drop_checkpoint, keep_checkpoint
from workers.operations.training.restoring import awake, begin
from workers.operations.training.sessions import HeldSession, export_in_spare_time, session_facts
from workers.operations.training.steps import staged, step
from workers.resident.residents import Resident
from workers.training.checkpoints import Snapshot
from workers.training.model.listing import list_tensors
from workers.training.onnx.export import onnx_bytes
from workers.training.validation import compare

__all__ = ["checkpoint", "end_session", "initialize", "step", "validate"]

#: Seconds that the end of a session waits for its checkpoint's file before it looks at the scheduler again.
LOOK_SECONDS = 0.02


def initialize(resident: Resident, work: ClaimedJob) -> Outcome:
    """Builds the session on the device."""
    session_id = work.request["session_id"]
    row = resident.read(store.get, session_id)
    if row is None or row["state"] != "initializing":
        raise failure("session_closed", f"training session {session_id} is not to be initialized")
    held = begin(resident, row)
    if held.session.sequence != row["applied_sequence"]:
        raise failure(
            "sequence_gap",
            f"the checkpoint stands at sequence {held.session.sequence}, and {row['applied_sequence']} was expected "
            "when it was submitted: a step before it was not applied; initialize again",
        )
    held.session.prepare()
    resident.training[session_id] = held
    export_in_spare_time(resident, held)
    made = session_facts(held)
    result = {"session_id": session_id, "device_id": resident.device_id, **made, **_described(held)}
    listed = list_tensors(held.session.definition, held.spec, held.session.state.model)
    return work.succeeded(result, session=made | {"parameters": [asdict(tensor) for tensor in listed]})


def checkpoint(resident: Resident, work: ClaimedJob) -> Detached:
    """Copies the session's state now; the file is written and recorded on a background thread, while steps go on."""
    request = work.request
    held = awake(resident, request["session_id"], work.job_id)
    if held.session.sequence > request["at_sequence"]:
        raise failure(
            "worker_lost",
            f"the worker died before the checkpoint was whole, and the session has gone on from sequence "
            f"{request['at_sequence']} to {held.session.sequence}; take another",
        )
    snapshot = held.session.snapshot()
    onnx = onnx_bytes(held.session.definition, held.spec, snapshot) if request.get("export") else None
    return Detached(lambda: _finish_checkpoint(resident, work, held, snapshot, onnx), held.session_id)


def validate(resident: Resident, work: ClaimedJob) -> Outcome:
    """Exports the model, runs it for inference on this device, and compares it with the trained one."""
    request = work.request
    held = _checkpoint_of(resident, request["checkpoint"]) if request.get("checkpoint") else None
    if held is None:
        held = awake(resident, request["session_id"], work.job_id)
        resident.record(lambda: _touch(resident, request["session_id"]))
    session = held.session
    inputs, targets = batch_of(resident, request)
    # Before the first step only the caller knows the inputs' shapes.
    session.expected_output(inputs, training=False)
    snapshot = session.snapshot(model_only=True)
    if snapshot.state["last_inputs"] is None:
        shapes = {name: (host_array(value).dtype.name, list(value.shape[1:])) for name, value in inputs.items()}
        snapshot = type(snapshot)(snapshot.tensors, {**snapshot.state, "last_inputs": shapes})
    content = onnx_bytes(session.definition, held.spec, snapshot)
    served = _served(resident, work, content, {name: host_array(value) for name, value in inputs.items()})
    found = compare(session, inputs, targets, served)
    result = {
        "session_id": request.get("session_id"), "checkpoint_id": request.get("checkpoint_id"), "step": session.step,
        **asdict(found), **staged(request),
    }  # fmt: skip
    return work.succeeded(result)


def _touch(resident: Resident, session_id: str) -> None:
    """The session is used. Separate from the job's end, which touches no other record and waits for no disk."""
    with resident.engine.connect() as connection:
        store.touch(connection, session_id)


def end_session(resident: Resident, work: ClaimedJob) -> Outcome | Steps:
    """Ends a session and frees its memory; with `checkpoint` its state is kept first, or the session goes on."""
    session_id = work.request["session_id"]
    if work.request.get("checkpoint"):
        return _kept_and_ended(resident, work)
    held = resident.training.pop(session_id, None)
    freed = held.session.memory_bytes() if held is not None else 0
    return work.succeeded({"session_id": session_id, "freed_bytes": freed, "checkpoint_id": None})


# ---- many steps


# ---- what is result


def _described(held: HeldSession) -> JsonObject:
    definition = held.session.definition
    model = held.session.state.model
    return {
        "inputs": [port.name for port in definition.inputs], "outputs": list(definition.output_names),
        "parameters": sum(tensor.numel() for tensor in model.parameters.values()),
        "trained_parameters": sum(tensor.numel() for tensor in model.trained.values()),
    }  # fmt: skip


# ---- checkpoints and exports


def _keep(
    resident: Resident, work: ClaimedJob, held: HeldSession, snapshot: Snapshot, onnx: bytes | None = None
) -> NewCheckpoint:
    request = work.request
    return keep_checkpoint(
        resident, snapshot,
        {
            "checkpoint_id": request["checkpoint_id"], "session_id": held.session_id, "owner": held.owner,
            "name": request.get("name"), "job_id": work.job_id, "keep_last": request.get("keep_last"),
        },
        onnx,
    )  # fmt: skip


def _finish_checkpoint(
    resident: Resident, work: ClaimedJob, held: HeldSession, snapshot: Snapshot, onnx: bytes | None
) -> Outcome:
    """The file, whole; its record is made with the job's end."""
    work.cancel.check()
    made = _keep(resident, work, held, snapshot, onnx)
    try:
        work.cancel.check()
    except OperationError:
        drop_checkpoint(resident, made)
        raise
    held.checkpoint_step = max(held.checkpoint_step, snapshot.step)
    held.checkpoint_sequence = max(held.checkpoint_sequence, made["sequence"])
    result = _shown(made)
    return work.succeeded(result, checkpoint=made)


_CHECKPOINT_FACTS = (
    "checkpoint_id", "session_id", "name", "step", "sequence", "sha256", "size_bytes", "blob_id", "onnx_blob_id",
)  # fmt: skip


def _shown(checkpoint: NewCheckpoint) -> JsonObject:
    return {name: value for name, value in checkpoint.items() if name in _CHECKPOINT_FACTS}


def _kept_and_ended(resident: Resident, work: ClaimedJob) -> Steps:
    held = awake(resident, work.request["session_id"], work.job_id)
    snapshot = held.session.snapshot()
    writing = resident.background.submit(_keep, resident, work, held, snapshot)
    while not wait([writing], LOOK_SECONDS).done:
        yield Progress()
    made = writing.result()
    resident.training.pop(held.session_id, None)
    result = {
        "session_id": held.session_id, "freed_bytes": held.session.memory_bytes(),
        "checkpoint_id": made["checkpoint_id"], "checkpoint": _shown(made),
    }  # fmt: skip
    return work.succeeded(result, checkpoint=made)


def _served(resident: Resident, work: ClaimedJob, content: bytes, inputs: Mapping[str, Feed]) -> dict[str, HostArray]:
    """What the exported model gives when it is loaded for inference on this device."""
    # As many threads as training has: a pool of more takes longer to start and end than a small model to run.
    options = SessionOptions(intra_op_threads=torch.get_num_threads())
    with resident.loading(len(content)):
        onnx = resident.device.open_model(content, options, work.cancel)
    try:
        return {name: host_array(value) for name, value in onnx.run(inputs, cancel=work.cancel).items()}
    finally:
        onnx.close()


def _checkpoint_of(resident: Resident, named: Row) -> HeldSession:
    """A session of its own, made from a checkpoint, which is dropped after use."""
    row = resident.read(store.get, named["session_id"])
    if row is None:
        raise failure("session_not_found", f"session {named['session_id']}, whose checkpoint it is, is forgotten")
    return begin(resident, {**row, "resumed": named, "reserved_bytes": 0})
