"""Routes on models, runs and inference sessions."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from api_gateway.auth import Known
from api_gateway.documents import body_schema
from api_gateway.gateway import of
from api_gateway.submission import json_response, read_body, submit_job
from device_operations.errors import failure
from device_operations.jobs import Job, Kind
from tasks.store import models as store
from tasks.store.connection import Row

router = APIRouter(tags=["inference"])


@router.post("/api/inference/load-model", status_code=202, response_model=Job, openapi_extra=body_schema("load_model"))
async def load_model(request: Request, caller: Known) -> Response:
    """Makes a model resident on a device; the same content twice on one device is the same model."""
    return await submit_job(request, caller, Kind.INFERENCE_LOAD_MODEL, await read_body(request))


@router.post("/api/inference/run", status_code=202, response_model=Job, openapi_extra=body_schema("run"))
async def run(request: Request, caller: Known) -> Response:
    """Runs a model; the outputs are in the job's `result`."""
    return await submit_job(request, caller, Kind.INFERENCE_RUN, await read_body(request))


@router.delete("/api/inference/unload-model/{model_id}", status_code=202, response_model=Job)
async def unload_model(
    request: Request, caller: Known, model_id: str, force: bool = False, recycle: bool = False
) -> Response:
    """Takes a model off its device once its runs are done, and reports `freed_bytes`."""
    body = {"model_id": model_id, "force": force, "recycle": recycle}
    return await submit_job(request, caller, Kind.INFERENCE_UNLOAD_MODEL, body)


@router.get("/api/inference/models")
async def list_models(
    request: Request, caller: Known, device_id: str | None = None, state: str | None = None, limit: int = 1000
) -> Response:
    """Models, newest first: the resident ones and what became of the others."""
    gateway = of(request)

    def read() -> list[Row]:
        with gateway.engine.connect() as connection:
            return store.page(connection, device_id=device_id, state=state, limit=max(1, min(limit, 10_000)))

    return json_response({"models": [view(row) for row in await run_in_threadpool(read)]})


@router.get("/api/inference/models/{model_id}")
async def read_model(request: Request, caller: Known, model_id: str) -> Response:
    """One model."""
    gateway = of(request)

    def read() -> Row | None:
        with gateway.engine.connect() as connection:
            return store.get(connection, model_id)

    row = await run_in_threadpool(read)
    if row is None:
        raise failure("model_not_found", f"there is no model {model_id!r}")
    return json_response(view(row))


def view(model: Row) -> dict[str, Any]:
    """The model as callers see it (contract, section 6)."""
    return {
        name: model[name]
        for name in (
            "model_id", "name", "version", "model_type", "device_id", "state", "inputs", "outputs", "memory_bytes",
            "freed_bytes", "load_ms", "run_count", "failed_count", "last_used_at", "pinned", "provider",
            "cpu_fallback_ops", "statistics", "sha256", "owner", "options", "error", "created_at", "ended_at",
        )
    }  # fmt: skip
