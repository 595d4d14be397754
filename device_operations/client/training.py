"""Training sessions and checkpoints over HTTP, with NumPy arrays as batches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Unpack, cast

from device_operations.client.arrays import TensorLike, all_sent, sent
from device_operations.client.submission import Submission, said, submission
from device_operations.client.transport.calls import Call, Flow, at, get, send
from device_operations.client.transport.operations import Mode, Noun, operation
from device_operations.jobs import Job, Kind
from device_operations.views import CheckpointView, TrainingStatus
from device_operations.wire.json_types import FreeJson


class Training(Noun[Mode]):
    """The methods on training sessions. docs/training.md says what a request may hold."""

    @operation
    def initialize(
        self,
        model: Mapping[str, object],
        *,
        loss: str | Mapping[str, object],
        optimizer: Mapping[str, object],
        more: Mapping[str, object] | None = None,
        device_id: str | None = None,
        seed: int | None = None,
        resume_from: str | None = None,
        **given: Unpack[Submission],
    ) -> Flow[Job]:
        """Makes a training session, whose id is the job's `resource.id`, at once.

        `more` holds the request's other fields: `weights`, `schedule`, `trainable`, `lora`, `precision`, …
        """
        fields = said(
            model=dict(model),
            loss=loss if isinstance(loss, str) else dict(loss),
            optimizer=dict(optimizer),
            device_id=device_id,
            seed=seed,
            resume_from=resume_from,
        )
        return (yield from submission(Kind.TRAINING_INITIALIZE, fields | dict(more or {}), given))

    @operation
    def step(
        self,
        session_id: str,
        inputs: Mapping[str, TensorLike] | None = None,
        targets: TensorLike | None = None,
        *,
        sequence: int | None = None,
        mode: str | None = None,
        dataset: FreeJson | None = None,
        learning_rate: float | None = None,
        gradient_clip_norm: float | None = None,
        accumulate: bool | None = None,
        form: str | None = None,
        **given: Unpack[Submission],
    ) -> Flow[Job]:
        """One step on a batch, or many on a `dataset` (whose `inputs` and `targets` may be arrays too).

        With `sequence` (1, 2, …) it happens exactly once, however often it is sent.
        """
        fields = said(
            session_id=session_id,
            sequence=sequence,
            mode=mode,
            learning_rate=learning_rate,
            gradient_clip_norm=gradient_clip_norm,
            accumulate=accumulate,
            form=form,
        )
        fields |= yield from _batch(inputs, targets)
        if dataset is not None:
            fields["dataset"] = dict(dataset) | (yield from _batch(dataset.get("inputs"), dataset.get("targets")))
        return (yield from submission(Kind.TRAINING_STEP, fields, given))

    @operation
    def checkpoint(
        self,
        session_id: str,
        *,
        name: str | None = None,
        export: list[str] | None = None,
        keep_last: int | None = None,
        **given: Unpack[Submission],
    ) -> Flow[Job]:
        """Writes the session's whole state to the blob store; the checkpoint's id is the job's `resource.id`."""
        fields = said(session_id=session_id, name=name, export=export, keep_last=keep_last)
        return (yield from submission(Kind.TRAINING_CHECKPOINT, fields, given))

    @operation
    def validate(
        self,
        inputs: Mapping[str, TensorLike],
        targets: TensorLike,
        *,
        session_id: str | None = None,
        checkpoint_id: str | None = None,
        **given: Unpack[Submission],
    ) -> Flow[Job]:
        """Exports a session or a checkpoint, runs it for inference, and compares it with the model under training."""
        fields = said(session_id=session_id, checkpoint_id=checkpoint_id) | (yield from _batch(inputs, targets))
        return (yield from submission(Kind.TRAINING_VALIDATE, fields, given))

    @operation
    def end_session(self, session_id: str, *, checkpoint: bool | None = None, **given: Unpack[Submission]) -> Flow[Job]:
        """Ends a session and frees its memory; with `checkpoint` its state is kept first."""
        fields = said(session_id=session_id, checkpoint=checkpoint)
        return (yield from submission(Kind.TRAINING_END_SESSION, fields, given))

    @operation
    def status(self, session_id: str, *, history: int | None = None) -> Flow[TrainingStatus]:
        """How a session stands, with the last `history` steps."""
        path = at("/api/training/status/{}", session_id)
        return cast("TrainingStatus", (yield from get(path, history=history)))

    @operation
    def checkpoints(self, session_id: str | None = None) -> Flow[list[CheckpointView]]:
        """Checkpoints, of one session or of all."""
        answer = yield from get("/api/training/checkpoints", session_id=session_id)
        checkpoints: list[CheckpointView] = answer["checkpoints"]
        return checkpoints

    @operation
    def get_checkpoint(self, checkpoint_id: str) -> Flow[CheckpointView]:
        """One checkpoint; its files are `blob_id` and, where exported, `onnx_blob_id`."""
        return cast("CheckpointView", (yield from get(at("/api/training/checkpoints/{}", checkpoint_id))))

    @operation
    def delete_checkpoint(self, checkpoint_id: str) -> Flow[None]:
        """Deletes a checkpoint and its files."""
        yield from send(Call("DELETE", at("/api/training/checkpoints/{}", checkpoint_id)))


def _batch(inputs: Mapping[str, TensorLike] | None, targets: TensorLike | None) -> Flow[FreeJson]:
    made: FreeJson = {}
    if inputs is not None:
        made["inputs"] = yield from all_sent(inputs)
    if targets is not None:
        made["targets"] = yield from sent(targets, "targets")
    return made
