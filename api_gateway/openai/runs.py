"""A request below /v1 as a job: planned, submitted and awaited like an inference over the Open Inference Protocol.

no Idempotency-Key ─▶ awaited while the client stays; what is large passes through transient files
with one ───────────▶ recorded under the key, and goes on without the client; the same key and body find it again
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import orjson
from fastapi import Request
from starlette.concurrency import run_in_threadpool

from api_gateway.gateway import Caller, Gateway, of
from api_gateway.oip.infer import performed
from api_gateway.oip.tensors import stashed
from api_gateway.openai.requests import Options
from api_gateway.submission.answer import make_plan, promise_of, read_row
from device_operations.errors import from_job_error
from device_operations.jobs import TERMINAL, Kind, State, new_id
from device_operations.json_types import FreeJson
from device_operations.requests.kinds import parse
from tasks.jobs import store
from tasks.jobs.submit import Plan, Promise, recall_jobs
from tasks.statements import Row

#: Finds the model of a request; it may read the database.
FindModel = Callable[[], Row]


@asynccontextmanager
async def run(
    request: Request, caller: Caller, body: Any, find: FindModel, fields: dict[str, Any], options: Options
) -> AsyncIterator[dict[str, Any] | None]:
    """The ended job of a pipeline's run with `fields`; None where the client has left, whose job is cancelled.

    `body` is what the client sent. While inside, what the job gives in transient files can be read. Raises what the job
    failed with, and `idempotency_conflict`.
    """
    gateway = of(request)
    promise = promise_of(request, caller, body)
    if promise is not None:
        yield await _promised(gateway, caller, promise, find, {**fields, "job": options.model_dump()})
        return
    made = await _plan(gateway, caller, find, {**fields, "job": options.model_dump()})
    made.job.request["form"] = "transient"
    job = await performed(request, gateway, made, None)
    try:
        yield job
    finally:
        left_behind = stashed(job["result"].get("outputs") or {}) if job is not None else []
        if left_behind:
            await run_in_threadpool(gateway.transients.drop, left_behind)


async def _plan(gateway: Gateway, caller: Caller, find: FindModel, fields: dict[str, Any]) -> Plan:
    model = await run_in_threadpool(find)
    parsed = await run_in_threadpool(parse, Kind.INFERENCE_RUN, {"model_id": model["model_id"], **fields})
    return await make_plan(gateway, caller, Kind.INFERENCE_RUN, parsed, new_id())


async def _promised(
    gateway: Gateway, caller: Caller, promise: Promise, find: FindModel, fields: dict[str, Any]
) -> FreeJson:
    """The succeeded job that the key was used for before, or that is recorded under it now."""
    # Before anything is looked up: the model of the first request may be gone by now.
    rows = await run_in_threadpool(recall_jobs, gateway.engine, promise)
    if not rows:
        rows = await gateway.submitter.submit([await _plan(gateway, caller, find, fields)], promise)
    job_id = rows[0]["id"]
    async with gateway.waiters.awaiting(job_id) as ended:
        row = await read_row(gateway, job_id)
        job: FreeJson = {**store.view(row)} if row["state"] in TERMINAL else orjson.loads(await ended)
    if job["state"] != State.SUCCEEDED:
        raise from_job_error(job["error"])
    return job
