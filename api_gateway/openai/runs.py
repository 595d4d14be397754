"""A request below /v1 as a job: planned, submitted and awaited like an inference over the Open Inference Protocol.

no Idempotency-Key ─▶ awaited while the client stays; what is large passes through transient files
with one ───────────▶ recorded under the key, and goes on without the client; the same key and body find it again
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from fastapi import Request
from starlette.concurrency import run_in_threadpool

from api_gateway.gateway import Caller, Gateway, of
from api_gateway.oip.tensors import stashed
from api_gateway.openai.requests import Options
from api_gateway.submission.answer import earlier_rows, make_plan, promise_of
from api_gateway.submission.performing import ended_job, performed, performed_to_the_end
from device_operations.jobs import Kind, new_id
from device_operations.requests.kinds import parse
from device_operations.wire.json_types import FreeJson
from tasks.jobs.submit import Plan, Promise
from tasks.statements import Row

#: Finds the model of a request; it may read the database.
FindModel = Callable[[], Row]


@asynccontextmanager
async def run(
    request: Request, caller: Caller, body: object, find: FindModel, fields: FreeJson, options: Options
) -> AsyncIterator[FreeJson | None]:
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


async def _plan(gateway: Gateway, caller: Caller, find: FindModel, fields: FreeJson) -> Plan:
    model = await run_in_threadpool(find)
    parsed = await run_in_threadpool(parse, Kind.INFERENCE_RUN, {"model_id": model["model_id"], **fields})
    return await make_plan(gateway, caller, Kind.INFERENCE_RUN, parsed, new_id())


async def _promised(gateway: Gateway, caller: Caller, promise: Promise, find: FindModel, fields: FreeJson) -> FreeJson:
    """The succeeded job that the key was used for before, or that is recorded under it now."""
    # Before anything is looked up: the model of the first request may be gone by now.
    rows = await earlier_rows(gateway, promise)
    if rows:
        return await ended_job(gateway, rows[0]["id"])
    return await performed_to_the_end(gateway, await _plan(gateway, caller, find, fields), promise)
