"""Routes on training sessions: their jobs, their standing as recorded, and their checkpoints."""

from __future__ import annotations

from typing import Annotated, cast

from fastapi import APIRouter, Query, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from api_gateway.auth import Known
from api_gateway.documents import body_schema
from api_gateway.gateway import Caller, Gateway, of
from api_gateway.submission.answer import json_response, read_body, submit_job
from device_operations.errors import failure
from device_operations.jobs import Job, Kind
from device_operations.views import CheckpointView, TrainingSessionView, TrainingStatus
from tasks.owners import found
from tasks.statements import Row, transaction
from tasks.training import checkpoints as checkpoint_store
from tasks.training import sessions as store
from tasks.training.named import find_checkpoint

router = APIRouter(tags=["training"])

#: How many checkpoints the status of a session lists, newest first.
CHECKPOINTS_TOLD = 100


@router.post("/api/training/initialize", status_code=202, response_model=Job, openapi_extra=body_schema("initialize"))
async def initialize(request: Request, caller: Known) -> Response:
    """Makes a training session; its id is the job's resource, usable at once."""
    return await submit_job(request, caller, Kind.TRAINING_INITIALIZE, await read_body(request))


@router.post("/api/training/step", status_code=202, response_model=Job, openapi_extra=body_schema("step"))
async def step(request: Request, caller: Known) -> Response:
    """One step on a batch, or the many of a dataset. With `sequence` it happens exactly once.

    A step that ended unapplied frees its number, and queued steps behind it fail with `sequence_gap`. A dataset's job
    that was cut short after some steps counts as applied with those.
    """
    return await submit_job(request, caller, Kind.TRAINING_STEP, await read_body(request))


@router.get("/api/training/status/{session_id}")
async def read_status(
    request: Request, caller: Known, session_id: str, history: Annotated[int, Query(ge=0, le=100_000)] = 0
) -> Response:
    """How a session stands, with its last `history` steps. Reads records only: no device is queried."""
    gateway = of(request)

    def read() -> TrainingStatus:
        with gateway.engine.connect() as connection:
            session = found(caller, store.get(connection, session_id), "training session", session_id)
            stepping = session["state"] in ("ready", "restored") and store.is_stepping(connection, session)
            steps = store.history(connection, session_id, history) if history else []
            checkpoints = checkpoint_store.page(connection, session_id, None, CHECKPOINTS_TOLD)
        shown = view(session)
        if stepping:
            shown["state"] = "stepping"
        return {
            **shown,
            "history": [{**one} for one in steps],
            "checkpoints": [view_checkpoint(one) for one in checkpoints],
        }

    return json_response(await run_in_threadpool(read))


@router.post("/api/training/checkpoint", status_code=202, response_model=Job, openapi_extra=body_schema("checkpoint"))
async def checkpoint(request: Request, caller: Known) -> Response:
    """Keeps a session's whole state as it is after the jobs submitted before; steps behind it need not wait."""
    return await submit_job(request, caller, Kind.TRAINING_CHECKPOINT, await read_body(request))


@router.get("/api/training/checkpoints")
async def list_checkpoints(
    request: Request,
    caller: Known,
    session_id: str | None = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 1000,
) -> Response:
    """Checkpoints newest first: those that are whole."""
    gateway = of(request)

    def read() -> list[Row]:
        with gateway.engine.connect() as connection:
            return checkpoint_store.page(connection, session_id, None if caller.admin else caller.owner, limit)

    rows = await run_in_threadpool(read)
    return json_response({"checkpoints": [view_checkpoint(row) for row in rows]})


@router.get("/api/training/checkpoints/{checkpoint_id}")
async def read_checkpoint(request: Request, caller: Known, checkpoint_id: str) -> Response:
    """One checkpoint; its file is the blob `blob_id`."""
    gateway = of(request)
    context = gateway.context(caller)
    return json_response(view_checkpoint(await run_in_threadpool(find_checkpoint, context, checkpoint_id)))


@router.delete("/api/training/checkpoints/{checkpoint_id}", status_code=204)
async def delete_checkpoint(request: Request, caller: Known, checkpoint_id: str) -> Response:
    """Deletes a checkpoint; its files go as soon as nothing uses them. 409 while an open session depends on it."""
    gateway = of(request)
    await run_in_threadpool(_delete, gateway, caller, checkpoint_id)
    return Response(status_code=204)


@router.post("/api/training/validate", status_code=202, response_model=Job, openapi_extra=body_schema("validate"))
async def validate(request: Request, caller: Known) -> Response:
    """Exports a session or checkpoint to ONNX, runs it for inference, and compares it with the trained model."""
    return await submit_job(request, caller, Kind.TRAINING_VALIDATE, await read_body(request))


@router.delete("/api/training/session/{session_id}", status_code=202, response_model=Job)
async def end_session(request: Request, caller: Known, session_id: str, checkpoint: bool = False) -> Response:
    """Ends a session after the jobs submitted before and frees its memory; the body may hold `job` options."""
    body = await read_body(request, empty_is={})
    if body.get("session_id", session_id) != session_id:
        raise failure("validation_failed", "the body names another session than the address")
    named = {"checkpoint": checkpoint, **body, "session_id": session_id}
    return await submit_job(request, caller, Kind.TRAINING_END_SESSION, named)


def view(session: Row) -> TrainingSessionView:
    """The session as callers see it."""
    operators = session["cpu_fallback_operators"]
    derived = {"resident": session["epoch"] is not None, "cpu_fallback_ops": len(operators)}
    names = TrainingSessionView.__annotations__
    return cast("TrainingSessionView", {name: derived[name] if name in derived else session[name] for name in names})


def view_checkpoint(checkpoint: Row) -> CheckpointView:
    """The checkpoint as callers see it."""
    derived = {"automatic": checkpoint["job_id"] is None}
    names = CheckpointView.__annotations__
    return cast("CheckpointView", {name: derived[name] if name in derived else checkpoint[name] for name in names})


def _delete(gateway: Gateway, caller: Caller, checkpoint_id: str) -> None:
    find_checkpoint(gateway.context(caller), checkpoint_id)
    with transaction(gateway.engine) as connection:
        if checkpoint_store.is_needed(connection, checkpoint_id):
            raise failure(
                "checkpoint_in_use",
                f"without checkpoint {checkpoint_id} its open session could not come back after its worker's death; "
                "take another checkpoint first, or end the session",
            )
        checkpoint_store.delete(connection, checkpoint_id)
