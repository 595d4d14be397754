"""From a request's body to a job's answer: read, check, plan, record, and wait if the request says so."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from urllib.parse import quote

import orjson
from fastapi import Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from api_gateway.gateway import Caller, Gateway, of
from api_gateway.submission.bodies import read_whole
from api_gateway.submission.waiting import lost
from device_operations.errors import OperationError, failure
from device_operations.jobs import TERMINAL, Kind, new_id
from device_operations.requests.base import JobRequest
from device_operations.requests.kinds import parse
from device_operations.tensors import INLINE_BYTES
from device_operations.wire.bounds import load_json, whole_number
from device_operations.wire.json_types import FreeJson
from tasks.database import unavailable
from tasks.jobs import lost_ends as ends
from tasks.jobs import store
from tasks.jobs.model import JobRow
from tasks.jobs.order import recall_key
from tasks.jobs.submit import Plan, Promise, body_hash, recall_jobs
from tasks.kinds import KINDS
from tasks.owners import absent
from tasks.planning.planner import plan
from tasks.statements import Row

#: The longest that a request may wait for its job, in seconds.
MAX_WAIT_SECONDS = 60.0

#: A shorter wait is likely to end in a 202, which is a promise: then the submission waits for the disk at once.
LIKELY_ENDED_SECONDS = 1.0

JSON = "application/json"


def json_response(value: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """An answer in JSON; times are RFC 3339 in UTC."""
    return Response(orjson.dumps(value, option=orjson.OPT_UTC_Z, default=str), status, headers, media_type=JSON)


async def read_body(request: Request, *, empty_is: FreeJson | None = None) -> FreeJson:
    """The JSON body; `payload_too_large` over the limit, `malformed_request` for what is not JSON."""
    body = await read_whole(request, of(request).settings.http.max_body_bytes, _too_large)
    if not body:
        if empty_is is not None:
            return empty_is
        raise failure("malformed_request", "the body is empty; send a JSON object")
    value = load_json(body) if len(body) <= INLINE_BYTES else await run_in_threadpool(load_json, body)
    if not isinstance(value, dict):
        raise failure("malformed_request", "the body is not a JSON object")
    return value


async def submit_job(request: Request, caller: Caller, kind: Kind, body: FreeJson) -> Response:
    """Takes one job: 202 with the job, or 200 with the finished job where `Prefer: wait=S` saw its end."""
    gateway = of(request)
    heavy = is_heavy(request)
    parsed = await run_in_threadpool(parse, kind, body) if heavy else parse(kind, body)
    promise = promise_of(request, caller, body)
    wait_seconds = preferred_wait(request)
    return await submit_parsed(gateway, caller, kind, parsed, promise, wait_seconds, heavy=heavy)


def is_heavy(request: Request) -> bool:
    """Whether the request's body is large, or of unknown length: it is checked on a thread then."""
    size = whole_number(request.headers.get("content-length"))
    return size is None or size > INLINE_BYTES


async def submit_parsed(
    gateway: Gateway,
    caller: Caller,
    kind: Kind,
    parsed: JobRequest,
    promise: Promise | None,
    wait_seconds: float,
    *,
    heavy: bool = True,
    also: Mapping[str, object] | None = None,
    retried_from: str | None = None,
) -> Response:
    """The same for a request that is checked already.

    `also` is for the worker, besides the request. `retried_from` is the ended job that this one tries again.
    """
    job_id = new_id()
    try:
        made = await make_plan(gateway, caller, kind, parsed, job_id, heavy=heavy)
    except OperationError:
        # What the first submission under this key named may be gone by now; its answer stands.
        earlier = await earlier_job(gateway, promise, wait_seconds)
        if earlier is None:
            raise
        return earlier
    made.job.request.update(also or {})
    if retried_from is not None:
        made = replace(made, job=replace(made.job, retried_from=retried_from))
    if not wait_seconds:
        rows = await gateway.submitter.submit([made], promise)
        return accepted(rows[0])
    async with gateway.waiters.awaiting(job_id) as ended:
        awaited = promise is None and wait_seconds >= LIKELY_ENDED_SECONDS
        rows = await gateway.submitter.submit([made], promise, awaited=awaited)
        row = rows[0]
        if row["id"] != job_id or row["state"] in TERMINAL:
            return await wait_for(gateway, row, wait_seconds)
        ended.recorded = True
        try:
            text = await asyncio.wait_for(ended, wait_seconds)
        except TimeoutError:
            return accepted(await promised_row(gateway, job_id))
        return Response(text, 200, _location(row), media_type=JSON)


async def make_plan(
    gateway: Gateway, caller: Caller, kind: Kind, parsed: JobRequest, job_id: str, *, heavy: bool = True
) -> Plan:
    """Plans on the event loop where that reads no database and moves no bytes, else on a thread."""
    gateway.rates.spend(caller.owner)
    context = gateway.context(caller)
    is_light = KINDS[kind].is_light
    light = (
        not heavy
        and is_light is not None
        and gateway.directory.is_fresh()
        and is_light(gateway.directory, caller, parsed)
    )
    try:
        return (
            plan(context, kind, parsed, job_id)
            if light
            else await run_in_threadpool(plan, context, kind, parsed, job_id)
        )
    except Exception as error:
        raise unavailable(error) from error


async def wait_for(gateway: Gateway, row: Row, wait_seconds: float) -> Response:
    """A job that exists, as soon as it has ended, or as it stands when the time is up."""
    job_id = row["id"]
    async with gateway.waiters.awaiting(job_id) as ended:
        current = await read_row(gateway, job_id)
        if current["state"] in TERMINAL:
            return json_response(store.view(current), headers=_location(current))
        try:
            return Response(await asyncio.wait_for(ended, wait_seconds), 200, _location(current), media_type=JSON)
        except TimeoutError:
            return accepted(await read_row(gateway, job_id))


async def earlier_job(gateway: Gateway, promise: Promise | None, wait_seconds: float) -> Response | None:
    """The answer that was given for the key before, if it was used before."""
    earlier = await earlier_rows(gateway, promise)
    if not earlier:
        return None
    return await wait_for(gateway, earlier[0], wait_seconds) if wait_seconds else accepted(earlier[0])


async def earlier_rows(gateway: Gateway, promise: Promise | None) -> list[Row] | None:
    """The jobs that were recorded under the key before; None if it is new, or there is none."""
    return await run_in_threadpool(recall_jobs, gateway.engine, promise) if promise else None


async def read_row(gateway: Gateway, job_id: str) -> Row:
    """The row of a job that the caller has seen or made; `job_not_found` if it has been deleted."""

    def read() -> Row | None:
        with gateway.engine.connect() as connection:
            return store.get(connection, job_id)

    row = await run_in_threadpool(read)
    if row is None:
        raise absent("job", job_id)
    return row


async def promised_row(gateway: Gateway, job_id: str) -> Row:
    """The row of a job that was submitted without waiting for the disk, now on the disk: a 202 is a promise.

    `database_unavailable` where PostgreSQL lost it.
    """

    def write() -> Row | None:
        with gateway.engine.connect() as connection:
            return ends.on_disk(connection, job_id)

    try:
        row = await run_in_threadpool(write)
    except Exception as error:
        raise unavailable(error) from error
    if row is None:
        raise lost()
    return row


def accepted(row: Row) -> Response:
    """202 with the job and where to find it; 200 where it has ended already."""
    status = 200 if row["state"] in TERMINAL else 202
    return json_response(store.view(row), status, _location(row))


async def accepted_all(gateway: Gateway, rows: Sequence[JobRow], wait_seconds: float) -> Response:
    """202 with several jobs; 200 where all of them have ended within the time."""
    if not wait_seconds:
        return json_response({"jobs": [store.view(row) for row in rows]}, 202)
    waiting = {row["id"]: gateway.waiters.expect(row["id"]) for row in rows}
    try:
        # Only once all are awaited: one that has ended before would not be announced again.
        current = await _read_rows(gateway, waiting)
        pending = {waiting[job_id] for job_id, row in current.items() if row["state"] not in TERMINAL}
        if pending:
            _, pending = await asyncio.wait(pending, timeout=wait_seconds)
            current = await _read_rows(gateway, waiting)
    finally:
        for job_id, future in waiting.items():
            gateway.waiters.forget(job_id, future)
    found = [current.get(row["id"], row) for row in rows]
    status = 200 if all(row["state"] in TERMINAL for row in found) else 202
    return json_response({"jobs": [store.view(row) for row in found]}, status)


async def _read_rows(gateway: Gateway, job_ids: Collection[str]) -> dict[str, JobRow]:
    def read() -> dict[str, JobRow]:
        with gateway.engine.connect() as connection:
            return store.get_many(connection, job_ids)

    return await run_in_threadpool(read)


def promise_of(request: Request, caller: Caller, body: object) -> Promise | None:
    """The promise that `Idempotency-Key` makes."""
    key = _key_of(request)
    if key is None:
        return None
    digest = body_hash([body, sorted(request.query_params.multi_items())])
    return Promise(caller.owner, _route_of(request), key, digest)


def knows_key(request: Request, caller: Caller) -> bool:
    """Whether the caller has used the request's key on this route before, with any body."""
    key = _key_of(request)
    if key is None:
        return False
    with of(request).engine.connect() as connection:
        return recall_key(connection, caller.owner, _route_of(request), key) is not None


def _key_of(request: Request) -> str | None:
    key = request.headers.get("idempotency-key")
    if key is not None and not 1 <= len(key) <= 255:
        raise failure("malformed_request", "Idempotency-Key has 1 to 255 characters")
    return key


def _route_of(request: Request) -> str:
    return f"{request.method} {request.url.path}"


def preferred_wait(request: Request) -> float:
    """The seconds of `Prefer: wait=S`, 0 where it is absent, at most 60."""
    preferred = request.headers.get("prefer")
    if preferred is None:
        return 0.0
    found = _WAIT.search(preferred)
    return min(float(found.group(1)), MAX_WAIT_SECONDS) if found else 0.0


#: More digits than these are refused nothing: so many seconds are the longest wait anyway.
_WAIT = re.compile(r"(?:^|[,;\s])wait[ \t]{0,9}=[ \t]{0,9}\"?([0-9]{1,20}(?:\.[0-9]{1,20})?)", re.ASCII)


def _location(row: Row) -> dict[str, str]:
    # A direct caller's task id may have characters that no header takes.
    return {"Location": f"/api/jobs/{quote(row['id'], safe='')}"}


def _too_large(limit: int) -> OperationError:
    return failure(
        "payload_too_large",
        f"a JSON body may have {limit} bytes (HTTP__MAX_BODY_BYTES); send big tensors as blobs: POST /api/blobs",
    )
