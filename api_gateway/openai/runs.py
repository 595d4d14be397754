"""A request below /v1 as a job: planned, submitted and awaited like an inference over the Open Inference Protocol."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Request
from starlette.concurrency import run_in_threadpool

from api_gateway.gateway import Caller, of
from api_gateway.oip_infer import performed
from api_gateway.oip_tensors import stashed
from api_gateway.openai.requests import Options
from api_gateway.submission import make_plan
from device_operations.jobs import Kind, new_id
from device_operations.requests.kinds import parse
from tasks.store.connection import Row


@asynccontextmanager
async def run(
    request: Request, caller: Caller, model: Row, fields: dict[str, Any], options: Options
) -> AsyncIterator[dict[str, Any] | None]:
    """The ended job of a pipeline's run; None where the client has left, whose job is cancelled.

    While inside, what the job gives in transient files can be read. Raises what the job failed with.
    """
    gateway = of(request)
    body = {"model_id": model["model_id"], **fields, "job": options.model_dump()}
    parsed = await run_in_threadpool(parse, Kind.INFERENCE_RUN, body)
    made = await make_plan(gateway, caller, Kind.INFERENCE_RUN, parsed, new_id())
    made.job.request["form"] = "transient"
    job = await performed(request, gateway, made, None)
    try:
        yield job
    finally:
        left_behind = stashed(job["result"].get("outputs") or {}) if job is not None else []
        if left_behind:
            await run_in_threadpool(gateway.transients.drop, left_behind)
