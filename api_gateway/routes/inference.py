"""Routes on models, runs and inference sessions."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Annotated, Literal, TypeVar, cast

from fastapi import APIRouter, Query, Request
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from api_gateway.auth import Known
from api_gateway.documents import body_schema
from api_gateway.gateway import Gateway, of
from api_gateway.submission.answer import json_response, promise_of, read_body, submit_job
from device_operations.errors import OperationError, failure
from device_operations.jobs import TERMINAL, Job, Kind, State
from device_operations.requests.base import invalid
from device_operations.requests.inference import OpenSession
from device_operations.views import InferenceSessionView, ModelView
from device_operations.wire.json_types import FreeJson
from tasks.database import unavailable
from tasks.inference import models as store
from tasks.inference import session_store, sessions
from tasks.jobs import store as job_store
from tasks.kinds import spec_of
from tasks.owners import absent, found, may_see
from tasks.statements import Row

router = APIRouter(tags=["inference"])

T = TypeVar("T")

#: How often a load looks again when others load the same name at the same moment.
LOADS_AT_ONCE = 8


async def until_recorded(submit: Callable[[], Awaitable[T]]) -> T:
    """What submitting a load gives. It looks again where another request recorded the same between look and insert."""
    for _ in range(LOADS_AT_ONCE):
        try:
            return await submit()
        except OperationError as error:
            if error.code != "model_in_use" or not error.retryable:
                raise
    return await submit()


@router.post("/api/inference/load-model", status_code=202, response_model=Job, openapi_extra=body_schema("load_model"))
async def load_model(request: Request, caller: Known) -> Response:
    """Makes a model of the caller's resident on a device; equal content there shares its graph.

    From the end of the load on, its name and version mean it; what they meant before leaves once its runs are done.
    """
    body = await read_body(request)
    return await until_recorded(lambda: submit_job(request, caller, Kind.INFERENCE_LOAD_MODEL, body))


@router.post("/api/inference/run", status_code=202, response_model=Job, openapi_extra=body_schema("run"))
async def run(request: Request, caller: Known) -> Response:
    """Runs a model; the outputs are in the job's `result`."""
    return await submit_job(request, caller, Kind.INFERENCE_RUN, await read_body(request))


@router.delete("/api/inference/unload-model/{model_id}", status_code=202, response_model=Job)
async def unload_model(
    request: Request, caller: Known, model_id: str, force: bool = False, recycle: bool = False
) -> Response:
    """Takes a model off its device once its runs are done, and reports `freed_bytes`.

    `force` cancels its runs and closes its sessions. `recycle` restarts an idle worker where the backend gives memory
    back in no other way.
    """
    body = {"model_id": model_id, "force": force, "recycle": recycle}
    if not force:
        return await submit_job(request, caller, Kind.INFERENCE_UNLOAD_MODEL, body)
    submitting = asyncio.ensure_future(submit_job(request, caller, Kind.INFERENCE_UNLOAD_MODEL, body))
    # The runs are marked in the unload's own transaction; workers see it within a second, or at once when woken.
    await asyncio.wait((submitting,), timeout=0.05)
    await run_in_threadpool(_wake_cancelled, of(request), model_id)
    return await submitting


@router.post("/api/inference/sessions", status_code=201, openapi_extra=body_schema("open_session"))
async def open_session(request: Request, caller: Known) -> Response:
    """Opens a conversation with a model, whose state tensors stay on the device between runs."""
    body = await read_body(request)
    parsed = _parse_session(body)
    gateway = of(request)
    promise = promise_of(request, caller, body)
    gateway.rates.spend(caller.owner)
    try:
        row = await run_in_threadpool(sessions.open_session, gateway.context(caller), parsed, promise)
    except Exception as error:
        raise unavailable(error) from error
    return json_response(session_view(row), 201, {"Location": f"/api/inference/status/{row['session_id']}"})


@router.get("/api/inference/sessions")
async def list_sessions(
    request: Request,
    caller: Known,
    state: Literal["active", "closed", "expired", "lost"] | None = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> Response:
    """The caller's inference sessions, newest first; an admin sees every owner's."""
    gateway = of(request)
    owner = None if caller.admin else caller.owner

    def read() -> list[Row]:
        with gateway.engine.connect() as connection:
            return session_store.page_sessions(connection, owner=owner, state=state, limit=limit)

    return json_response({"sessions": [session_view(row) for row in await run_in_threadpool(read)]})


@router.get("/api/inference/status/{session_id}")
async def read_session(request: Request, caller: Known, session_id: str) -> Response:
    """A session and what became of its runs. A run without a session has one of its own, whose id is the job's."""
    gateway = of(request)

    def read() -> InferenceSessionView:
        with gateway.engine.connect() as connection:
            row = session_store.get_session(connection, session_id)
            if row is not None and may_see(caller, row):
                return session_view(row)
            job = found(caller, job_store.get(connection, session_id), "inference session", session_id)
            if not spec_of(job["kind"]).runs_model:
                raise absent("inference session", session_id)
            if job["resource_id"] != job["id"]:
                raise failure("session_not_found", f"{session_id} is a run of the session {job['resource_id']}")
            return _session_of_a_job(job)

    return json_response(await run_in_threadpool(read))


@router.delete("/api/inference/sessions/{session_id}", status_code=202, response_model=Job)
async def close_session(request: Request, caller: Known, session_id: str) -> Response:
    """Closes a session after the runs submitted before, and frees its state."""
    return await submit_job(request, caller, Kind.INFERENCE_CLOSE_SESSION, {"session_id": session_id})


@router.get("/api/inference/models")
async def list_models(
    request: Request, caller: Known, device_id: str | None = None, state: str | None = None, limit: int = 1000
) -> Response:
    """The caller's models and those shared with it, newest first: resident ones and what became of the others."""
    gateway = of(request)
    owner = None if caller.admin else caller.owner

    def read() -> list[Row]:
        with gateway.engine.connect() as connection:
            return store.page(
                connection, owner=owner, device_id=device_id, state=state, limit=max(1, min(limit, 10_000))
            )

    return json_response({"models": [view(row) for row in await run_in_threadpool(read)]})


@router.get("/api/inference/models/{model_id}")
async def read_model(request: Request, caller: Known, model_id: str) -> Response:
    """One model of the caller's, or one that is shared."""
    gateway = of(request)

    def read() -> Row:
        with gateway.engine.connect() as connection:
            return found(caller, store.get(connection, model_id), "model", model_id, shared=True)

    return json_response(view(await run_in_threadpool(read)))


def view(model: Row) -> ModelView:
    """The model as callers see it."""
    return cast("ModelView", {name: model[name] for name in ModelView.__annotations__})


def session_view(session: Row) -> InferenceSessionView:
    """The session as callers see it; `idle` is one that is open and has no run under way."""
    state = session["state"]
    return {
        "session_id": session["session_id"],
        "model_id": session["model_id"],
        "device_id": session["device_id"],
        "state": "idle" if state == "active" and not session["running"] else state,
        "runs": {"succeeded": session["succeeded"], "failed": session["failed"], "running": session["running"]},
        "last_job_id": session["last_job_id"],
        "opened_at": session["opened_at"],
        "last_used_at": session["last_used_at"],
        "expires_at": session["expires_at"],
        "ended_at": session["ended_at"],
        "owner": session["owner"],
        "state_map": session["state_map"],
    }


def _wake_cancelled(gateway: Gateway, model_id: str) -> None:
    """Wakes workers for the runs that an unload has cancelled; they would see it themselves within a second."""
    with gateway.engine.connect() as connection:
        cancelled = job_store.to_be_cancelled(connection, model_id)
    for job in cancelled:
        gateway.publisher.wake(job["device_id"], {"cancel": job["id"]})


def _session_of_a_job(job: Row) -> InferenceSessionView:
    over = job["state"] in TERMINAL
    won = job["state"] == State.SUCCEEDED
    return {
        "session_id": job["id"],
        "model_id": job["needs"][0],
        "device_id": job["device_id"],
        "state": "closed" if over else "active",
        "runs": {"succeeded": int(won), "failed": int(over and not won), "running": int(not over)},
        "last_job_id": job["id"],
        "opened_at": job["submitted_at"],
        "last_used_at": job["finished_at"] or job["started_at"] or job["submitted_at"],
        "expires_at": None,
        "ended_at": job["finished_at"],
        "owner": job["owner"],
        "state_map": {},
    }


def _parse_session(body: FreeJson) -> OpenSession:
    try:
        return OpenSession.model_validate(body)
    except ValidationError as error:
        raise invalid(error, "The request for a session does not fit the contract") from error
