"""What initializing, stepping, checkpointing, validating and ending training sessions do on the device.

A step moves the session in memory first; its number, loss and history are committed with the job's end. Where that end
cannot be recorded the memory is ahead, and the session is brought back from its record before its next job.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping
from concurrent.futures import wait
from dataclasses import asdict
from typing import Any

import torch

from device_operations.errors import OperationError, failure
from tasks.blobs import records as blob_store
from tasks.jobs.lifecycle import Outcome
from tasks.training import sessions as store
from tasks.training import steps
from tasks.training.effects import number_of
from tasks.training.facts import AppliedStep, NewCheckpoint, Standing
from workers.devices.values import SessionOptions
from workers.execution.claimed_job import ClaimedJob, Detached, PlaceReleased, Progress
from workers.operations.tensors import host_array, staged_bytes
from workers.operations.training.batches import data_of, options_of, plan_of, resident_tensors, spooled, taken
from workers.operations.training.files import drop_checkpoint, keep_checkpoint, keep_gradients
from workers.operations.training.sessions import (
    HeldSession,
    awake,
    begin,
    checkpoint_beside,
    classified,
    export_in_spare_time,
    facts,
)
from workers.resident.residents import Resident
from workers.training.checkpoints import Snapshot
from workers.training.dataset import Samples
from workers.training.model.listing import list_tensors
from workers.training.onnx.export import onnx_bytes
from workers.training.outcomes import StepOutcome, summarize
from workers.training.runs import DatasetRun
from workers.training.validation import compare

Steps = Generator[Progress, None, Outcome | PlaceReleased]

#: Seconds between two notes of a long job's history.
NOTE_SECONDS = 0.5

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
    made = facts(held)
    told = {"session_id": session_id, "device_id": resident.device_id, **made, **_described(held)}
    listed = list_tensors(held.session.definition, held.spec, held.session.state.model)
    return work.succeeded(told, session={**made, "parameters": [asdict(tensor) for tensor in listed]})


def step(resident: Resident, work: ClaimedJob) -> Outcome | PlaceReleased | Steps:
    """One step, or the many of a dataset."""
    held = awake(resident, work.request["session_id"], work.job_id, work.request.get("sequence"))
    data = data_of(resident, held.session_id, work.request)
    if isinstance(data, Samples):
        return _run(resident, work, held, data)
    options, sequence = options_of(work.request), work.request.get("sequence")
    copies = spooled(resident, work.request, work.row["owner"]) if sequence and resident_tensors(work.request) else {}
    work.cancel.check()
    notes = _Notes(resident, held)
    session = held.session
    outcome = session.perform(data, options, sequence) if sequence else session.advance(data, options)
    device_ms = round(notes.seconds() * 1000, 3)
    held.run_job_id = None
    try:
        notes.add(outcome)
        told = _told(resident, work, held, outcome)
        if _is_due(held, outcome):
            checkpoint_beside(resident, held)
    except BaseException:
        # The memory has made a step that will not be recorded.
        resident.training.pop(held.session_id, None)
        raise
    export_in_spare_time(resident, held)
    ended = work.succeeded(told, device_ms=device_ms)
    if sequence is None:
        return ended
    ended.facts["applied"] = _applied(notes, sequence, None, copies)
    return _passed(held, sequence, ended)


def checkpoint(resident: Resident, work: ClaimedJob) -> Detached:
    """Copies the session's state now; the file is written and recorded beside, while steps go on."""
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
    inputs = {name: taken(resident, name, tensor) for name, tensor in request["inputs"].items()}
    targets = taken(resident, "targets", request["targets"])
    # Before the first step nobody knows the inputs' shapes but the caller.
    session.expected_output(inputs, training=False)
    snapshot = session.snapshot(model_only=True)
    if snapshot.state["last_inputs"] is None:
        shapes = {name: (host_array(value).dtype.name, list(value.shape[1:])) for name, value in inputs.items()}
        snapshot = type(snapshot)(snapshot.tensors, {**snapshot.state, "last_inputs": shapes})
    content = onnx_bytes(session.definition, held.spec, snapshot)
    served = _served(resident, work, content, {name: host_array(value) for name, value in inputs.items()})
    found = compare(session, inputs, targets, served)
    told = {
        "session_id": request.get("session_id"), "checkpoint_id": request.get("checkpoint_id"), "step": session.step,
        **asdict(found), **_staged(request),
    }  # fmt: skip
    return work.succeeded(told)


def _touch(resident: Resident, session_id: str) -> None:
    """The session is used. Beside the job, whose own end touches no other record and waits for no disk."""
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


def _run(resident: Resident, work: ClaimedJob, held: HeldSession, dataset: Samples) -> Steps:
    """The steps of a dataset; the scheduler may run something more urgent between any two.

    Cut short, it counts as applied with the steps that were made, unless it made none.
    """
    session, options, sequence = held.session, options_of(work.request), work.request.get("sequence")
    plan = plan_of(work.request)
    assert plan is not None
    copies = spooled(resident, work.request, work.row["owner"]) if sequence else {}
    run = session.run(dataset, plan, options, sequence or session.sequence + 1)
    held.run_job_id = work.job_id
    notes = _Notes(resident, held)
    try:
        while run.steps_done < run.steps_total:
            outcome = next(run)
            notes.add(outcome)
            export_in_spare_time(resident, held)
            if _is_due(held, outcome):
                # Whoever comes back from this checkpoint does not make the steps before it again.
                notes.note()
                checkpoint_beside(resident, held)
            yield Progress(_progress(run, outcome))
    except Exception as error:
        known = classified(resident, error)
        if sequence is None:
            session.abandon_run()
            raise known from error
        if not run.steps_done or not session.intact:
            # Nothing to keep, or nothing that could be: the record has the session as it was before the job.
            resident.training.pop(held.session_id, None)
            raise known from error
        run.finish()
        return work.failed(known, applied=_applied(notes, sequence, run.steps_done, copies))
    told = {
        "session_id": held.session_id, "sequence": sequence, "mode": options.mode, "steps_applied": run.steps_done,
        **notes.summary(), **_staged(work.request),
    }  # fmt: skip
    ended = work.succeeded(told, device_ms=round(notes.seconds() * 1000, 3))
    if sequence is None:
        session.abandon_run()
        return ended
    run.finish()
    ended.facts["applied"] = _applied(notes, sequence, run.steps_done, copies)
    return _passed(held, sequence, ended)


class _Notes:
    """What the steps of one job did, on its way into the session's record: in bulk, twice a second."""

    def __init__(self, resident: Resident, held: HeldSession) -> None:
        self._resident, self._held = resident, held
        self._began = self._noted_at = time.perf_counter()
        self._history: list[dict[str, Any]] = []
        self.outcomes: list[StepOutcome] = []
        self.session_id = held.session_id

    def add(self, outcome: StepOutcome) -> None:
        """One more step."""
        self.outcomes.append(outcome)
        if outcome.mode in ("train", "apply") and not outcome.skipped:
            self._history.append(
                {
                    "step": outcome.step,
                    "loss": outcome.loss if outcome.update_loss is None else outcome.update_loss,
                    "gradient_norm": outcome.gradient_norm,
                    "learning_rate": outcome.learning_rate,
                    "at": time.time(),
                }
            )
        if time.perf_counter() - self._noted_at >= NOTE_SECONDS:
            self.note()

    def note(self) -> None:
        """Hands what was not noted yet to the completer."""
        self._noted_at = time.perf_counter()
        standing = self.rest()
        engine, session_id, epoch = self._resident.engine, self.session_id, self._resident.epoch

        def write() -> None:
            with engine.connect() as connection:
                steps.advance(connection, session_id, epoch, standing)

        self._resident.record(write)

    def rest(self) -> Standing:
        """Where the session stands, with the history that was not noted yet."""
        history, self._history = self._history, []
        # None where a death came between a job's last step and its end: then all of it is in the checkpoint.
        last = self.outcomes[-1] if self.outcomes else StepOutcome(self._held.session.step, "train")
        return {
            "step": self._held.session.step, "loss": last.loss, "gradient_norm": last.gradient_norm,
            "learning_rate": last.learning_rate, "samples_seen": self._held.session.state.samples_seen,
            "steps_per_second": round(len(self.outcomes) / max(self.seconds(), 1e-9), 3), "history": history,
            "cpu_fallback_operators": list(self._resident.device.cpu_fallback_operators),
        }  # fmt: skip

    def summary(self) -> dict[str, Any]:
        """All steps of the job as one; those that a dead worker made are in the history."""
        return asdict(summarize(self.outcomes)) if self.outcomes else {"step": self._held.session.step, "steps": 0}

    def seconds(self) -> float:
        """How long the steps have taken so far."""
        return time.perf_counter() - self._began


# ---- what is told


def _applied(notes: _Notes, sequence: int, steps_applied: int | None, copies: dict[str, dict[str, Any]]) -> AppliedStep:
    """What the end of an applied step writes into the session's record."""
    return {
        **notes.rest(),
        "session_id": notes.session_id, "sequence": sequence, "steps_applied": steps_applied, "spooled": copies,
        "spooled_ids": [tensor["blob_id"] for tensor in copies.values()],
    }  # fmt: skip


def _passed(held: HeldSession, sequence: int, ended: Outcome) -> PlaceReleased:
    """The next step may begin while this one's end is recorded: the record takes it only after this one.

    Everything else on the session waits for the record.
    """
    return PlaceReleased(ended, number_of(held.session_id, sequence))


def _told(resident: Resident, work: ClaimedJob, held: HeldSession, outcome: StepOutcome) -> dict[str, Any]:
    told: dict[str, Any] = {
        "session_id": held.session_id, "sequence": work.request.get("sequence"), "mode": outcome.mode,
        "step": outcome.step, "loss": outcome.loss, "gradient_norm": outcome.gradient_norm,
        "learning_rate": outcome.learning_rate, "samples": outcome.samples, "skipped": outcome.skipped,
        "accumulated_batches": outcome.accumulated_batches, **_staged(work.request),
    }  # fmt: skip
    if outcome.correct is not None:
        told["accuracy"] = outcome.correct / outcome.elements if outcome.elements else None
    if outcome.gradient_norms is not None:
        told["gradient_norms"] = dict(outcome.gradient_norms)
    if outcome.gradients is not None:
        stored = keep_gradients(resident, outcome.gradients)
        blob = {"blob_id": stored.blob_id, "sha256": stored.sha256, "size_bytes": stored.size_bytes}
        with resident.engine.connect() as connection:
            ttl_seconds = resident.settings.blobs.ttl_hours * 3600
            blob_store.insert(connection, {**blob, "owner": work.row["owner"]}, ttl_seconds)
        told["gradients"] = blob
    return told


def _progress(run: DatasetRun, outcome: StepOutcome) -> dict[str, Any]:
    return {"done": run.steps_done, "total": run.steps_total, "step": outcome.step, "loss": outcome.loss}


def _staged(request: dict[str, Any]) -> dict[str, int]:
    size = staged_bytes(resident_tensors(request))
    return {"staged_bytes": size} if size else {}


def _described(held: HeldSession) -> dict[str, Any]:
    definition = held.session.definition
    model = held.session.state.model
    return {
        "inputs": [port.name for port in definition.inputs], "outputs": list(definition.output_names),
        "parameters": sum(tensor.numel() for tensor in model.parameters.values()),
        "trained_parameters": sum(tensor.numel() for tensor in model.trained.values()),
    }  # fmt: skip


def _is_due(held: HeldSession, outcome: StepOutcome) -> bool:
    """Whether an automatic checkpoint is to be taken after this step."""
    every = held.spec.checkpoint_every_steps
    moved = outcome.mode in ("train", "apply") and not outcome.skipped
    return bool(every and moved and outcome.step % every == 0 and outcome.step != held.checkpoint_step)


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
    told = _shown(made)
    return work.succeeded(told, checkpoint=made)


_TOLD_OF_CHECKPOINTS = (
    "checkpoint_id", "session_id", "name", "step", "sequence", "sha256", "size_bytes", "blob_id", "onnx_blob_id",
)  # fmt: skip


def _shown(checkpoint: Mapping[str, object]) -> dict[str, object]:
    return {name: checkpoint[name] for name in _TOLD_OF_CHECKPOINTS}


def _kept_and_ended(resident: Resident, work: ClaimedJob) -> Steps:
    held = awake(resident, work.request["session_id"], work.job_id)
    snapshot = held.session.snapshot()
    writing = resident.background.submit(_keep, resident, work, held, snapshot)
    while not wait([writing], LOOK_SECONDS).done:
        yield Progress()
    made = writing.result()
    resident.training.pop(held.session_id, None)
    told = {
        "session_id": held.session_id, "freed_bytes": held.session.memory_bytes(),
        "checkpoint_id": made["checkpoint_id"], "checkpoint": _shown(made),
    }  # fmt: skip
    return work.succeeded(told, checkpoint=made)


def _served(resident: Resident, work: ClaimedJob, content: bytes, inputs: dict[str, Any]) -> dict[str, Any]:
    """What the exported model gives when it is loaded for inference on this device."""
    # As many threads as training has: a pool of more takes longer to start and end than a small model to run.
    options = SessionOptions(intra_op_threads=torch.get_num_threads())
    with resident.loading(len(content)):
        onnx = resident.device.open_model(content, options, work.cancel)
    try:
        return {name: host_array(value) for name, value in onnx.run(inputs, cancel=work.cancel).items()}
    finally:
        onnx.close()


def _checkpoint_of(resident: Resident, named: dict[str, Any]) -> HeldSession:
    """A session of its own, made from a checkpoint, which is dropped after use."""
    row = resident.read(store.get, named["session_id"])
    if row is None:
        raise failure("session_not_found", f"session {named['session_id']}, whose checkpoint it is, is forgotten")
    return begin(resident, {**row, "resumed": named, "reserved_bytes": 0})
