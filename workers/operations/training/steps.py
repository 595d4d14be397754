"""Steps of a training session: one, or the many of a dataset.

A step moves the session in memory first; its number, loss and history are committed with the job's end. If that end
cannot be recorded the memory is ahead, and the session is brought back from its record before its next job.
"""

from __future__ import annotations

import time
from dataclasses import asdict

from device_operations.wire.json_types import JsonObject
from tasks.blobs import records as blob_store
from tasks.jobs.lifecycle import Outcome
from tasks.jobs.model import StoredRequest
from tasks.training import steps as store
from tasks.training.effects import number_of
from tasks.training.facts import AppliedStep, Standing
from workers.execution.claimed_job import ClaimedJob, PlaceReleased, Progress, Steps
from workers.operations.tensors import staged_bytes
from workers.operations.training.batches import data_of, options_of, plan_of, resident_tensors, spooled
from workers.operations.training.files import keep_gradients
from workers.operations.training.restoring import awake
from workers.operations.training.sessions import HeldSession, checkpoint_beside, classified, export_in_spare_time
from workers.resident.residents import Resident
from workers.training.dataset import Samples
from workers.training.outcomes import StepOutcome, summarize
from workers.training.runs import DatasetRun

#: Seconds between two notes of a long job's history.
NOTE_SECONDS = 0.5


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
        result = _result(resident, work, held, outcome)
        if _is_due(held, outcome):
            checkpoint_beside(resident, held)
    except BaseException:
        # The memory has made a step that will not be recorded.
        resident.training.pop(held.session_id, None)
        raise
    export_in_spare_time(resident, held)
    ended = work.succeeded(result, device_ms=device_ms)
    if sequence is None:
        return ended
    ended.facts["applied"] = _applied(notes, sequence, None, copies)
    return _passed(held, sequence, ended)


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
                # A session restored from this checkpoint does not repeat the steps before it.
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
    result = {
        "session_id": held.session_id, "sequence": sequence, "mode": options.mode, "steps_applied": run.steps_done,
        **notes.summary(), **staged(work.request),
    }  # fmt: skip
    ended = work.succeeded(result, device_ms=round(notes.seconds() * 1000, 3))
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
        self._history: list[JsonObject] = []
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
                store.advance(connection, session_id, epoch, standing)

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

    def summary(self) -> JsonObject:
        """All steps of the job as one; those that a dead worker made are in the history."""
        return asdict(summarize(self.outcomes)) if self.outcomes else {"step": self._held.session.step, "steps": 0}

    def seconds(self) -> float:
        """How long the steps have taken so far."""
        return time.perf_counter() - self._began


def _applied(notes: _Notes, sequence: int, steps_applied: int | None, copies: dict[str, StoredRequest]) -> AppliedStep:
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


def _result(resident: Resident, work: ClaimedJob, held: HeldSession, outcome: StepOutcome) -> JsonObject:
    result: JsonObject = {
        "session_id": held.session_id, "sequence": work.request.get("sequence"), "mode": outcome.mode,
        "step": outcome.step, "loss": outcome.loss, "gradient_norm": outcome.gradient_norm,
        "learning_rate": outcome.learning_rate, "samples": outcome.samples, "skipped": outcome.skipped,
        "accumulated_batches": outcome.accumulated_batches, **staged(work.request),
    }  # fmt: skip
    if outcome.correct is not None:
        result["accuracy"] = outcome.correct / outcome.elements if outcome.elements else None
    if outcome.gradient_norms is not None:
        result["gradient_norms"] = dict(outcome.gradient_norms)
    if outcome.gradients is not None:
        stored = keep_gradients(resident, outcome.gradients)
        blob = {"blob_id": stored.blob_id, "sha256": stored.sha256, "size_bytes": stored.size_bytes}
        with resident.engine.connect() as connection:
            ttl_seconds = resident.settings.blobs.ttl_hours * 3600
            blob_store.insert(connection, {**blob, "owner": work.row["owner"]}, ttl_seconds)
        result["gradients"] = blob
    return result


def _progress(run: DatasetRun, outcome: StepOutcome) -> JsonObject:
    return {"done": run.steps_done, "total": run.steps_total, "step": outcome.step, "loss": outcome.loss}


def staged(request: StoredRequest) -> dict[str, int]:
    size = staged_bytes(resident_tensors(request).values())
    return {"staged_bytes": size} if size else {}


def _is_due(held: HeldSession, outcome: StepOutcome) -> bool:
    """Whether an automatic checkpoint is to be taken after this step."""
    every = held.spec.checkpoint_every_steps
    moved = outcome.mode in ("train", "apply") and not outcome.skipped
    return bool(every and moved and outcome.step % every == 0 and outcome.step != held.checkpoint_step)
