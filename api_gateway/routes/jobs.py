"""Routes on jobs: read, wait, list, follow, cancel, and many at once."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Annotated, Any, Literal

import orjson
from fastapi import APIRouter, Query, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response, StreamingResponse

from api_gateway.auth import Known
from api_gateway.documents import body_schema
from api_gateway.gateway import Caller, Gateway, of
from api_gateway.submission.answer import (
    MAX_WAIT_SECONDS,
    accepted_all,
    earlier_job,
    earlier_rows,
    json_response,
    preferred_wait,
    promise_of,
    read_body,
    read_row,
    submit_parsed,
    wait_for,
)
from api_gateway.submission.performing import cancel
from device_operations.errors import OperationError, failure
from device_operations.jobs import CLAIMABLE, TERMINAL, Job, Kind, State, new_id
from device_operations.requests.kinds import parse
from device_operations.wire.bounds import whole_number
from tasks.jobs import store
from tasks.jobs.model import JobView
from tasks.jobs.options import as_asked, to_retry
from tasks.jobs.submit import Plan
from tasks.kinds import KINDS
from tasks.owners import found
from tasks.planning.context import Context
from tasks.planning.earlier import Earlier
from tasks.planning.planner import plan
from tasks.statements import Row

router = APIRouter(tags=["jobs"])

#: Jobs in one bulk submission at most.
BULK_LIMIT = 1000

#: Seconds for which a cancellation waits for the worker that holds the job ahead of its device to let go of it.
CANCEL_SECONDS = 0.25

#: Seconds between two comments on a quiet event stream, so that proxies keep it open.
KEEPALIVE_SECONDS = 15.0


@router.get("/api/jobs/{job_id}", response_model=Job)
async def read_job(
    request: Request,
    caller: Known,
    job_id: str,
    wait: Annotated[float, Query(ge=0, le=MAX_WAIT_SECONDS, description="seconds to wait for the job's end")] = 0,
    include: Annotated[Literal["request"] | None, Query(description="request: also the job's request")] = None,
) -> Response:
    """One job; with `wait`, as soon as it has ended, or as it stands when the time is up.

    `include=request` adds the job's request, as `request`; tensors above 64 KiB in it are blobs.
    """
    gateway = of(request)
    row = await _visible(gateway, caller, job_id)
    if wait and row["state"] not in TERMINAL:
        waited = await wait_for(gateway, row, wait)
        if waited.status_code == 200 and include is None:
            return waited
        row = await read_row(gateway, job_id)

    def more() -> JobView | dict[str, object]:
        with gateway.engine.connect() as connection:
            shown = store.view(row, store.queue_position(connection, row) if row["state"] in CLAIMABLE else None)
            recorded = store.asked_of(connection, job_id) if include else None
        return shown if recorded is None else {**shown, "request": as_asked(recorded)}

    if include is None and row["state"] not in CLAIMABLE:
        return json_response(store.view(row))
    return json_response(await run_in_threadpool(more))


@router.get("/api/jobs")
async def list_jobs(
    request: Request,
    caller: Known,
    state: State | None = None,
    kind: Kind | None = None,
    device_id: str | None = None,
    owner: str | None = None,
    label: Annotated[str | None, Query(description="name:value or name=value")] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    cursor: str | None = None,
) -> Response:
    """Jobs newest first, a page at a time."""
    gateway = of(request)
    if not caller.admin:
        if owner not in (None, caller.owner):
            raise failure("forbidden", f"this key stands for {caller.owner!r} and sees its own jobs only")
        owner = caller.owner
    filters = {
        name: str(value)
        for name, value in {"state": state, "kind": kind, "device_id": device_id, "owner": owner}.items()
        if value is not None
    }
    before = _sequence(cursor) if cursor else None
    pair = _label(label) if label else None

    def read() -> list[Row]:
        with gateway.engine.connect() as connection:
            return store.page(connection, filters=filters, label=pair, before=before, limit=limit + 1)

    rows = await run_in_threadpool(read)
    more = rows[limit - 1]["seq"] if len(rows) > limit else None
    return json_response(
        {"jobs": [store.view(row) for row in rows[:limit]], "next_cursor": _cursor(more) if more is not None else None}
    )


@router.post("/api/jobs", status_code=202, openapi_extra=body_schema("bulk"))
async def submit_many(request: Request, caller: Known) -> Response:
    """Takes 1 to 1,000 jobs at once: all are recorded, or none. `Prefer: wait=S` waits for all of them.

    An entry may name what an earlier one makes: by an id or name of the caller's own, or as `{"$entry": 0}`, which is
    the id of the first entry's resource, and in `job.after` that of its job.
    """
    gateway = of(request)
    body = await read_body(request)
    entries = body.get("jobs")
    if set(body) != {"jobs"} or not isinstance(entries, list) or not 1 <= len(entries) <= BULK_LIMIT:
        raise failure("validation_failed", f"the body is {{'jobs': [1 to {BULK_LIMIT} of {{'kind', 'request'}}]}}")
    gateway.rates.spend(caller.owner, len(entries))
    earlier = Earlier()
    context = replace(gateway.context(caller), earlier=earlier)

    def plan_all() -> list[Plan]:
        for index, entry in enumerate(entries):
            planned = _planned(context, index, entry, earlier)
            earlier.add(planned, KINDS[planned.job.kind].foresee)
        return earlier.plans

    promise = promise_of(request, caller, body)
    try:
        plans = await run_in_threadpool(plan_all)
    except OperationError:
        before = await earlier_rows(gateway, promise)
        if before is None:
            raise
        rows = before
    else:
        rows = await gateway.submitter.submit(plans, promise)
    return await accepted_all(gateway, rows, preferred_wait(request))


def _planned(context: Context, index: int, entry: object, earlier: Earlier) -> Plan:
    if not isinstance(entry, dict) or not isinstance(entry.get("request"), dict) or set(entry) - {"kind", "request"}:
        raise failure("validation_failed", f"jobs.{index} is not {{'kind': …, 'request': {{…}}}}")
    try:
        kind = Kind(str(entry.get("kind")))
    except ValueError:
        raise failure(
            "validation_failed", f"jobs.{index}: no kind {str(entry.get('kind'))[:100]!r}; there are: {', '.join(Kind)}"
        ) from None
    try:
        return plan(context, kind, parse(kind, earlier.resolved(entry["request"])), new_id())
    except OperationError as error:
        error.message = f"jobs.{index}: {error.message}"
        raise


@router.post(
    "/api/jobs/{job_id}/retry", status_code=202, response_model=Job, openapi_extra=body_schema("retry", required=False)
)
async def retry_job(request: Request, caller: Known, job_id: str) -> Response:
    """Submits an ended job again as a new one, which names it in `retried_from`; 409 while it has not ended.

    The body holds fields of the request to replace; null leaves one out, `job` is changed option by option.
    """
    gateway = of(request)
    changes = await read_body(request, empty_is={})
    row = await _visible(gateway, caller, job_id)
    if row["state"] not in TERMINAL:
        raise failure(
            "job_not_finished", f"job {job_id} is {row['state']}; wait for its end, or cancel it, and then try again"
        )
    if not isinstance(changes.get("job", {}), dict):
        raise failure("validation_failed", "job is an object of options")

    def request_again() -> dict[str, object]:
        with gateway.engine.connect() as connection:
            recorded = store.asked_of(connection, job_id)
        if recorded is None:
            raise failure("job_not_found", f"there is no job {job_id!r}")
        if recorded["owner"] != caller.owner:
            # A retry by another caller (an admin) stays its owner's.
            changes["job"] = {"owner": recorded["owner"], **changes.get("job", {})}
        return to_retry(recorded, changes, gateway.blobs.read)

    kind, wait_seconds = Kind(row["kind"]), preferred_wait(request)
    promise = promise_of(request, caller, changes)
    try:
        parsed = parse(kind, await run_in_threadpool(request_again))
    except OperationError:
        earlier = await earlier_job(gateway, promise, wait_seconds)
        if earlier is None:
            raise
        return earlier
    return await submit_parsed(gateway, caller, kind, parsed, promise, wait_seconds, retried_from=job_id)


@router.get("/api/jobs/{job_id}/events")
async def follow_job(request: Request, caller: Known, job_id: str) -> Response:
    """Server-sent events: `state` and `progress` while the job is open, and at last `done` with the job."""
    gateway = of(request)
    await _visible(gateway, caller, job_id)
    return StreamingResponse(
        _events(gateway, job_id), media_type="text/event-stream", headers={"Cache-Control": "no-store"}
    )


@router.delete("/api/jobs/{job_id}", status_code=202, response_model=Job)
async def cancel_job(request: Request, caller: Known, job_id: str) -> Response:
    """Asks for cancellation: a queued job never starts, a running one stops at its next step, batch or node."""
    gateway = of(request)
    await _visible(gateway, caller, job_id)
    async with gateway.waiters.awaiting(job_id) as ended:
        row = await run_in_threadpool(cancel, gateway, job_id)
        if row["state"] == State.RESERVED:
            await asyncio.wait([ended], timeout=CANCEL_SECONDS)
            row = await read_row(gateway, job_id)
    return json_response(store.view(row), 202, {"Location": f"/api/jobs/{job_id}"})


async def _events(gateway: Gateway, job_id: str) -> AsyncIterator[bytes]:

    async with gateway.waiters.following(job_id) as events, gateway.waiters.awaiting(job_id) as ended:
        row = await read_row(gateway, job_id)
        await run_in_threadpool(_follow, gateway, row)
        view = store.view(row)
        yield _event("state", view)
        if row["state"] in TERMINAL:
            yield _event("done", view)
            return
        while True:
            heard = asyncio.ensure_future(events.get())
            both: set[asyncio.Future[Any]] = {heard, ended}
            await asyncio.wait(both, timeout=KEEPALIVE_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            if heard.done():
                yield _event(heard.result()["event"], heard.result()["data"])
                continue
            heard.cancel()
            if ended.done():
                yield b"event: done\ndata: " + ended.result() + b"\n\n"
                return
            yield b": still here\n\n"
            await run_in_threadpool(_follow, gateway, row)


def _follow(gateway: Gateway, row: Row) -> None:
    """Wakes the job's worker because the job is followed; repeated while it is."""
    if row["device_id"] and row["state"] not in TERMINAL:
        gateway.publisher.wake(row["device_id"], {"follow": row["id"]})


def _event(name: str, data: object) -> bytes:
    return b"event: " + name.encode() + b"\ndata: " + orjson.dumps(data, option=orjson.OPT_UTC_Z) + b"\n\n"


async def _visible(gateway: Gateway, caller: Caller, job_id: str) -> Row:
    return found(caller, await read_row(gateway, job_id), "job", job_id)


def _cursor(sequence: int) -> str:
    return base64.urlsafe_b64encode(str(sequence).encode()).decode().rstrip("=")


def _sequence(cursor: str) -> int:
    try:
        found = whole_number(base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)))
    except ValueError:
        found = None
    if found is None:
        raise failure("validation_failed", f"cursor {cursor[:100]!r} is none that was given out")
    return found


def _label(label: str) -> tuple[str, str]:
    for separator in (":", "="):
        name, there, value = label.partition(separator)
        if there and name:
            return name, value
    raise failure("validation_failed", "label is name:value or name=value")
